"""Estimators of KL(π‖π_ref) from one token: value, then its derivative by log p.

d = log π_ref − log π. Schulman, http://joschu.net/blog/kl-approx.html. ``d_max`` bounds |d|, ``kl_max`` the estimate; a
bound that is active passes no gradient.
"""

from typing import NamedTuple

from rlfast.kernels.formulas.elementary import expm1
from rlfast.kernels.lang import jit, tl


class KlBounds(NamedTuple):
    """Bounds of d and of the estimate; off by default."""

    d_max: float = float("inf")
    kl_max: float = float("inf")


@jit
def bounded(value, derivative, d, h: KlBounds):
    """The estimate within its bounds."""
    open_ = (tl.abs(d) <= h.d_max) & (tl.abs(value) <= h.kl_max)
    return tl.minimum(tl.maximum(value, -h.kl_max), h.kl_max), tl.where(open_, derivative, 0.0)


@jit
def k1(d, h: KlBounds):
    """−d: unbiased. Derivative 1."""
    c = tl.minimum(tl.maximum(d, -h.d_max), h.d_max)
    return bounded(-c, 1.0, d, h)


@jit
def k2(d, h: KlBounds):
    """d²/2: its gradient is that of the KL, on-policy. Derivative −d."""
    c = tl.minimum(tl.maximum(d, -h.d_max), h.d_max)
    return bounded(0.5 * c * c, -c, d, h)


@jit
def k3(d, h: KlBounds):
    """e^d − d − 1: unbiased, and never negative. Derivative −(e^d − 1)."""
    c = tl.minimum(tl.maximum(d, -h.d_max), h.d_max)
    grown = expm1(c)
    return bounded(grown - c, -grown, d, h)


@jit
def absolute(d, h: KlBounds):
    """|d|. Derivative −sign(d)."""
    c = tl.minimum(tl.maximum(d, -h.d_max), h.d_max)
    sign = tl.where(d > 0.0, -1.0, tl.where(d < 0.0, 1.0, 0.0))
    return bounded(tl.abs(c), sign, d, h)
