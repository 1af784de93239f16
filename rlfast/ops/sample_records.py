"""What the ``sample`` op passes to its backends."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """Tensors of one call, on one device, contiguous but for the logits."""

    logits: torch.Tensor  # [M, V] of any row stride, the last dimension contiguous
    temperature: torch.Tensor  # float32 [M]; 0: the first of the largest
    top_k: torch.Tensor  # int32 [M]; 0: off
    top_p: torch.Tensor  # float32 [M]; 1: off
    min_p: torch.Tensor  # float32 [M]; 0: off
    seeds: torch.Tensor  # int64 [M]
    positions: torch.Tensor  # int64 [M]
    edit_ends: torch.Tensor | None  # int32 [M + 1]: row i's edits are [ends[i], ends[i + 1])
    edit_ids: torch.Tensor | None  # int32 [E]
    edit_values: torch.Tensor | None  # float32 [E]
    allowed: torch.Tensor | None  # int32 [M, ⌈V/32⌉]: bit v % 32 of word v / 32


class Outputs(NamedTuple):
    """Tensors of its answer, each [M]; float32, or float64 for float64 logits."""

    tokens: torch.Tensor  # int64; −1 in a row that has none
    logp_raw: torch.Tensor
    logp: torch.Tensor
    kept: torch.Tensor
    entropy: torch.Tensor


def allocate(x: Inputs) -> Outputs:
    """Uninitialised outputs."""
    rows, device = x.logits.shape[:1], x.logits.device
    wide = torch.float64 if x.logits.dtype == torch.float64 else torch.float32
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    return Outputs(tokens, *(torch.empty(rows, dtype=wide, device=device) for _ in range(4)))


class SortedEdits(NamedTuple):
    """Edits in the order of their places; of equal ones the last is the last that was given."""

    places: torch.Tensor  # int64 [E]: row·V + id; what belongs to no row is outside [0, M·V)
    values: torch.Tensor  # float32 [E]; NaN for an id that is none, at the nearest that is one


def sorted_edits(x: Inputs) -> SortedEdits | None:
    """The edits of all rows, without a look at them from the host."""
    if x.edit_ends is None:
        return None
    vocab = x.logits.shape[1]
    index = torch.arange(x.edit_ids.shape[0], device=x.logits.device, dtype=torch.int32)
    row = torch.searchsorted(x.edit_ends, index, right=True) - 1
    ids = x.edit_ids.long().clamp(0, vocab - 1)
    values = torch.where(ids == x.edit_ids, x.edit_values, torch.nan)
    places, order = torch.sort(row * vocab + ids, stable=True)
    return SortedEdits(places, values[order])
