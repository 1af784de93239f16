// Eight float32 in 256 bits, and 8 of them turned: what AVX2 and AVX-512 share.
#pragma once
#include <immintrin.h>

namespace rlfast {
namespace RLFAST_ISA_NS {

using R = __m256;
constexpr int kRows = 8;

inline R load_rows(const float* p) { return _mm256_loadu_ps(p); }
inline void store_rows(float* p, R x) { _mm256_storeu_ps(p, x); }
inline void stream_rows(float* p, R x) { _mm256_stream_ps(p, x); }

// x[i] lane j ↔ x[j] lane i: pairs of lanes, then of pairs, then of halves.
inline void transpose(R* x) {
  R y[kRows];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; i += 2) {
    y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < kRows; i += 4) {
    x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows / 2; ++i) {
    const R low = x[i], high = x[i + kRows / 2];
    x[i] = _mm256_permute2f128_ps(low, high, 0x20);
    x[i + kRows / 2] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}

// y[j] = Σ of the lanes of a vector: of neighbours, of pairs of them, of halves.
inline void four_sums(R a, R b, R c, R d, float* y) {
  const R halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(y, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
