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
// ∂ℓ/∂x = −4·A·r·σ(τ(r − 1))·σ(−τ(r − 1)), r·σ(−u) = e^(x − u)·σ(u). arXiv 2511.20347.
template <class V>
RLFAST_FORMULA auto sapo(const Token<V>& t, const Sapo& h) {
  auto tau = select<V>((t.adv > 0.0f), h.tau_pos, h.tau_neg);
  auto u = (tau * (t.ratio - 1.0f));
  auto gate = sigmoid(u);
  auto rest = (exp((t.log_ratio - u)) * gate);
  return Surrogate<V>{(((-t.adv * gate) * 4.0f) / tau), (((-t.adv * 4.0f) * gate) * rest), 0.0f, 0.0f};
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

// Weight of the pull towards the reference.
struct NashMd {
  float pull;
};

// ℓ = −A·log p + τ·sg(log p − log p_ref)·log p, A = P − ½ of the whole response, old_logp the reference's, τ pull.
// ∂ℓ/∂log p = −A + τ(log p − log p_ref). arXiv 2312.00886.
template <class V>
RLFAST_FORMULA auto nash_md(const Token<V>& t, const NashMd& h) {
  auto pull = (h.pull * (t.logp - t.old_logp));
  return Surrogate<V>{((pull - t.adv) * t.logp), 0.0f, (pull - t.adv), 0.0f};
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

// s = D.
// ds/dS = 1. DPO, arXiv 2305.18290: the score of the reverse KL.
template <class V>
RLFAST_FORMULA auto log_ratio(const Response<V>& r, const NoHyper& h) {
  (void)h;
  return Score<V>{r.log_ratio, 1.0f};
}

// s = S.
// ds/dS = 1: no reference.
template <class V>
RLFAST_FORMULA auto total(const Response<V>& r, const NoHyper& h) {
  (void)h;
  return Score<V>{r.logp, 1.0f};
}

// The exponent α.
struct Alpha {
  float alpha;
};

// s = (1 − e^u)/α, u = min(−α·S/n, 80); S/n for α = 0.
// ds/dS = e^u/n, and 0 where the bound is active. AlphaPO, arXiv 2501.03884, which has no bound.
template <class V>
RLFAST_FORMULA auto power(const Response<V>& r, const Alpha& h) {
  auto mean = (r.logp / r.length);
  auto u = select<V>(((h.alpha * r.length) == 0.0f), 0.0f, (-h.alpha * mean));
  auto bounded = select<V>((u > 80.0f), 80.0f, u);
  auto value = select<V>((u == 0.0f), mean, (-expm1(bounded) / h.alpha));
  return Score<V>{value, select<V>((u > 80.0f), 0.0f, (exp(bounded) / r.length))};
}

// s = 1 − e^u, u = min(−D, 80).
// ds/dS = e^u, and 0 where the bound is active. f-DPO, arXiv 2309.16240, which has no bound.
template <class V>
RLFAST_FORMULA auto forward_kl(const Response<V>& r, const NoHyper& h) {
  (void)h;
  auto bounded = select<V>((r.log_ratio < -80.0f), 80.0f, -r.log_ratio);
  return Score<V>{-expm1(bounded), select<V>((r.log_ratio < -80.0f), 0.0f, exp(bounded))};
}

// s = log 2 + log σ(D).
// ds/dS = σ(−D). f-DPO, arXiv 2309.16240.
template <class V>
RLFAST_FORMULA auto jensen_shannon(const Response<V>& r, const NoHyper& h) {
  (void)h;
  return Score<V>{(-softplus(-r.log_ratio) + 0.6931471805599453f), sigmoid(-r.log_ratio)};
}

// The α of an α-divergence.
struct Divergence {
  float alpha;
};

// s = (e^u − 1)/(α − 1), u = min((α − 1)·D, 80); D for α = 1, the reverse KL.
// ds/dS = e^u, and 0 where the bound is active. f-DPO, arXiv 2309.16240.
template <class V>
RLFAST_FORMULA auto alpha_divergence(const Response<V>& r, const Divergence& h) {
  auto rate = (h.alpha - 1.0f);
  auto u = select<V>(((rate * r.length) == 0.0f), 0.0f, (rate * r.log_ratio));
  auto bounded = select<V>((u > 80.0f), 80.0f, u);
  auto value = select<V>((u == 0.0f), r.log_ratio, (expm1(bounded) / rate));
  return Score<V>{value, select<V>((u > 80.0f), 0.0f, exp(bounded))};
}

// −(1 − ε)·log σ(x) − ε·log σ(−x), ε = wrong: ε·x⁺ + (1 − ε)·x⁻ + log(1 + e^−|x|); 0 times infinity is 0.
template <class V>
RLFAST_FORMULA auto cross_entropy(V x, V wrong) {
  auto a = absolute_value(x);
  auto rate = select<V>((x > 0.0f), wrong, (1.0f - wrong));
  return (select<V>((rate == 0.0f), 0.0f, (rate * a)) + log1p(exp(-a)));
}

// d/dt of log(1 + q(e^t − 1)) − qt, without the factor q(1 − q).
template <class V>
RLFAST_FORMULA auto choice_kl_slope(V q, V t) {
  auto grown = expm1(t);
  return (grown / (1.0f + (q * grown)));
}

// KL of a choice with log-odds a to one with log-odds b, without the cancellation of its four terms.
// log(1 + q(e^s − 1)) − qs, s = |b − a|, q = σ(A), A = ±a and B = ±b so that B ≥ A. Up to s = 2 the integral of its
// slope, which is positive, by the rule of Gauss of six points (relative error < 10⁻⁹); beyond, the same as
// s(1 − q) + log σ(A) − log σ(B) or, for A < 0, log σ(−A) − log σ(−B) − qs.
template <class V>
RLFAST_FORMULA auto choice_kl(V a, V b) {
  auto up = (b > a);
  auto low = select<V>(up, a, -a);
  auto high = select<V>(up, b, -b);
  auto s = minimum(absolute_value((b - a)), 1e+30f);
  auto q = sigmoid(low);
  auto rest = sigmoid(-low);
  auto near = minimum(s, 2.0f);
  auto outer = (choice_kl_slope<V>(q, (0.03376524289842397f * near)) + choice_kl_slope<V>(q, (0.966234757101576f * near)));
  auto middle = (choice_kl_slope<V>(q, (0.16939530676686776f * near)) + choice_kl_slope<V>(q, (0.8306046932331322f * near)));
  auto inner = (choice_kl_slope<V>(q, (0.3806904069584015f * near)) + choice_kl_slope<V>(q, (0.6193095930415985f * near)));
  auto mean = (((0.08566224618958518f * outer) + (0.1803807865240693f * middle)) + (0.23395696728634552f * inner));
  near = ((near * (q * rest)) * mean);
  auto far = select<V>((low < 0.0f), ((softplus(high) - softplus(low)) - (q * s)), (((s * rest) - softplus(-low)) + softplus(-high)));
  return select<V>((s <= 2.0f), near, far);
}

// σ'(a) − σ'(b), σ' = σ(u)σ(−u) = ¼/cosh²(u/2), gap = a − b, without the cancellation.
// Of sinh(x + y)·sinh(x − y) = cosh²x − cosh²y.
template <class V>
RLFAST_FORMULA auto slope_difference(V a, V b, V gap) {
  auto u = (1.0f + exp(-absolute_value(a)));
  auto v = (1.0f + exp(-absolute_value(b)));
  auto size = (((expm1(-absolute_value(gap)) * expm1(-absolute_value((a + b)))) * exp(-minimum(absolute_value(a), absolute_value(b)))) / (((u * u) * v) * v));
  return select<V>(((gap * (a + b)) > 0.0f), -size, size);
}

// β.
struct Beta {
  float beta;
};

// β, the share ε of labels that are wrong, a constant margin γ, and the price α of each token more.
struct Logistic {
  float beta;
  float label_smoothing;
  float gamma;
  float length_price;
};

// ℓ = −(1 − ε)·log σ(x) − ε·log σ(−x), x = β(w − l) − γ − m − α(n_w − n_l).
// ∂ℓ/∂x = ε − σ(−x). DPO, arXiv 2305.18290; SimPO's γ, 2405.14734; R-DPO's α, 2403.19159; Bradley and Terry 1952.
template <class V>
RLFAST_FORMULA auto logistic(const Pair<V>& p, const Logistic& h) {
  auto x = (((h.beta * (p.chosen - p.rejected)) - h.gamma) - p.margin);
  x = (x - (h.length_price * (p.chosen_length - p.rejected_length)));
  auto d = (h.beta * (h.label_smoothing - sigmoid(-x)));
  return PairLoss<V>{cross_entropy<V>(x, h.label_smoothing), d, -d};
}

// β, and the share ε < ½ of labels that are wrong.
struct Smoothed {
  float beta;
  float label_smoothing;
};

// ℓ = (−(1 − ε)·log σ(x) + ε·log σ(−x))/(1 − 2ε): a share −ε/(1 − 2ε) of wrong labels.
// ∂ℓ/∂x = −((1 − ε)·σ(−x) + ε·σ(x))/(1 − 2ε). arXiv 2403.00409.
template <class V>
RLFAST_FORMULA auto robust(const Pair<V>& p, const Smoothed& h) {
  auto x = ((h.beta * (p.chosen - p.rejected)) - p.margin);
  auto keep = (1.0f - h.label_smoothing);
  auto whole = (1.0f - (2.0f * h.label_smoothing));
  auto d = ((-h.beta * ((keep * sigmoid(-x)) + (h.label_smoothing * sigmoid(x)))) / whole);
  return PairLoss<V>{cross_entropy<V>(x, (-h.label_smoothing / whole)), d, -d};
}

// β, and the margin δ of the hinge.
struct Hinge {
  float beta;
  float delta;
};

// ℓ = max(0, δ − x), x = β(w − l) − m.
// ∂ℓ/∂x = −1 where x < δ. SLiC, arXiv 2305.10425, 2309.06657.
template <class V>
RLFAST_FORMULA auto hinge(const Pair<V>& p, const Hinge& h) {
  auto gap = (h.delta - ((h.beta * (p.chosen - p.rejected)) - p.margin));
  auto d = select<V>((gap > 0.0f), -h.beta, 0.0f);
  return PairLoss<V>{maximum(gap, 0.0f), d, -d};
}

// ℓ = (w − l − m − 1/(2β))².
// ∂ℓ/∂w = 2(w − l − m − 1/(2β)). arXiv 2310.12036 (17).
template <class V>
RLFAST_FORMULA auto ipo(const Pair<V>& p, const Beta& h) {
  auto t = (((p.chosen - p.rejected) - p.margin) - (0.5f / h.beta));
  return PairLoss<V>{(t * t), (2.0f * t), (-2.0f * t)};
}

// β, and the probability ε > 0 that the label is wrong.
struct Exo {
  float beta;
  float label_smoothing;
};

// ℓ = q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε), q = σ(x): the KL to log-odds a = log((1 − ε)/ε).
// ∂ℓ/∂x = q(1 − q)·(x − a). arXiv 2402.00856 (16).
template <class V>
RLFAST_FORMULA auto exo_pair(const Pair<V>& p, const Exo& h) {
  auto x = (h.beta * (p.chosen - p.rejected));
  auto a = log(((1.0f - h.label_smoothing) / h.label_smoothing));
  auto slope = (sigmoid(x) * sigmoid(-x));
  auto d = (h.beta * select<V>((slope > 0.0f), (slope * (x - a)), 0.0f));
  return PairLoss<V>{choice_kl<V>(x, a), d, -d};
}

// β, and the temperature τ of the mixture.
struct Disco {
  float beta;
  float tau;
};

// ℓ = −(1 − g)·log σ(x) + g·e^(−x), g = σ(x/τ).
// ∂ℓ/∂x = g(1 − g)/τ·(e^(−x) + log σ(x)) − (1 − g)·σ(−x) − g·e^(−x). arXiv 2406.08414 (5).
template <class V>
RLFAST_FORMULA auto discopop(const Pair<V>& p, const Disco& h) {
  auto x = (h.beta * (p.chosen - p.rejected));
  x = select<V>((x < -1e+30f), -1e+30f, x);
  auto u = (x / h.tau);
  auto rest = sigmoid(-u);
  auto grown = exp((-x - softplus(-u)));
  auto far = softplus(-x);
  auto d = (h.beta * ((((rest * (grown - (sigmoid(u) * far))) / h.tau) - (rest * sigmoid(-x))) - grown));
  return PairLoss<V>{((rest * far) + grown), d, -d};
}

// β, and the scale η of the true rewards, whose difference is the margin.
struct Rpo {
  float beta;
  float eta;
};

// ℓ = (x − a)², a = η·m.
// ∂ℓ/∂x = 2(x − a). arXiv 2406.11704.
template <class V>
RLFAST_FORMULA auto rpo_squared(const Pair<V>& p, const Rpo& h) {
  auto t = ((h.beta * (p.chosen - p.rejected)) - (h.eta * p.margin));
  auto d = ((2.0f * h.beta) * t);
  return PairLoss<V>{(t * t), d, -d};
}

// ℓ = σ(a)·(log σ(a) − log σ(x)) + σ(−a)·(log σ(−a) − log σ(−x)), a = η·m.
// ∂ℓ/∂x = σ(−a)σ(x) − σ(a)σ(−x). arXiv 2406.11704.
template <class V>
RLFAST_FORMULA auto rpo_backward_kl(const Pair<V>& p, const Rpo& h) {
  auto x = (h.beta * (p.chosen - p.rejected));
  auto a = (h.eta * p.margin);
  auto up = sigmoid(a);
  auto down = sigmoid(-a);
  auto d = (h.beta * ((down * sigmoid(x)) - (up * sigmoid(-x))));
  return PairLoss<V>{choice_kl<V>(a, x), d, -d};
}

// ℓ = σ(x)·(log σ(x) − log σ(a)) + σ(−x)·(log σ(−x) − log σ(−a)), a = η·m.
// ∂ℓ/∂x = σ(x)σ(−x)·(x − a). arXiv 2406.11704.
template <class V>
RLFAST_FORMULA auto rpo_forward_kl(const Pair<V>& p, const Rpo& h) {
  auto x = (h.beta * (p.chosen - p.rejected));
  auto a = (h.eta * p.margin);
  auto up = sigmoid(x);
  auto down = sigmoid(-x);
  auto slope = (up * down);
  auto d = (h.beta * select<V>((slope > 0.0f), (slope * (x - a)), 0.0f));
  return PairLoss<V>{choice_kl<V>(x, a), d, -d};
}

// ℓ = (x − 1)².
// ∂ℓ/∂x = 2(x − 1). GPO, arXiv 2402.05749.
template <class V>
RLFAST_FORMULA auto squared(const Pair<V>& p, const Beta& h) {
  auto t = ((h.beta * (p.chosen - p.rejected)) - 1.0f);
  auto d = ((2.0f * h.beta) * t);
  return PairLoss<V>{(t * t), d, -d};
}

// ℓ = e^(−x).
// ∂ℓ/∂x = −e^(−x). GPO, arXiv 2402.05749.
template <class V>
RLFAST_FORMULA auto exponential(const Pair<V>& p, const Beta& h) {
  auto value = exp((-h.beta * (p.chosen - p.rejected)));
  return PairLoss<V>{value, (-h.beta * value), (h.beta * value)};
}

// ℓ = max(0, 1 − x)².
// ∂ℓ/∂x = −2·max(0, 1 − x). GPO, arXiv 2402.05749.
template <class V>
RLFAST_FORMULA auto truncated_quadratic(const Pair<V>& p, const Beta& h) {
  auto gap = (1.0f - (h.beta * (p.chosen - p.rejected)));
  gap = maximum(gap, 0.0f);
  auto d = ((-2.0f * h.beta) * gap);
  return PairLoss<V>{(gap * gap), d, -d};
}

// ℓ = σ(−x)².
// ∂ℓ/∂x = −2σ(x)σ(−x)². GPO, arXiv 2402.05749.
template <class V>
RLFAST_FORMULA auto savage(const Pair<V>& p, const Beta& h) {
  auto x = (h.beta * (p.chosen - p.rejected));
  auto down = sigmoid(-x);
  auto d = ((-2.0f * h.beta) * ((down * down) * sigmoid(x)));
  return PairLoss<V>{(down * down), d, -d};
}

// ℓ = −log σ(β·extra·(w − l)): a pair's own β.
// ∂ℓ/∂w = −β·extra·σ(−x). β-DPO, arXiv 2407.08639.
template <class V>
RLFAST_FORMULA auto scaled_logistic(const Pair<V>& p, const Beta& h) {
  auto rate = (h.beta * p.extra);
  auto x = (rate * (p.chosen - p.rejected));
  auto d = (-rate * sigmoid(-x));
  return PairLoss<V>{softplus(-x), d, -d};
}

// β of the chosen, α of the rejected.
struct Unequal {
  float beta;
  float alpha;
};

// ℓ = −log σ(βw − αl).
// ∂ℓ/∂w = −βσ(−x), ∂ℓ/∂l = ασ(−x). D²O, arXiv 2403.03419, w the mean over a prompt's own samples.
template <class V>
RLFAST_FORMULA auto unequal(const Pair<V>& p, const Unequal& h) {
  auto x = ((h.beta * p.chosen) - (h.alpha * p.rejected));
  auto d = sigmoid(-x);
  return PairLoss<V>{softplus(-x), (-h.beta * d), (h.alpha * d)};
}

// ℓ = −w.
// ∂ℓ/∂w = −1.
template <class V>
RLFAST_FORMULA auto nll(const Pair<V>& p, const NoHyper& h) {
  (void)h;
  return PairLoss<V>{-p.chosen, -1.0f, 0.0f};
}

// β, and the weight η of the likelihood in units of it.
struct Weighted {
  float beta;
  float eta;
};

// ℓ = −βη·w.
// ∂ℓ/∂w = −βη. RPO, arXiv 2405.16436, of w = S: a sum over the tokens.
template <class V>
RLFAST_FORMULA auto weighted_nll(const Pair<V>& p, const Weighted& h) {
  auto weight = (h.beta * h.eta);
  return PairLoss<V>{(-weight * p.chosen), -weight, 0.0f};
}

// ℓ = −w/shared: with the batch's mean length, the mean over all of its chosen tokens.
// ∂ℓ/∂w = −1/shared.
template <class V>
RLFAST_FORMULA auto batch_nll(const Pair<V>& p, const NoHyper& h) {
  (void)h;
  return PairLoss<V>{(-p.chosen / p.shared), (-1.0f / p.shared), 0.0f};
}

// ℓ = −log σ(βw) − ½·log σ(−βw) − ½·log σ(−βl), the first two together (βw)⁻ + ½(βw)⁺ + 1½·log(1 + e^−|βw|).
// ∂ℓ/∂w = β(½σ(βw) − σ(−βw)), ∂ℓ/∂l = ½βσ(βl). arXiv 2402.05369.
template <class V>
RLFAST_FORMULA auto nca_pair(const Pair<V>& p, const Beta& h) {
  auto w = (h.beta * p.chosen);
  auto l_ = (h.beta * p.rejected);
  auto value = ((select<V>((w > 0.0f), (0.5f * w), -w) + (1.5f * log1p(exp(-absolute_value(w))))) + (0.5f * softplus(l_)));
  return PairLoss<V>{value, (h.beta * ((0.5f * sigmoid(w)) - sigmoid(-w))), ((0.5f * h.beta) * sigmoid(l_))};
}

// ℓ = −log σ(βw − δ) − log σ(δ − βl), δ the shared number.
// ∂ℓ/∂w = −βσ(δ − βw), ∂ℓ/∂l = βσ(βl − δ). arXiv 2404.04656.
template <class V>
RLFAST_FORMULA auto bco(const Pair<V>& p, const Beta& h) {
  auto w = ((h.beta * p.chosen) - p.shared);
  auto l_ = ((h.beta * p.rejected) - p.shared);
  return PairLoss<V>{(softplus(-w) + softplus(l_)), (-h.beta * sigmoid(-w)), (h.beta * sigmoid(l_))};
}

// β, and a factor of the whole.
struct Sppo {
  float beta;
  float scale;
};

// ℓ = scale·((w − 1/(2β))² + (l + 1/(2β))²).
// ∂ℓ/∂w = 2·scale·(w − 1/(2β)), ∂ℓ/∂l = 2·scale·(l + 1/(2β)). arXiv 2405.00675 (4.7), P = 1 for the chosen.
template <class V>
RLFAST_FORMULA auto sppo_hard(const Pair<V>& p, const Sppo& h) {
  auto w = (p.chosen - (0.5f / h.beta));
  auto l_ = (p.rejected + (0.5f / h.beta));
  return PairLoss<V>{(h.scale * ((w * w) + (l_ * l_))), ((2.0f * h.scale) * w), ((2.0f * h.scale) * l_)};
}

// ℓ = scale·((w − (P − ½)/β)² + (l + (P − ½)/β)²), P = extra the probability that the chosen is preferred.
// ∂ℓ/∂w = 2·scale·(w − (P − ½)/β), ∂ℓ/∂l = 2·scale·(l + (P − ½)/β). arXiv 2405.00675 (4.7).
template <class V>
RLFAST_FORMULA auto sppo(const Pair<V>& p, const Sppo& h) {
  auto gain = ((p.extra - 0.5f) / h.beta);
  auto w = (p.chosen - gain);
  auto l_ = (p.rejected + gain);
  return PairLoss<V>{(h.scale * ((w * w) + (l_ * l_))), ((2.0f * h.scale) * w), ((2.0f * h.scale) * l_)};
}

// ℓ = 1 − σ(βw) + σ(βl).
// ∂ℓ/∂w = −βσ(βw)σ(−βw), ∂ℓ/∂l = βσ(βl)σ(−βl). arXiv 2408.06266 (7).
template <class V>
RLFAST_FORMULA auto apo_zero(const Pair<V>& p, const Beta& h) {
  auto w = (h.beta * p.chosen);
  auto l_ = (h.beta * p.rejected);
  auto low = sigmoid(-w);
  auto high = sigmoid(l_);
  return PairLoss<V>{(low + high), (-h.beta * (sigmoid(w) * low)), (h.beta * (high * sigmoid(-l_)))};
}

// ℓ = σ(βw) + 1 − σ(x).
// ∂ℓ/∂w = β(σ'(βw) − σ'(x)), ∂ℓ/∂l = βσ'(x), σ' = σ(u)σ(−u). arXiv 2408.06266 (8).
template <class V>
RLFAST_FORMULA auto apo_down(const Pair<V>& p, const Beta& h) {
  auto w = (h.beta * p.chosen);
  auto l_ = (h.beta * p.rejected);
  auto x = (h.beta * (p.chosen - p.rejected));
  auto down = sigmoid(-x);
  auto d = (h.beta * slope_difference<V>(w, x, l_));
  return PairLoss<V>{(sigmoid(w) + down), d, (h.beta * (sigmoid(x) * down))};
}

// log(1 − e^x) for x < 0. Mächler 2012.
template <class V>
RLFAST_FORMULA auto log1mexp(V x) {
  auto near = (x > -0.6931471805599453f);
  auto u = exp(select<V>(near, -1.0f, x));
  return select<V>(near, log(-expm1(select<V>(near, x, -1.0f))), -log1p((u / (1.0f - u))));
}

// ℓ = −β·log σ(o), o = (w − l) − (log(1 − e^w) − log(1 − e^l)), w and l mean log-probs.
// ∂ℓ/∂w = βσ(−o)/(e^w − 1), ∂ℓ/∂l = −βσ(−o)/(e^l − 1). ORPO, arXiv 2403.07691 (7).
template <class V>
RLFAST_FORMULA auto odds_ratio(const Pair<V>& p, const Beta& h) {
  auto w = minimum(p.chosen, -1e-30f);
  auto l_ = minimum(p.rejected, -1e-30f);
  auto o = ((w - l_) - (log1mexp<V>(w) - log1mexp<V>(l_)));
  auto rest = (h.beta * sigmoid(-o));
  return PairLoss<V>{(h.beta * softplus(-o)), (rest / expm1(w)), (-rest / expm1(l_))};
}

// β, and the weight λ of the penalty on a chosen response that lost likelihood.
struct Positive {
  float beta;
  float penalty;
};

// ℓ = −log σ(β(w − l − λ·max(0, −w))).
// ∂ℓ/∂w = −β(1 + λ[w < 0])·σ(−x), ∂ℓ/∂l = βσ(−x). DPO-Positive, arXiv 2402.13228 (3).
template <class V>
RLFAST_FORMULA auto dpop(const Pair<V>& p, const Positive& h) {
  auto lost = (p.chosen < 0.0f);
  auto x = (h.beta * ((p.chosen - p.rejected) + select<V>(lost, (h.penalty * p.chosen), 0.0f)));
  auto d = (h.beta * sigmoid(-x));
  return PairLoss<V>{softplus(-x), (-d * select<V>(lost, (1.0f + h.penalty), 1.0f)), d};
}

// ℓ = −log σ(x) + λ·max(0, −w).
// ∂ℓ/∂w = −βσ(−x) − λ[w < 0], ∂ℓ/∂l = βσ(−x).
template <class V>
RLFAST_FORMULA auto dpop_outside(const Pair<V>& p, const Positive& h) {
  auto lost = (p.chosen < 0.0f);
  auto x = (h.beta * (p.chosen - p.rejected));
  auto d = (h.beta * sigmoid(-x));
  return PairLoss<V>{(softplus(-x) - select<V>(lost, (h.penalty * p.chosen), 0.0f)), (-d - select<V>(lost, h.penalty, 0.0f)), d};
}

// β, and the weight λ of the calibration.
struct Calibrated {
  float beta;
  float calibration;
};

// ℓ = −log σ(w − l) + λ((w − 1/(2β))² + (l + 1/(2β))²).
// ∂ℓ/∂w = −σ(l − w) + 2λ(w − 1/(2β)), ∂ℓ/∂l = σ(l − w) + 2λ(l + 1/(2β)). arXiv 2412.14516.
template <class V>
RLFAST_FORMULA auto cal_dpo(const Pair<V>& p, const Calibrated& h) {
  auto x = (p.chosen - p.rejected);
  auto w = (p.chosen - (0.5f / h.beta));
  auto l_ = (p.rejected + (0.5f / h.beta));
  auto d = sigmoid(-x);
  auto twice = (2.0f * h.calibration);
  return PairLoss<V>{(softplus(-x) + (h.calibration * ((w * w) + (l_ * l_)))), ((twice * w) - d), ((twice * l_) + d)};
}

// The weight α.
struct Explored {
  float alpha;
};

// ℓ = α(extra·w + (1 − extra)·l): extra is 1 where the chosen came from the reference, else 0.
// ∂ℓ/∂w = α·extra, ∂ℓ/∂l = α(1 − extra). XPO, arXiv 2405.21046.
template <class V>
RLFAST_FORMULA auto exploration(const Pair<V>& p, const Explored& h) {
  auto rest = (1.0f - p.extra);
  return PairLoss<V>{(h.alpha * ((p.extra * p.chosen) + (rest * p.rejected))), (h.alpha * p.extra), (h.alpha * rest)};
}

// ℓ = −P·log σ(x) − (1 − P)·log σ(−x), P = extra.
// ∂ℓ/∂x = (1 − P) − σ(−x). Constitutional AI, arXiv 2212.08073.
template <class V>
RLFAST_FORMULA auto soft_label(const Pair<V>& p, const Beta& h) {
  auto x = (h.beta * (p.chosen - p.rejected));
  auto d = (h.beta * ((1.0f - p.extra) - sigmoid(-x)));
  return PairLoss<V>{cross_entropy<V>(x, (1.0f - p.extra)), d, -d};
}

// ℓ = (w + l)².
// ∂ℓ/∂w = ∂ℓ/∂l = 2(w + l). arXiv 2312.09244.
template <class V>
RLFAST_FORMULA auto centring(const Pair<V>& p, const NoHyper& h) {
  (void)h;
  auto t = (p.chosen + p.rejected);
  return PairLoss<V>{(t * t), (2.0f * t), (2.0f * t)};
}

// The exponent γ.
struct Focal {
  float gamma;
};

// ℓ = −(1 − 2·max(P − ½, 0))^γ·log P, P = σ(w − l).
// ∂ℓ/∂w = −k·(σ(−x) + γσ(x)·(−log P)[x > 0]), k the weight, which is (2σ(−x))^γ where x > 0. InternLM2, 2403.17297.
template <class V>
RLFAST_FORMULA auto focal(const Pair<V>& p, const Focal& h) {
  auto x = (p.chosen - p.rejected);
  auto easy = (x > 0.0f);
  auto k = select<V>(easy, exp((h.gamma * (-softplus(x) + 0.6931471805599453f))), 1.0f);
  auto value = softplus(-x);
  auto d = (-k * (sigmoid(-x) + select<V>(easy, ((h.gamma * sigmoid(x)) * value), 0.0f)));
  return PairLoss<V>{(k * value), d, -d};
}

// Where the barrier is, how near to it a reward counts, and the weight λ.
struct Barrier {
  float limit;
  float edge;
  float barrier;
};

// ℓ = −λ·[log(b − w) + log(b + w) + log(b − l) + log(b + l)], w and l within ±edge.
// ∂ℓ/∂w = λ/(b − w) − λ/(b + w), and 0 beyond the edge. InternLM2, arXiv 2403.17297.
template <class V>
RLFAST_FORMULA auto barrier(const Pair<V>& p, const Barrier& h) {
  auto w = minimum(maximum(p.chosen, -h.edge), h.edge);
  auto l_ = minimum(maximum(p.rejected, -h.edge), h.edge);
  auto value = (((-log((h.limit - w)) - log((h.limit + w))) - log((h.limit - l_))) - log((h.limit + l_)));
  auto d_w = (h.barrier * ((1.0f / (h.limit - w)) - (1.0f / (h.limit + w))));
  auto d_l = (h.barrier * ((1.0f / (h.limit - l_)) - (1.0f / (h.limit + l_))));
  d_w = select<V>((absolute_value(p.chosen) <= h.edge), d_w, 0.0f);
  return PairLoss<V>{(h.barrier * value), d_w, select<V>((absolute_value(p.rejected) <= h.edge), d_l, 0.0f)};
}

// How much more a pair in the wrong order counts.
struct MaxMargin {
  float penalty;
};

// ℓ = −x where x ≥ 0, else −penalty·x, x = w − l.
// ∂ℓ/∂w = −1, or −penalty. Ng and Russell 2000; arXiv 2410.12491.
template <class V>
RLFAST_FORMULA auto max_margin(const Pair<V>& p, const MaxMargin& h) {
  auto x = (p.chosen - p.rejected);
  auto d = select<V>((x >= 0.0f), -1.0f, -h.penalty);
  return PairLoss<V>{(d * x), d, -d};
}

// Where the difference is pulled to.
struct Point {
  float target;
};

// ℓ = ½(w − l − target)².
// ∂ℓ/∂w = w − l − target. GPM, arXiv 2410.02197.
template <class V>
RLFAST_FORMULA auto regression(const Pair<V>& p, const Point& h) {
  auto t = ((p.chosen - p.rejected) - h.target);
  return PairLoss<V>{((0.5f * t) * t), t, -t};
}

// β, and the weights of the two kinds.
struct Kto {
  float beta;
  float desirable_weight;
  float undesirable_weight;
};

// ℓ = λ_D·(1 − σ(β(s − z))) if desirable, else λ_U·(1 − σ(β(z − s))), z the shared number.
// ∂ℓ/∂s = ∓βλσ(u)σ(−u), u = β(s − z). arXiv 2402.01306 (8).
template <class V>
RLFAST_FORMULA auto kto(const Single<V>& p, const Kto& h) {
  auto good = (p.desirable > 0.0f);
  auto u = (h.beta * (p.score - p.shared));
  auto low = sigmoid(-u);
  auto high = sigmoid(u);
  auto d = (h.beta * (low * high));
  auto value = select<V>(good, (h.desirable_weight * low), (h.undesirable_weight * high));
  return SingleLoss<V>{value, select<V>(good, (-h.desirable_weight * d), (h.undesirable_weight * d))};
}

// ℓ = −log σ(βs − δ) if desirable, else −log σ(δ − βs), δ the shared number.
// ∂ℓ/∂s = −βσ(δ − βs), or βσ(βs − δ). arXiv 2404.04656.
template <class V>
RLFAST_FORMULA auto bco_unpaired(const Single<V>& p, const Beta& h) {
  auto good = (p.desirable > 0.0f);
  auto u = ((h.beta * p.score) - p.shared);
  return SingleLoss<V>{select<V>(good, softplus(-u), softplus(u)), (h.beta * select<V>(good, -sigmoid(-u), sigmoid(u)))};
}

// ℓ = 1 − σ(βs) if desirable, else σ(βs).
// ∂ℓ/∂s = ∓βσ(βs)σ(−βs). arXiv 2408.06266.
template <class V>
RLFAST_FORMULA auto apo_zero_unpaired(const Single<V>& p, const Beta& h) {
  auto good = (p.desirable > 0.0f);
  auto low = sigmoid((-h.beta * p.score));
  auto high = sigmoid((h.beta * p.score));
  auto d = (h.beta * (low * high));
  return SingleLoss<V>{select<V>(good, low, high), select<V>(good, -d, d)};
}

// ℓ = σ(βs) + 1 − σ(β(s − z)) if desirable, else 1 − σ(β(z − s)): APO-down, whose pair's other log-ratio is z, the
// shared number.
// ∂ℓ/∂s = β(σ'(βs) − σ'(β(s − z))), or βσ'(β(s − z)), σ' = σ(u)σ(−u). arXiv 2408.06266 (8), of pairs.
template <class V>
RLFAST_FORMULA auto apo_down_unpaired(const Single<V>& p, const Beta& h) {
  auto good = (p.desirable > 0.0f);
  auto u = (h.beta * p.score);
  auto x = (h.beta * (p.score - p.shared));
  auto low = sigmoid(-x);
  auto high = sigmoid(x);
  auto d = select<V>(good, slope_difference<V>(u, x, (h.beta * p.shared)), (low * high));
  return SingleLoss<V>{select<V>(good, (sigmoid(u) + low), high), (h.beta * d)};
}

// ℓ = −(2/β)·log σ(−βs) of what is to be forgotten: the undesirable. 0 of the rest.
// ∂ℓ/∂s = 2σ(βs). arXiv 2404.05868 (3).
template <class V>
RLFAST_FORMULA auto npo(const Single<V>& p, const Beta& h) {
  auto good = (p.desirable > 0.0f);
  auto u = (h.beta * p.score);
  return SingleLoss<V>{select<V>(good, 0.0f, (softplus(u) * (2.0f / h.beta))), select<V>(good, 0.0f, (2.0f * sigmoid(u)))};
}

// ℓ = −s of what is to be kept: the desirable. 0 of the rest.
// ∂ℓ/∂s = −1.
template <class V>
RLFAST_FORMULA auto retain(const Single<V>& p, const NoHyper& h) {
  (void)h;
  auto good = (p.desirable > 0.0f);
  return SingleLoss<V>{select<V>(good, -p.score, 0.0f), select<V>(good, -1.0f, 0.0f)};
}

// The regularisation τ.
struct Dro {
  float tau;
};

// ℓ = ½(r − τs)², r = extra the reward above the value of the prompt.
// ∂ℓ/∂s = −τ(r − τs). DRO-V, arXiv 2405.19107 (6).
template <class V>
RLFAST_FORMULA auto dro(const Single<V>& p, const Dro& h) {
  auto t = (p.extra - (h.tau * p.score));
  return SingleLoss<V>{((0.5f * t) * t), (-h.tau * t)};
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
  X(nash_md, NashMd) \
  X(value_clipped, ValueClip) \
  X(value_huber, Huber)

// X(formula, hyper-parameters)
#define RLFAST_KL_FORMULAS(X) \
  X(k1, KlBounds) \
  X(k2, KlBounds) \
  X(k3, KlBounds) \
  X(absolute, KlBounds)

// X(formula, hyper-parameters)
#define RLFAST_SCORE_FORMULAS(X) \
  X(log_ratio, NoHyper) \
  X(total, NoHyper) \
  X(power, Alpha) \
  X(forward_kl, NoHyper) \
  X(jensen_shannon, NoHyper) \
  X(alpha_divergence, Divergence)

// X(formula, hyper-parameters)
#define RLFAST_PAIR_FORMULAS(X) \
  X(logistic, Logistic) \
  X(robust, Smoothed) \
  X(hinge, Hinge) \
  X(ipo, Beta) \
  X(exo_pair, Exo) \
  X(discopop, Disco) \
  X(rpo_squared, Rpo) \
  X(rpo_backward_kl, Rpo) \
  X(rpo_forward_kl, Rpo) \
  X(squared, Beta) \
  X(exponential, Beta) \
  X(truncated_quadratic, Beta) \
  X(savage, Beta) \
  X(scaled_logistic, Beta) \
  X(unequal, Unequal) \
  X(nll, NoHyper) \
  X(weighted_nll, Weighted) \
  X(batch_nll, NoHyper) \
  X(nca_pair, Beta) \
  X(bco, Beta) \
  X(sppo_hard, Sppo) \
  X(sppo, Sppo) \
  X(apo_zero, Beta) \
  X(apo_down, Beta) \
  X(odds_ratio, Beta) \
  X(dpop, Positive) \
  X(dpop_outside, Positive) \
  X(cal_dpo, Calibrated) \
  X(exploration, Explored) \
  X(soft_label, Beta) \
  X(centring, NoHyper) \
  X(focal, Focal) \
  X(barrier, Barrier) \
  X(max_margin, MaxMargin) \
  X(regression, Point)

// X(formula, hyper-parameters)
#define RLFAST_SINGLE_FORMULAS(X) \
  X(kto, Kto) \
  X(bco_unpaired, Beta) \
  X(apo_zero_unpaired, Beta) \
  X(apo_down_unpaired, Beta) \
  X(npo, Beta) \
  X(retain, NoHyper) \
  X(dro, Dro)
