// The stages of a tile of token_loss: ρ and its gate → the KL → the surrogate → the entropy; and, for objectives of whole
// sequences, what is summed before and what is pulled back after.
#pragma once
#include <cstring>

#include "loss_tile.h"
// after the words that it is written with
#include "../rlfast/formulas.gen.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// An objective as the stages read it.
struct Objective {
  LossPlan plan;
  LossSettings s;
  const float* hyper;
  const float* kl_hyper;
  float beta, entropy_coef;
  bool rollout, keep, weights, entropy, kl;
  bool bounded, unit_bounded;  // whether x, and the unit's, can be at a bound
  bool multiplied, applied;    // whether the surrogate's multiplier, or ρ as it is applied, can be other than 1
  bool sequence, pulled_back;  // whether x is a sequence's; whether its gradient is too
  float scale, entropy_scale;  // of the gradients
};

// What the tokens of one sequence share.
struct Sequence {
  int64_t count = 0;
  float c = 1.0f;                           // weight of a token in the sum
  float weight = 1.0f;                      // ρ at the sequence's level
  bool open = true;                         // its gate
  bool strayed = false;                     // off-policy by more than δ: it counts where A ≥ 0
  float unit = 0.0f, ratio = 1.0f;          // of a sequence's unit
  bool inside = true;                       // and whether it is within its bounds
  alignas(64) float mean_adv[kLanes] = {};  // if the plan has it
};

// log ρ of the token; NaN counts as ρ = 1, and infinities as the largest float.
inline F drift_of(const Tile& t, int64_t i, M m) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  const F d = only(m, sub(t.old_logp[i], t.rollout_logp[i]));
  return min(set1(kLargest), max(set1(-kLargest), only(equal(d, d), d)));
}

// What the gate looks at: k1 = d, k2 = d²/2, k3 = e^d − 1 − d.
inline F looked_at(int kind, F d) {
  if (kind == 1) return d;
  if (kind == 2) return mul(set1(0.5f), mul(d, d));
  return sub(exponential(d).grown, d);
}

inline M within(F x, F low, F high) { return both(at_least(x, low), at_least(high, x)); }

inline M gate_of(F d, const Sequence& q, const Objective& o) {
  if (o.plan.gate != kAtToken) return when(q.open);
  return within(looked_at(o.plan.gate_kind, d), set1(o.s.gate_low), set1(o.s.gate_high));
}

inline F weight_of(F rho, const Sequence& q, const Objective& o) {
  if (o.plan.weight != kAtToken) return set1(q.weight);
  return min(set1(o.s.weight_high), max(set1(o.s.weight_low), rho));
}

// A closed gate takes the token out of the mask.
inline void mask_by_gate(Tile& t, const Sequence& q, const Objective& o) {
  for (int64_t i = 0; i < t.padded; i += kLanes) {
    const M m = t.mask[i];
    const uint32_t left = bits(both(m, gate_of(drift_of(t, i, m), q, o)));
    for (int lane = 0; lane < kLanes; ++lane) t.mask_bytes[i + lane] = (left >> lane) & 1;
  }
  t.mask = {t.mask_bytes, -1};
}

struct LogRatio {
  F x;       // of the token, within its bounds
  M inside;  // where it is
};

// x = clamp(lp − lp_old); a signed bound holds from above where A > 0, from below where A < 0
inline LogRatio log_ratio(const Tile& t, int64_t i, M m, const Objective& o) {
  const F raw = only(m, sub(t.logp[i], t.old_logp[i]));
  if (!o.bounded) return {raw, m};
  F low = set1(o.s.inner_low), high = set1(o.s.inner_high);
  if (o.plan.signed_bounds) {
    const F adv = t.own_adv[i], zero = set1(0.0f);
    low = select(greater(adv, zero), set1(-HUGE_VALF), low);
    high = select(greater(zero, adv), set1(HUGE_VALF), high);
  }
  return {only(m, min(high, max(low, raw))), both(m, within(raw, low, high))};
}

// ρ, its gate, keep, weights and the off-policy mask → multiplier, applied
inline void multipliers(Tile& t, const Sequence& q, const Objective& o, Sums& sums) {
  F drift = set1(0.0f), largest = set1(0.0f);
  for (int64_t i = 0; i < t.padded; i += kLanes) {
    const M m = t.mask[i];
    F weight = set1(1.0f);
    M open = m;
    if (o.rollout) {
      const F d = drift_of(t, i, m), rho = only(m, exponential(d).power);
      drift = add(drift, rho), largest = max(largest, rho);
      weight = weight_of(rho, q, o);
      open = both(m, gate_of(d, q, o));
    }
    store(t.applied + i, only(open, weight));
    F k = o.plan.weight_in_ratio ? set1(1.0f) : weight;
    if (o.weights) k = mul(k, t.weights[i]);
    if (o.keep) open = both(open, t.keep[i]);
    if (q.strayed) open = both(open, at_least(t.adv[i], set1(0.0f)));
    store(t.multiplier + i, only(open, k));
  }
  sums.add(kDrift, drift);
  sums.drift_max = max(sums.drift_max, largest);
}

// d = lp_ref − lp → the estimate, perhaps times r, and beta times its derivatives
template <formulas::Estimate<formulas::V> (*formula)(formulas::V, const formulas::KlBounds&)>
void kl_tile(Tile& t, const Sequence& q, const Objective& o, Sums& sums) {
  formulas::KlBounds bounds;
  std::memcpy(&bounds, o.kl_hyper, sizeof bounds);
  const F beta = set1(o.beta);
  F total = set1(0.0f);
  for (int64_t i = 0; i < t.padded; i += kLanes) {
    const M m = t.mask[i];
    const F d = only(m, sub(t.ref_logp[i], t.logp[i]));
    const auto estimate = formula(formulas::V(d), bounds);
    F value = estimate.value.x, by_logp = o.plan.kl_through ? negative(d) : estimate.d_logp.x, by_ratio = set1(0.0f);
    if (o.plan.kl_ratio) {
      const LogRatio token = log_ratio(t, i, m, o);
      F r = set1(q.ratio);
      if (o.plan.kl_ratio == 2) {
        r = exponential(token.x).power;
      } else if (!o.sequence) {
        r = exponential(min(set1(o.s.unit_high), max(set1(o.s.unit_low), token.x))).power;
      }
      value = mul(r, value), by_logp = mul(r, by_logp);
      if (o.plan.kl_ratio == 2) {
        by_logp = add(by_logp, only(token.inside, value));
      } else {
        by_ratio = value;
      }
    }
    total = add(total, only(m, value));
    store(t.kl_logp + i, mul(beta, only(m, by_logp)));
    store(t.kl_ratio + i, mul(beta, only(m, by_ratio)));
  }
  sums.add(kKl, total);
}

// The surrogate, the metrics of the ratio, and the gradient: `g` is c·scale·∂/∂log p of each token, in which x of a sequence
// is not yet seen; the sum of ∂/∂x is returned for it.
template <class Hyper, formulas::Surrogate<formulas::V> (*formula)(const formulas::Token<formulas::V>&, const Hyper&)>
double surrogate_tile(Tile& t, const Sequence& q, const Objective& o, Sums& sums, float* g, bool streamed) {
  using formulas::V;
  Hyper hyper;
  std::memcpy(&hyper, o.hyper, sizeof hyper);
  const F zero = set1(0.0f), one = set1(1.0f), scale = set1(q.c * o.scale);
  F policy = zero, xs = zero, k3 = zero, ratios = zero, largest = zero, weights = zero, squares = zero, pull = zero;
  const M unit_inside = when(q.inside);
  int used_count = 0, clipped_count = 0, low_count = 0;
  for (int64_t i = 0; i < t.padded; i += kLanes) {
    const M m = t.mask[i];
    const LogRatio token = log_ratio(t, i, m, o);
    const Exponential e = exponential(token.x);
    F unit = token.x, r = e.power;
    M inside = token.inside;
    if (o.sequence) {
      unit = set1(q.unit), r = set1(q.ratio);
    } else if (o.unit_bounded) {
      inside = both(inside, within(unit, set1(o.s.unit_low), set1(o.s.unit_high)));
      unit = min(set1(o.s.unit_high), max(set1(o.s.unit_low), unit));
      r = exponential(unit).power;
    }
    r = only(m, r);
    const auto s = formula({V(t.logp[i]), V(t.old_logp[i]), V(unit), V(r), V(t.adv[i]), V(t.extra[i])}, hyper);
    F value = s.value.x, by_x = s.d_log_ratio.x, by_logp = s.d_logp.x, w = r;
    M used = m;
    if (o.multiplied) {
      const F k = load(t.multiplier + i);
      used = both(m, unequal(k, zero));
      value = mul(k, value), by_x = mul(k, by_x), by_logp = mul(k, by_logp);
    }
    if (o.applied) w = mul(r, load(t.applied + i));
    value = only(used, value), by_x = only(used, by_x), by_logp = only(used, by_logp);

    const M clipped = both(used, either(unequal(s.clipped.x, zero), except(m, token.inside)));
    used_count += count(used), clipped_count += count(clipped), low_count += count(both(clipped, greater(one, r)));
    policy = add(policy, value);
    xs = add(xs, token.x), k3 = add(k3, sub(e.grown, token.x));
    ratios = add(ratios, r), largest = max(largest, r);
    w = min(set1(kLargestWeight), w);
    weights = add(weights, w), squares = fma(w, w, squares);

    if (o.kl) by_logp = add(by_logp, load(t.kl_logp + i)), by_x = add(by_x, load(t.kl_ratio + i));
    if (o.pulled_back) {
      pull = add(pull, by_x);
    } else {
      by_logp = add(by_logp, only(o.sequence ? unit_inside : inside, by_x));
    }
    if (!g) continue;
    if (streamed) {
      stream(g + i, mul(scale, by_logp));
    } else {
      store(g + i, mul(scale, by_logp));
    }
  }
  sums.add(kPolicy, policy), sums.add(kX, xs), sums.add(kK3, k3), sums.add(kRatio, ratios);
  sums.add(kWeight, weights), sums.add(kWeightSq, squares);
  sums.ratio_max = max(sums.ratio_max, largest);
  sums.used += used_count, sums.low += low_count, sums.high += clipped_count - low_count;
  return reduce_add(pull);
}

// −entropy_coef·H: its sums, and its gradient, of which c·scale is `scale`
inline void entropy_tile(const Tile& t, const Objective& o, float scale, Sums& sums, float* g) {
  F total = set1(0.0f), kept_total = set1(0.0f);
  const F slope = set1(-o.entropy_coef * scale);
  for (int64_t i = 0; i < t.padded; i += kLanes) {
    const M m = t.mask[i], kept = o.plan.entropy_mean && o.keep ? both(m, t.keep[i]) : m;
    const F h = t.entropy[i];
    total = add(total, only(m, h)), kept_total = add(kept_total, only(kept, h));
    sums.kept += count(kept);
    if (g) store(g + i, only(kept, slope));
  }
  sums.add(kEntropy, total), sums.add(kKeptEntropy, kept_total);
}

// The gradient through x of the sequence, for each of its tokens that is within its own bounds.
inline void pull_back(const Tile& t, const Objective& o, float pull, const float* part, float* g, bool streamed) {
  for (int64_t i = 0; i < t.padded; i += kLanes) {
    const M m = t.mask[i], inside = o.bounded ? log_ratio(t, i, m, o).inside : m;
    const F d = add(load(part + i), only(inside, set1(pull)));
    if (streamed) {
      stream(g + i, d);
    } else {
      store(g + i, d);
    }
  }
}

// What a first walk over a sequence adds up.
struct Looked {
  D drift = zero_double(), looked = zero_double();
  int64_t count = 0;

  void add(const Tile& t, const Objective& o) {
    for (int64_t i = 0; i < t.padded; i += kLanes) {
      const M m = t.mask[i];
      const F d = drift_of(t, i, m);
      drift = accumulate(drift, d);
      looked = accumulate(looked, looked_at(o.plan.gate_kind, d));
      count += rlfast::RLFAST_ISA_NS::count(m);
    }
  }
};

// And a second one, which knows the weight and the gate.
struct Measured {
  D x = zero_double(), log_weight = zero_double(), adv = zero_double(), moved = zero_double();
  int64_t count = 0;

  void add(const Tile& t, const Sequence& q, const Objective& o) {
    for (int64_t i = 0; i < t.padded; i += kLanes) {
      const M m = t.mask[i];
      count += rlfast::RLFAST_ISA_NS::count(m);
      x = accumulate(x, log_ratio(t, i, m, o).x);
      if (o.plan.mean_adv) adv = accumulate(adv, only(m, t.own_adv[i]));
      if (o.plan.weight_in_ratio) log_weight = accumulate(log_weight, only(m, log_weight_of(t, i, m, q, o)));
      if (o.s.off_policy < HUGE_VALF) moved = accumulate(moved, moved_of(t, i, m, o));
    }
  }

private:
  // log of ρ as it is applied: of 0, LOG_LEAST
  static F log_weight_of(const Tile& t, int64_t i, M m, const Sequence& q, const Objective& o) {
    const auto bounded = [](double x) { return static_cast<float>(std::min(kLogMost, std::max(kLogLeast, x))); };
    const F d = o.rollout ? drift_of(t, i, m) : set1(0.0f);
    F y = set1(bounded(std::log(static_cast<double>(q.weight))));
    if (o.plan.weight == kAtToken) {
      y = max(set1(bounded(std::log(static_cast<double>(o.s.weight_low)))), d);
      y = min(set1(bounded(std::log(static_cast<double>(o.s.weight_high)))), y);
    }
    return select(o.rollout ? gate_of(d, q, o) : every(), y, set1(static_cast<float>(kLogLeast)));
  }
  // log π_sampled − log π, where NaN counts as 0
  static F moved_of(const Tile& t, int64_t i, M m, const Objective& o) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    const F sampled = o.rollout ? t.rollout_logp[i] : t.old_logp[i], d = only(m, sub(sampled, t.logp[i]));
    return min(set1(kLargest), max(set1(-kLargest), only(equal(d, d), d)));
  }
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
