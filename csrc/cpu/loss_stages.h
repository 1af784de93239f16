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

// Infinities as the largest float, NaN as 0.
inline F without_nan(F d) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  return min(set1(kLargest), max(set1(-kLargest), only(equal(d, d), d)));
}

// log ρ of the token; NaN counts as ρ = 1.
inline F drift_of(const View& v, int64_t i, M m) { return without_nan(only(m, sub(v.old_logp[i], v.rollout_logp[i]))); }

// What the gate looks at: k1 = d, k2 = d²/2, k3 = e^d − 1 − d.
inline F looked_at(int kind, F d) {
  if (kind == 1) return d;
  if (kind == 2) return mul(set1(0.5f), mul(d, d));
  return sub(exponential(d).grown, d);
}

inline F unit_bounded(F x, const Objective& o) { return min(set1(o.s.unit_high), max(set1(o.s.unit_low), x)); }
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
  const View v = t.view;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    const M m = v.mask[i];
    const uint32_t left = bits(both(m, gate_of(drift_of(v, i, m), q, o)));
    for (int lane = 0; lane < kLanes; ++lane) t.mask_bytes[i + lane] = (left >> lane) & 1;
  }
  t.view.mask = {t.mask_bytes, -1};
}

struct LogRatio {
  F x;       // of the token, within its bounds
  M inside;  // where it is
};

// x = clamp(lp − lp_old); a signed bound holds from above where A > 0, from below where A < 0
inline LogRatio log_ratio(const View& v, int64_t i, M m, const Objective& o) {
  const F raw = only(m, sub(v.logp[i], v.old_logp[i]));
  if (!o.bounded) return {raw, m};
  F low = set1(o.s.inner_low), high = set1(o.s.inner_high);
  if (o.plan.signed_bounds) {
    const F adv = v.own_adv[i], zero = set1(0.0f);
    low = select(greater(adv, zero), set1(-HUGE_VALF), low);
    high = select(greater(zero, adv), set1(HUGE_VALF), high);
  }
  return {only(m, min(high, max(low, raw))), both(m, within(raw, low, high))};
}

// ρ, its gate, keep, weights and the off-policy mask → multiplier, applied
inline void multipliers(Tile& t, const Sequence& q, const Objective& given, Sums& sums) {
  const View v = t.view;
  const Objective o = given;
  F largest = set1(0.0f);
  Sum drift;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    v.rollout_logp.ahead(i), v.weights.ahead(i);
    const M m = v.mask[i];
    F weight = set1(1.0f);
    M open = m;
    if (o.rollout) {
      const F d = drift_of(v, i, m), rho = only(m, exponential(d).power);
      drift.add(rho), largest = max(largest, rho);
      weight = weight_of(rho, q, o);
      open = both(m, gate_of(d, q, o));
    }
    store(t.applied + i, only(open, weight));
    F k = weight;
    if (o.plan.weight_in_ratio) k = set1(1.0f), open = m;  // a closed gate is a ρ of 0 in the ratio, and drops nothing
    if (o.weights) k = mul(k, v.weights[i]);
    if (o.keep) open = both(open, v.keep[i]);
    if (q.strayed) open = both(open, at_least(v.adv[i], set1(0.0f)));
    store(t.multiplier + i, only(open, k));
    if (due(i)) drift.flush();
  }
  sums.add(kDrift, drift);
  sums.drift_max = max(sums.drift_max, largest);
}

// w = r·ρ as it is applied, of the effective sample size
inline void weight_tile(const Tile& t, const Sequence& q, const Objective& given, Sums& sums) {
  const View v = t.view;
  const Objective o = given;
  Sum weights, squares;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    const F r = o.sequence ? set1(q.ratio) : load(t.ratio + i);
    const F w = min(set1(kLargestWeight), o.applied ? mul(r, load(t.applied + i)) : r);
    const F counted = only(except(v.mask[i], greater(set1(kSmallestWeight), w)), w);
    weights.add(counted), squares.add(mul(counted, counted));
    if (due(i)) weights.flush(), squares.flush();
  }
  sums.add(kWeight, weights), sums.add(kWeightSq, squares);
}

// x and r of each token, and their metrics: −x is k1, e^x − 1 − x is k3
inline void ratio_tile(Tile& t, const Sequence& q, const Objective& given, Sums& sums) {
  const View v = t.view;
  const Objective o = given;
  F largest = set1(0.0f);
  Sum xs, k3, ratios, squares;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    v.logp.ahead(i), v.old_logp.ahead(i);
    const M m = v.mask[i];
    const F x = log_ratio(v, i, m, o).x;
    const Exponential e = exponential(x);
    xs.add(x), k3.add(sub(e.grown, x));
    const F r = only(m, o.unit_bounded ? exponential(unit_bounded(x, o)).power : e.power);
    store(t.ratio + i, r);
    ratios.add(r), squares.add(mul(r, r)), largest = max(largest, r);
    if (due(i)) xs.flush(), k3.flush(), ratios.flush(), squares.flush();
  }
  sums.add(kX, xs), sums.add(kK3, k3), sums.add(kRatio, ratios);
  sums.ratio_max = max(sums.ratio_max, largest);
  // beside a weight of 1e-3, those below the smallest do not count anyway
  const float most = reduce_max(largest);
  if (o.applied || !(most >= 1e-3f && most <= kLargestWeight)) {
    weight_tile(t, q, o, sums);
  } else {
    sums.add(kWeight, ratios), sums.add(kWeightSq, squares);
  }
}

// d = lp_ref − lp → the estimate, perhaps times r, and beta times its derivatives
template <formulas::Estimate<formulas::V> (*formula)(formulas::V, const formulas::KlBounds&)>
void kl_tile(Tile& t, const Sequence& q, const Objective& given, Sums& sums) {
  const View v = t.view;
  const Objective o = given;
  formulas::KlBounds bounds;
  std::memcpy(&bounds, o.kl_hyper, sizeof bounds);
  const F beta = set1(o.beta);
  Sum total;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    v.ref_logp.ahead(i);
    const M m = v.mask[i];
    const F d = only(m, sub(v.ref_logp[i], v.logp[i]));
    const auto estimate = formula(formulas::V(d), bounds);
    F value = estimate.value.x, by_logp = o.plan.kl_through ? negative(d) : estimate.d_logp.x;
    if (o.plan.kl_ratio == 1) {
      const F r = o.sequence ? set1(q.ratio) : load(t.ratio + i);
      value = mul(r, value), by_logp = mul(r, by_logp);
      store(t.kl_ratio + i, mul(beta, only(m, value)));
    } else if (o.plan.kl_ratio == 2) {
      const LogRatio token = log_ratio(v, i, m, o);
      const F r = exponential(token.x).power;
      value = mul(r, value), by_logp = add(mul(r, by_logp), only(token.inside, value));
    } else if (o.plan.kl_ratio == 3) {  // by π/sg(π), which is 1
      const F bound = set1(bounds.kl_max);
      by_logp = add(by_logp, only(both(greater(bound, value), greater(value, negative(bound))), value));
    }
    total.add(only(m, value));
    if (due(i)) total.flush();
    store(t.kl_logp + i, mul(beta, only(m, by_logp)));
  }
  sums.add(kKl, total);
}

// The surrogate and the gradient: `g` is c·scale·∂/∂log p of each token, in which x of a sequence is not yet seen; what
// ∂/∂x adds up to is returned for it.
template <bool kSequence, class Hyper,
          formulas::Surrogate<formulas::V> (*formula)(const formulas::Token<formulas::V>&, const Hyper&)>
double surrogate_tile(Tile& t, const Sequence& q, const Objective& given, Sums& sums, float* g, bool streamed) {
  using formulas::V;
  const View v = t.view;
  const Objective o = given;
  Hyper hyper;
  std::memcpy(&hyper, o.hyper, sizeof hyper);
  const F zero = set1(0.0f), one = set1(1.0f), scale = set1(q.c * o.scale);
  const M unit_inside = when(q.inside);
  Sum policy, pull;
  N used_count = zero_count(), low = zero_count(), high = zero_count();
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    v.own_adv.ahead(i);
    const M m = v.mask[i];
    const LogRatio token = log_ratio(v, i, m, o);
    F unit = token.x, r;
    M inside = token.inside;
    if constexpr (kSequence) {
      unit = set1(q.unit), r = only(m, set1(q.ratio)), inside = unit_inside;
    } else {
      r = load(t.ratio + i);
      if (o.unit_bounded) {
        inside = both(inside, within(unit, set1(o.s.unit_low), set1(o.s.unit_high)));
        unit = unit_bounded(unit, o);
      }
    }
    const auto s = formula({V(v.logp[i]), V(v.old_logp[i]), V(unit), V(r), V(v.adv[i]), V(v.extra[i])}, hyper);
    // a formula's minimum and maximum may drop a NaN
    F value = select(equal(unit, unit), s.value.x, unit), by_x = s.d_log_ratio.x, by_logp = s.d_logp.x;
    M used = m;
    if (o.multiplied) {
      const F k = load(t.multiplier + i);
      used = both(m, unequal(k, zero));
      used_count = tally(used_count, used);
      value = mul(k, value), by_x = mul(k, by_x), by_logp = mul(k, by_logp);
    }
    policy.add(only(used, value));
    by_x = only(used, by_x), by_logp = only(used, by_logp);

    const M at_bound = both(used, unequal(s.clipped.x, zero));
    const M clipped = o.bounded ? either(at_bound, except(used, token.inside)) : at_bound;
    low = tally(low, both(clipped, greater(one, r))), high = tally(high, both(clipped, at_least(r, one)));

    if (o.kl) by_logp = add(by_logp, load(t.kl_logp + i));
    if (o.kl && o.plan.kl_ratio == 1) by_x = add(by_x, load(t.kl_ratio + i));
    if (kSequence && o.pulled_back) {
      pull.add(by_x);
    } else {
      by_logp = add(by_logp, only(inside, by_x));
    }
    if (due(i)) policy.flush(), pull.flush();
    if (!g) continue;
    if (streamed) {
      stream(g + i, mul(scale, by_logp));
    } else {
      store(g + i, mul(scale, by_logp));
    }
  }
  sums.add(kPolicy, policy);
  sums.used = add(sums.used, used_count), sums.low = add(sums.low, low);
  sums.high = add(sums.high, high);
  return reduce_add(pull.sum());
}

// −entropy_coef·H: its sums, and its gradient, of which c·scale is `scale`
inline void entropy_tile(const Tile& t, const Objective& o, float scale, Sums& sums, float* g) {
  const View v = t.view;
  const bool by_keep = o.plan.entropy_mean && o.keep;
  const F slope = set1(-o.entropy_coef * scale);
  Sum total, kept_total;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    v.entropy.ahead(i);
    const M m = v.mask[i], kept = by_keep ? both(m, v.keep[i]) : m;
    const F h = v.entropy[i];
    total.add(only(m, h)), kept_total.add(only(kept, h));
    sums.kept = tally(sums.kept, kept);
    if (due(i)) total.flush(), kept_total.flush();
    if (g) store(g + i, only(kept, slope));
  }
  sums.add(kEntropy, total), sums.add(kKeptEntropy, kept_total);
}

// The gradient through x of the sequence, for each of its tokens that is within its own bounds.
inline void pull_back(const Tile& t, const Objective& given, float pull, const float* part, float* g, bool streamed) {
  const View v = t.view;
  const Objective o = given;
  for (int64_t i = 0; i < v.padded; i += kLanes) {
    const M m = v.mask[i], inside = o.bounded ? log_ratio(v, i, m, o).inside : m;
    const F d = add(load(part + i), only(inside, set1(pull)));
    if (streamed) {
      stream(g + i, d);
    } else {
      store(g + i, d);
    }
  }
}

// What the first walk over a sequence adds up: log ρ, and what its gate looks at.
struct Looked {
  D drift = zero_double(), looked = zero_double();

  void add(const Tile& t, const Objective& o) {
    const View v = t.view;
    for (int64_t i = 0; i < v.padded; i += kLanes) {
      v.old_logp.ahead(i), v.rollout_logp.ahead(i);
      const M m = v.mask[i];
      const F d = drift_of(v, i, m);
      drift = accumulate(drift, d), looked = accumulate(looked, looked_at(o.plan.gate_kind, d));
    }
  }
};

// And a second walk, which knows ρ of the sequence and its gate. Sums that go into an exponential are in doubles.
struct Measured {
  D x = zero_double(), log_weight = zero_double(), adv = zero_double(), moved = zero_double();
  N count = zero_count();

  // k1 and k3 of the tokens, whose x the walk sees anyway, go to the sums of a sequence's objective.
  void add(const Tile& t, const Sequence& q, const Objective& given, Sums& sums) {
    const View v = t.view;
    const Objective o = given;
    D xs = zero_double();
    Sum k3;
    for (int64_t i = 0; i < v.padded; i += kLanes) {
      const M m = v.mask[i];
      count = tally(count, m);
      if (o.sequence) {
        v.logp.ahead(i), v.old_logp.ahead(i);
        const F token = log_ratio(v, i, m, o).x;
        xs = accumulate(xs, token), k3.add(sub(exponential(token).grown, token));
        if (due(i)) k3.flush();
      }
      if (o.plan.mean_adv) adv = accumulate(adv, only(m, v.own_adv[i]));
      if (o.plan.weight_in_ratio) log_weight = accumulate(log_weight, only(m, log_weight_of(v, i, m, q, o)));
      if (o.s.off_policy < HUGE_VALF) moved = accumulate(moved, moved_of(v, i, m, o));
    }
    x = rlfast::RLFAST_ISA_NS::add(x, xs);
    sums.of[kX] = rlfast::RLFAST_ISA_NS::add(sums.of[kX], xs);
    sums.add(kK3, k3);
  }

private:
  // log of ρ as it is applied: of 0, kLogLeast
  static F log_weight_of(const View& v, int64_t i, M m, const Sequence& q, const Objective& o) {
    const auto bounded = [](double x) { return static_cast<float>(std::min(kLogMost, std::max(kLogLeast, x))); };
    const F d = o.rollout ? drift_of(v, i, m) : set1(0.0f);
    F y = set1(bounded(std::log(static_cast<double>(q.weight))));
    if (o.plan.weight == kAtToken) {
      y = max(set1(bounded(std::log(static_cast<double>(o.s.weight_low)))), d);
      y = min(set1(bounded(std::log(static_cast<double>(o.s.weight_high)))), y);
    }
    return select(o.rollout ? gate_of(d, q, o) : every(), y, set1(static_cast<float>(kLogLeast)));
  }
  // log π_sampled − log π, where NaN counts as 0
  static F moved_of(const View& v, int64_t i, M m, const Objective& o) {
    return without_nan(only(m, sub(o.rollout ? v.rollout_logp[i] : v.old_logp[i], v.logp[i])));
  }
};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
