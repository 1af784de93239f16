"""Corrections for a rollout that did not come from π_old: weights and gates on ρ = e^(log π_old − log π_rollout)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlfast import limits, validate
from rlfast.ops.loss_records import LEVELS

KINDS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class Correction:
    """A weight on the surrogate, and a gate that drops what is too far off. Both are detached.

    ρ_t = exp(old_logp − rollout_logp); a NaN there counts as ρ = 1. A level takes the token's log ρ, or its sequence's
    sum or mean.

    Args:
        weight: level of the weight: None, "token", "seq_sum" or "seq_mean".
        low, high: the weight is clamped to [low, high].
        gate: level of the gate: None, "token", "seq_sum" or "seq_mean".
        gate_kind: what the gate looks at, with d = log ρ: "k1" is d, "k2" is d²/2, "k3" is e^d − 1 − d.
        gate_low, gate_high: the gate is open within [gate_low, gate_high], in the units of ``gate_kind``.
        masks: whether a closed gate takes the token out of the mask, and so out of every denominator.

    Reference:
        TIS: https://fengyao.notion.site/off-policy-rl; IcePop: arXiv 2510.18855; decoupled PPO: arXiv 2505.24298.
    """

    weight: str | None = None
    low: float = 0.0
    high: float = math.inf
    gate: str | None = None
    gate_kind: str = "k1"
    gate_low: float = -math.inf
    gate_high: float = math.inf
    masks: bool = False

    def __post_init__(self):
        validate.one_of("weight", self.weight, LEVELS)
        validate.one_of("gate", self.gate, LEVELS)
        validate.one_of("gate_kind", self.gate_kind, KINDS)
        validate.flag("masks", self.masks)
        for low, high in (("low", "high"), ("gate_low", "gate_high")):
            for name in (low, high):
                validate.number(name, getattr(self, name), limits.OPTIONS[name])
            validate.ordered(low, getattr(self, low), high, getattr(self, high))


def _log(name: str, ratio) -> float:
    """log of a bound of ρ; −inf of 0."""
    ratio = validate.number(name, ratio, limits.BOUND)
    return math.log(ratio) if ratio > 0 else -math.inf


def tis(cap: float = 2.0) -> Correction:
    """Truncated importance sampling: min(ρ, cap) of each token."""
    return Correction(weight="token", high=cap)


def icepop(low: float = 0.5, high: float = 5.0) -> Correction:
    """ρ where it is in [low, high], else 0."""
    return Correction(weight="token", gate="token", gate_low=_log("low", low), gate_high=_log("high", high))


def sequence_tis(cap: float = 2.0) -> Correction:
    """min(Π ρ, cap) of each sequence."""
    return Correction(weight="seq_sum", high=cap)


def sequence_mask(high: float = 3.0, low: float = 0.0) -> Correction:
    """Π ρ of the sequence where it is in [low, high], else 0."""
    return Correction(weight="seq_sum", gate="seq_sum", gate_low=_log("low", low), gate_high=_log("high", high))


def geometric_mask(low: float = 0.999, high: float = 1.002) -> Correction:
    """ρ of each token, in sequences whose geometric mean of ρ is in [low, high]; the others are dropped."""
    return Correction(weight="token", gate="seq_mean", gate_low=_log("low", low), gate_high=_log("high", high))


def rejection(level: str = "seq_mean", kind: str = "k1", low: float | None = None, high: float = 0.002) -> Correction:
    """No weight; tokens or sequences whose estimate is outside [low, high] leave the mask.

    ``kind`` "k1" has bounds on log ρ; "k2" and "k3" are never negative and need only ``high``.
    """
    bottom = -math.inf if low is None else low
    return Correction(gate=level, gate_kind=kind, gate_low=bottom, gate_high=high, masks=True)


def decoupled() -> Correction:
    """ρ of each token, unbounded: decoupled PPO clips π/π_prox and weighs by π_prox/π_behave."""
    return Correction(weight="token")


CORRECTIONS = {
    "tis": tis,
    "icepop": icepop,
    "sequence_tis": sequence_tis,
    "sequence_mask": sequence_mask,
    "geometric_mask": geometric_mask,
    "rejection": rejection,
    "decoupled": decoupled,
}
