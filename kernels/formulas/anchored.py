"""Losses of a pair in which each score counts on its own, not the difference alone; ``kernels/formulas/pair.py``."""

from typing import NamedTuple

from rlfast.kernels.formulas.choice import slope_difference
from rlfast.kernels.formulas.elementary import exp, expm1, log1p, sigmoid, softplus
from rlfast.kernels.formulas.pair import Beta, Pair
from rlfast.kernels.formulas.score import LN_2
from rlfast.kernels.lang import jit, tl

CERTAIN = tl.constexpr(-1e-30)  # the largest mean log-prob that has odds


@jit
def nca_pair(p: Pair, h: Beta):
    """ℓ = −log σ(βw) − ½·log σ(−βw) − ½·log σ(−βl), the first two together (βw)⁻ + ½(βw)⁺ + 1½·log(1 + e^−|βw|).

    ∂ℓ/∂w = β(½σ(βw) − σ(−βw)), ∂ℓ/∂l = ½βσ(βl). arXiv 2402.05369.
    """
    w, l_ = h.beta * p.chosen, h.beta * p.rejected
    value = tl.where(w > 0.0, 0.5 * w, -w) + 1.5 * log1p(exp(-tl.abs(w))) + 0.5 * softplus(l_)
    return value, h.beta * (0.5 * sigmoid(w) - sigmoid(-w)), 0.5 * h.beta * sigmoid(l_)


@jit
def bco(p: Pair, h: Beta):
    """ℓ = −log σ(βw − δ) − log σ(δ − βl), δ the shared number.

    ∂ℓ/∂w = −βσ(δ − βw), ∂ℓ/∂l = βσ(βl − δ). arXiv 2404.04656.
    """
    w, l_ = h.beta * p.chosen - p.shared, h.beta * p.rejected - p.shared
    return softplus(-w) + softplus(l_), -h.beta * sigmoid(-w), h.beta * sigmoid(l_)


class Sppo(NamedTuple):
    """β, and a factor of the whole."""

    beta: float = 1e-3
    scale: float = 1.0


@jit
def sppo_hard(p: Pair, h: Sppo):
    """ℓ = scale·((w − 1/(2β))² + (l + 1/(2β))²).

    ∂ℓ/∂w = 2·scale·(w − 1/(2β)), ∂ℓ/∂l = 2·scale·(l + 1/(2β)). arXiv 2405.00675 (4.7), P = 1 for the chosen.
    """
    w, l_ = p.chosen - 0.5 / h.beta, p.rejected + 0.5 / h.beta
    return h.scale * (w * w + l_ * l_), 2.0 * h.scale * w, 2.0 * h.scale * l_


@jit
def sppo(p: Pair, h: Sppo):
    """ℓ = scale·((w − (P − ½)/β)² + (l + (P − ½)/β)²), P = extra the probability that the chosen is preferred.

    ∂ℓ/∂w = 2·scale·(w − (P − ½)/β), ∂ℓ/∂l = 2·scale·(l + (P − ½)/β). arXiv 2405.00675 (4.7).
    """
    gain = (p.extra - 0.5) / h.beta
    w, l_ = p.chosen - gain, p.rejected + gain
    return h.scale * (w * w + l_ * l_), 2.0 * h.scale * w, 2.0 * h.scale * l_


@jit
def apo_zero(p: Pair, h: Beta):
    """ℓ = 1 − σ(βw) + σ(βl).

    ∂ℓ/∂w = −βσ(βw)σ(−βw), ∂ℓ/∂l = βσ(βl)σ(−βl). arXiv 2408.06266 (7).
    """
    w, l_ = h.beta * p.chosen, h.beta * p.rejected
    low, high = sigmoid(-w), sigmoid(l_)
    return low + high, -h.beta * (sigmoid(w) * low), h.beta * (high * sigmoid(-l_))


@jit
def apo_down(p: Pair, h: Beta):
    """ℓ = σ(βw) + 1 − σ(x).

    ∂ℓ/∂w = β(σ'(βw) − σ'(x)), ∂ℓ/∂l = βσ'(x), σ' = σ(u)σ(−u). arXiv 2408.06266 (8).
    """
    w, l_, x = h.beta * p.chosen, h.beta * p.rejected, h.beta * (p.chosen - p.rejected)
    down = sigmoid(-x)
    d = h.beta * slope_difference(w, x, l_)
    return sigmoid(w) + down, d, h.beta * (sigmoid(x) * down)


@jit
def log1mexp(x):
    """log(1 − e^x) for x < 0. Mächler 2012."""
    near = x > -LN_2
    u = exp(tl.where(near, -1.0, x))  # ≤ ½
    return tl.where(near, tl.log(-expm1(tl.where(near, x, -1.0))), -log1p(u / (1.0 - u)))


@jit
def odds_ratio(p: Pair, h: Beta):
    """ℓ = −β·log σ(o), o = (w − l) − (log(1 − e^w) − log(1 − e^l)), w and l mean log-probs.

    ∂ℓ/∂w = βσ(−o)/(e^w − 1), ∂ℓ/∂l = −βσ(−o)/(e^l − 1). ORPO, arXiv 2403.07691 (7).
    """
    w, l_ = tl.minimum(p.chosen, CERTAIN), tl.minimum(p.rejected, CERTAIN)
    o = (w - l_) - (log1mexp(w) - log1mexp(l_))
    rest = h.beta * sigmoid(-o)
    return h.beta * softplus(-o), rest / expm1(w), -rest / expm1(l_)


class Positive(NamedTuple):
    """β, and the weight λ of the penalty on a chosen response that lost likelihood."""

    beta: float = 0.1
    penalty: float = 50.0


@jit
def dpop(p: Pair, h: Positive):
    """ℓ = −log σ(β(w − l − λ·max(0, −w))).

    ∂ℓ/∂w = −β(1 + λ[w < 0])·σ(−x), ∂ℓ/∂l = βσ(−x). DPO-Positive, arXiv 2402.13228 (3).
    """
    lost = p.chosen < 0.0
    x = h.beta * ((p.chosen - p.rejected) + tl.where(lost, h.penalty * p.chosen, 0.0))
    d = h.beta * sigmoid(-x)
    return softplus(-x), -d * tl.where(lost, 1.0 + h.penalty, 1.0), d


@jit
def dpop_outside(p: Pair, h: Positive):
    """ℓ = −log σ(x) + λ·max(0, −w).

    ∂ℓ/∂w = −βσ(−x) − λ[w < 0], ∂ℓ/∂l = βσ(−x).
    """
    lost = p.chosen < 0.0
    x = h.beta * (p.chosen - p.rejected)
    d = h.beta * sigmoid(-x)
    return softplus(-x) - tl.where(lost, h.penalty * p.chosen, 0.0), -d - tl.where(lost, h.penalty, 0.0), d


class Calibrated(NamedTuple):
    """β, and the weight λ of the calibration."""

    beta: float = 0.1
    calibration: float = 0.5


@jit
def cal_dpo(p: Pair, h: Calibrated):
    """ℓ = −log σ(w − l) + λ((w − 1/(2β))² + (l + 1/(2β))²).

    ∂ℓ/∂w = −σ(l − w) + 2λ(w − 1/(2β)), ∂ℓ/∂l = σ(l − w) + 2λ(l + 1/(2β)). arXiv 2412.14516.
    """
    x, w, l_ = p.chosen - p.rejected, p.chosen - 0.5 / h.beta, p.rejected + 0.5 / h.beta
    d, twice = sigmoid(-x), 2.0 * h.calibration
    return softplus(-x) + h.calibration * (w * w + l_ * l_), twice * w - d, twice * l_ + d


class Explored(NamedTuple):
    """The weight α."""

    alpha: float = 1e-5


@jit
def exploration(p: Pair, h: Explored):
    """ℓ = α(extra·w + (1 − extra)·l): extra is 1 where the chosen came from the reference, else 0.

    ∂ℓ/∂w = α·extra, ∂ℓ/∂l = α(1 − extra). XPO, arXiv 2405.21046.
    """
    rest = 1.0 - p.extra
    return h.alpha * (p.extra * p.chosen + rest * p.rejected), h.alpha * p.extra, h.alpha * rest
