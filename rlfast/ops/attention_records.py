"""What ``paged_attention`` passes to its backends."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Inputs(NamedTuple):
    """Tensors of one call, on one device. The last dimension of each is contiguous."""

    q: torch.Tensor  # [T, H, D]
    k_cache: torch.Tensor  # [pages, page_size, Hkv, D] of q's dtype
    v_cache: torch.Tensor  # [pages, page_size, Hkv, Dv]
    block_table: torch.Tensor  # int32 [S, most]: page p of sequence s; what lies behind its last page is not read
    cu_q: torch.Tensor  # int32 [S + 1]: the new tokens of each sequence
    kv_lens: torch.Tensor  # int32 [S]: its positions, the new tokens among them
    sinks: torch.Tensor | None  # float32 (float64 beside float64) [H]


class Options(NamedTuple):
    """Numbers of one call."""

    scale: float  # > 0
    softcap: float  # 0: none
    window: int  # positions that a query sees, its own among them; 0: all
    shared_prefix: bool = False  # a hint: neighbouring sequences begin with the same pages


def allocate(x: Inputs) -> torch.Tensor:
    """The output [T, H, Dv], contiguous."""
    tokens, heads, _ = x.q.shape
    return torch.empty((tokens, heads, x.v_cache.shape[-1]), dtype=x.q.dtype, device=x.q.device)


def longest(cu_seqlens: torch.Tensor, tokens: int) -> int:
    """A bound on the length of a packed sequence: looked at on a CPU, where that costs no synchronisation."""
    if cu_seqlens.device.type != "cpu":
        return tokens
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def paged(q, k, v, cu_seqlens, sinks) -> Inputs:
    """Packed sequences as the paged call that sees the same: each key is a page of its own."""
    most = longest(cu_seqlens, q.shape[0])
    table = cu_seqlens[:-1, None] + torch.arange(most, dtype=torch.int32, device=q.device)
    return Inputs(q, k.unsqueeze(1), v.unsqueeze(1), table, cu_seqlens, cu_seqlens.diff(), sinks)
