// The arithmetic of token_logps on a GPU: one logit, one row. Every product that feeds a sum is an explicit fmaf or an
// uncontracted product, so that the bits do not depend on how the compiler schedules a loop.
#pragma once
#include "../rlfast/token_logps.h"
#include "device.cuh"

namespace rlfast::cuda {

// Below this many nats under its peak a term is 0: exp(−104) < 2^-150. It also keeps −inf out of the arithmetic below.
constexpr float kFloor = -104.0f;

// exp(x) for kFloor ≤ x ≤ 0. x·log2(e) is rounded to fp32, which loses up to |x|·2^-24 of relative precision; its remainder,
// exact by fmaf, puts it back. What is left is the error of ex2.approx, 2 ulps, as in CUDA's expf.
RLFAST_DEVICE float exponential(float x) {
  constexpr float log2e = 1.44269504088896341f, log2e_low = 1.92596299e-8f, ln2 = 0.693147180559945309f;
  float t = product(x, log2e);
  float rest = fmaf(x, log2e_low, fmaf(x, log2e, -t));
  float e = exp2_approx(t);
  return fmaf(e, product(rest, ln2), e);
}

// z = softcap·tanh(logit_scale·x / softcap) / temperature, for one row.
struct RowTransform {
  float scale, softcap, temperature, inverse;
  bool plain;

  static RLFAST_DEVICE RowTransform of(const Transform& t, int64_t row) {
    float temperature = t.temperatures ? t.temperatures[row] : t.temperature;
    return {t.logit_scale, t.softcap, temperature, 1.0f / temperature,
            t.logit_scale == 1.0f && t.softcap == 0.0f && temperature == 1.0f};
  }

  // x / temperature, correctly rounded from the reciprocal (Markstein 1990): 4 instructions instead of a division's 8.
  RLFAST_DEVICE float divided(float x) const {
    float q = product(x, inverse);
    float better = fmaf(fmaf(-q, temperature, x), inverse, q);
    return fabsf(q) <= FLT_MAX ? better : q;
  }

  RLFAST_DEVICE float operator()(float x) const {
    x = product(x, scale);
    if (softcap != 0.0f) x = product(softcap, tanhf(x / softcap));
    return divided(x);
  }

  // ∂z/∂x: through the temperature, the soft-cap and the scale.
  // 1 − tanh²u = 4e^(−2|u|) / (1 + e^(−2|u|))² keeps its digits.
  RLFAST_DEVICE float slope(float x) const {
    float d = divided(scale);
    if (softcap == 0.0f) return d;
    float t = expf(-2.0f * fabsf(product(x, scale) / softcap));
    return product(d, 4.0f * t / ((1.0f + t) * (1.0f + t)));
  }
};

// Σ over a leaf relative to its own peak.
struct LeafSums {
  float e, ex, ee, z;  // Σ e, Σ e·(z − peak), Σ e², Σ z with e = exp(z − peak)
};

// What a leaf's sums count for relative to the row's peak.
struct LeafWeight {
  float distance, weight;

  static RLFAST_DEVICE LeafWeight of(float leaf_peak, float peak) {
    float d = max_nan(leaf_peak - peak, kFloor);
    return {d, exponential(d)};
  }
};

// A row of −inf has no maximum to subtract.
RLFAST_DEVICE float reference_of(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// log p = −softplus(log Σ_others − (z_t − peak)): never positive, and exact as p → 1.
RLFAST_DEVICE float target_logp(float others, float z_minus_peak) {
  float y = logf(others) - z_minus_peak;
  float softplus = y > 0.0f ? y + log1pf(expf(-y)) : log1pf(expf(y));
  return -softplus;
}

// ∂L/∂x_j = p_j·(a + h·(log p_j + H)) with a = (g_lse − Σ_k g_logp_k)·∂z/∂x and h = −g_entropy·∂z/∂x.
struct RowGradient {
  float peak, log_sum, entropy;
  float g_logp, g_lse, g_entropy;  // g_logp: the sum over the candidates that count

  RLFAST_DEVICE float log_p(float z) const { return (z - peak) - log_sum; }
  static RLFAST_DEVICE float p_of(float log_p) { return exponential(max_nan(log_p, kFloor)); }

  // h·p·(log p + H) is 0 where p is.
  RLFAST_DEVICE float rest(float p, float log_p) const {
    float from_entropy = p != 0.0f ? -g_entropy * (log_p + entropy) : 0.0f;
    return g_lse + from_entropy;
  }

  RLFAST_DEVICE float operator()(float z) const {
    float l = log_p(z), p = p_of(l);
    return product(p, rest(p, l) - g_logp);
  }

  // At a candidate: 1 − p = −expm1(log p) keeps its digits as p → 1. `hit` is the g_logp of the candidates here.
  RLFAST_DEVICE float at_target(float z, float logp, float hit) const {
    float l = log_p(z), p = p_of(l);
    return product(p, rest(p, l) - (g_logp - hit)) - product(hit, expm1f(logp));
  }
};

// Order-preserving map to unsigned; NaN above +inf. 0 is below every value.
RLFAST_DEVICE uint32_t sort_key(float x) {
  if (x != x) return 0xffffffffu;
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (bits == 0x80000000u) bits = 0;  // −0 ties with 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

RLFAST_DEVICE float from_sort_key(uint32_t key) {
  uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

}  // namespace rlfast::cuda
