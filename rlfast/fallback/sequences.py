"""Sums over the tokens of responses in plain PyTorch, and the way back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.fallback.token_logps import compute_dtype
from rlfast.ops.preference_records import Side, rows_of


class Sums(NamedTuple):
    """Of each response, in the compute dtype."""

    logp: torch.Tensor  # S
    log_ratio: torch.Tensor  # S − S_ref
    length: torch.Tensor  # n
    mask: torch.Tensor | None  # like tokens; None of sums
    weight: torch.Tensor | None  # c of the tokens; None: 1


def is_tokens(side: Side) -> bool:
    """Whether a side has tokens, and not their sums."""
    return side.logp.dim() == 2 or side.cu_seqlens is not None


def lengths_of(side: Side) -> torch.Tensor | None:
    """The tokens that count of each response; None where there are no tokens."""
    if not is_tokens(side):
        return None
    mask = torch.ones_like(side.logp, dtype=torch.bool) if side.mask is None else side.mask
    return _rows(side, mask.double())


def _rows(side: Side, x):
    """Σ over each response, in double."""
    if side.cu_seqlens is None:
        return x.sum(-1, dtype=torch.float64)
    inside = x[: side.cu_seqlens[-1]]
    return torch.segment_reduce(inside.double(), "sum", offsets=side.cu_seqlens - side.cu_seqlens[0], initial=0)


def _spread(side: Side, x):
    """One number a response, for each of its tokens."""
    if side.cu_seqlens is None:
        return x.unsqueeze(-1)
    return torch.repeat_interleave(x, side.cu_seqlens.diff())


def _position(side: Side, mask):
    """How many tokens of its response count up to each token, itself among them."""
    count = mask.cumsum(-1)
    if side.cu_seqlens is None:
        return count
    before = torch.nn.functional.pad(count, (1, 0))[side.cu_seqlens[:-1]]
    return count - _spread(side, before)


def within(side: Side) -> Side:
    """Packed tokens from the first boundary to the last."""
    if side.cu_seqlens is None:
        return side
    first, last = side.cu_seqlens[0], side.cu_seqlens[-1]
    cut = (x if x is None else x[first:last] for x in (side.logp, side.ref_logp, side.mask))
    return Side(*cut, side.cu_seqlens - first, None)


def sums_of(side: Side, shared_length, tail: float) -> Sums:
    """The sums of a side whose packed tokens start at 0; ``shared_length`` is the length of the shorter response."""
    acc = compute_dtype(side.logp)
    if not is_tokens(side):
        logp = side.logp.to(acc)
        ratio = logp if side.ref_logp is None else logp - side.ref_logp.to(acc)
        length = torch.ones_like(logp) if side.lengths is None else side.lengths.to(acc)
        return Sums(logp, ratio, length, None, None)
    mask, weight = weights_of(side, shared_length, tail)
    logp = total(side, side.logp, mask, weight)
    ref = torch.zeros_like(logp) if side.ref_logp is None else total(side, side.ref_logp, mask, weight)
    return Sums(logp.to(acc), (logp - ref).to(acc), _rows(side, mask.to(acc)).to(acc), mask, weight)


def weights_of(side: Side, shared_length, tail: float):
    """(the tokens that count, c of the tokens; None: 1)."""
    mask = torch.ones_like(side.logp, dtype=torch.bool) if side.mask is None else side.mask
    if tail == 1.0 or shared_length is None:
        return mask, None
    beyond = _position(side, mask) > _spread(side, shared_length)
    return mask, torch.where(beyond, tail, 1.0).to(compute_dtype(side.logp))


def total(side: Side, x, mask, weight):
    """Σ c·x over the tokens that count of each response, in double."""
    acc = compute_dtype(x)
    x = torch.where(mask, x.to(acc), torch.zeros((), dtype=acc, device=x.device))
    return _rows(side, x if weight is None else x * weight)


def pull_back(side: Side, sums: Sums, d_sum, out) -> None:
    """∂/∂log p of each token from ∂/∂S of its response, into ``out``."""
    if sums.mask is None:
        out.copy_(d_sum)
        return
    d = _spread(side, d_sum)
    d = d if sums.weight is None else d * sums.weight
    d = torch.where(sums.mask, d, torch.zeros((), dtype=d.dtype, device=d.device))
    out.copy_(d)


def shared_lengths(chosen: Side, rejected: Side, tail: float):
    """The length of the shorter response of each pair, where it matters."""
    if tail == 1.0 or not is_tokens(chosen) or rows_of(chosen) == 0:
        return None
    return torch.minimum(lengths_of(chosen), lengths_of(rejected))
