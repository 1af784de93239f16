"""Losses of a reward model on a pair, as links of ``kernels/formulas/pair.py``: w and l are the rewards themselves."""

from typing import NamedTuple

from rlfast.kernels.formulas.choice import cross_entropy
from rlfast.kernels.formulas.elementary import exp, sigmoid, softplus
from rlfast.kernels.formulas.pair import Beta, Pair
from rlfast.kernels.formulas.score import LN_2
from rlfast.kernels.formulas.token import NoHyper
from rlfast.kernels.lang import jit, tl


@jit
def soft_label(p: Pair, h: Beta):
    """ℓ = −P·log σ(x) − (1 − P)·log σ(−x), P = extra.

    ∂ℓ/∂x = (1 − P) − σ(−x). Constitutional AI, arXiv 2212.08073.
    """
    x = h.beta * (p.chosen - p.rejected)
    d = h.beta * ((1.0 - p.extra) - sigmoid(-x))
    return cross_entropy(x, 1.0 - p.extra), d, -d


@jit
def centring(p: Pair, h: NoHyper):
    """ℓ = (w + l)².

    ∂ℓ/∂w = ∂ℓ/∂l = 2(w + l). arXiv 2312.09244.
    """
    t = p.chosen + p.rejected
    return t * t, 2.0 * t, 2.0 * t


class Focal(NamedTuple):
    """The exponent γ."""

    gamma: float = 2.0


@jit
def focal(p: Pair, h: Focal):
    """ℓ = −(1 − 2·max(P − ½, 0))^γ·log P, P = σ(w − l).

    ∂ℓ/∂w = −k·(σ(−x) + γσ(x)·(−log P)[x > 0]), k the weight, which is (2σ(−x))^γ where x > 0. InternLM2, 2403.17297.
    """
    x = p.chosen - p.rejected
    easy = x > 0.0
    k = tl.where(easy, exp(h.gamma * (-softplus(x) + LN_2)), 1.0)
    value = softplus(-x)
    d = -k * (sigmoid(-x) + tl.where(easy, h.gamma * sigmoid(x) * value, 0.0))
    return k * value, d, -d


class Barrier(NamedTuple):
    """Where the barrier is, how near to it a reward counts, and the weight λ."""

    limit: float = 5.0
    edge: float = 4.999
    barrier: float = 0.02


@jit
def barrier(p: Pair, h: Barrier):
    """ℓ = −λ·[log(b − w) + log(b + w) + log(b − l) + log(b + l)], w and l within ±edge.

    ∂ℓ/∂w = λ/(b − w) − λ/(b + w), and 0 beyond the edge. InternLM2, arXiv 2403.17297.
    """
    w = tl.minimum(tl.maximum(p.chosen, -h.edge), h.edge)
    l_ = tl.minimum(tl.maximum(p.rejected, -h.edge), h.edge)
    value = -tl.log(h.limit - w) - tl.log(h.limit + w) - tl.log(h.limit - l_) - tl.log(h.limit + l_)
    d_w = h.barrier * (1.0 / (h.limit - w) - 1.0 / (h.limit + w))
    d_l = h.barrier * (1.0 / (h.limit - l_) - 1.0 / (h.limit + l_))
    d_w = tl.where(tl.abs(p.chosen) <= h.edge, d_w, 0.0)
    return h.barrier * value, d_w, tl.where(tl.abs(p.rejected) <= h.edge, d_l, 0.0)


class MaxMargin(NamedTuple):
    """How much more a pair in the wrong order counts."""

    penalty: float = 2.0


@jit
def max_margin(p: Pair, h: MaxMargin):
    """ℓ = −x where x ≥ 0, else −penalty·x, x = w − l.

    ∂ℓ/∂w = −1, or −penalty. Ng and Russell 2000; arXiv 2410.12491.
    """
    x = p.chosen - p.rejected
    d = tl.where(x >= 0.0, -1.0, -h.penalty)
    return d * x, d, -d


class Point(NamedTuple):
    """Where the difference is pulled to."""

    target: float = 10.0


@jit
def regression(p: Pair, h: Point):
    """ℓ = ½(w − l − target)².

    ∂ℓ/∂w = w − l − target. GPM, arXiv 2410.02197.
    """
    t = (p.chosen - p.rejected) - h.target
    return 0.5 * t * t, t, -t
