"""Row statistics per leaf of the vocabulary, and their merge: the one function that gives every log-prob op its bits.

A leaf is LEAF columns. ``fold`` writes each leaf's statistics, relative to the leaf's own peak, wherever the logits
are: a whole tensor, or a tile of it that a GEMM has just written. ``merge`` adds them up in ascending order, with the
target's leaf replaced by the same leaf without its target. So the bits of a row depend on neither the batch nor the
tiles.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.elementary import exp
from rlfast.kernels.formulas.logit import logp_of, transformed
from rlfast.kernels.lang import jit, tl

# Columns of a leaf. A program keeps one leaf in registers: 32 float32 a thread of 128. It is 8 KiB of bf16, so that 3
# programs an SM have the 25 KiB in flight that saturate an H100's memory (3.35 TB/s × 1 µs / 132), and a 152K
# vocabulary has 38.
LEAF = tl.constexpr(4096)
# 128 threads × one 16-byte load of bf16: the higher bits of a column are registers of one thread.
LANES = tl.constexpr(1024)
MERGED_ROWS = tl.constexpr(32)  # rows of a merge program: one warp, a row a thread

ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1, LSE = (tl.constexpr(1 << i) for i in range(5))  # as in ops/records.py
IGNORE = tl.constexpr(-100)


class Place(NamedTuple):
    """Where logits lie: row r at (r // inner)·stride_outer + (r % inner)·stride_inner; column 0 is id ``start``."""

    inner: int
    stride_outer: int
    stride_inner: int
    start: int
    columns: int
    first_row: int  # the row of the batch that row 0 is


class Sizes(NamedTuple):
    """The batch's sizes."""

    candidates: int
    rows: int
    vocab: int
    leaves: int


# Kernels take these one by one and make the records themselves: an int inside a tuple argument compiles anew when it is
# 1 or a multiple of 16, whatever do_not_specialize says (Triton 3.6 and 3.9).
INTS = (*Place._fields, *Sizes._fields)


class Tokens(NamedTuple):
    """What belongs to rows of the batch, whatever tile they are in."""

    targets: torch.Tensor  # int64 [rows, candidates]
    mask: torch.Tensor | None  # bool [rows]
    temperatures: torch.Tensor | None  # float32 [rows]
    bias: torch.Tensor | None  # [vocab]


class Scalars(NamedTuple):
    """The transform's run-time floats."""

    temperature: float
    softcap: float
    logit_scale: float


class Scratch(NamedTuple):
    """What ``fold`` leaves behind. A column is a row of the batch, so that ``merge`` reads them side by side."""

    sums: torch.Tensor  # float32 [5, leaves, rows]: peak, Σe, Σe·(z − peak), Σe², Σz
    first: torch.Tensor  # int32 [leaves, rows]: the first column that holds the peak
    chosen: torch.Tensor  # float32 [3, candidates, rows]: z of the target; peak and Σe of its leaf without it


@jit
def tree_sum(x):
    """Σ x [power of two], in an order that the text fixes: every step adds two numbers, and a + b = b + a.

    A plain reduction follows the layout, which follows the alignment and the dtype of the load.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > LANES:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2]), axis=0)
    for _ in tl.static_range(16):
        if x.shape[0] > 2:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x, axis=0)


@jit
def counts(tokens, sizes, row, inside):
    """Whether rows are not skipped: not masked, and if they have targets, at least one is not −100."""
    live = row < tl.where(sizes.candidates == 0, sizes.rows, 0)
    for k in range(sizes.candidates):
        target = tl.load(tokens.targets + row * sizes.candidates + k, mask=inside, other=IGNORE)
        live = live | (target != IGNORE)
    if tokens.mask is not None:
        live = live & (tl.load(tokens.mask + row, mask=inside, other=0) != 0)
    return live


@jit
def row_start(place, row, ALIGNED: tl.constexpr):
    """The offset of a row's first column, in elements. The row is int32: a 64-bit division is a subroutine."""
    outer = row // place.inner
    offset = outer.to(tl.int64) * place.stride_outer + (row - outer * place.inner).to(tl.int64) * place.stride_inner
    if ALIGNED:
        offset = offset // 16 * 16  # unlike the hint tl.multiple_of, this survives inlining
    return offset


@jit
def inside_of(place, column, ALIGNED: tl.constexpr):
    """Which columns are there. A mask that might change within 16 columns would split a wide load."""
    limit = place.columns
    if ALIGNED:
        limit = limit // 16 * 16
    return column < limit


@jit
def temperature_of(tokens, scalars, row):
    """The row's temperature, in float32."""
    if tokens.temperatures is not None:
        return tl.load(tokens.temperatures + row)
    return tl.cast(scalars.temperature, tl.float32)


@jit
def load_logits(x_ptr, place, tokens, row, column, ALIGNED: tl.constexpr):
    """x [·] of a row's columns in float32, the bias added."""
    inside = inside_of(place, column, ALIGNED)
    x = tl.load(x_ptr + row_start(place, row, ALIGNED) + column, mask=inside, other=0.0).to(tl.float32)
    if tokens.bias is not None:
        first = place.start // LEAF * LEAF  # as it is, but known to be a multiple
        x += tl.load(tokens.bias + first + column, mask=inside, other=0.0).to(tl.float32)
    return x


@jit
def finite(peak):
    """The peak, or 0 where every z is −inf: exp(z − peak) is then 0, not NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@jit(do_not_specialize=["per_program", *INTS])
def fold(
    x_ptr, tokens, scalars, scratch, per_program,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, OUTPUTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Peak, Σe, Σe·(z − peak), Σe², Σz, first argmax of each leaf of a row, e = exp(z − peak); grid: rows × groups."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    groups = tl.cdiv(tl.cdiv(place.columns, LEAF), per_program)
    local_row = tl.program_id(0) // groups
    row = local_row.to(tl.int64) + first_row
    if counts(tokens, sizes, row, True):
        temperature = temperature_of(tokens, scalars, row)
        softcap, logit_scale = tl.cast(scalars.softcap, tl.float32), tl.cast(scalars.logit_scale, tl.float32)
        group = tl.program_id(0) % groups
        for leaf in range(group * per_program, tl.minimum((group + 1) * per_program, tl.cdiv(place.columns, LEAF))):
            column = leaf * LEAF + tl.arange(0, LEAF)
            inside = inside_of(place, column, ALIGNED)
            x = load_logits(x_ptr, place, tokens, local_row, column, ALIGNED)
            z = tl.where(inside, transformed(x, temperature, softcap, logit_scale, KIND), float("-inf"))
            fold_leaf(z, inside, place.start // LEAF + leaf, row, sizes, scratch, OUTPUTS)
            fold_targets(
                x_ptr, place, tokens, sizes, scratch, local_row, leaf, temperature, softcap, logit_scale, KIND, ALIGNED
            )


@jit
def fold_targets(
    x_ptr, place, tokens, sizes, scratch, local_row, leaf, temperature, softcap, logit_scale,
    KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """What the targets of a row that are in this leaf leave behind: the leaf without each of them."""
    row = local_row.to(tl.int64) + place.first_row
    for k in range(sizes.candidates):
        target = tl.load(tokens.targets + row * sizes.candidates + k)
        if (target >= 0) & (target < sizes.vocab) & (target // LEAF == place.start // LEAF + leaf):
            # Loaded again, from the cache, in one leaf of a row: z kept until here costs 40 registers a thread.
            column = leaf * LEAF + tl.arange(0, LEAF)
            x = load_logits(x_ptr, place, tokens, local_row, column, ALIGNED)
            z = transformed(x, temperature, softcap, logit_scale, KIND)
            z = tl.where(inside_of(place, column, ALIGNED), z, float("-inf"))
            at = scratch.chosen + k * tl.cast(sizes.rows, tl.int64) + row
            fold_chosen(z, place.start + column == target, at, sizes)


@jit
def fold_leaf(z, inside, leaf, row, sizes, scratch, OUTPUTS: tl.constexpr):
    """The statistics of one leaf's z [LEAF], stored."""
    peak = tl.max(z, axis=0)
    d = z - finite(peak)
    e = tl.exp(d)
    at = scratch.sums + leaf * tl.cast(sizes.rows, tl.int64) + row
    one = tl.cast(sizes.leaves, tl.int64) * sizes.rows
    tl.store(at, peak)
    tl.store(at + one, tree_sum(e))
    if ENTROPY & OUTPUTS:
        tl.store(at + 2 * one, tree_sum(tl.where(e > 0.0, e * d, e)))
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        tl.store(at + 3 * one, tree_sum(e * e))
    if MEAN_LOGITS & OUTPUTS:
        tl.store(at + 4 * one, tree_sum(tl.where(inside, z, 0.0)))
    if IS_TOP1 & OUTPUTS:
        column = leaf * LEAF + tl.arange(0, LEAF)
        first = tl.min(tl.where(z == peak, column, 2147483647), axis=0)
        tl.store(scratch.first + leaf * tl.cast(sizes.rows, tl.int64) + row, first.to(tl.int32))


@jit
def fold_chosen(z, chosen, at, sizes):
    """The z of a target, and the peak and the sum of the others in its leaf."""
    others = tl.where(chosen, float("-inf"), z)
    peak = tl.max(others, axis=0)
    one = tl.cast(sizes.candidates, tl.int64) * sizes.rows
    tl.store(at, tl.sum(tl.where(chosen, z, 0.0), axis=0))  # one term and zeros: exact in any order
    tl.store(at + one, peak)
    tl.store(at + 2 * one, tree_sum(tl.exp(others - finite(peak))))


class Merged(NamedTuple):
    """The outputs of ``merge``: those of the op, flattened; what is not asked for is not read."""

    logp: torch.Tensor  # [rows, candidates]
    lse: torch.Tensor  # [rows]
    entropy: torch.Tensor  # [rows]
    aux: torch.Tensor  # [·, rows]
    is_top1: torch.Tensor  # uint8 [rows, candidates]


@jit
def scaled_leaf(sums, offset, peak, inside):
    """A leaf's distance to the row's peak and its weight exp(distance); both 0 for a leaf that is all −inf."""
    leaf_peak = tl.load(sums + offset, mask=inside, other=0.0)
    empty = leaf_peak == float("-inf")
    distance = tl.where(empty, 0.0, leaf_peak - peak)
    return distance, tl.where(empty, 0.0, exp(distance))


@jit
def row_peak(sizes, scratch, row, inside):
    """The row's maximum over its leaves, 0 if it is all −inf; and whether there is a first leaf that holds it."""
    peak = tl.full(row.shape, float("-inf"), tl.float32)
    first = tl.zeros(row.shape, tl.int32)
    for leaf in range(sizes.leaves):
        here = tl.load(scratch.sums + leaf * tl.cast(sizes.rows, tl.int64) + row, mask=inside, other=0.0)
        first = tl.where(here > peak, leaf, first)
        peak = tl.maximum(peak, here)
    return finite(peak), first


@jit
def others_of(k, target, sizes, scratch, row, inside):
    """(peak, Σe) of a row without its k-th target: the leaves in ascending order, the target's replaced."""
    at = scratch.chosen + k * tl.cast(sizes.rows, tl.int64) + row
    one = tl.cast(sizes.candidates, tl.int64) * sizes.rows
    chosen_peak = tl.load(at + one, mask=inside, other=0.0)
    chosen_sum = tl.load(at + 2 * one, mask=inside, other=0.0)
    stride = tl.cast(sizes.leaves, tl.int64) * sizes.rows
    peak = chosen_peak
    for leaf in range(sizes.leaves):
        here = tl.load(scratch.sums + leaf * tl.cast(sizes.rows, tl.int64) + row, mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.where(target // LEAF == leaf, float("-inf"), here))
    peak = finite(peak)
    total = tl.zeros(row.shape, tl.float32)
    for leaf in range(sizes.leaves):
        offset = leaf * tl.cast(sizes.rows, tl.int64) + row
        mine = target // LEAF == leaf
        here = tl.where(mine, chosen_peak, tl.load(scratch.sums + offset, mask=inside, other=0.0))
        part = tl.where(mine, chosen_sum, tl.load(scratch.sums + stride + offset, mask=inside, other=0.0))
        empty = here == float("-inf")
        total += tl.where(empty, 0.0, exp(tl.where(empty, 0.0, here - peak))) * part
    return peak, total


@jit(do_not_specialize=Sizes._fields)
def merge(tokens, scratch, merged, candidates, rows, vocab, leaves, OUTPUTS: tl.constexpr):
    """Every output of MERGED_ROWS rows from the statistics of their leaves, in ascending order."""
    sizes = Sizes(candidates, rows, vocab, leaves)
    row = tl.program_id(0).to(tl.int64) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    rows = tl.cast(rows, tl.int64)
    inside = row < rows
    live = counts(tokens, sizes, row, inside) & inside
    peak, top_leaf = row_peak(sizes, scratch, row, live)
    one = tl.cast(sizes.leaves, tl.int64) * rows
    total, weighted, squares, plain = (tl.zeros(row.shape, tl.float32),) * 4
    for leaf in range(sizes.leaves):
        offset = leaf * rows + row
        distance, weight = scaled_leaf(scratch.sums, offset, peak, live)
        part = tl.load(scratch.sums + one + offset, mask=live, other=0.0)
        total += weight * part
        if ENTROPY & OUTPUTS:
            weighted += weight * (tl.load(scratch.sums + 2 * one + offset, mask=live, other=0.0) + distance * part)
        if LOG_SUM_SQ_PROBS & OUTPUTS:
            squares += weight * weight * tl.load(scratch.sums + 3 * one + offset, mask=live, other=0.0)
        if MEAN_LOGITS & OUTPUTS:
            plain += tl.load(scratch.sums + 4 * one + offset, mask=live, other=0.0)
    for k in range(sizes.candidates):
        # A target that is no id makes its row NaN: looking for one from the host would synchronise.
        target = tl.load(tokens.targets + row * sizes.candidates + k, mask=live, other=IGNORE)
        wrong = (target != IGNORE) & ((target < 0) | (target >= sizes.vocab))
        total = tl.where(wrong, float("nan"), total)
    log_sum = tl.log(total)
    tl.store(merged.aux + row, tl.where(live, peak, 0.0), mask=inside)
    tl.store(merged.aux + rows + row, tl.where(live, log_sum, 0.0), mask=inside)
    if LSE & OUTPUTS:
        tl.store(merged.lse + row, tl.where(live, peak + log_sum, 0.0), mask=inside)
    merge_chosen(total, top_leaf, live, inside, row, tokens, sizes, scratch, merged, OUTPUTS)
    aux = merged.aux + (2 + tl.cast(sizes.candidates, tl.int64)) * rows + row
    if ENTROPY & OUTPUTS:
        entropy = tl.where(live, log_sum - tl.div_rn(weighted, total), 0.0)
        tl.store(aux, entropy, mask=inside)
        tl.store(merged.entropy + row, entropy, mask=inside)
        aux += rows
    if LOG_SUM_SQ_PROBS & OUTPUTS:
        tl.store(aux, tl.where(live, tl.log(squares) - 2.0 * log_sum, 0.0), mask=inside)
        aux += rows
    if MEAN_LOGITS & OUTPUTS:
        mean = tl.div_rn(plain, tl.cast(sizes.vocab, tl.float32))
        tl.store(aux, tl.where(live, tl.where(total == total, mean, float("nan")), 0.0), mask=inside)


@jit
def merge_chosen(total, top_leaf, live, inside, row, tokens, sizes, scratch, merged, OUTPUTS: tl.constexpr):
    """log p = −softplus(lse_others − z_t) of each target, and whether it is the first argmax."""
    rows = tl.cast(sizes.rows, tl.int64)
    for k in range(sizes.candidates):
        at = row * sizes.candidates + k
        target = tl.load(tokens.targets + at, mask=live, other=IGNORE)
        known = (target >= 0) & (target < sizes.vocab)
        peak, others = others_of(k, target, sizes, scratch, row, known)
        z = tl.load(scratch.chosen + k * rows + row, mask=known, other=0.0)
        logp = tl.where(known & (total == total), logp_of(peak, others, z), float("nan"))
        logp = tl.where(target == IGNORE, 0.0, logp)
        tl.store(merged.logp + at, logp, mask=inside)
        tl.store(merged.aux + (2 + k) * rows + row, logp, mask=inside)
        if IS_TOP1 & OUTPUTS:
            first = tl.load(scratch.first + top_leaf * rows + row, mask=known, other=-1)
            tl.store(merged.is_top1 + at, (known & (first == target) & (total == total)).to(tl.uint8), mask=inside)


def alignment(x: torch.Tensor) -> bool:
    """Whether every row of x starts and ends on 16 elements, so that loads may be wide."""
    return all(stride % 16 == 0 for stride in (*x.stride()[:-1], x.shape[-1]))


def place_of(x: torch.Tensor, start: int = 0, first_row: int = 0) -> Place:
    """The place of logits [*lead, columns] of one or two leading dimensions."""
    return Place(max(x.shape[-2], 1), x.stride(0) if x.dim() == 3 else 0, x.stride(-2), start, x.shape[-1], first_row)


def allocate_scratch(sizes: Sizes, like: torch.Tensor) -> Scratch:
    """Room for the statistics of every leaf."""
    return Scratch(
        torch.empty((5, sizes.leaves, sizes.rows), dtype=torch.float32, device=like.device),
        torch.empty((sizes.leaves, sizes.rows), dtype=torch.int32, device=like.device),
        torch.empty((3, sizes.candidates, sizes.rows), dtype=torch.float32, device=like.device),
    )
