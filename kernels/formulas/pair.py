"""Losses of a pair of responses: value, then its derivatives by the two scores.

A link takes a ``Pair`` and its hyper-parameters, and returns (ℓ, ∂ℓ/∂w, ∂ℓ/∂l); w is the score of the chosen response,
l of the rejected (``kernels/formulas/score.py``), and x = β(w − l) where nothing else is said. A reward model's scores
are its rewards.
"""

from typing import NamedTuple

from rlfast.kernels.formulas.choice import FAR, choice_kl, cross_entropy
from rlfast.kernels.formulas.elementary import exp, sigmoid, softplus
from rlfast.kernels.formulas.token import NoHyper
from rlfast.kernels.lang import jit, tl


class Pair(NamedTuple):
    """What a link sees of one pair."""

    chosen: object  # w
    rejected: object  # l
    chosen_length: object  # n_w
    rejected_length: object  # n_l
    margin: object  # m; 0 if there is none
    extra: object  # a field that a loss names for itself; 0 if there is none
    shared: object  # a number that a loss names for itself, one for all pairs; 0 if there is none


class Beta(NamedTuple):
    """β."""

    beta: float = 0.1


class Logistic(NamedTuple):
    """β, the share ε of labels that are wrong, a constant margin γ, and the price α of each token more."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.0
    length_price: float = 0.0


@jit
def logistic(p: Pair, h: Logistic):
    """ℓ = −(1 − ε)·log σ(x) − ε·log σ(−x), x = β(w − l) − γ − m − α(n_w − n_l).

    ∂ℓ/∂x = ε − σ(−x). DPO, arXiv 2305.18290; SimPO's γ, 2405.14734; R-DPO's α, 2403.19159; Bradley and Terry 1952.
    """
    x = h.beta * (p.chosen - p.rejected) - h.gamma - p.margin
    x = x - h.length_price * (p.chosen_length - p.rejected_length)
    d = h.beta * (h.label_smoothing - sigmoid(-x))
    return cross_entropy(x, h.label_smoothing), d, -d


class Smoothed(NamedTuple):
    """β, and the share ε < ½ of labels that are wrong."""

    beta: float = 0.1
    label_smoothing: float = 0.1


@jit
def robust(p: Pair, h: Smoothed):
    """ℓ = (−(1 − ε)·log σ(x) + ε·log σ(−x))/(1 − 2ε): a share −ε/(1 − 2ε) of wrong labels.

    ∂ℓ/∂x = −((1 − ε)·σ(−x) + ε·σ(x))/(1 − 2ε). arXiv 2403.00409.
    """
    x = h.beta * (p.chosen - p.rejected) - p.margin
    keep, whole = 1.0 - h.label_smoothing, 1.0 - 2.0 * h.label_smoothing
    d = -h.beta * (keep * sigmoid(-x) + h.label_smoothing * sigmoid(x)) / whole
    return cross_entropy(x, -h.label_smoothing / whole), d, -d


class Hinge(NamedTuple):
    """β, and the margin δ of the hinge."""

    beta: float = 0.1
    delta: float = 1.0


@jit
def hinge(p: Pair, h: Hinge):
    """ℓ = max(0, δ − x), x = β(w − l) − m.

    ∂ℓ/∂x = −1 where x < δ. SLiC, arXiv 2305.10425, 2309.06657.
    """
    gap = h.delta - (h.beta * (p.chosen - p.rejected) - p.margin)
    d = tl.where(gap > 0.0, -h.beta, 0.0)
    return tl.maximum(gap, 0.0), d, -d


@jit
def ipo(p: Pair, h: Beta):
    """ℓ = (w − l − m − 1/(2β))².

    ∂ℓ/∂w = 2(w − l − m − 1/(2β)). arXiv 2310.12036 (17).
    """
    t = (p.chosen - p.rejected) - p.margin - 0.5 / h.beta
    return t * t, 2.0 * t, -2.0 * t


class Exo(NamedTuple):
    """β, and the probability ε > 0 that the label is wrong."""

    beta: float = 0.1
    label_smoothing: float = 1e-3


@jit
def exo_pair(p: Pair, h: Exo):
    """ℓ = q·(log q − log(1 − ε)) + (1 − q)·(log(1 − q) − log ε), q = σ(x): the KL to log-odds a = log((1 − ε)/ε).

    ∂ℓ/∂x = q(1 − q)·(x − a). arXiv 2402.00856 (16).
    """
    x = h.beta * (p.chosen - p.rejected)
    a = tl.log((1.0 - h.label_smoothing) / h.label_smoothing)
    slope = sigmoid(x) * sigmoid(-x)
    d = h.beta * tl.where(slope > 0.0, slope * (x - a), 0.0)
    return choice_kl(x, a), d, -d


class Disco(NamedTuple):
    """β, and the temperature τ of the mixture."""

    beta: float = 0.1
    tau: float = 0.05


@jit
def discopop(p: Pair, h: Disco):
    """ℓ = −(1 − g)·log σ(x) + g·e^(−x), g = σ(x/τ).

    ∂ℓ/∂x = g(1 − g)/τ·(e^(−x) + log σ(x)) − (1 − g)·σ(−x) − g·e^(−x). arXiv 2406.08414 (5).
    """
    x = h.beta * (p.chosen - p.rejected)
    x = tl.where(x < -FAR, -FAR, x)
    u = x / h.tau
    rest = sigmoid(-u)
    grown = exp(-x - softplus(-u))  # g·e^(−x): neither factor alone stays finite
    far = softplus(-x)
    d = h.beta * (rest * (grown - sigmoid(u) * far) / h.tau - rest * sigmoid(-x) - grown)
    return rest * far + grown, d, -d


class Rpo(NamedTuple):
    """β, and the scale η of the true rewards, whose difference is the margin."""

    beta: float = 0.1
    eta: float = 1.0


@jit
def rpo_squared(p: Pair, h: Rpo):
    """ℓ = (x − a)², a = η·m.

    ∂ℓ/∂x = 2(x − a). arXiv 2406.11704.
    """
    t = h.beta * (p.chosen - p.rejected) - h.eta * p.margin
    d = 2.0 * h.beta * t
    return t * t, d, -d


@jit
def rpo_backward_kl(p: Pair, h: Rpo):
    """ℓ = σ(a)·(log σ(a) − log σ(x)) + σ(−a)·(log σ(−a) − log σ(−x)), a = η·m.

    ∂ℓ/∂x = σ(−a)σ(x) − σ(a)σ(−x). arXiv 2406.11704.
    """
    x, a = h.beta * (p.chosen - p.rejected), h.eta * p.margin
    up, down = sigmoid(a), sigmoid(-a)
    d = h.beta * (down * sigmoid(x) - up * sigmoid(-x))
    return choice_kl(a, x), d, -d


@jit
def rpo_forward_kl(p: Pair, h: Rpo):
    """ℓ = σ(x)·(log σ(x) − log σ(a)) + σ(−x)·(log σ(−x) − log σ(−a)), a = η·m.

    ∂ℓ/∂x = σ(x)σ(−x)·(x − a). arXiv 2406.11704.
    """
    x, a = h.beta * (p.chosen - p.rejected), h.eta * p.margin
    up, down = sigmoid(x), sigmoid(-x)
    slope = up * down
    d = h.beta * tl.where(slope > 0.0, slope * (x - a), 0.0)
    return choice_kl(x, a), d, -d


@jit
def squared(p: Pair, h: Beta):
    """ℓ = (x − 1)².

    ∂ℓ/∂x = 2(x − 1). GPO, arXiv 2402.05749.
    """
    t = h.beta * (p.chosen - p.rejected) - 1.0
    d = 2.0 * h.beta * t
    return t * t, d, -d


@jit
def exponential(p: Pair, h: Beta):
    """ℓ = e^(−x).

    ∂ℓ/∂x = −e^(−x). GPO, arXiv 2402.05749.
    """
    value = exp(-h.beta * (p.chosen - p.rejected))
    return value, -h.beta * value, h.beta * value


@jit
def truncated_quadratic(p: Pair, h: Beta):
    """ℓ = max(0, 1 − x)².

    ∂ℓ/∂x = −2·max(0, 1 − x). GPO, arXiv 2402.05749.
    """
    gap = 1.0 - h.beta * (p.chosen - p.rejected)
    gap = tl.maximum(gap, 0.0)
    d = -2.0 * h.beta * gap
    return gap * gap, d, -d


@jit
def savage(p: Pair, h: Beta):
    """ℓ = σ(−x)².

    ∂ℓ/∂x = −2σ(x)σ(−x)². GPO, arXiv 2402.05749.
    """
    x = h.beta * (p.chosen - p.rejected)
    down = sigmoid(-x)
    d = -2.0 * h.beta * (down * down * sigmoid(x))
    return down * down, d, -d


@jit
def scaled_logistic(p: Pair, h: Beta):
    """ℓ = −log σ(β·extra·(w − l)): a pair's own β.

    ∂ℓ/∂w = −β·extra·σ(−x). β-DPO, arXiv 2407.08639.
    """
    rate = h.beta * p.extra
    x = rate * (p.chosen - p.rejected)
    d = -rate * sigmoid(-x)
    return softplus(-x), d, -d


class Unequal(NamedTuple):
    """β of the chosen, α of the rejected."""

    beta: float = 0.1
    alpha: float = 0.1


@jit
def unequal(p: Pair, h: Unequal):
    """ℓ = −log σ(βw − αl).

    ∂ℓ/∂w = −βσ(−x), ∂ℓ/∂l = ασ(−x). D²O, arXiv 2403.03419, w the mean over a prompt's own samples.
    """
    x = h.beta * p.chosen - h.alpha * p.rejected
    d = sigmoid(-x)
    return softplus(-x), -h.beta * d, h.alpha * d


@jit
def nll(p: Pair, h: NoHyper):
    """ℓ = −w.

    ∂ℓ/∂w = −1.
    """
    return -p.chosen, -1.0, 0.0


class Weighted(NamedTuple):
    """β, and the weight η of the likelihood in units of it."""

    beta: float = 0.1
    eta: float = 0.005


@jit
def weighted_nll(p: Pair, h: Weighted):
    """ℓ = −βη·w.

    ∂ℓ/∂w = −βη. RPO, arXiv 2405.16436, of w = S: a sum over the tokens.
    """
    weight = h.beta * h.eta
    return -weight * p.chosen, -weight, 0.0


@jit
def batch_nll(p: Pair, h: NoHyper):
    """ℓ = −w/shared: with the batch's mean length, the mean over all of its chosen tokens.

    ∂ℓ/∂w = −1/shared.
    """
    return -p.chosen / p.shared, -1.0 / p.shared, 0.0
