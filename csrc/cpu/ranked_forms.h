// The losses of ranked groups, a group a lane: kernels/formulas/ranked.py has the same equations. Candidates are in their
// order, the best first, so that i < j where i is ahead of j.
#pragma once
#include <algorithm>
#include <vector>

#include "preference_tile.h"

namespace rlfast {
namespace RLFAST_ISA_NS {

// Candidate i of every lane's group; what is beyond the end of a group holds 0.
struct Ranked {
  int64_t most;             // candidates of the largest group
  F count;                  // candidates of each
  const float *x, *reward;  // [most, lanes]
  float* d;                 // ∂ℓ/∂x, zeros at first
  float* scratch;           // [kScratch, most, lanes]
  float tau, top;

  static constexpr int kScratch = 4;
  M valid(int64_t i) const { return greater(count, set1(static_cast<float>(i))); }
  F x_of(int64_t i) const { return load(x + i * kLanes); }
  F reward_of(int64_t i) const { return load(reward + i * kLanes); }
  void gain(int64_t i, F by) const { store(d + i * kLanes, add(load(d + i * kLanes), by)); }
  float* part(int k) const { return scratch + k * most * kLanes; }
};

// A sum whose rounding is carried along: there may be any number of candidates.
struct LaneSum {
  F high = set1(0.0f), low = set1(0.0f);
  void operator+=(F x) {
    const F sum = add(high, x), shadow = sub(sum, high);
    low = add(low, add(sub(high, sub(sum, shadow)), sub(x, shadow)));
    high = sum;
  }
  // of an infinite sum there is no rounding
  F value() const { return select(equal(low, low), add(high, low), high); }
};

inline F e_to(F x) { return exponential(x).power; }

// (log(1 + e^z), σ(z)), of any z.
struct Logistic {
  F softplus, sigmoid;
};

inline Logistic logistic(F z) {
  const F zero = set1(0.0f), one = set1(1.0f), e = e_to(negative(abs(z)));
  return {add(max(zero, z), log1p_of(e)), div(select(greater(zero, z), e, one), add(one, e))};
}

// Σ_{i ≤ top} −log p_i, p_i = e^own_i/(e^own_i + Σ_{j>i} e^z_ij) with own_i = x_i·T_i and z_ij = x_j·T_ij; 1 − p_i is
// Σ_j p_ij, not a difference. T_ij = r_i − r_j, T_i = max_j T_ij if tempered, else 1.
template <bool tempered>
F in_turn(const Ranked& g) {
  const F one = set1(1.0f);
  F last = set1(0.0f);
  for (int64_t i = 0; tempered && i < g.most; ++i) last = select(g.valid(i), g.reward_of(i), last);
  LaneSum value;
  for (int64_t i = 0; i < g.most && static_cast<float>(i) < g.top; ++i) {
    const F r = g.reward_of(i), t = tempered ? only(g.valid(i), sub(r, last)) : one, own = mul(g.x_of(i), t);
    float *z = g.part(0), *e = g.part(1);
    const auto t_of = [&](int64_t j) { return tempered ? sub(r, g.reward_of(j)) : one; };
    F peak = own;
    for (int64_t j = i + 1; j < g.most; ++j) {
      const F z_j = mul(g.x_of(j), t_of(j));
      store(z + j * kLanes, z_j), peak = select(g.valid(j), max(peak, z_j), peak);
    }
    const F here = e_to(sub(own, peak));
    LaneSum rest;
    for (int64_t j = i + 1; j < g.most; ++j) {
      const F e_j = only(g.valid(j), e_to(sub(load(z + j * kLanes), peak)));
      store(e + j * kLanes, e_j), rest += e_j;
    }
    const F away = rest.value(), total = add(here, away);
    const F nll = add(sub(peak, own), log1p_of(select(equal(own, peak), away, sub(total, one))));
    const F share = div(one, total);
    value += only(g.valid(i), nll);
    LaneSum lost;
    for (int64_t j = i + 1; j < g.most; ++j) {
      const F p = mul(load(e + j * kLanes), share);
      lost += p, g.gain(j, mul(p, t_of(j)));
    }
    g.gain(i, negative(mul(t, lost.value())));
  }
  return value.value();
}

inline F plackett_luce(const Ranked& g) { return in_turn<false>(g); }
inline F pro(const Ranked& g) { return in_turn<true>(g); }

// Mean over the pairs with r_i > r_j of −log σ(x_i − x_j).
inline F bradley_terry(const Ranked& g) {
  const F one = set1(1.0f);
  LaneSum value;
  F pairs = set1(0.0f);
  for (int64_t i = 0; i < g.most; ++i) {
    for (int64_t j = i + 1; j < g.most; ++j) {
      const M better = both(g.valid(j), greater(g.reward_of(i), g.reward_of(j)));
      const Logistic of = logistic(sub(g.x_of(j), g.x_of(i)));
      const F lost = only(better, of.sigmoid);
      value += only(better, of.softplus), pairs = add(pairs, only(better, one));
      g.gain(j, lost), g.gain(i, negative(lost));
    }
  }
  const F n = max(one, pairs);
  for (int64_t i = 0; i < g.most; ++i) store(g.d + i * kLanes, div(load(g.d + i * kLanes), n));
  return div(value.value(), n);
}

// Σ over the pairs with r_i > r_j of max(0, x_j − x_i).
inline F hinge(const Ranked& g) {
  const F one = set1(1.0f);
  LaneSum value;
  for (int64_t i = 0; i < g.most; ++i) {
    for (int64_t j = i + 1; j < g.most; ++j) {
      const F z = sub(g.x_of(j), g.x_of(i));
      const M better = both(g.valid(j), greater(g.reward_of(i), g.reward_of(j)));
      const M wrong = both(better, greater(z, set1(0.0f)));
      const F lost = only(wrong, one);
      value += only(wrong, z), g.gain(j, lost), g.gain(i, negative(lost));
    }
  }
  return value.value();
}

// log softmax(y/τ) and softmax(y/τ) of every group.
inline void log_softmax(const Ranked& g, const float* y, float tau, float* log_p, float* p) {
  F peak = set1(-std::numeric_limits<float>::infinity());
  const auto y_of = [&](int64_t i) { return div(load(y + i * kLanes), set1(tau)); };
  for (int64_t i = 0; i < g.most; ++i) peak = select(g.valid(i), max(peak, y_of(i)), peak);
  LaneSum sum;
  for (int64_t i = 0; i < g.most; ++i) {
    const F e = only(g.valid(i), e_to(sub(y_of(i), peak)));
    store(p + i * kLanes, e), sum += e;
  }
  const F total = sum.value(), log_total = log_of(total);
  for (int64_t i = 0; i < g.most; ++i) {
    store(log_p + i * kLanes, only(g.valid(i), sub(sub(y_of(i), peak), log_total)));
    store(p + i * kLanes, div(load(p + i * kLanes), total));
  }
}

// KL(p‖q), p = softmax(x), q = softmax(r/τ): ∂/∂x_k = p_k·(log p_k − log q_k − ℓ).
inline F reverse_kl(const Ranked& g) {
  float *log_p = g.part(0), *p = g.part(1), *log_q = g.part(2);
  log_softmax(g, g.x, 1.0f, log_p, p), log_softmax(g, g.reward, g.tau, log_q, g.part(3));
  LaneSum sum;
  const auto gap = [&](int64_t i) { return sub(load(log_p + i * kLanes), load(log_q + i * kLanes)); };
  for (int64_t i = 0; i < g.most; ++i) sum += mul(load(p + i * kLanes), gap(i));
  const F value = sum.value();
  for (int64_t i = 0; i < g.most; ++i) g.gain(i, mul(load(p + i * kLanes), sub(gap(i), value)));
  return value;
}

// −Σ_k q_k·log p_k: ∂/∂x_k = p_k − q_k.
inline F cross_entropy(const Ranked& g) {
  float *log_p = g.part(0), *p = g.part(1), *q = g.part(3);
  log_softmax(g, g.x, 1.0f, log_p, p), log_softmax(g, g.reward, g.tau, g.part(2), q);
  LaneSum value;
  for (int64_t i = 0; i < g.most; ++i) {
    const F q_i = load(q + i * kLanes);
    value += negative(mul(q_i, load(log_p + i * kLanes)));
    g.gain(i, only(g.valid(i), sub(load(p + i * kLanes), q_i)));
  }
  return value.value();
}

// −Σ_k [q_k·log σ(x_k) + log σ(−x_k)/K].
inline F nca(const Ranked& g) {
  float* q = g.part(1);
  log_softmax(g, g.reward, g.tau, g.part(0), q);
  const F each = div(set1(1.0f), max(set1(1.0f), g.count));
  LaneSum value;
  for (int64_t i = 0; i < g.most; ++i) {
    const F q_i = load(q + i * kLanes), x = g.x_of(i);
    const Logistic up = logistic(x), down = logistic(negative(x));
    value += only(g.valid(i), add(mul(q_i, down.softplus), mul(each, up.softplus)));
    g.gain(i, only(g.valid(i), sub(mul(each, up.sigmoid), mul(q_i, down.sigmoid))));
  }
  return value.value();
}

using FormStage = void (*)(const Ranked&, float* value);

template <F (*form)(const Ranked&)>
void form_stage(const Ranked& g, float* value) {
  store(value, form(g));
}

constexpr NamedStage<FormStage> kForms[] = {{"plackett_luce", form_stage<plackett_luce>},
                                            {"pro", form_stage<pro>},
                                            {"bradley_terry", form_stage<bradley_terry>},
                                            {"hinge", form_stage<hinge>},
                                            {"reverse_kl", form_stage<reverse_kl>},
                                            {"cross_entropy", form_stage<cross_entropy>},
                                            {"nca", form_stage<nca>}};

}  // namespace RLFAST_ISA_NS
}  // namespace rlfast
