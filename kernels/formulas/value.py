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
    """Where the square turns into a line, and how far V may move from V_old."""

    delta: float = 1.0
    clip: float = INFINITE


@jit
def value_huber(t: Token, h: Huber):
    """ℓ = ½·e² where |e| ≤ δ, else δ·(|e| − ½δ), e the larger of V − R and clip(V, V_old ± c) − R.

    ∂ℓ/∂V = clip(V − R, −δ, δ), and 0 where the second is larger. Huber 1964.
    """
    error = t.logp - t.adv
    bounded = tl.minimum(tl.maximum(t.logp, t.old_logp - h.clip), t.old_logp + h.clip) - t.adv
    active = tl.abs(error) >= tl.abs(bounded)
    worst = tl.maximum(tl.abs(error), tl.abs(bounded))
    loss = tl.where(worst <= h.delta, 0.5 * worst * worst, h.delta * (worst - 0.5 * h.delta))
    d = tl.minimum(tl.maximum(error, -h.delta), h.delta)
    return loss, 0.0, tl.where(active, d, 0.0), tl.where(active, 0.0, 1.0)
