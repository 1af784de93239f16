// Operands of gemm.h from matrices of any dtype and row stride: bf16 and f16 become float32 here, and only here, or stay
// bf16 in pairs where the processor multiplies those.
#pragma once
#include "gemm.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// A row of elements as 32-bit words, the last word completed with zero.
template <class T>
struct Widened {
  using Element = T;
  using Words = Float32Words;
  static int64_t words(int64_t n) { return n; }
  static void copy(const T* x, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i));
    for (; i < n; ++i) y[i] = to_float(x[i]);
  }
};

#if defined(__AVX512BF16__)
struct Paired {
  using Element = bf16;
  using Words = Bf16Words;
  static int64_t words(int64_t n) { return (n + 1) / 2; }
  static void copy(const bf16* x, int64_t n, float* y) {
    if (n % 2) y[n / 2] = 0.0f;
    std::memcpy(y, x, n * sizeof(bf16));
  }
};
#endif

// The widest exact product of T: pairs of bf16 where the processor has it, else float32.
template <class T>
struct RowOf {
  using type = Widened<T>;
};
#if defined(__AVX512BF16__)
template <>
struct RowOf<bf16> {
  using type = Paired;
};
#endif

// y[j][i] = x[i][j] of a 4 × 4 block, in the compilers' vector extension.
inline void transpose_4x4(const float* x, int64_t ldx, float* y, int64_t ldy) {
  typedef float F4 __attribute__((vector_size(16)));
  typedef int I4 __attribute__((vector_size(16)));
  F4 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], x + i * ldx, sizeof(F4));
  const I4 low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  const F4 a = __builtin_shuffle(r[0], r[1], low), b = __builtin_shuffle(r[2], r[3], low);
  const F4 c = __builtin_shuffle(r[0], r[1], high), d = __builtin_shuffle(r[2], r[3], high);
  const F4 columns[4] = {__builtin_shuffle(a, b, first), __builtin_shuffle(a, b, second),
                         __builtin_shuffle(c, d, first), __builtin_shuffle(c, d, second)};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(y + i * ldy, &columns[i], sizeof(F4));
}

// One panel of B = Xᵀ: `rows` ≤ kTileCols rows of X, n elements each, become the columns. row(r) is where a row begins; null: it
// is zero, like the rows that are not there.
template <class Row, class RowAt>
void pack_transposed(RowAt row, int64_t rows, int64_t n, float* panel) {
  constexpr int64_t kElements = 64;  // 32 rows of 64 words: 8 KiB, staged in the first-level cache
  alignas(64) float staged[kTileCols * kElements];
  for (int64_t i = 0; i < n; i += kElements) {
    const int64_t width = std::min(kElements, n - i), words = Row::words(width);
    for (int64_t r = 0; r < kTileCols; ++r) {
      float* to = staged + r * kElements;
      const typename Row::Element* from = r < rows ? row(r) : nullptr;
      if (from) {
        Row::copy(from + i, width, to);
      } else {
        std::fill(to, to + words, 0.0f);
      }
    }
    float* block = panel + Row::words(i) * kTileCols;
    int64_t k = 0;
    for (; k + 4 <= words; k += 4) {
      for (int r = 0; r < kTileCols; r += 4)
        transpose_4x4(staged + r * kElements + k, kElements, block + k * kTileCols + r, kTileCols);
    }
    for (; k < words; ++k) {
      for (int r = 0; r < kTileCols; ++r) block[k * kTileCols + r] = staged[r * kElements + k];
    }
  }
}

// The same of rows that lie ldx apart.
template <class Row>
void pack_transposed(const typename Row::Element* x, int64_t ldx, int64_t rows, int64_t n, float* panel) {
  pack_transposed<Row>([=](int64_t r) { return x + r * ldx; }, rows, n, panel);
}

// One panel of B = X in float32: cols ≤ kTileCols columns, which begin at row(r) in row r.
template <class T, class RowAt>
void pack_panel(RowAt row, int64_t rows, int64_t cols, float* panel) {
  for (int64_t r = 0; r < rows; ++r, panel += kTileCols) {
    Widened<T>::copy(row(r), cols, panel);
    std::fill(panel + cols, panel + kTileCols, 0.0f);
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
