"""The ``triton`` backend of divergences of two heads: cuBLAS tiles of both, folded as they come.

As ``linear_token_logps``: a tile of logits is one GEMM of each head, in float32, and ∂L/∂logits of the own side goes
into two more GEMMs as it is or as three bfloat16 numbers. A JSD sweeps the tiles twice forward: kept ones, or made
again.
"""

import torch

from rlfast.kernels import divergence
from rlfast.kernels.divergence import (
    batch_of,
    launch_fold,
    launch_gradient,
    launch_merge_mixed,
    launch_merges,
    launch_mixed,
    room_for,
    saved_of,
)
from rlfast.kernels.formulas.divergence import JSD
from rlfast.kernels.leaves import place_of
from rlfast.kernels.linear_token_logps import add_products, allocate_tiles, pieces, product, tile_shape
from rlfast.ops.divergence_records import Head, Measure, Saved, allocate


def _tiles(rows: int, vocab: int, shape):
    for column in range(0, vocab, shape[1]):
        for row in range(0, rows, shape[0]):
            yield slice(row, min(row + shape[0], rows)), slice(column, min(column + shape[1], vocab))


def _tile(head: Head, kept, buffer, rows: slice, columns: slice):
    """The float32 logits of a tile, without the bias: kept, or made."""
    if kept.numel():
        return kept[rows, columns]
    to = buffer[: rows.stop - rows.start, : columns.stop - columns.start]
    return product(head.hidden[rows], head.weight[columns].T, out=to)


def forward(head: Head, ref_head: Head, targets, mask, transform, ref_transform, measure: Measure, outputs, keep):
    """See ``rlfast/ops/linear_divergence.py``."""
    hidden, n, vocab = head.hidden, head.hidden.shape[0], head.weight.shape[0]
    out = allocate(hidden, (n,), targets, outputs)
    kept = [hidden.new_empty((n, vocab) if keep else (0,), dtype=torch.float32) for _ in range(2)]
    if n == 0:
        return out, *kept
    biases = (head.bias, ref_head.bias)
    batch = batch_of(hidden, targets, mask, (transform, ref_transform), measure, biases, n, vocab)
    room, shape = room_for(batch, hidden), (n, vocab) if keep else tile_shape(n, vocab)
    buffers = kept if keep else [hidden.new_empty(shape, dtype=torch.float32) for _ in range(2)]
    nothing = hidden.new_empty(0, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        for rows, columns in _tiles(n, vocab, shape):
            x, y = (_tile(h, nothing, b, rows, columns) for h, b in zip((head, ref_head), buffers, strict=True))
            launch_fold(x, y, place_of(x, columns.start, rows.start), batch, room, outputs)
        launch_merges(batch, room, out, outputs)
        if measure.kind == JSD.value:
            for rows, columns in _tiles(n, vocab, shape):
                x, y = (_tile(h, k, b, rows, columns) for h, k, b in zip((head, ref_head), kept, buffers, strict=True))
                launch_mixed(x, y, place_of(x, columns.start, rows.start), batch, room, out)
            launch_merge_mixed(batch, room, out)
    return out, *kept


def backward(
    own: Head, other: Head, targets, mask, transform, other_transform, measure: Measure, saved: Saved, grads, needs,
    kept, other_kept, sums, dtype,
):  # fmt: skip
    """See ``rlfast/ops/linear_divergence.py``."""
    hidden, n, vocab = own.hidden, own.hidden.shape[0], own.weight.shape[0]
    returned = [need and (i == 0 or sums is None) for i, need in enumerate(needs)]
    found = [hidden.new_empty(x.shape if there else (0,), dtype=dtype) for x, there in zip(own, returned, strict=True)]
    if n == 0:
        return found[0], found[1].zero_(), found[2].zero_()
    batch = batch_of(hidden, targets, mask, (transform, other_transform), measure, (own.bias, other.bias), n, vocab)
    totals = [
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if there else None
        for x, there in zip(own, returned, strict=True)
    ]
    totals = totals if sums is None else [totals[0], *sums]
    live = hidden if mask is None else torch.where(mask.unsqueeze(-1), hidden, torch.zeros_like(hidden))
    hidden_pieces = pieces(live) if needs[1] else []  # a skipped row may hold NaN, and 0·NaN is NaN
    shape = tile_shape(n, vocab)
    buffer, gradients = allocate_tiles(hidden, *shape, kept)
    other_buffer = None if kept.numel() else hidden.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        for rows, columns in _tiles(n, vocab, shape):
            x, y = _tile(own, kept, buffer, rows, columns), _tile(other, other_kept, other_buffer, rows, columns)
            g = [t[: x.shape[0], : x.shape[1]] for t in gradients]
            place, rest = place_of(x, columns.start, rows.start), g[1:] or (None, None)
            launch_gradient(x, y, g[0], rest, place, batch, *saved_of(saved, grads))
            if needs[0]:
                add_products(totals[0][rows], g, pieces(own.weight[columns]))
            if needs[1]:
                add_products(totals[1][columns], [t.T for t in g], [t[rows] for t in hidden_pieces])
            if needs[2]:
                for t in g:
                    totals[2][columns] += t.sum(0, dtype=torch.float32)
    return tuple(t.to(dtype) if there else f for f, t, there in zip(found, totals, returned, strict=True))


COMPILE = tuple(case for case in divergence.COMPILE if case.full)


def launch_to_compile(case: divergence.CompileCase) -> None:
    """Forward and backward of a case, for a driver that compiles and does not run; with biases."""
    targets, mask, transforms, outputs, grads = divergence.batch_to_compile(case, rows=3)
    heads = [
        Head(*(torch.zeros(shape, dtype=case.dtype) for shape in ((3, d), (case.vocab, d), (case.vocab,))))
        for d in (16, 24)
    ]
    out, *kept = forward(*heads, targets, mask, *transforms, case.measure, outputs, keep=True)
    saved = divergence.views_of(out.aux, 1, outputs, False)
    needs = (True, True, True)
    backward(*heads, targets, mask, *transforms, case.measure, saved, grads, needs, *kept, None, case.dtype)
