"""The largest log-probs of a row and the mass outside them: candidates per leaf, then a merge of the leaves' heads.

The order is (z descending, id ascending), total, so extraction needs no mask of what was taken: the next one is the largest
below the last. A NaN sorts first, as in torch.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.logit import exp, transformed
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    LEAF,
    Place,
    Scalars,
    Scratch,
    Tokens,
    counts,
    load_logits,
    scaled_leaf,
    temperature_of,
    tree_sum,
)

NO_ID = tl.constexpr(2147483647)  # after every column, where a leaf has fewer columns than top_k


class Heads(NamedTuple):
    """The top of each leaf, row-major; and Σe of the leaf without its first c, relative to the leaf's peak."""

    values: torch.Tensor  # float32 [rows, leaves, top_k]
    ids: torch.Tensor  # int32 [rows, leaves, top_k]
    tails: torch.Tensor  # float32 [rows, leaves, top_k + 1]
    top_k: int


class TopK(NamedTuple):
    """The outputs, flattened."""

    logp: torch.Tensor  # float32 [rows, top_k]
    ids: torch.Tensor  # int64 [rows, top_k]
    tail_mass: torch.Tensor  # float32 [rows]: a row of aux


@jit(do_not_specialize=["place", "tokens", "scalars", "scratch", "heads"])
def fold_topk(x_ptr, place, tokens, scalars, scratch, heads, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The top_k of each leaf of a row by repeated extraction; grid: rows × leaves of the tile. After ``fold``."""
    leaves = tl.cdiv(place.columns, LEAF)
    local_row = (tl.program_id(0) // leaves).to(tl.int64)
    leaf = tl.program_id(0) % leaves
    row = local_row + place.first_row
    if counts(tokens, row, True):
        columns = leaf * LEAF + tl.arange(0, LEAF)
        inside = columns < place.columns
        x = load_logits(x_ptr, place, tokens, local_row, columns, ALIGNED)
        softcap, logit_scale = tl.cast(scalars.softcap, tl.float32), tl.cast(scalars.logit_scale, tl.float32)
        z = transformed(x, temperature_of(tokens, scalars, row), softcap, logit_scale, KIND)
        global_leaf = place.start // LEAF + leaf
        extract(z, place.start + columns, inside, global_leaf, row, tokens, scratch, heads)


@jit
def extract(z, ids, inside, leaf, row, tokens, scratch, heads):
    """Store (z, id) of the top_k of one leaf, and Σe of what is left after each."""
    peak = tl.load(scratch.sums + leaf * tl.cast(tokens.rows, tl.int64) + row)
    e = tl.exp(z - tl.where(peak == float("-inf"), 0.0, peak))
    key = tl.where(z == z, z, float("inf"))
    last, last_id = tl.full([], float("inf"), tl.float32), tl.full([], -1, tl.int32)
    slot = row * scratch.leaves + leaf
    tl.store(heads.tails + slot * (heads.top_k + 1), tree_sum(tl.where(inside, e, 0.0)))
    for i in range(heads.top_k):
        left = inside & ((key < last) | ((key == last) & (ids > last_id)))
        last = tl.max(tl.where(left, key, float("-inf")), axis=0)
        last_id = tl.min(tl.where(left & (key == last), ids, NO_ID), axis=0)
        left = left & ((key < last) | (ids > last_id))
        tl.store(heads.values + slot * heads.top_k + i, last)
        tl.store(heads.ids + slot * heads.top_k + i, last_id)
        tl.store(heads.tails + slot * (heads.top_k + 1) + i + 1, tree_sum(tl.where(left, e, 0.0)))


@jit(do_not_specialize=["tokens", "scratch", "heads", "aux_ptr", "out"])
def merge_topk(tokens, scratch, heads, aux_ptr, out, LEAVES: tl.constexpr):
    """The row's top_k from the heads of its leaves, one at a time, and the mass of the rest; grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.cast(tokens.rows, tl.int64)
    leaf = tl.arange(0, LEAVES)
    there = leaf < scratch.leaves
    at = row * heads.top_k
    if counts(tokens, row, True):
        peak, log_sum = tl.load(aux_ptr + row), tl.load(aux_ptr + rows + row)
        slot = row * scratch.leaves + leaf
        taken = tl.zeros([LEAVES], tl.int32)
        for i in range(heads.top_k):
            left = there & (taken < heads.top_k)
            value = tl.load(heads.values + slot * heads.top_k + taken, mask=left, other=float("-inf"))
            ids = tl.load(heads.ids + slot * heads.top_k + taken, mask=left, other=NO_ID)
            best = tl.max(value, axis=0)
            best_id = tl.min(tl.where(value == best, ids, NO_ID), axis=0)
            taken += (left & (value == best) & (ids == best_id)).to(tl.int32)
            tl.store(out.logp + at + i, (best - peak) - log_sum)
            tl.store(out.ids + at + i, best_id.to(tl.int64))
        _, weight = scaled_leaf(scratch.sums, leaf * rows + row, peak, there)
        tail = tl.load(heads.tails + slot * (heads.top_k + 1) + taken, mask=there, other=0.0)
        mass = tree_sum(tl.where(there, weight * tail, 0.0))
        tl.store(out.tail_mass + row, mass * exp(-log_sum))
    else:
        for i in range(heads.top_k):
            tl.store(out.logp + at + i, 0.0)
            tl.store(out.ids + at + i, tl.full([], -1, tl.int64))
        tl.store(out.tail_mass + row, 0.0)


def allocate_heads(tokens: Tokens, scratch: Scratch, top_k: int) -> Heads:
    """Room for the heads of every leaf."""
    n, device = (tokens.rows, scratch.leaves), scratch.sums.device
    return Heads(
        torch.empty((*n, top_k), dtype=torch.float32, device=device),
        torch.empty((*n, top_k), dtype=torch.int32, device=device),
        torch.empty((*n, top_k + 1), dtype=torch.float32, device=device),
        top_k,
    )
