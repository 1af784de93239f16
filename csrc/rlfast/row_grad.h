// The gradient of a row with respect to its logits.
//
//   ∂L/∂z_j = g_logp·(1[j = target] − p_j) + g_lse·p_j − g_entropy·p_j·(log p_j + H)
//   ∂L/∂x_j = ∂L/∂z_j · logit_scale/temperature · (1 − y_j²)      the last factor with a soft-cap only
//
// With e = exp(c·t), t = y − peak and log p = c·t − log_sum, all but the target is e·(a + b·t): two scalars a row.
#pragma once
#include "row_stats.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

struct RowGrad {
  float peak, a, b;
  bool entropy;  // b is not 0
  double g_sum, g_lse, g_entropy, saved_entropy;
};

// ids [candidates] and the row's gradients; NaN for the whole row where a target is out of range.
inline RowGrad row_grad(const RowScale& s, const BackwardIn& in, const int64_t* ids, int64_t candidates, int64_t vocab,
                        int64_t row) {
  RowGrad g{};
  for (int64_t k = 0; k < candidates && in.g_logp; ++k) {
    if (ids[k] == kIgnoreIndex) continue;
    g.g_sum += ids[k] < 0 || ids[k] >= vocab ? kNaN : in.g_logp[row * candidates + k];
  }
  g.peak = in.peak[row];
  g.g_lse = in.g_lse ? in.g_lse[row] : 0.0;
  g.entropy = in.g_entropy != nullptr;
  g.g_entropy = g.entropy ? in.g_entropy[row] : 0.0;
  g.saved_entropy = g.entropy ? in.saved_entropy[row] : 0.0;
  const double log_sum = in.log_sum[row], scale = std::exp(-log_sum) * s.chain;
  const double centre = g.entropy ? g.g_entropy * (g.saved_entropy - log_sum) : 0.0;
  g.a = static_cast<float>(scale * (g.g_lse - g.g_sum - centre));
  g.b = static_cast<float>(-scale * g.g_entropy * s.c);
  return g;
}

enum class Store { cached, streamed };

template <bool kEntropy, bool kSoftcap>
inline F dlogits(F x, const RowScale& s, const RowGrad& g) {
  F y = x, slope = set1(1.0f);
  if constexpr (kSoftcap) {
    const F e = tanh_exponential(x, s.tanh);
    y = tanh(x, e, s.tanh);
    slope = sech2(e);
  } else if (!s.plain) {
    y = mul(x, set1(s.sign));
  }
  const F t = max(set1(s.log2.t_min), sub(y, set1(g.peak)));
  const F e = exp_scaled(t, set1(s.log2.hi), set1(s.log2.lo));
  const F d = mul(e, kEntropy ? fma(set1(g.b), t, set1(g.a)) : set1(g.a));
  return kSoftcap ? mul(d, slope) : d;
}

template <bool kEntropy, bool kSoftcap, Store kStore, class In, class Out>
inline void dlogits_loop(const In* x, Out* out, int64_t n, const RowScale& s, const RowGrad& g) {
  int64_t i = 0;
  if constexpr (kStore == Store::streamed) {
    // up to the first address that a streaming store takes
    const uintptr_t width = kLanes * sizeof(Out), past = reinterpret_cast<uintptr_t>(out) % width;
    const int64_t head = past ? static_cast<int64_t>((width - past) / sizeof(Out)) : 0;
    if (head && head <= n) {
      store_part(out, dlogits<kEntropy, kSoftcap>(load_part(x, static_cast<int>(head), 0.0f), s, g),
                 static_cast<int>(head));
      i = head;
    }
    if (head > n) return dlogits_loop<kEntropy, kSoftcap, Store::cached>(x, out, n, s, g);
    for (; i + kLanes <= n; i += kLanes) stream(out + i, dlogits<kEntropy, kSoftcap>(load(x + i), s, g));
  } else {
    for (; i + kLanes <= n; i += kLanes) store(out + i, dlogits<kEntropy, kSoftcap>(load(x + i), s, g));
  }
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_part(out + i, dlogits<kEntropy, kSoftcap>(load_part(x + i, left, 0.0f), s, g), left);
  }
}

// n columns of a row, all but the targets' own term. `out` may be `x`.
template <Store kStore, class In, class Out>
inline void dlogits_span(const In* x, Out* out, int64_t n, const RowScale& s, const RowGrad& g) {
  if (s.softcap) {
    if (g.entropy) return dlogits_loop<true, true, kStore>(x, out, n, s, g);
    return dlogits_loop<false, true, kStore>(x, out, n, s, g);
  }
  if (g.entropy) return dlogits_loop<true, false, kStore>(x, out, n, s, g);
  return dlogits_loop<false, false, kStore>(x, out, n, s, g);
}

// ∂L/∂x at the k-th target, whole: 1 − p = −expm1(log p) keeps its digits as p → 1. `x` is its logit before the backward.
// A target that occurs several times takes the sum of its gradients.
inline float target_dlogit(float x, int64_t k, const RowScale& s, const RowGrad& g, const BackwardIn& in,
                           const int64_t* ids, int64_t candidates, int64_t row, int64_t rows) {
  double own = 0.0;
  for (int64_t j = 0; j < candidates && in.g_logp; ++j) {
    if (ids[j] == ids[k]) own += in.g_logp[row * candidates + j];
  }
  const double logp = in.saved_logp[k * rows + row], p = std::exp(logp);
  double d = -own * std::expm1(logp) + (g.g_lse - (g.g_sum - own)) * p;
  if (g.entropy) d -= g.g_entropy * (p == 0.0 ? 0.0 : p * (logp + g.saved_entropy));
  if (s.softcap) {
    const double e = std::exp(-2.0 * std::fabs((static_cast<double>(s.tanh.hi) + s.tanh.lo) * x));
    d *= 4.0 * e / ((1.0 + e) * (1.0 + e));
  }
  return static_cast<float>(d * s.chain);
}

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
