"""Attention over a paged cache in plain PyTorch, and the gradients of attention over packed sequences.

Neighbouring sequences with the same number of new tokens are one batch, their keys padded to the longest: a decode
step is one batch. It looks at ``cu_q`` and ``kv_lens``, for which a GPU has to be waited for. Its bits may depend on
the batch.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from rlfast.ops.attention_records import Inputs, Options, allocate

ELEMENTS = 1 << 22  # scores, or keys, of one batch: 16 MiB in float32
QUERIES = 32  # whose contributions to a gradient are one partial sum


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _batches(starts: list, lens: list, width: int):
    """[first, last) of neighbours with as many new tokens, whose padded keys are ELEMENTS at most."""
    first = 0
    while first < len(lens):
        new, most, last = starts[first + 1] - starts[first], lens[first], first + 1
        while last < len(lens) and starts[last + 1] - starts[last] == new:
            most = max(most, lens[last])
            if most * (last + 1 - first) * width > ELEMENTS:
                break
            last += 1
        if new:
            yield first, last
        first = last


class _Weights(NamedTuple):
    """Probabilities, and what a gradient wants beside them."""

    p: torch.Tensor  # [B, Hkv, n, G, m]
    capped: torch.Tensor | None  # tanh of the scores, where there is a soft-cap
    sink: torch.Tensor | None  # [B, Hkv, n, G]: the probability of the sink


def _by_head(x: torch.Tensor, group: int) -> torch.Tensor:
    """[B, n, H, D] → [B, Hkv, n·G, D]."""
    batch, n, heads, width = x.shape
    return x.unflatten(2, (-1, group)).transpose(1, 2).reshape(batch, heads // group, n * group, width)


def _by_token(x: torch.Tensor, group: int) -> torch.Tensor:
    """The way back."""
    return x.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)


def _weights(q, k, seen, sinks, o: Options) -> _Weights:
    """softmax of the scores of q [B, Hkv, n·G, D] over the keys [B, Hkv, m, D] that are ``seen`` [B, n, m]."""
    batch, heads, rows, _ = q.shape
    n, m = seen.shape[1:]
    scores = (q @ k.transpose(2, 3)).view(batch, heads, n, rows // n, m) * o.scale
    capped = None
    if o.softcap:
        capped = torch.tanh(scores / o.softcap)
        scores = o.softcap * capped
    scores = scores.masked_fill(~seen[:, None, :, None], -torch.inf)
    if sinks is None:
        return _Weights(torch.softmax(scores, -1), capped, None)
    sink = sinks.view(1, heads, 1, -1, 1).expand(*scores.shape[:-1], 1)
    p = torch.softmax(torch.cat((scores, sink), -1), -1)
    return _Weights(p[..., :-1], capped, p[..., -1])


def _seen(last, keys, window: int) -> torch.Tensor:
    """[B, n, m]: which of the positions ``keys`` [m] the queries at the positions ``last`` [B, n] see."""
    distance = last.unsqueeze(-1) - keys
    return (distance >= 0) & (distance < window) if window else distance >= 0


def forward(x: Inputs, o: Options) -> torch.Tensor:
    """See ``rlfast/ops/paged_attention.py``."""
    out, device = allocate(x), x.q.device
    starts, lens = x.cu_q.tolist(), x.kv_lens.tolist()
    page_size, kv_heads = x.k_cache.shape[1:3]
    heads = x.q.shape[1]
    group = heads // kv_heads
    for first, last in _batches(starts, lens, kv_heads * (x.k_cache.shape[-1] + x.v_cache.shape[-1])):
        count, most, new = last - first, max(lens[first:last]), starts[first + 1] - starts[first]
        keys = torch.arange(most, device=device)
        ends = x.kv_lens[first:last, None]
        there = keys < ends
        if o.window:
            there &= keys > ends - new - o.window
        pages = x.block_table[first:last, keys // page_size].long().masked_fill(~there, 0)
        k, v = (_wide(cache[pages, keys % page_size]).transpose(1, 2) for cache in (x.k_cache, x.v_cache))
        q, to = (y[starts[first] : starts[last]].view(count, new, heads, -1) for y in (x.q, out))
        step = max(1, ELEMENTS // (count * heads * most))
        for i in range(0, new, step):
            part = q[:, i : i + step]
            n = part.shape[1]
            seen = _seen(ends - new + torch.arange(i, i + n, device=device), keys, o.window)
            w = _weights(_by_head(_wide(part), group), k, seen, x.sinks, o)
            # what nobody sees may be garbage, and 0·NaN is NaN
            values = v.masked_fill(~seen.any(1)[:, None, :, None], 0.0)
            to[:, i : i + n] = _by_token(w.p.reshape(count, kv_heads, n * group, most) @ values, group)
    return out


def gradients(g, q, k, v, cu_seqlens, sinks, o: Options) -> tuple:
    """∂L/∂ of q, k, v in their dtype and of the sinks (float32; no elements where there are none), g = ∂L/∂out.

    A sequence at a time, and of it at most QUERIES queries, the last ones first: a key's gradient is the sum of what
    all queries behind it give, of which the last, who see the most keys, give the least. With P the probabilities,

        ∂v = Pᵀg,  ∂P = g·vᵀ,  ∂s = P ∘ (∂P − Σ_j P∘∂P),  ∂q = scale·∂s·k,  ∂k = scale·∂sᵀq,  ∂sink = −Σ p_sink·Σ_j P∘∂P

    where a soft-cap multiplies ∂s by 1 − tanh².
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    group, ends = heads // kv_heads, cu_seqlens.tolist()
    totals = [torch.zeros(x.shape, dtype=_wide(x).dtype, device=x.device) for x in (q, k, v)]
    g_sinks = torch.zeros(0 if sinks is None else heads, dtype=torch.float64, device=q.device)  # terms cancel
    for begin, end in pairwise(ends):
        step = max(1, min(QUERIES, ELEMENTS // (heads * max(1, end - begin))))
        for b in range(end, begin, -step):
            a = max(b - step, begin)
            rows, keys = slice(a, b), slice(max(begin, a - o.window + 1) if o.window else begin, b)
            at = torch.arange(begin, end, device=q.device)
            seen = _seen(at[None, a - begin : b - begin].flip(1), at[keys.start - begin : b - begin], o.window)
            qs, gs = (_by_head(_wide(x[None, rows].flip(1)), group) for x in (q, g))
            ks, vs = (_wide(x[None, keys]).transpose(1, 2) for x in (k, v))
            w = _weights(qs, ks, seen, sinks, o)
            dp = (gs @ vs.transpose(2, 3)).view_as(w.p)
            mean = (w.p * dp).sum(-1)
            ds = w.p * (dp - mean.unsqueeze(-1)) * o.scale
            if w.capped is not None:
                ds = ds * (1.0 - w.capped.square())
            if w.sink is not None:
                g_sinks -= (w.sink * mean).sum(2, dtype=torch.float64).flatten()
            ds, p = (x.reshape(1, kv_heads, -1, x.shape[-1]) for x in (ds, w.p))
            totals[0][rows] = _by_token(ds @ ks, group)[0].flip(0)
            totals[1][keys] += (ds.transpose(2, 3) @ qs)[0].transpose(0, 1)
            totals[2][keys] += (p.transpose(2, 3) @ gs)[0].transpose(0, 1)
    return (*(total.to(q.dtype) for total in totals), g_sinks.to(totals[0].dtype))
