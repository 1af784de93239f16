// A vector of float32 at the width of one instruction set, and the two functions that log-probs need of it.
//
// Every translation unit of csrc/cpu is compiled once per instruction set with RLFAST_ISA_NS set to its name, so that the
// same text gives one set of kernels per instruction set. Formulas are float32 only: bf16 and f16 convert at load and
// store.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifndef RLFAST_ISA_NS
#error "RLFAST_ISA_NS: the build names the instruction set that this file is compiled for"
#endif

namespace rlfast {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace RLFAST_ISA_NS {

// Scalar conversions, for tails and for the generic vector.
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}
inline float to_float(f16 x) {
  // The exponent is rebiased by a product with 2^112, which also normalises subnormals; infinity and NaN keep theirs.
  uint32_t u = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &u, 4);
  y *= 0x1p112f;
  std::memcpy(&u, &y, 4);
  if ((x.bits & 0x7c00) == 0x7c00) u |= 0x7f800000;
  u |= static_cast<uint32_t>(x.bits & 0x8000) << 16;
  std::memcpy(&y, &u, 4);
  return y;
}
inline void from_float(float x, float* y) { *y = x; }
inline void from_float(float x, bf16* y) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  y->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline void from_float(float x, f16* y) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more, infinity, NaN
    y->bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  } else if (magnitude < 0x38800000) {  // subnormal: the sum with 2^-1 rounds at the last place of f16, 2^-24
    float m;
    std::memcpy(&m, &magnitude, 4);
    m += 0.5f;
    std::memcpy(&u, &m, 4);
    y->bits = static_cast<uint16_t>(sign | (u - 0x3f000000));
  } else {
    y->bits = static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
  }
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast

// Each of these defines, in RLFAST_ISA_NS: F (the vector), M (a lane mask), kLanes;
//   set1, load, load_part(p, n, fill), store, store_part(p, x, n), stream (aligned, past the cache);
//   add, sub, mul, div, fma (a·b + c; two roundings where there is no instruction), abs;
//   max(x, y) and min(x, y): y where x is NaN, NaN where y is;
//   split(t, k, n, f): t·k = n + f, n integral, |f| ≤ ½; kSplitsInf: t·k = −inf gives n = −inf and f = 0;
//   D, a vector of kDoubles doubles, and DM, a mask of it: zero_double, set1_double, load_double, store_double, widen_load and
//   narrow_store (from and to float32), add, sub, mul, fma, min (as above), nonzero(d) (NaN is), select;
//   accumulate(d, x), and reduce_add of it;
//   lane_sums(x, y): y[j] is the sum of the lanes of x[j], of kLaneSums vectors, each by the same tree;
//   W, kDoubles words of 32 bits, each in the low half of 64 (what is above it is garbage but in a product): set1_word,
//   words_from(x) (x, x + 1, …), product (all 64 bits), high_word (of a product), exclusive_or of three, max_word,
//   words_at_least(a, b) (a bit a word; b has nothing above it), store_words(p, w), and float_of_words(p) of kLanes of them below 2^24;
//   R, float32 of kRows rows: load_rows, store_rows, stream_rows, and transpose(x) of kRows of them;
//   kFused: whether fma rounds once; head12: the leading 12 bits of the significand (where not fused);
//   greater(x, y), equal(x, y), select(m, yes, no), any(m), bits(m): one bit a lane; from_bits(bits), its inverse;
//   at_least(x, y), unequal(x, y) (true for a NaN); both, either and except (a and not b) of masks;
//   min_number, max_number: the operand that is not NaN; N, counters of a lane: zero_count, tally(n, m) adds the mask, add,
//   reduce_add;
//   load_flags(p): the lanes whose byte is not 0; exponent(x): ⌊log2 x⌋ of a normal x > 0;
//   scale2(p, n): p·2^n for integral n ≤ 127, 0 below n = −126; for any n, and subnormals, where kScalesAny; reduce_max; reduce_add in double.
#if defined(RLFAST_GENERIC)
#include "vec_generic.h"
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif

namespace rlfast {
namespace RLFAST_ISA_NS {

// A factor k·log2(e) in two floats: t·(hi + lo) keeps the digits that t·hi loses.
struct Log2Scale {
  float hi, lo;
  // Below this t, exp(k·t) is 0: t is clamped there, so that t = −inf gives 0·finite and not 0·inf.
  float t_min;
};

inline Log2Scale log2_scale(double k) {
  const double u = k * 1.4426950408889634;
  const float hi = static_cast<float>(u);
  const double t_min = -160.0 / std::fabs(u);
  const double lowest = -static_cast<double>(std::numeric_limits<float>::max());
  return {hi, static_cast<float>(u - hi), static_cast<float>(t_min > lowest ? t_min : lowest)};
}

// t·(hi + lo) − n, exact before its last rounding. Without a fused product, t and hi are cut into halves of 12 bits.
inline F reduced(F t, F hi, F lo, F n) {
  if constexpr (kFused) return fma(t, lo, fma_sub(t, hi, n));
  const F hi_head = head12(hi), t_head = head12(t);
  const F tail = add(mul(t_head, sub(hi, hi_head)), mul(sub(t, t_head), hi));
  return add(sub(mul(t_head, hi_head), n), add(tail, mul(t, lo)));
}

// 2^f for |f| ≤ ½ (minimax, degree 6, relative error 2^-28). Horner has the fewest instructions; with vectors of 8 lanes or
// fewer its chain of products is what takes the time, so there the terms are paired.
inline F exp2_fraction(F f) {
  const F c6 = set1(1.5353361960e-04f), c5 = set1(1.3398873853e-03f), c4 = set1(9.6184369177e-03f);
  const F c3 = set1(5.5503323674e-02f), c2 = set1(2.4022647738e-01f), c1 = set1(6.9314718246e-01f), c0 = set1(1.0f);
  if constexpr (kLanes >= 16) return fma(fma(fma(fma(fma(fma(c6, f, c5), f, c4), f, c3), f, c2), f, c1), f, c0);
  const F square = mul(f, f);
  return fma(fma(fma(c6, square, fma(c5, f, c4)), square, fma(c3, f, c2)), square, fma(c1, f, c0));
}

// exp(k·t) for t ≤ 0 (or a little above), t finite or NaN, clamped by the caller: 2^n·2^f with n + f = t·k·log2(e), |f| ≤ ½;
// within 1 ulp.
inline F exp_scaled(F t, F hi, F lo) {
  const F magic = set1(0x1.8p23f);  // adding it rounds to an integer
  const F n = sub(fma(t, hi, magic), magic);
  return scale2(exp2_fraction(reduced(t, hi, lo, n)), n);
}

// The same for a term of a sum that is dominated by terms near t = 0: log2(e)·k is one float and its product with t may be
// rounded, which leaves a relative error of |log2 of the result|·2^-25. A tenth faster. t may be −inf where kSplitsInf.
inline F exp_term(F t, F hi) {
  F n, f;
  split(t, hi, &n, &f);
  return scale2(exp2_fraction(f), n);
}

// exp(x) for any x ≤ 88: 0 for −inf, NaN for NaN.
inline F exp(F x) { return exp_scaled(max(set1(-115.0f), x), set1(1.44269502f), set1(1.92596303e-8f)); }

// y = tanh(k·x) and the part of its derivative that depends on x, 1 − y² = 4E/(1 + E)² with E = exp(−2|k·x|), which keeps
// its digits where 1 − y² would cancel.
struct TanhScale {
  float hi, lo;        // k in two floats
  Log2Scale exponent;  // of −2|k|
};

inline TanhScale tanh_scale(double k) {
  const float hi = static_cast<float>(k);
  return {hi, static_cast<float>(k - hi), log2_scale(2.0 * std::fabs(k))};
}

inline F tanh_exponential(F x, const TanhScale& s) {
  const F t = sub(set1(0.0f), abs(x));
  return exp_scaled(max(set1(s.exponent.t_min), t), set1(s.exponent.hi), set1(s.exponent.lo));
}

// 1 − 2E/(1 + E) away from 0; near it u + u³·p(u²), p of degree 7 (minimax on |u| ≤ 1, relative error 2^-31). Where they
// meet 2E/(1 + E) is a quarter, so that its rounding counts for little: within 1 ulp.
inline F tanh(F x, F e, const TanhScale& s) {
  const F u = fma(x, set1(s.hi), mul(x, set1(s.lo))), square = mul(u, u);
  F p = set1(1.2147074449e-04f);
  p = fma(p, square, set1(-8.4113731282e-04f));
  p = fma(p, square, set1(3.0785943381e-03f));
  p = fma(p, square, set1(-8.5951145738e-03f));
  p = fma(p, square, set1(2.1784730256e-02f));
  p = fma(p, square, set1(-5.3953099996e-02f));
  p = fma(p, square, set1(1.3333199918e-01f));
  p = fma(p, square, set1(-3.3333328366e-01f));
  const F small = fma(mul(p, square), u, u);
  const F large = sub(set1(1.0f), div(add(e, e), add(set1(1.0f), e)));
  // of an infinite x, u is infinity − infinity where hi and lo differ in sign; x·hi is not
  const F rough = mul(x, set1(s.hi));
  const F signed_large = select(greater(set1(0.0f), rough), sub(set1(0.0f), large), large);
  return select(greater(abs(rough), set1(1.0f)), signed_large, small);
}

inline F tanh(F x, const TanhScale& s) { return tanh(x, tanh_exponential(x, s), s); }

inline F sech2(F e) {
  const F d = add(set1(1.0f), e);
  return div(mul(set1(4.0f), e), mul(d, d));
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
