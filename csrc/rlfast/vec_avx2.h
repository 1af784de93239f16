// AVX2 with FMA and F16C: 8 lanes.
#pragma once
#include <immintrin.h>

#include "rows_256.h"
namespace rlfast {
namespace RLFAST_ISA_NS {

using F = __m256;
using M = __m256;
constexpr int kLanes = 8;
constexpr bool kFused = true;

inline F set1(float x) { return _mm256_set1_ps(x); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F head12(F a) { return a; }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fma_sub(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F abs(F a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline M equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline F select(M m, F yes, F no) { return _mm256_blendv_ps(no, yes, m); }
inline M at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline M unequal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_NEQ_UQ); }
inline M both(M a, M b) { return _mm256_and_ps(a, b); }
inline M either(M a, M b) { return _mm256_or_ps(a, b); }
inline M except(M a, M b) { return _mm256_andnot_ps(b, a); }
inline M load_flags(const uint8_t* p) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(x, _mm256_setzero_si256()));
}
inline F min_number(F a, F b) { return select(equal(b, b), min(a, b), a); }
inline F max_number(F a, F b) { return select(equal(b, b), max(a, b), a); }
using N = __m256i;
inline N zero_count() { return _mm256_setzero_si256(); }
inline N tally(N n, M m) { return _mm256_sub_epi32(n, _mm256_castps_si256(m)); }
inline N add(N a, N b) { return _mm256_add_epi32(a, b); }
inline int64_t reduce_add(N n) {
  alignas(32) int32_t lanes[kLanes];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), n);
  int64_t total = 0;
  for (int32_t x : lanes) total += x;
  return total;
}
inline F exponent(F x) {
  const __m256i biased = _mm256_srli_epi32(_mm256_castps_si256(x), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
}
inline uint32_t bits(M m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
inline bool any(M m) { return bits(m) != 0; }
inline M from_bits(uint32_t x) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(x)), lane), lane));
}
// 2^n is built in the exponent field; below the normal range the result is 0.
inline F scale2(F p, F n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(greater(set1(-126.0f), n), mul(p, _mm256_castsi256_ps(power)));
}
constexpr bool kScalesAny = false;
constexpr bool kSplitsInf = false;
inline void split(F t, F k, F* n, F* f) {
  const F magic = set1(0x1.8p23f);
  *n = sub(fma(t, k, magic), magic);
  *f = fma_sub(t, k, *n);
}

inline F widen(__m128i x, bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline F widen(__m128i x, f16) { return _mm256_cvtph_ps(x); }
inline __m128i narrow(F x, bf16) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
}
inline __m128i narrow(F x, f16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F load(const float* p) { return _mm256_loadu_ps(p); }
template <class T>
inline F load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}
template <class T>
inline F load_part(const T* p, int n, float fill) {
  alignas(32) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? to_float(p[i]) : fill;
  return _mm256_load_ps(lanes);
}
inline void store(float* p, F x) { _mm256_storeu_ps(p, x); }
template <class T>
inline void store(T* p, F x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T{}));
}
template <class T>
inline void store_part(T* p, F x, int n) {
  alignas(32) T lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
inline void stream(float* p, F x) { _mm256_stream_ps(p, x); }
template <class T>
inline void stream(T* p, F x) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(x, T{}));
}
inline void stream_fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline float reduce_max(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

using D = __m256d;
inline D zero_double() { return _mm256_setzero_pd(); }
inline D add(D a, D b) { return _mm256_add_pd(a, b); }
inline D accumulate(D d, F x) {
  const D low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  return _mm256_add_pd(d, _mm256_add_pd(low, high));
}
inline double reduce_add(D d) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(d), _mm256_extractf128_pd(d, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
inline double reduce_add(F x) { return reduce_add(accumulate(zero_double(), x)); }

constexpr int kLaneSums = 4;
inline void lane_sums(const F* x, float* y) { four_sums(x[0], x[1], x[2], x[3], y); }

using DM = __m256d;
constexpr int kDoubles = 4;
inline D set1_double(double x) { return _mm256_set1_pd(x); }
inline D load_double(const double* p) { return _mm256_loadu_pd(p); }
inline void store_double(double* p, D x) { _mm256_storeu_pd(p, x); }
inline D widen_load(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void narrow_store(float* p, D x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x)); }
inline D sub(D a, D b) { return _mm256_sub_pd(a, b); }
inline D mul(D a, D b) { return _mm256_mul_pd(a, b); }
inline D fma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
inline D min(D a, D b) { return _mm256_min_pd(a, b); }
inline DM nonzero(D x) { return _mm256_cmp_pd(x, zero_double(), _CMP_NEQ_UQ); }
inline D select(DM m, D yes, D no) { return _mm256_blendv_pd(no, yes, m); }

using W = __m256i;
inline W set1_word(uint32_t x) { return _mm256_set1_epi64x(x); }
inline W words_from(uint32_t x) { return _mm256_add_epi64(set1_word(x), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline W product(W a, W b) { return _mm256_mul_epu32(a, b); }
inline W high_word(W a) { return _mm256_srli_epi64(a, 32); }
inline W exclusive_or(W a, W b, W c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }
inline W max_word(W a, W b) { return _mm256_max_epu32(a, b); }
inline uint32_t words_at_least(W a, W b) {
  const __m256i reaches = _mm256_cmpeq_epi32(_mm256_max_epu32(a, b), a);
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(_mm256_slli_epi64(reaches, 32))));
}
inline void store_words(uint32_t* p, W a) {
  const __m256i low = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(low));
}
inline F float_of_words(const uint32_t* p) {
  return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
