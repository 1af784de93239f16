// The V of the printed formulas: a vector of float32 with operators, and the elementary functions that formulas use.
//
// Products and sums are rounded one by one, so that a formula's bits are those of its text.
#pragma once
#include "vec.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// x where the mask is set, else 0.
inline F only(M m, F x) { return select(m, x, set1(0.0f)); }
inline F negative(F x) { return sub(set1(-0.0f), x); }
// The integer nearest to x·k, where |x·k| < 2^22.
inline F rounded(F x, float k) {
  const F magic = set1(0x1.8p23f);
  return sub(fma(x, set1(k), magic), magic);
}

// e^x within 0.75 ulps (torch's own is nearly always the nearest float, and sums of terms that cancel show the difference) and
// e^x − 1 within 1.5, for any x: 0 or a subnormal far down, inf above 88.72, NaN for NaN.
//
// x = n·ln 2 + r, q = e^r − 1 = r + r²·p(r) (minimax on |r| ≤ ½ ln 2, relative error 2^-29), e^x = 2^n·(1 + q),
// e^x − 1 = 2^n·q + (2^n − 1). The second is made at half its size, since 2^128 is no float and e^88.72 is.
struct Exponential {
  F power, grown;
};

inline Exponential exponential(F x) {
  x = min(set1(89.0f), max(set1(-105.0f), x));
  const F n = rounded(x, 1.44269502f);
  // ln 2 in two parts: n times the first, of 16 bits, is exact
  const F r = fma(n, set1(-1.4286068203e-06f), fma(n, set1(-0.693145751953125f), x));
  // the terms in pairs: as few products as Horner's rule, whose chain of them is what would take the time
  const F one = set1(1.0f), square = mul(r, r);
  const F high = fma(set1(1.9845878705e-04f), r, set1(1.3940637000e-03f));
  const F middle = fma(set1(8.3333896473e-03f), r, set1(4.1666362435e-02f));
  const F low = fma(set1(1.6666665673e-01f), r, set1(0.5f));
  const F p = fma(fma(high, square, middle), square, low), q = fma(square, p, r);
  // 1 + q, whose rounding is the only one that counts
  const F head = add(one, r), sum = add(head, fma(square, p, sub(r, sub(head, one))));
  const F half = scale2(one, sub(n, one)), grown = fma(half, q, sub(half, set1(0.5f)));
  F power;
  if constexpr (kScalesAny) {
    power = mul(half, sum);
    power = add(power, power);
  } else {
    const F first = rounded(n, 0.5f);
    power = scale2(scale2(sum, first), sub(n, first));
  }
  return {power, add(grown, grown)};
}

// log x within 1 ulp: x = 2^e·(1 + f), √½ ≤ 1 + f < √2, s = f/(2 + f),
// log(1 + f) = f − (f²/2 − s·(f²/2 + R(s²))), R from the series of 2·artanh(s) (its next term is below 2^-29).
inline F log_of(F x) {
  const M tiny = greater(set1(0x1p-100f), x);
  const F y = select(tiny, mul(x, set1(0x1p24f)), x);
  F e = exponent(y), m = scale2(mul(y, set1(0.5f)), sub(set1(1.0f), e));
  const M large = greater(m, set1(1.41421356f));
  m = select(large, mul(m, set1(0.5f)), m);
  e = add(e, select(large, set1(1.0f), set1(0.0f)));
  e = select(tiny, sub(e, set1(24.0f)), e);
  const F f = sub(m, set1(1.0f)), s = div(f, add(set1(2.0f), f)), z = mul(s, s), half = mul(set1(0.5f), mul(f, f));
  F series = set1(2.0f / 9.0f);
  series = fma(series, z, set1(2.0f / 7.0f));
  series = fma(series, z, set1(2.0f / 5.0f));
  series = mul(fma(series, z, set1(2.0f / 3.0f)), z);
  const F low = mul(e, set1(1.4286068203e-06f)), high = mul(e, set1(0.693145751953125f));
  const F log_m = sub(half, fma(s, add(half, series), low));
  F y_log = sub(high, sub(log_m, f));
  constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();
  y_log = select(equal(x, set1(kInf)), x, y_log);
  y_log = select(equal(x, set1(0.0f)), set1(-kInf), y_log);
  return select(at_least(x, set1(0.0f)), y_log, set1(kNaN));
}

// log(1 + x) within 2 ulps for 0 ≤ x ≤ 1: log y of y = 1 + x as it is rounded, and what the rounding left out of it.
inline F log1p_of(F x) {
  const F one = set1(1.0f), y = add(one, x);
  return add(log_of(y), div(sub(x, sub(y, one)), y));
}

namespace formulas {

struct Mask {
  M m;
};
inline Mask operator&(Mask a, Mask b) { return {both(a.m, b.m)}; }
inline Mask operator|(Mask a, Mask b) { return {either(a.m, b.m)}; }

struct V {
  F x;
  V() = default;
  explicit V(F x) : x(x) {}
  V(float x) : x(set1(x)) {}
};

inline V operator+(V a, V b) { return V(add(a.x, b.x)); }
inline V operator-(V a, V b) { return V(sub(a.x, b.x)); }
inline V operator*(V a, V b) { return V(mul(a.x, b.x)); }
inline V operator/(V a, V b) { return V(div(a.x, b.x)); }
inline V operator-(V a) { return V(negative(a.x)); }
inline Mask operator>(V a, V b) { return {greater(a.x, b.x)}; }
inline Mask operator<(V a, V b) { return {greater(b.x, a.x)}; }
inline Mask operator>=(V a, V b) { return {at_least(a.x, b.x)}; }
inline Mask operator<=(V a, V b) { return {at_least(b.x, a.x)}; }
inline Mask operator==(V a, V b) { return {equal(a.x, b.x)}; }
inline Mask operator!=(V a, V b) { return {unequal(a.x, b.x)}; }
inline V choose(Mask m, V yes, V no) { return V(select(m.m, yes.x, no.x)); }

// A hyper-parameter is not NaN, and so one instruction is enough for it.
inline V minimum(V a, float b) { return V(min(a.x, set1(b))); }
inline V maximum(V a, float b) { return V(max(a.x, set1(b))); }
inline V minimum(V a, V b) { return V(min_number(a.x, b.x)); }
inline V maximum(V a, V b) { return V(max_number(a.x, b.x)); }
inline V absolute_value(V a) { return V(abs(a.x)); }
inline V exp(V a) { return V(exponential(a.x).power); }
inline V expm1(V a) { return V(exponential(a.x).grown); }
inline V log(V a) { return V(log_of(a.x)); }
inline V sigmoid(V a) { return 1.0f / (1.0f + exp(-a)); }
inline V log1p(V a) { return V(log1p_of(a.x)); }
inline V softplus(V a) { return V(max(set1(0.0f), a.x)) + log1p(exp(-absolute_value(a))); }

inline float minimum(float a, float b) { return std::fmin(a, b); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
inline float exp(float a) { return std::exp(a); }
inline float log(float a) { return std::log(a); }
inline float log1p(float a) { return std::log1p(a); }

}  // namespace formulas
}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
