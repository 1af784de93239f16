"""Preference losses by the compiled kernels."""

from __future__ import annotations

from rlfast.native.preferences import arguments, launch, why_not
from rlfast.ops.preference_records import Output, Rest, Settings, Side

__all__ = ["forward", "why_not"]


def forward(chosen: Side, rejected: Side, rest: Rest, terms, settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/pair_loss.py``."""
    launch("pair_loss", chosen, *arguments((chosen, rejected), rest, terms, settings, reduce, out))
