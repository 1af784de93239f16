// Printed by tools/emit_cpp.py from kernels/formulas: change those.
// clang-format off
#pragma once
#include "formulas.h"

RLFAST_FORMULAS_BEGIN

// No hyper-parameters.
struct NoHyper {
  float unused;
};

// The range of the ratio, [1 − eps_low, 1 + eps_high].
struct Range {
  float eps_low;
  float eps_high;
};

// The range of the ratio, [1 − eps_low, 1 + eps_high], and two more bounds that are off by default.
struct Clip {
  float eps_low;
  float eps_high;
  float dual_clip;
  float delta;
};

// ℓ = max(−A·min(r, δ), −A·clip(r, 1 − ε_low, 1 + ε_high)), and ℓ ≤ −c·A where A < 0.
// ∂ℓ/∂x = −A·r, and 0 where a bound is active.
// PPO, arXiv 1707.06347; dual clip, 1912.09729; δ, 2505.07291.
template <class V>
RLFAST_FORMULA auto ppo_clip(const Token<V>& t, const Clip& h) {
  auto low = (1.0f - h.eps_low);
  auto high = (1.0f + h.eps_high);
  auto slope = (-t.adv * t.ratio);
  auto unclipped = (-t.adv * minimum(t.ratio, h.delta));
  auto clipped = (-t.adv * minimum(maximum(t.ratio, low), high));
  auto loss = maximum(unclipped, clipped);
  auto inside = ((t.ratio >= low) & (t.ratio <= high));
  auto d = select<V>((unclipped >= clipped), select<V>((t.ratio <= h.delta), slope, 0.0f), select<V>(inside, slope, 0.0f));
  auto beyond = ((t.adv < 0.0f) & (loss > (-t.adv * h.dual_clip)));
  loss = select<V>(beyond, (-t.adv * h.dual_clip), loss);
  d = select<V>(beyond, 0.0f, d);
  return Surrogate<V>{loss, d, 0.0f, select<V>((loss != slope), 1.0f, 0.0f)};
}

// ℓ = −A·log p.
// ∂ℓ/∂log p = −A. Williams 1992.
template <class V>
RLFAST_FORMULA auto reinforce(const Token<V>& t, const NoHyper& h) {
  (void)h;
  return Surrogate<V>{(-t.adv * t.logp), 0.0f, -t.adv, 0.0f};
}

// ℓ = −log p.
// ∂ℓ/∂log p = −1.
template <class V>
RLFAST_FORMULA auto nll(const Token<V>& t, const NoHyper& h) {
  (void)h;
  return Surrogate<V>{-t.logp, 0.0f, -1.0f, 0.0f};
}

// ℓ = −A·r.
// ∂ℓ/∂x = −A·r. GMPO, arXiv 2507.20673, where r is the geometric mean of clipped ratios.
template <class V>
RLFAST_FORMULA auto ratio_weighted(const Token<V>& t, const NoHyper& h) {
  (void)h;
  return Surrogate<V>{(-t.adv * t.ratio), (-t.adv * t.ratio), 0.0f, 0.0f};
}

// ℓ = −sg(clip(r, 1 − ε_low, 1 + ε_high))·A·log p.
// ∂ℓ/∂log p = −clip(r, 1 − ε_low, 1 + ε_high)·A. arXiv 2506.13585.
template <class V>
RLFAST_FORMULA auto cispo(const Token<V>& t, const Range& h) {
  auto weight = minimum(maximum(t.ratio, (1.0f - h.eps_low)), (1.0f + h.eps_high));
  return Surrogate<V>{((-weight * t.adv) * t.logp), 0.0f, (-weight * t.adv), select<V>((weight != t.ratio), 1.0f, 0.0f)};
}

// An upper bound of the ratio.
struct Cap {
  float cap;
};

// ℓ = −sg(min(r, cap))·A·log p.
// ∂ℓ/∂log p = −min(r, cap)·A. arXiv 2506.13585, with an absolute bound instead of 1 + ε.
template <class V>
RLFAST_FORMULA auto cispo_capped(const Token<V>& t, const Cap& h) {
  auto weight = minimum(t.ratio, h.cap);
  return Surrogate<V>{((-weight * t.adv) * t.logp), 0.0f, (-weight * t.adv), select<V>((weight != t.ratio), 1.0f, 0.0f)};
}

// ℓ = −A·log p where A > 0, else −sg(min(r, cap))·A·log p.
// ∂ℓ/∂log p = −A where A > 0, else −min(r, cap)·A. arXiv 2503.14286.
template <class V>
RLFAST_FORMULA auto topr(const Token<V>& t, const Cap& h) {
  auto weight = select<V>((t.adv > 0.0f), 1.0f, minimum(t.ratio, h.cap));
  auto clipped = ((t.adv < 0.0f) & (t.ratio > h.cap));
  return Surrogate<V>{((-weight * t.adv) * t.logp), 0.0f, (-weight * t.adv), select<V>(clipped, 1.0f, 0.0f)};
}

// Temperatures of the gate.
struct Sapo {
  float tau_pos;
  float tau_neg;
};

// ℓ = −A·σ(τ(r − 1))·4/τ.
// ∂ℓ/∂x = −4·A·r·σ(τ(r − 1))·σ(−τ(r − 1)). arXiv 2511.20347.
template <class V>
RLFAST_FORMULA auto sapo(const Token<V>& t, const Sapo& h) {
  auto tau = select<V>((t.adv > 0.0f), h.tau_pos, h.tau_neg);
  auto u = (tau * (t.ratio - 1.0f));
  auto gate = sigmoid(u);
  auto rest = (exp(-u) * gate);
  return Surrogate<V>{(((-t.adv * gate) * 4.0f) / tau), ((((-t.adv * 4.0f) * gate) * rest) * t.ratio), 0.0f, 0.0f};
}

// Exponents of the weight φ(w) = e^λ·w^k·e^(−λw).
struct Vespo {
  float k_pos;
  float lambda_pos;
  float k_neg;
  float lambda_neg;
};

// ℓ = −sg(φ)·A·log p, log φ = λ + k·x − λ·r.
// ∂ℓ/∂log p = −φ·A. x is the sequence's summed log-ratio. arXiv 2602.10693.
template <class V>
RLFAST_FORMULA auto vespo(const Token<V>& t, const Vespo& h) {
  auto k = select<V>((t.adv >= 0.0f), h.k_pos, h.k_neg);
  auto rate = maximum(select<V>((t.adv >= 0.0f), h.lambda_pos, h.lambda_neg), 0.0001f);
  auto phi = exp(((rate + (k * t.log_ratio)) - (rate * t.ratio)));
  phi = select<V>((phi < 3.4e+38f), phi, 0.0f);
  return Surrogate<V>{((-phi * t.adv) * t.logp), 0.0f, (-phi * t.adv), 0.0f};
}

// ℓ = scale·(A − τ·x)².
struct Squared {
  float tau;
  float scale;
};

// ℓ = scale·(A − τ·x)².
// ∂ℓ/∂x = −2·scale·τ·(A − τ·x). Kimi k1.5, arXiv 2501.12599; DRO, 2405.19107 (½); A*-PO, 2505.20686.
template <class V>
RLFAST_FORMULA auto squared_residual(const Token<V>& t, const Squared& h) {
  auto residual = (t.adv - (h.tau * t.log_ratio));
  return Surrogate<V>{((h.scale * residual) * residual), (((-2.0f * h.scale) * h.tau) * residual), 0.0f, 0.0f};
}

// ℓ = scale·(−A·log p + (τ/2)·x²).
// ∂ℓ/∂x = scale·τ·x, ∂ℓ/∂log p = −scale·A: the gradient of the squared residual, up to its factor 2τ.
template <class V>
RLFAST_FORMULA auto quadratic_penalty(const Token<V>& t, const Squared& h) {
  auto loss = ((-t.adv * t.logp) + (((0.5f * h.tau) * t.log_ratio) * t.log_ratio));
  return Surrogate<V>{(h.scale * loss), ((h.scale * h.tau) * t.log_ratio), (-h.scale * t.adv), 0.0f};
}

// 1/λ of advantage-induced policy alignment.
struct Apa {
  float inv_lambda;
};

// ℓ = (x − A/λ)².
// ∂ℓ/∂x = 2·(x − A/λ). arXiv 2306.02231.
template <class V>
RLFAST_FORMULA auto apa(const Token<V>& t, const Apa& h) {
  auto residual = (t.log_ratio - (t.adv * h.inv_lambda));
  return Surrogate<V>{(residual * residual), (2.0f * residual), 0.0f, 0.0f};
}

// Weight e^(c·A), and its bound.
struct Awr {
  float coef;
  float max_weight;
};

// ℓ = −min(e^(c·A), w_max)·log p.
// ∂ℓ/∂log p = −min(e^(c·A), w_max). arXiv 1910.00177.
template <class V>
RLFAST_FORMULA auto awr(const Token<V>& t, const Awr& h) {
  auto weight = minimum(exp(minimum((h.coef * t.adv), 88.0f)), h.max_weight);
  return Surrogate<V>{(-weight * t.logp), 0.0f, -weight, 0.0f};
}

// ℓ = −sg(clip(r, 1 − ε_low, 1 + ε_high))·max(A, 0)·log p.
// ∂ℓ/∂log p = −clip(r, 1 − ε_low, 1 + ε_high)·max(A, 0), r of the whole sequence. arXiv 2305.14718.
template <class V>
RLFAST_FORMULA auto a_lol(const Token<V>& t, const Range& h) {
  auto weight = minimum(maximum(t.ratio, (1.0f - h.eps_low)), (1.0f + h.eps_high));
  auto gain = maximum(t.adv, 0.0f);
  return Surrogate<V>{((-weight * gain) * t.logp), 0.0f, (-weight * gain), select<V>((weight != t.ratio), 1.0f, 0.0f)};
}

// Bounds of the divergence, and of the ratio.
struct Dppo {
  float eps_low;
  float eps_high;
  float cap;
};

// ℓ = −A·sg(min(r, cap))·log p, and 0 where p has already moved beyond ε in the direction of A.
// ∂ℓ/∂log p = −A·min(r, cap), or 0. arXiv 2602.04879.
template <class V>
RLFAST_FORMULA auto dppo_tv(const Token<V>& t, const Dppo& h) {
  auto moved = (exp(t.logp) - exp(t.old_logp));
  auto up = select<V>((moved <= h.eps_high), 1.0f, 0.0f);
  auto down = select<V>((moved >= -h.eps_low), 1.0f, 0.0f);
  auto kept = select<V>((t.adv > 0.0f), up, down);
  auto weight = (kept * minimum(t.ratio, h.cap));
  return Surrogate<V>{((-t.adv * weight) * t.logp), 0.0f, (-t.adv * weight), (1.0f - kept)};
}

// ℓ = −A·sg(min(r, cap))·log p, and 0 where KL = q·log(q/p) + (1 − q)·log((1 − q)/(1 − p)) > ε on A's side.
// ∂ℓ/∂log p = −A·min(r, cap), or 0. q is the old probability. arXiv 2602.04879.
template <class V>
RLFAST_FORMULA auto dppo_kl(const Token<V>& t, const Dppo& h) {
  auto p = exp(t.logp);
  auto q = exp(t.old_logp);
  auto others = log((((1.0f - q) + 1e-08f) / ((1.0f - p) + 1e-08f)));
  auto divergence = ((q * (t.old_logp - t.logp)) + ((1.0f - q) * others));
  auto up = select<V>(((divergence <= h.eps_high) | (p <= q)), 1.0f, 0.0f);
  auto down = select<V>(((divergence <= h.eps_low) | (p >= q)), 1.0f, 0.0f);
  auto kept = select<V>((t.adv > 0.0f), up, down);
  auto weight = (kept * minimum(t.ratio, h.cap));
  return Surrogate<V>{((-t.adv * weight) * t.logp), 0.0f, (-t.adv * weight), (1.0f - kept)};
}

// Weight of the penalty on the chosen tokens.
struct KlCov {
  float coef;
};

// ℓ = −A·r + coef·extra·|x|.
// ∂ℓ/∂x = −A·r + coef·extra·sign(x). ``extra`` is 1 on the tokens of largest covariance. arXiv 2505.22617.
template <class V>
RLFAST_FORMULA auto kl_cov(const Token<V>& t, const KlCov& h) {
  auto coef = (h.coef * t.extra);
  auto sign = select<V>((t.log_ratio > 0.0f), 1.0f, select<V>((t.log_ratio < 0.0f), -1.0f, 0.0f));
  return Surrogate<V>{((-t.adv * t.ratio) + (coef * absolute_value(t.log_ratio))), ((-t.adv * t.ratio) + (coef * sign)), 0.0f, 0.0f};
}

// Range of the ratio, and weight of the drift.
struct Cpgd {
  float eps_low;
  float eps_high;
  float alpha;
};

// ℓ = −min(x·A, clip(x, log(1 − ε_low), log(1 + ε_high))·A) + α·(e^x − 1 − x).
// ∂ℓ/∂x = −A, and 0 where the bound is active; + α·(e^x − 1). arXiv 2505.12504, its drift KL(π_old‖π) by k3.
template <class V>
RLFAST_FORMULA auto cpgd(const Token<V>& t, const Cpgd& h) {
  auto low = log((1.0f - h.eps_low));
  auto high = log((1.0f + h.eps_high));
  auto unclipped = (-t.adv * t.log_ratio);
  auto clipped = (-t.adv * minimum(maximum(t.log_ratio, low), high));
  auto drift = expm1(t.log_ratio);
  auto active = (unclipped >= clipped);
  auto loss = (maximum(unclipped, clipped) + (h.alpha * (drift - t.log_ratio)));
  return Surrogate<V>{loss, (select<V>(active, -t.adv, 0.0f) + (h.alpha * drift)), 0.0f, select<V>(active, 0.0f, 1.0f)};
}

// How far V may move from V_old; off by default.
struct ValueClip {
  float clip;
};

// ℓ = ½·max((V − R)², (clip(V, V_old ± c) − R)²).
// ∂ℓ/∂V = V − R, and 0 where the second is larger. PPO2.
template <class V>
RLFAST_FORMULA auto value_clipped(const Token<V>& t, const ValueClip& h) {
  auto error = (t.logp - t.adv);
  auto bounded = (minimum(maximum(t.logp, (t.old_logp - h.clip)), (t.old_logp + h.clip)) - t.adv);
  auto active = ((error * error) >= (bounded * bounded));
  auto worst = maximum((error * error), (bounded * bounded));
  return Surrogate<V>{(0.5f * worst), 0.0f, select<V>(active, error, 0.0f), select<V>(active, 0.0f, 1.0f)};
}

// Where the square turns into a line, and how far V may move from V_old.
struct Huber {
  float delta;
  float clip;
};

// ℓ = ½·e² where |e| ≤ δ, else δ·(|e| − ½δ), e the larger of V − R and clip(V, V_old ± c) − R.
// ∂ℓ/∂V = clip(V − R, −δ, δ), and 0 where the second is larger. Huber 1964.
template <class V>
RLFAST_FORMULA auto value_huber(const Token<V>& t, const Huber& h) {
  auto error = (t.logp - t.adv);
  auto bounded = (minimum(maximum(t.logp, (t.old_logp - h.clip)), (t.old_logp + h.clip)) - t.adv);
  auto active = (absolute_value(error) >= absolute_value(bounded));
  auto worst = maximum(absolute_value(error), absolute_value(bounded));
  auto loss = select<V>((worst <= h.delta), ((0.5f * worst) * worst), (h.delta * (worst - (0.5f * h.delta))));
  auto d = minimum(maximum(error, -h.delta), h.delta);
  return Surrogate<V>{loss, 0.0f, select<V>(active, d, 0.0f), select<V>(active, 0.0f, 1.0f)};
}

// Bounds of d and of the estimate; off by default.
struct KlBounds {
  float d_max;
  float kl_max;
};

// The estimate within its bounds.
template <class V>
RLFAST_FORMULA auto bounded(V value, V derivative, V d, const KlBounds& h) {
  auto open_ = ((absolute_value(d) <= h.d_max) & (absolute_value(value) <= h.kl_max));
  return Estimate<V>{minimum(maximum(value, -h.kl_max), h.kl_max), select<V>(open_, derivative, 0.0f)};
}

// −d: unbiased. Derivative 1.
template <class V>
RLFAST_FORMULA auto k1(V d, const KlBounds& h) {
  auto c = minimum(maximum(d, -h.d_max), h.d_max);
  return bounded<V>(-c, 1.0f, d, h);
}

// d²/2: its gradient is that of the KL, on-policy. Derivative −d.
template <class V>
RLFAST_FORMULA auto k2(V d, const KlBounds& h) {
  auto c = minimum(maximum(d, -h.d_max), h.d_max);
  return bounded<V>(((0.5f * c) * c), -c, d, h);
}

// e^d − d − 1: unbiased, and never negative. Derivative −(e^d − 1).
template <class V>
RLFAST_FORMULA auto k3(V d, const KlBounds& h) {
  auto c = minimum(maximum(d, -h.d_max), h.d_max);
  auto grown = expm1(c);
  return bounded<V>((grown - c), -grown, d, h);
}

// |d|. Derivative −sign(d).
template <class V>
RLFAST_FORMULA auto absolute(V d, const KlBounds& h) {
  auto c = minimum(maximum(d, -h.d_max), h.d_max);
  auto sign = select<V>((d > 0.0f), -1.0f, select<V>((d < 0.0f), 1.0f, 0.0f));
  return bounded<V>(absolute_value(c), sign, d, h);
}

RLFAST_FORMULAS_END

// X(formula, hyper-parameters)
#define RLFAST_SURROGATE_FORMULAS(X) \
  X(ppo_clip, Clip) \
  X(reinforce, NoHyper) \
  X(nll, NoHyper) \
  X(ratio_weighted, NoHyper) \
  X(cispo, Range) \
  X(cispo_capped, Cap) \
  X(topr, Cap) \
  X(sapo, Sapo) \
  X(vespo, Vespo) \
  X(squared_residual, Squared) \
  X(quadratic_penalty, Squared) \
  X(apa, Apa) \
  X(awr, Awr) \
  X(a_lol, Range) \
  X(dppo_tv, Dppo) \
  X(dppo_kl, Dppo) \
  X(kl_cov, KlCov) \
  X(cpgd, Cpgd) \
  X(value_clipped, ValueClip) \
  X(value_huber, Huber)

// X(formula, hyper-parameters)
#define RLFAST_KL_FORMULAS(X) \
  X(k1, KlBounds) \
  X(k2, KlBounds) \
  X(k3, KlBounds) \
  X(absolute, KlBounds)
