// AVX-512 (F, BW, VL, DQ): 16 lanes, masked tails.
#pragma once
#include <immintrin.h>

#include "rows_256.h"
namespace rlfast {
namespace RLFAST_ISA_NS {

using F = __m512;
using M = __mmask16;
constexpr int kLanes = 16;
constexpr bool kFused = true;

inline F set1(float x) { return _mm512_set1_ps(x); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F head12(F a) { return a; }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fma_sub(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F abs(F a) { return _mm512_abs_ps(a); }
inline M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline F select(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
inline M at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline M unequal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
// Not with & and |, for which compilers take the masks through general registers.
inline M both(M a, M b) { return _kand_mask16(a, b); }
inline M either(M a, M b) { return _kor_mask16(a, b); }
inline M except(M a, M b) { return _kandn_mask16(b, a); }
inline M load_flags(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(x, x);
}
inline F min_number(F a, F b) { return _mm512_range_ps(a, b, 4); }
inline F max_number(F a, F b) { return _mm512_range_ps(a, b, 5); }
using N = __m512i;
inline N zero_count() { return _mm512_setzero_si512(); }
inline N tally(N n, M m) { return _mm512_mask_add_epi32(n, m, n, _mm512_set1_epi32(1)); }
inline N add(N a, N b) { return _mm512_add_epi32(a, b); }
inline int64_t reduce_add(N n) { return _mm512_reduce_add_epi32(n); }
inline F exponent(F x) { return _mm512_getexp_ps(x); }
inline uint32_t bits(M m) { return m; }
inline bool any(M m) { return m != 0; }
inline M from_bits(uint32_t x) { return static_cast<M>(x); }
inline F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }
constexpr bool kScalesAny = true;
constexpr bool kSplitsInf = true;
inline void split(F t, F k, F* n, F* f) {
  const F u = mul(t, k);
  *n = _mm512_roundscale_ps(u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  *f = _mm512_reduce_ps(u, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // u − n, and 0 for an infinity
}

inline F widen(__m256i x, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline F widen(__m256i x, f16) { return _mm512_cvtph_ps(x); }
// Round to nearest even in integers: vcvtneps2bf16 would flush subnormals.
inline __m256i narrow(F x, bf16) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
  const M nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0)));
}
inline __m256i narrow(F x, f16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline F load(const float* p) { return _mm512_loadu_ps(p); }
template <class T>
inline F load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
inline M first(int n) { return static_cast<M>((1u << n) - 1); }
inline F load_part(const float* p, int n, float fill) { return _mm512_mask_loadu_ps(set1(fill), first(n), p); }
template <class T>
inline F load_part(const T* p, int n, float fill) {
  return select(first(n), widen(_mm256_maskz_loadu_epi16(first(n), p), T{}), set1(fill));
}
inline void store(float* p, F x) { _mm512_storeu_ps(p, x); }
template <class T>
inline void store(T* p, F x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
inline void store_part(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
template <class T>
inline void store_part(T* p, F x, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow(x, T{}));
}
inline void stream(float* p, F x) { _mm512_stream_ps(p, x); }
template <class T>
inline void stream(T* p, F x) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(x, T{}));
}
inline void stream_fence() { _mm_sfence(); }
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

inline float reduce_max(F x) { return _mm512_reduce_max_ps(x); }

using D = __m512d;
inline D zero_double() { return _mm512_setzero_pd(); }
inline D add(D a, D b) { return _mm512_add_pd(a, b); }
inline D accumulate(D d, F x) {
  const D low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  return _mm512_add_pd(d, _mm512_add_pd(low, high));
}
inline double reduce_add(D d) { return _mm512_reduce_add_pd(d); }
inline double reduce_add(F x) { return reduce_add(accumulate(zero_double(), x)); }

constexpr int kLaneSums = 8;
inline R folded(F x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); }
inline void lane_sums(const F* x, float* y) {
  four_sums(folded(x[0]), folded(x[1]), folded(x[2]), folded(x[3]), y);
  four_sums(folded(x[4]), folded(x[5]), folded(x[6]), folded(x[7]), y + 4);
}

using DM = __mmask8;
constexpr int kDoubles = 8;
inline D set1_double(double x) { return _mm512_set1_pd(x); }
inline D load_double(const double* p) { return _mm512_loadu_pd(p); }
inline void store_double(double* p, D x) { _mm512_storeu_pd(p, x); }
inline D widen_load(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline void narrow_store(float* p, D x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
inline D sub(D a, D b) { return _mm512_sub_pd(a, b); }
inline D mul(D a, D b) { return _mm512_mul_pd(a, b); }
inline D fma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
inline D min(D a, D b) { return _mm512_min_pd(a, b); }
inline DM nonzero(D x) { return _mm512_cmp_pd_mask(x, zero_double(), _CMP_NEQ_UQ); }
inline D select(DM m, D yes, D no) { return _mm512_mask_blend_pd(m, no, yes); }

using W = __m512i;
inline W set1_word(uint32_t x) { return _mm512_set1_epi64(x); }
inline W words_from(uint32_t x) { return _mm512_add_epi64(set1_word(x), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)); }
inline W product(W a, W b) { return _mm512_mul_epu32(a, b); }
inline W high_word(W a) { return _mm512_srli_epi64(a, 32); }
inline W exclusive_or(W a, W b, W c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline W max_word(W a, W b) { return _mm512_max_epu32(a, b); }
inline uint32_t words_at_least(W a, W b) {
  return _mm512_cmpge_epu64_mask(_mm512_and_si512(a, _mm512_set1_epi64(0xffffffff)), b);
}
inline void store_words(uint32_t* p, W a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi64_epi32(a));
}
inline F float_of_words(const uint32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
