"""Losses of a critic: value, then derivative. ``t.logp`` is V, ``t.old_logp`` is V_old and ``t.adv`` the return R."""

from typing import NamedTuple

from rlfast.kernels.formulas.token import INFINITE, Token
from rlfast.kernels.lang import jit, tl


class ValueClip(NamedTuple):
    """How far V may move from V_old; off by default."""

    clip: float = INFINITE


@jit
def value_clipped(t: Token, h: ValueClip):
    """ℓ = ½·max((V − R)², (clip(V, V_old ± c) − R)²).

    ∂ℓ/∂V = V − R, and 0 where the second is larger. PPO2.
    """
    error = t.logp - t.adv
    bounded = tl.minimum(tl.maximum(t.logp, t.old_logp - h.clip), t.old_logp + h.clip) - t.adv
    active = error * error >= bounded * bounded
    worst = tl.maximum(error * error, bounded * bounded)
    return 0.5 * worst, 0.0, tl.where(active, error, 0.0), tl.where(active, 0.0, 1.0)


class Huber(NamedTuple):
    """Where the square turns into a line."""

    delta: float = 1.0


@jit
def value_huber(t: Token, h: Huber):
    """ℓ = ½·e² where |e| ≤ δ, else δ·(|e| − ½δ), e = V − R.

    ∂ℓ/∂V = clip(e, −δ, δ). Huber 1964.
    """
    error = t.logp - t.adv
    size = tl.abs(error)
    loss = tl.where(size <= h.delta, 0.5 * error * error, h.delta * (size - 0.5 * h.delta))
    return loss, 0.0, tl.minimum(tl.maximum(error, -h.delta), h.delta), 0.0
