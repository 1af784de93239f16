"""Divergences of two heads in plain PyTorch: the logits op's arithmetic over chunks of rows.

Each chunk is projected by both heads in float32, and its logits live only as long as the chunk, unless they are kept.
"""

from __future__ import annotations

import torch

from rlfast.fallback.divergence import (
    flat_saved,
    flattened,
    ids_of,
    live_rows,
    own_gradient,
    pair_statistics,
)
from rlfast.fallback.linear_token_logps import logits_of, slices
from rlfast.fallback.token_logps import compute_dtype, grads_by_row, transformed
from rlfast.ops.divergence_records import Head, Measure, Saved, allocate, candidates_of


def forward(head: Head, ref_head: Head, targets, mask, transform, ref_transform, measure: Measure, outputs, keep):
    """See ``rlfast/ops/linear_divergence.py``."""
    n, vocab = head.hidden.shape[0], head.weight.shape[0]
    out = allocate(head.hidden, (n,), targets, outputs)
    ids, counted = ids_of(targets, mask, n, head.hidden.device)
    live = live_rows(mask, n, head.hidden.device)
    flat = flattened(out, candidates_of(targets, 1), n)
    kept = [head.hidden.new_empty((n, vocab) if keep else (0,), dtype=out.value.dtype) for _ in range(2)]
    for rows in slices(n, vocab):
        x, y = (logits_of(h.hidden[rows], h.weight, h.bias) for h in (head, ref_head))
        if keep:
            kept[0][rows], kept[1][rows] = x, y
        z, ref_z = transformed(x, transform, rows), transformed(y, ref_transform, rows)
        pair_statistics(z, ref_z, ids, counted, live, flat, rows, measure, outputs)
    return out, *kept


def backward(
    own: Head, other: Head, targets, mask, transform, other_transform, measure: Measure, saved: Saved, grads, needs,
    kept, other_kept, sums, dtype,
):  # fmt: skip
    """See ``rlfast/ops/linear_divergence.py``."""
    hidden, weight, _ = own
    n, vocab, acc = hidden.shape[0], weight.shape[0], compute_dtype(hidden)
    ids, counted = ids_of(targets, mask, n, hidden.device)
    live, saved, grads = live_rows(mask, n, hidden.device), flat_saved(saved, n), grads_by_row(grads, n)
    returned = [need and (i == 0 or sums is None) for i, need in enumerate(needs)]
    out = [hidden.new_zeros(x.shape if there else (0,), dtype=acc) for x, there in zip(own, returned, strict=True)]
    total = out if sums is None else [out[0], *sums]
    for rows in slices(n, vocab):
        x, y = (
            k[rows] if k.numel() else logits_of(h.hidden[rows], h.weight, h.bias)
            for h, k in ((own, kept), (other, other_kept))
        )
        g = own_gradient(x, y, ids, counted, live, (transform, other_transform), measure, saved, rows, grads)
        if needs[0]:
            total[0][rows] = g @ weight.to(acc)
        if needs[1]:
            there = live[rows].unsqueeze(-1)  # a skipped row may hold NaN, and 0·NaN is NaN
            total[1].addmm_(g.T, torch.where(there, hidden[rows].to(acc), 0.0))
        if needs[2]:
            total[2] += g.sum(0)
    return tuple(x.to(dtype) for x in out)
