// The arithmetic of a divergence of S, the own side, and T, the other, on a GPU: a column at a time.
#pragma once
#include "row_math.cuh"

namespace rlfast::cuda {

// e_p·gap: 0 where p is 0, infinite where q alone is.
RLFAST_DEVICE float gap_term(float zp, float zq, float peak_p, float peak_q) {
  float dp = zp - peak_p;
  if (zp == -INFINITY) return 0.0f;
  if (zq == -INFINITY && zp > -INFINITY) return INFINITY;
  return product(exponential(max_nan(dp, kFloor)), dp - (zq - peak_q));
}

// log M/S and log M/T, M = rest·S + beta·T, from u = log T − log S. With w = e^−|u|, the smaller over the larger,
// log M/S = log(1 + β·(w − 1)) for u ≤ 0 and log M/T = log(1 + (1 − β)·(w − 1)) for u > 0; the other is u away.
struct OverMixture {
  float s, t;

  static RLFAST_DEVICE OverMixture of(float u, float beta, float rest) {
    constexpr float far = 110.0f;                    // nats beyond which w is 0
    u = u != u ? 0.0f : fminf(fmaxf(u, -far), far);  // NaN: neither is possible
    bool up = u > 0.0f;
    float log = log1pf(product(up ? rest : beta, expm1f(-fabsf(u))));
    return {log + (up ? u : 0.0f), log - (up ? 0.0f : u)};
  }
};

// What a gradient knows of a row beside RowGradient.
struct PairRow {
  Kind kind;
  float own_peak, own_log_sum, other_peak, other_log_sum, high, low, g, beta, rest;

  static RLFAST_DEVICE float p_of(float log_p) { return exponential(max_nan(log_p, kFloor)); }

  // ∂L/∂z of one column.
  RLFAST_DEVICE float operator()(float z, float y) const {
    float own = z - own_peak, other = y - other_peak, p = p_of(own - own_log_sum), d;
    if (high != high) return NAN;
    if (kind == Kind::forward)
      d = product(p_of(own), high) - product(p_of(other), low);  // high and low: 1/Σe of either side
    else if (p == 0.0f)
      d = 0.0f;
    else if (kind == Kind::reverse)
      d = product(p, (own - other - high) - low);
    else
      d = product(product(-rest, p),
                  (OverMixture::of((other - own) - (other_log_sum - own_log_sum), beta, rest).s + high) + low);
    return product(g, d);
  }
};

}  // namespace rlfast::cuda
