"""Scores of a response: what a preference loss compares, then its derivative by the summed log-prob.

S = Σ m·log π of the response's tokens, S_ref that of the reference (0 where there is none), D = S − S_ref. The loss may
divide a score by the response's length.
"""

from typing import NamedTuple

from rlfast.kernels.formulas.elementary import exp, expm1, sigmoid, softplus
from rlfast.kernels.formulas.token import NoHyper
from rlfast.kernels.lang import jit, tl

LN_2 = tl.constexpr(0.6931471805599453)
EXPONENT = tl.constexpr(80.0)


class Response(NamedTuple):
    """What a score sees of one response."""

    logp: object  # S
    log_ratio: object  # D
    length: object  # n, its tokens; 1 if they were not counted


@jit
def log_ratio(r: Response, h: NoHyper):
    """s = D.

    ds/dS = 1. DPO, arXiv 2305.18290: the score of the reverse KL.
    """
    return r.log_ratio, 1.0


@jit
def total(r: Response, h: NoHyper):
    """s = S.

    ds/dS = 1: no reference.
    """
    return r.logp, 1.0


class Alpha(NamedTuple):
    """The exponent α."""

    alpha: float = 0.25


@jit
def power(r: Response, h: Alpha):
    """s = (1 − e^u)/α, u = min(−α·S/n, 80); S/n for α = 0.

    ds/dS = e^u/n, and 0 where the bound is active. AlphaPO, arXiv 2501.03884, which has no bound.
    """
    mean = r.logp / r.length
    # a product with the length is 0 where α is; α·S/n would be NaN of an infinite S
    u = tl.where(h.alpha * r.length == 0.0, 0.0, -h.alpha * mean)
    bounded = tl.where(u > EXPONENT, EXPONENT, u)
    value = tl.where(u == 0.0, mean, -expm1(bounded) / h.alpha)
    return value, tl.where(u > EXPONENT, 0.0, exp(bounded) / r.length)


@jit
def forward_kl(r: Response, h: NoHyper):
    """s = 1 − e^u, u = min(−D, 80).

    ds/dS = e^u, and 0 where the bound is active. f-DPO, arXiv 2309.16240, which has no bound.
    """
    bounded = tl.where(r.log_ratio < -EXPONENT, EXPONENT, -r.log_ratio)
    return -expm1(bounded), tl.where(r.log_ratio < -EXPONENT, 0.0, exp(bounded))


@jit
def jensen_shannon(r: Response, h: NoHyper):
    """s = log 2 + log σ(D).

    ds/dS = σ(−D). f-DPO, arXiv 2309.16240.
    """
    return -softplus(-r.log_ratio) + LN_2, sigmoid(-r.log_ratio)


class Divergence(NamedTuple):
    """The α of an α-divergence."""

    alpha: float = 0.5


@jit
def alpha_divergence(r: Response, h: Divergence):
    """s = (e^u − 1)/(α − 1), u = min((α − 1)·D, 80); D for α = 1, the reverse KL.

    ds/dS = e^u, and 0 where the bound is active. f-DPO, arXiv 2309.16240.
    """
    rate = h.alpha - 1.0
    u = tl.where(rate * r.length == 0.0, 0.0, rate * r.log_ratio)  # as in power
    bounded = tl.where(u > EXPONENT, EXPONENT, u)
    value = tl.where(u == 0.0, r.log_ratio, expm1(bounded) / rate)
    return value, tl.where(u > EXPONENT, 0.0, exp(bounded))
