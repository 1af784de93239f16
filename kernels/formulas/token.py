"""Surrogates of policy-gradient objectives: what one token adds to the loss, then its derivative.

A surrogate takes a ``Token`` and its hyper-parameters, and returns

    (ℓ, ∂ℓ/∂x, ∂ℓ/∂log p, clipped)

with x the log-ratio of the token's unit (the token itself, or its sequence's mean or sum) and r = e^x. What multiplies
log p beside x is a weight that the gradient does not see: a stop-gradient is a derivative that is not written down.
``clipped`` is 1 where a bound is active, 0 elsewhere; it is counted, not differentiated.
"""

from typing import NamedTuple

from rlfast.kernels.formulas.elementary import exp, expm1, sigmoid
from rlfast.kernels.lang import jit, tl

INFINITE = float("inf")
LARGEST = tl.constexpr(3.4e38)


class Token(NamedTuple):
    """What a surrogate sees of one token."""

    logp: object  # log π(token)
    old_logp: object  # log π_old(token)
    log_ratio: object  # x, of the token's unit
    ratio: object  # r = e^x
    adv: object  # A
    extra: object  # a field that a loss names for itself; 0 if there is none


class NoHyper(NamedTuple):
    """No hyper-parameters."""

    unused: float = 0.0


class Range(NamedTuple):
    """The range of the ratio, [1 − eps_low, 1 + eps_high]."""

    eps_low: float = 0.2
    eps_high: float = 0.2


class Clip(NamedTuple):
    """The range of the ratio, [1 − eps_low, 1 + eps_high], and two more bounds that are off by default."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = INFINITE  # c of dual-clip PPO: ℓ ≤ −c·A where A < 0
    delta: float = INFINITE  # δ of two-sided clipping: r ≤ δ in the unclipped term


@jit
def ppo_clip(t: Token, h: Clip):
    """ℓ = max(−A·min(r, δ), −A·clip(r, 1 − ε_low, 1 + ε_high)), and ℓ ≤ −c·A where A < 0.

    ∂ℓ/∂x = −A·r, and 0 where a bound is active.
    PPO, arXiv 1707.06347; dual clip, 1912.09729; δ, 2505.07291.
    """
    low, high = 1.0 - h.eps_low, 1.0 + h.eps_high
    slope = -t.adv * t.ratio
    unclipped = -t.adv * tl.minimum(t.ratio, h.delta)
    clipped = -t.adv * tl.minimum(tl.maximum(t.ratio, low), high)
    loss = tl.maximum(unclipped, clipped)
    inside = (t.ratio >= low) & (t.ratio <= high)
    d = tl.where(unclipped >= clipped, tl.where(t.ratio <= h.delta, slope, 0.0), tl.where(inside, slope, 0.0))
    beyond = (t.adv < 0.0) & (loss > -t.adv * h.dual_clip)
    loss = tl.where(beyond, -t.adv * h.dual_clip, loss)
    d = tl.where(beyond, 0.0, d)
    return loss, d, 0.0, tl.where(loss != slope, 1.0, 0.0)  # a free token has ℓ = −A·r


@jit
def reinforce(t: Token, h: NoHyper):
    """ℓ = −A·log p.

    ∂ℓ/∂log p = −A. Williams 1992.
    """
    return -t.adv * t.logp, 0.0, -t.adv, 0.0


@jit
def nll(t: Token, h: NoHyper):
    """ℓ = −log p.

    ∂ℓ/∂log p = −1.
    """
    return -t.logp, 0.0, -1.0, 0.0


@jit
def ratio_weighted(t: Token, h: NoHyper):
    """ℓ = −A·r.

    ∂ℓ/∂x = −A·r. GMPO, arXiv 2507.20673, where r is the geometric mean of clipped ratios.
    """
    return -t.adv * t.ratio, -t.adv * t.ratio, 0.0, 0.0


@jit
def cispo(t: Token, h: Range):
    """ℓ = −sg(clip(r, 1 − ε_low, 1 + ε_high))·A·log p.

    ∂ℓ/∂log p = −clip(r, 1 − ε_low, 1 + ε_high)·A. arXiv 2506.13585.
    """
    weight = tl.minimum(tl.maximum(t.ratio, 1.0 - h.eps_low), 1.0 + h.eps_high)
    return -weight * t.adv * t.logp, 0.0, -weight * t.adv, tl.where(weight != t.ratio, 1.0, 0.0)


class Cap(NamedTuple):
    """An upper bound of the ratio."""

    cap: float = 1.0


@jit
def cispo_capped(t: Token, h: Cap):
    """ℓ = −sg(min(r, cap))·A·log p.

    ∂ℓ/∂log p = −min(r, cap)·A. arXiv 2506.13585, with an absolute bound instead of 1 + ε.
    """
    weight = tl.minimum(t.ratio, h.cap)
    return -weight * t.adv * t.logp, 0.0, -weight * t.adv, tl.where(weight != t.ratio, 1.0, 0.0)


@jit
def topr(t: Token, h: Cap):
    """ℓ = −A·log p where A > 0, else −sg(min(r, cap))·A·log p.

    ∂ℓ/∂log p = −A where A > 0, else −min(r, cap)·A. arXiv 2503.14286.
    """
    weight = tl.where(t.adv > 0.0, 1.0, tl.minimum(t.ratio, h.cap))
    clipped = (t.adv < 0.0) & (t.ratio > h.cap)
    return -weight * t.adv * t.logp, 0.0, -weight * t.adv, tl.where(clipped, 1.0, 0.0)


class Sapo(NamedTuple):
    """Temperatures of the gate."""

    tau_pos: float = 1.0  # where A > 0
    tau_neg: float = 1.05


@jit
def sapo(t: Token, h: Sapo):
    """ℓ = −A·σ(τ(r − 1))·4/τ.

    ∂ℓ/∂x = −4·A·r·σ(τ(r − 1))·σ(−τ(r − 1)), r·σ(−u) = e^(x − u)·σ(u). arXiv 2511.20347.
    """
    tau = tl.where(t.adv > 0.0, h.tau_pos, h.tau_neg)
    u = tau * (t.ratio - 1.0)
    gate = sigmoid(u)
    rest = exp(t.log_ratio - u) * gate  # neither the cancellation of 1 − σ(u) nor 0·∞ where r is infinite
    return -t.adv * gate * 4.0 / tau, -t.adv * 4.0 * gate * rest, 0.0, 0.0


class Vespo(NamedTuple):
    """Exponents of the weight φ(w) = e^λ·w^k·e^(−λw)."""

    k_pos: float = 2.0  # where A ≥ 0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0


@jit
def vespo(t: Token, h: Vespo):
    """ℓ = −sg(φ)·A·log p, log φ = λ + k·x − λ·r.

    ∂ℓ/∂log p = −φ·A. x is the sequence's summed log-ratio. arXiv 2602.10693.
    """
    k = tl.where(t.adv >= 0.0, h.k_pos, h.k_neg)
    rate = tl.maximum(tl.where(t.adv >= 0.0, h.lambda_pos, h.lambda_neg), 1e-4)
    phi = exp(rate + k * t.log_ratio - rate * t.ratio)
    phi = tl.where(phi < LARGEST, phi, 0.0)  # an infinity or NaN is not
    return -phi * t.adv * t.logp, 0.0, -phi * t.adv, 0.0


class Squared(NamedTuple):
    """ℓ = scale·(A − τ·x)²."""

    tau: float = 0.1
    scale: float = 1.0


@jit
def squared_residual(t: Token, h: Squared):
    """ℓ = scale·(A − τ·x)².

    ∂ℓ/∂x = −2·scale·τ·(A − τ·x). Kimi k1.5, arXiv 2501.12599; DRO, 2405.19107 (½); A*-PO, 2505.20686.
    """
    residual = t.adv - h.tau * t.log_ratio
    return h.scale * residual * residual, -2.0 * h.scale * h.tau * residual, 0.0, 0.0


@jit
def quadratic_penalty(t: Token, h: Squared):
    """ℓ = scale·(−A·log p + (τ/2)·x²).

    ∂ℓ/∂x = scale·τ·x, ∂ℓ/∂log p = −scale·A: the gradient of the squared residual, up to its factor 2τ.
    """
    loss = -t.adv * t.logp + 0.5 * h.tau * t.log_ratio * t.log_ratio
    return h.scale * loss, h.scale * h.tau * t.log_ratio, -h.scale * t.adv, 0.0


class Apa(NamedTuple):
    """1/λ of advantage-induced policy alignment."""

    inv_lambda: float = 10.0


@jit
def apa(t: Token, h: Apa):
    """ℓ = (x − A/λ)².

    ∂ℓ/∂x = 2·(x − A/λ). arXiv 2306.02231.
    """
    residual = t.log_ratio - t.adv * h.inv_lambda
    return residual * residual, 2.0 * residual, 0.0, 0.0


class Awr(NamedTuple):
    """Weight e^(c·A), and its bound."""

    coef: float = 1.0
    max_weight: float = 20.0


@jit
def awr(t: Token, h: Awr):
    """ℓ = −min(e^(c·A), w_max)·log p.

    ∂ℓ/∂log p = −min(e^(c·A), w_max). arXiv 1910.00177.
    """
    weight = tl.minimum(exp(tl.minimum(h.coef * t.adv, 88.0)), h.max_weight)
    return -weight * t.logp, 0.0, -weight, 0.0


@jit
def a_lol(t: Token, h: Range):
    """ℓ = −sg(clip(r, 1 − ε_low, 1 + ε_high))·max(A, 0)·log p.

    ∂ℓ/∂log p = −clip(r, 1 − ε_low, 1 + ε_high)·max(A, 0), r of the whole sequence. arXiv 2305.14718.
    """
    weight = tl.minimum(tl.maximum(t.ratio, 1.0 - h.eps_low), 1.0 + h.eps_high)
    gain = tl.maximum(t.adv, 0.0)
    return -weight * gain * t.logp, 0.0, -weight * gain, tl.where(weight != t.ratio, 1.0, 0.0)


class Dppo(NamedTuple):
    """Bounds of the divergence, and of the ratio."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    cap: float = 20.0


@jit
def dppo_tv(t: Token, h: Dppo):
    """ℓ = −A·sg(min(r, cap))·log p, and 0 where p has already moved beyond ε in the direction of A.

    ∂ℓ/∂log p = −A·min(r, cap), or 0. arXiv 2602.04879.
    """
    moved = exp(t.logp) - exp(t.old_logp)
    up, down = tl.where(moved <= h.eps_high, 1.0, 0.0), tl.where(moved >= -h.eps_low, 1.0, 0.0)
    kept = tl.where(t.adv > 0.0, up, down)
    weight = kept * tl.minimum(t.ratio, h.cap)
    return -t.adv * weight * t.logp, 0.0, -t.adv * weight, 1.0 - kept


@jit
def dppo_kl(t: Token, h: Dppo):
    """ℓ = −A·sg(min(r, cap))·log p, and 0 where KL = q·log(q/p) + (1 − q)·log((1 − q)/(1 − p)) > ε on A's side.

    ∂ℓ/∂log p = −A·min(r, cap), or 0. q is the old probability. arXiv 2602.04879.
    """
    p, q = exp(t.logp), exp(t.old_logp)
    others = tl.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    divergence = q * (t.old_logp - t.logp) + (1.0 - q) * others
    up = tl.where((divergence <= h.eps_high) | (p <= q), 1.0, 0.0)
    down = tl.where((divergence <= h.eps_low) | (p >= q), 1.0, 0.0)
    kept = tl.where(t.adv > 0.0, up, down)
    weight = kept * tl.minimum(t.ratio, h.cap)
    return -t.adv * weight * t.logp, 0.0, -t.adv * weight, 1.0 - kept


class KlCov(NamedTuple):
    """Weight of the penalty on the chosen tokens."""

    coef: float = 1.0


@jit
def kl_cov(t: Token, h: KlCov):
    """ℓ = −A·r + coef·extra·|x|.

    ∂ℓ/∂x = −A·r + coef·extra·sign(x). ``extra`` is 1 on the tokens of largest covariance. arXiv 2505.22617.
    """
    coef = h.coef * t.extra
    sign = tl.where(t.log_ratio > 0.0, 1.0, tl.where(t.log_ratio < 0.0, -1.0, 0.0))
    return -t.adv * t.ratio + coef * tl.abs(t.log_ratio), -t.adv * t.ratio + coef * sign, 0.0, 0.0


class Cpgd(NamedTuple):
    """Range of the ratio, and weight of the drift."""

    eps_low: float = 0.2
    eps_high: float = 0.2
    alpha: float = 0.1


@jit
def cpgd(t: Token, h: Cpgd):
    """ℓ = −min(x·A, clip(x, log(1 − ε_low), log(1 + ε_high))·A) + α·(e^x − 1 − x).

    ∂ℓ/∂x = −A, and 0 where the bound is active; + α·(e^x − 1). arXiv 2505.12504, its drift KL(π_old‖π) by k3.
    """
    low, high = tl.log(1.0 - h.eps_low), tl.log(1.0 + h.eps_high)
    unclipped = -t.adv * t.log_ratio
    clipped = -t.adv * tl.minimum(tl.maximum(t.log_ratio, low), high)
    drift = expm1(t.log_ratio)
    active = unclipped >= clipped
    loss = tl.maximum(unclipped, clipped) + h.alpha * (drift - t.log_ratio)
    return loss, tl.where(active, -t.adv, 0.0) + h.alpha * drift, 0.0, tl.where(active, 0.0, 1.0)


class NashMd(NamedTuple):
    """Weight of the pull towards the reference."""

    pull: float = 0.1


@jit
def nash_md(t: Token, h: NashMd):
    """ℓ = −A·log p + τ·sg(log p − log p_ref)·log p, A = P − ½ of the whole response, old_logp the reference's, τ pull.

    ∂ℓ/∂log p = −A + τ(log p − log p_ref). arXiv 2312.00886.
    """
    pull = h.pull * (t.logp - t.old_logp)
    return (pull - t.adv) * t.logp, 0.0, pull - t.adv, 0.0
