"""Losses of single responses by the compiled kernels."""

from __future__ import annotations

from rlfast.native.preferences import arguments, launch, why_not
from rlfast.ops.preference_records import Output, Rest, Settings, Side

__all__ = ["forward", "why_not"]


def forward(side: Side, desirable, rest: Rest, terms, settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/unpaired_loss.py``."""
    sides, *others = arguments((side,), rest, terms, settings, reduce, out)
    launch("unpaired_loss", side, sides, (desirable.data_ptr(), desirable.stride(0)), *others)
