"""The ``reference`` backend of ``sample``: its oracle behind a kernel's interface."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import torch

from rlfast.ops.sample_records import Inputs, Outputs, allocate
from rlfast.reference import sample as oracle


def edits_of(x: Inputs) -> list[list[tuple]] | None:
    """The edits of each row as pairs; an id that is none is a NaN somewhere in its row."""
    if x.edit_ends is None:
        return None
    vocab = x.logits.shape[1]
    pairs = zip(x.edit_ids.tolist(), x.edit_values.tolist(), strict=True)
    pairs = [(i, value) if 0 <= i < vocab else (0, float("nan")) for i, value in pairs]
    ends = x.edit_ends.tolist()
    return [pairs[begin:end] for begin, end in pairwise(ends)]


def allowed_of(x: Inputs) -> torch.Tensor | None:
    """The mask as bool [M, V]."""
    if x.allowed is None:
        return None
    bit = torch.arange(32, dtype=torch.int32, device=x.allowed.device)
    return ((x.allowed.unsqueeze(-1) >> bit) & 1).flatten(1)[:, : x.logits.shape[1]] != 0


def outputs(x: Inputs, dtype: torch.dtype, tokens=None) -> tuple:
    """What the op returns, computed in ``dtype``; of given tokens, if there are some."""
    return oracle.sample(*x[:7], edits=edits_of(x), allowed=allowed_of(x), tokens=tokens, dtype=dtype)


def _forward(x: Inputs) -> Outputs:
    out = allocate(x)
    for to, found in zip(out, outputs(x, out.logp.dtype), strict=True):
        to.copy_(found)
    return out


sample = SimpleNamespace(forward=_forward)
