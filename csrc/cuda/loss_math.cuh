// The arithmetic of token_loss on a GPU: one token within its sequence. rlfast/ops/token_loss.py has the equations.
#pragma once
#include "float_words.cuh"
#include "loss_tokens.cuh"

namespace rlfast::cuda {

namespace {

// What a token needs of its sequence.
struct Sequence {
  float count = 1.0f;     // tokens that count, at least 1
  float weight = 1.0f;    // ρ, if it is the sequence's
  bool open = true;       // the gate, if it is the sequence's
  float adv = 0.0f;       // mean advantage
  float unit = 0.0f;      // x of the unit, if it is the sequence's
  bool on_policy = true;  // mean(log π_rollout − log π) ≤ δ
};

RLFAST_DEVICE bool within(float x, float low, float high) { return x >= low && x <= high; }

// NaN stays NaN, as torch.clamp has it.
RLFAST_DEVICE float clamped(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// As torch.nan_to_num(x, nan=0).
RLFAST_DEVICE float finite(float x) { return x != x ? 0.0f : clamped(x, -FLT_MAX, FLT_MAX); }

// ρ of a token: its logarithm, what multiplies the surrogate, and whether its gate is open.
struct Correction {
  float drift, weight;
  bool open;
  RLFAST_DEVICE float applied() const { return open ? weight : 0.0f; }
};

RLFAST_DEVICE float gated(const LossPlan& plan, float drift) {
  if (plan.gate_kind == 1) return drift;
  return plan.gate_kind == 2 ? 0.5f * drift * drift : expm1f(drift) - drift;
}

RLFAST_DEVICE float weight_of(const LossSettings& s, float drift) {
  return clamped(expf(drift), s.weight_low, s.weight_high);
}

RLFAST_DEVICE Correction correction(const LossCall& c, const Sequence& s, float old_logp, float rollout) {
  float drift = c.fields.rollout_logp.data ? finite(old_logp - rollout) : 0.0f;
  float weight = c.plan.weight == kAtToken ? weight_of(c.settings, drift) : s.weight;
  bool open =
      c.plan.gate == kAtToken ? within(gated(c.plan, drift), c.settings.gate_low, c.settings.gate_high) : s.open;
  return {drift, weight, open};
}

// x = clamp(log π − log π_old), and whether it moves with log π.
struct LogRatio {
  float x;
  bool moves;
};

RLFAST_DEVICE LogRatio log_ratio(const LossCall& c, float logp, float old_logp, float adv) {
  float raw = logp - old_logp;
  float low = c.plan.signed_bounds && adv > 0.0f ? -INFINITY : c.settings.inner_low;
  float high = c.plan.signed_bounds && adv < 0.0f ? INFINITY : c.settings.inner_high;
  return {clamped(raw, low, high), within(raw, low, high)};
}

using Seen = formulas::Token<float>;
using Part = formulas::Surrogate<float>;

enum SurrogateNumber {
#define RLFAST_NUMBER(name, Hyper) kSurrogate_##name,
  RLFAST_SURROGATE_FORMULAS(RLFAST_NUMBER)
#undef RLFAST_NUMBER
};

enum EstimatorNumber {
#define RLFAST_NUMBER(name, Hyper) kEstimator_##name,
  RLFAST_KL_FORMULAS(RLFAST_NUMBER)
#undef RLFAST_NUMBER
};

// All of a grid take the same branch, once for four tokens: a kernel for each formula would be 20 kernels.
RLFAST_DEVICE void surrogate(const LossFormulas& f, const Seen (&seen)[kGroup], Part (&part)[kGroup]) {
  switch (f.surrogate) {
#define RLFAST_CASE(name, Hyper)                                                                    \
  case kSurrogate_##name: {                                                                         \
    auto h = hyper_of<formulas::Hyper>(f.hyper);                                                    \
    _Pragma("unroll") for (int j = 0; j < kGroup; ++j) part[j] = formulas::name<float>(seen[j], h); \
    break;                                                                                          \
  }
    RLFAST_SURROGATE_FORMULAS(RLFAST_CASE)
#undef RLFAST_CASE
  }
}

RLFAST_DEVICE formulas::Estimate<float> estimate(const LossFormulas& f, float d) {
  auto h = hyper_of<formulas::KlBounds>(f.kl_hyper);
  switch (f.estimator) {
#define RLFAST_CASE(name, Hyper) \
  case kEstimator_##name:        \
    return formulas::name<float>(d, h);
    RLFAST_KL_FORMULAS(RLFAST_CASE)
#undef RLFAST_CASE
  }
  return {0.0f, 0.0f};
}

// The KL of a token and its derivatives by log π and by x of the unit.
struct Divergence {
  float value = 0.0f, d_logp = 0.0f, d_unit = 0.0f;
};

// KL·r has two paths to log π: the estimator's own, and through r. The third of kl_ratio is the second's gradient where r = 1.
RLFAST_DEVICE Divergence divergence(const LossCall& c, const LogRatio& x, float ratio, float d) {
  auto found = estimate(c.formulas, d);
  Divergence kl = {found.value, c.plan.kl_through ? -d : found.d_logp, 0.0f};
  if (!c.plan.kl_ratio) return kl;
  if (c.plan.kl_ratio == 3) {
    kl.d_logp += fabsf(kl.value) < c.formulas.kl_hyper[1] ? kl.value : 0.0f;
    return kl;
  }
  float r = c.plan.kl_ratio == 1 ? ratio : expf(x.x);
  kl.value = r * kl.value, kl.d_logp = r * kl.d_logp;
  if (c.plan.kl_ratio == 1)
    kl.d_unit = kl.value;
  else
    kl.d_logp += x.moves ? kl.value : 0.0f;
  return kl;
}

}  // namespace

}  // namespace rlfast::cuda
