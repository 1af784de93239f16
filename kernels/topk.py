"""The largest log-probs of a row and the mass outside them: candidates per leaf, then a merge of the leaves' heads.

The order is (z descending, id ascending), total, so extraction needs no mask of what was taken: the next one is the
largest below the last. A NaN sorts first, as in torch.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.elementary import exp
from rlfast.kernels.formulas.logit import transformed
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    INTS,
    LEAF,
    Place,
    Sizes,
    counts,
    finite,
    inside_of,
    load_logits,
    scaled_leaf,
    temperature_of,
    tree_sum,
)

NO_ID = tl.constexpr(2147483647)  # after every column, where a leaf has fewer columns than top_k


class Heads(NamedTuple):
    """The top of each leaf, row-major; and Σe of the leaf without its first c, relative to the leaf's peak."""

    z: torch.Tensor  # float32 [rows, leaves, top_k]
    ids: torch.Tensor  # int32 [rows, leaves, top_k]
    tails: torch.Tensor  # float32 [rows, leaves, top_k + 1]


class TopK(NamedTuple):
    """The outputs, flattened."""

    logp: torch.Tensor  # float32 [rows, top_k]
    ids: torch.Tensor  # int64 [rows, top_k]
    tail_mass: torch.Tensor  # float32 [rows]: a row of aux


@jit(do_not_specialize=["top_k", *INTS])
def fold_topk(
    x_ptr, tokens, scalars, scratch, heads, top_k,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The top_k of each leaf of a row by repeated extraction; grid: rows × leaves of the tile. After ``fold``."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    leaves_here = tl.cdiv(columns, LEAF)
    local_row = tl.program_id(0) // leaves_here
    leaf = tl.program_id(0) % leaves_here
    row = local_row.to(tl.int64) + first_row
    if counts(tokens, sizes, row, True):
        column = leaf * LEAF + tl.arange(0, LEAF)
        inside = inside_of(place, column, ALIGNED)
        x = load_logits(x_ptr, place, tokens, local_row, column, ALIGNED)
        softcap, logit_scale = tl.cast(scalars.softcap, tl.float32), tl.cast(scalars.logit_scale, tl.float32)
        z = transformed(x, temperature_of(tokens, scalars, row), softcap, logit_scale, KIND)
        global_leaf = start // LEAF + leaf
        extract(z, start + column, inside, global_leaf, row, sizes, scratch, heads, top_k)


@jit
def extract(z, ids, inside, leaf, row, sizes, scratch, heads, top_k):
    """Store (z, id) of the top_k of one leaf, and Σe of what is left after each."""
    peak = tl.load(scratch.sums + leaf * tl.cast(sizes.rows, tl.int64) + row)
    e = tl.exp(z - finite(peak))
    key = tl.where(z == z, z, float("inf"))
    last, last_id = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    slot = row * sizes.leaves + leaf
    tl.store(heads.tails + slot * (top_k + 1), tree_sum(tl.where(inside, e, 0.0)))
    for i in range(top_k):
        left = inside & ((key < last) | ((key == last) & (ids > last_id)))
        last = tl.max(tl.where(left, key, float("-inf")), axis=0)
        last_id = tl.min(tl.where(left & (key == last), ids, NO_ID), axis=0)
        left = left & ((key < last) | (ids > last_id))
        tl.store(heads.z + slot * top_k + i, last)
        tl.store(heads.ids + slot * top_k + i, last_id)
        tl.store(heads.tails + slot * (top_k + 1) + i + 1, tree_sum(tl.where(left, e, 0.0)))


@jit(do_not_specialize=["top_k", *Sizes._fields])
def merge_topk(
    tokens, scratch, heads, aux_ptr, out, top_k, candidates, rows, vocab, leaves, LEAVES: tl.constexpr
):  # fmt: skip
    """The row's top_k from the heads of its leaves, one at a time, and the mass of the rest; grid: rows."""
    sizes = Sizes(candidates, rows, vocab, leaves)
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(rows, tl.int64)
    leaf = tl.arange(0, LEAVES)
    there = leaf < sizes.leaves
    at = row * top_k
    if counts(tokens, sizes, row, True):
        peak, log_sum = tl.load(aux_ptr + row), tl.load(aux_ptr + rows + row)
        slot = row * sizes.leaves + leaf
        taken = tl.zeros([LEAVES], tl.int32)
        for i in range(top_k):
            left = there & (taken < top_k)
            value = tl.load(heads.z + slot * top_k + taken, mask=left, other=float("-inf"))
            ids = tl.load(heads.ids + slot * top_k + taken, mask=left, other=NO_ID)
            best = tl.max(value, axis=0)
            best_id = tl.min(tl.where(value == best, ids, NO_ID), axis=0)
            taken += (left & (value == best) & (ids == best_id)).to(tl.int32)
            tl.store(out.logp + at + i, (best - peak) - log_sum)
            tl.store(out.ids + at + i, best_id.to(tl.int64))
        _, weight = scaled_leaf(scratch.sums, leaf * rows + row, peak, there)
        tail = tl.load(heads.tails + slot * (top_k + 1) + taken, mask=there, other=0.0)
        mass = tree_sum(tl.where(there, weight * tail, 0.0))
        tl.store(out.tail_mass + row, mass * exp(-log_sum))
    else:
        for i in range(top_k):
            tl.store(out.logp + at + i, 0.0)
            tl.store(out.ids + at + i, tl.full([], -1, tl.int64))
        tl.store(out.tail_mass + row, 0.0)


def allocate_heads(sizes: Sizes, top_k: int, like: torch.Tensor) -> Heads:
    """Room for the heads of every leaf."""
    n, device = (sizes.rows, sizes.leaves), like.device
    return Heads(
        torch.empty((*n, top_k), dtype=torch.float32, device=device),
        torch.empty((*n, top_k), dtype=torch.int32, device=device),
        torch.empty((*n, top_k + 1), dtype=torch.float32, device=device),
    )
