"""Token log-probs from hidden states in plain PyTorch: the token op's arithmetic over chunks of rows.

Each chunk of rows is projected in float32, and its logits live only as long as the chunk, unless they are kept for the
backward. Gradients accumulate in float32 over chunks.
"""

from __future__ import annotations

import torch

from rlfast.fallback.token_logps import (
    CHUNK_ELEMENTS,
    compute_dtype,
    counted_rows,
    flattened,
    grads_by_row,
    logits_gradient,
    row_statistics,
    transformed,
)
from rlfast.ops.records import ENTROPY, Row, Transform, Wanted, allocate


def logits_of(hidden, weight, bias) -> torch.Tensor:
    """hidden·weightᵀ + bias with float32 operands (float64 for float64)."""
    dtype = compute_dtype(hidden)
    z = hidden.to(dtype) @ weight.to(dtype).T
    return z if bias is None else z.add_(bias.to(dtype))


def slices(n: int, vocab: int) -> list[slice]:
    """Chunks of rows whose logits are a few hundred MiB."""
    step = max(1, 16 * CHUNK_ELEMENTS // vocab)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def forward(hidden, weight, bias, targets, mask, transform: Transform, wanted: Wanted, keep: bool):
    """See ``rlfast/ops/linear_token_logps.py``."""
    n, vocab = hidden.shape[0], weight.shape[0]
    out = allocate(hidden, (n,), targets, wanted)
    ids, counted = counted_rows(targets, mask, n)
    row, flat = Row.of(ids.shape[1], wanted), flattened(out, n)
    kept = hidden.new_empty((n, vocab) if keep else (0,), dtype=out.logp.dtype)
    for rows in slices(n, vocab):
        logits = logits_of(hidden[rows], weight, bias)
        if keep:
            kept[rows] = logits
        row_statistics(transformed(logits, transform, rows), ids[rows], counted[rows], flat, row, rows, wanted)
    return out, kept


def backward(hidden, weight, bias, targets, mask, transform: Transform, aux, grads, needs, kept, sums, dtype):
    """See ``rlfast/ops/linear_token_logps.py``."""
    n, vocab = hidden.shape[0], weight.shape[0]
    acc = compute_dtype(hidden)
    ids, counted = counted_rows(targets, mask, n)
    row = Row.of(ids.shape[1], Wanted(ENTROPY, 0))
    like, grads = (hidden, weight, bias), grads_by_row(grads, n)
    own = [need and (i == 0 or sums is None) for i, need in enumerate(needs)]
    out = [hidden.new_zeros(x.shape if need else (0,), dtype=acc) for x, need in zip(like, own, strict=True)]
    total = out if sums is None else [out[0], *sums]
    for rows in slices(n, vocab):
        logits = kept[rows] if kept.numel() else logits_of(hidden[rows], weight, bias)
        g = logits_gradient(logits, ids[rows], counted[rows], transform, aux, row, rows, grads)
        if needs[0]:
            total[0][rows] = g @ weight.to(acc)
        if needs[1]:
            live = counted[rows].any(-1, keepdim=True)  # a skipped row may hold NaN, and 0·NaN is NaN
            total[1].addmm_(g.T, torch.where(live, hidden[rows].to(acc), 0.0))
        if needs[2]:
            total[2] += g.sum(0)
    return tuple(x.to(dtype) for x in out)
