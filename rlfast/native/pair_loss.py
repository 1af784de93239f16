"""Preference losses by the compiled kernels."""

from __future__ import annotations

from rlfast.native.preferences import arguments, why_not
from rlfast.native.token_logps import extension_of
from rlfast.ops.preference_records import Output, Rest, Settings, Side, rows_of

__all__ = ["forward", "why_not"]


def forward(chosen: Side, rejected: Side, rest: Rest, terms, settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/pair_loss.py``."""
    extension, last = extension_of(chosen.logp)
    extension.pair_loss(*arguments((chosen, rejected), rest, terms, settings, reduce, out), rows_of(chosen), *last)
