"""Losses of a single response that is desirable or not: value, then its derivative by the score s."""

from typing import NamedTuple

from rlfast.kernels.formulas.choice import slope_difference
from rlfast.kernels.formulas.elementary import sigmoid, softplus
from rlfast.kernels.formulas.pair import Beta
from rlfast.kernels.formulas.token import NoHyper
from rlfast.kernels.lang import jit, tl


class Single(NamedTuple):
    """What a link sees of one response."""

    score: object  # s
    desirable: object  # 1, or 0
    extra: object  # a field that a loss names for itself; 0 if there is none
    shared: object  # a number that a loss names for itself, one for all responses; 0 if there is none


class Kto(NamedTuple):
    """β, and the weights of the two kinds."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@jit
def kto(p: Single, h: Kto):
    """ℓ = λ_D·(1 − σ(β(s − z))) if desirable, else λ_U·(1 − σ(β(z − s))), z the shared number.

    ∂ℓ/∂s = ∓βλσ(u)σ(−u), u = β(s − z). arXiv 2402.01306 (8).
    """
    good = p.desirable > 0.0
    u = h.beta * (p.score - p.shared)
    low, high = sigmoid(-u), sigmoid(u)
    d = h.beta * (low * high)
    value = tl.where(good, h.desirable_weight * low, h.undesirable_weight * high)
    return value, tl.where(good, -h.desirable_weight * d, h.undesirable_weight * d)


@jit
def bco_unpaired(p: Single, h: Beta):
    """ℓ = −log σ(βs − δ) if desirable, else −log σ(δ − βs), δ the shared number.

    ∂ℓ/∂s = −βσ(δ − βs), or βσ(βs − δ). arXiv 2404.04656.
    """
    good = p.desirable > 0.0
    u = h.beta * p.score - p.shared
    return tl.where(good, softplus(-u), softplus(u)), h.beta * tl.where(good, -sigmoid(-u), sigmoid(u))


@jit
def apo_zero_unpaired(p: Single, h: Beta):
    """ℓ = 1 − σ(βs) if desirable, else σ(βs).

    ∂ℓ/∂s = ∓βσ(βs)σ(−βs). arXiv 2408.06266.
    """
    good = p.desirable > 0.0
    low, high = sigmoid(-h.beta * p.score), sigmoid(h.beta * p.score)
    d = h.beta * (low * high)
    return tl.where(good, low, high), tl.where(good, -d, d)


@jit
def apo_down_unpaired(p: Single, h: Beta):
    """ℓ = σ(βs) + 1 − σ(β(s − z)) if desirable, else 1 − σ(β(z − s)): APO-down, whose pair's other log-ratio is z, the
    shared number.

    ∂ℓ/∂s = β(σ'(βs) − σ'(β(s − z))), or βσ'(β(s − z)), σ' = σ(u)σ(−u). arXiv 2408.06266 (8), of pairs.
    """
    good = p.desirable > 0.0
    u, x = h.beta * p.score, h.beta * (p.score - p.shared)
    low, high = sigmoid(-x), sigmoid(x)
    d = tl.where(good, slope_difference(u, x, h.beta * p.shared), low * high)
    return tl.where(good, sigmoid(u) + low, high), h.beta * d


@jit
def npo(p: Single, h: Beta):
    """ℓ = −(2/β)·log σ(−βs) of what is to be forgotten: the undesirable. 0 of the rest.

    ∂ℓ/∂s = 2σ(βs). arXiv 2404.05868 (3).
    """
    good = p.desirable > 0.0
    u = h.beta * p.score
    return tl.where(good, 0.0, softplus(u) * (2.0 / h.beta)), tl.where(good, 0.0, 2.0 * sigmoid(u))


@jit
def retain(p: Single, h: NoHyper):
    """ℓ = −s of what is to be kept: the desirable. 0 of the rest.

    ∂ℓ/∂s = −1.
    """
    good = p.desirable > 0.0
    return tl.where(good, -p.score, 0.0), tl.where(good, -1.0, 0.0)


class Dro(NamedTuple):
    """The regularisation τ."""

    tau: float = 1.0


@jit
def dro(p: Single, h: Dro):
    """ℓ = ½(r − τs)², r = extra the reward above the value of the prompt.

    ∂ℓ/∂s = −τ(r − τs). DRO-V, arXiv 2405.19107 (6).
    """
    t = p.extra - h.tau * p.score
    return 0.5 * t * t, -h.tau * t
