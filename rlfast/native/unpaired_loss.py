"""Losses of single responses by the compiled kernels."""

from __future__ import annotations

from rlfast.native.preferences import arguments, why_not
from rlfast.native.token_logps import extension_of
from rlfast.ops.preference_records import Output, Rest, Settings, Side, rows_of

__all__ = ["forward", "why_not"]


def forward(side: Side, desirable, rest: Rest, terms, settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/unpaired_loss.py``."""
    extension, last = extension_of(side.logp)
    sides, *others = arguments((side,), rest, terms, settings, reduce, out)
    flags = desirable.data_ptr(), desirable.stride(0)
    extension.unpaired_loss(sides, flags, *others, rows_of(side), *last)
