"""The ``triton`` backend of divergences: one read of both logits forward, one read of both and one write backward.

Forward: ``fold_pair`` keeps the statistics of each leaf of both sides as ``fold`` does, and with them Σ e_p·gap of a KL;
``merge`` adds up the leaves of either side, ``merge_gaps`` those of the gaps. A JSD takes a second sweep, ``fold_mixed`` and
``merge_mixed``, when both log Σe are known. Backward: ``pair_gradient``, elementwise, of one side.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.divergence import FORWARD, JSD, REVERSE, divergence_gradient, gap_term, over_mixture
from rlfast.kernels.formulas.elementary import exp
from rlfast.kernels.formulas.logit import pulled_back, transformed
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    INTS,
    LEAF,
    MERGED_ROWS,
    Merged,
    Place,
    Sizes,
    Tokens,
    alignment,
    allocate_scratch,
    counts,
    finite,
    fold_leaf,
    fold_targets,
    inside_of,
    load_logits,
    merge,
    place_of,
    row_peak,
    row_start,
    scaled_leaf,
    temperature_of,
    tree_sum,
)
from rlfast.kernels.token_logps import BLOCK, NARROW, OPTIONS, Saved, kind_of, row_gradient, scalars_of
from rlfast.ops.divergence_records import KINDS, REF_LSE, Measure, Outputs, allocate, candidates_of, student_rows
from rlfast.ops.divergence_records import saved_of as views_of
from rlfast.ops.records import ENTROPY, LSE, Transform

SIDE = ("ref_outer", "ref_stride")  # where the other side's rows lie: its stride_outer and stride_inner


class Side(NamedTuple):
    """One side's tensors and floats."""

    tokens: Tokens
    scalars: NamedTuple


class PairSaved(NamedTuple):
    """What the backward knows of each row beside ``token_logps.Saved``."""

    aux: torch.Tensor  # [·, rows]: peak and log_sum of the own side
    other: torch.Tensor  # [2, rows]
    centre: torch.Tensor  # [2, rows]
    g_value: torch.Tensor | None  # [rows]


@jit
def z_of(x_ptr, place, side, local_row, row, column, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """z [·] of a row's columns, −inf beyond the last."""
    x = load_logits(x_ptr, place, side.tokens, local_row, column, ALIGNED)
    softcap, logit_scale = tl.cast(side.scalars.softcap, tl.float32), tl.cast(side.scalars.logit_scale, tl.float32)
    z = transformed(x, temperature_of(side.tokens, side.scalars, row), softcap, logit_scale, KIND)
    return tl.where(inside_of(place, column, ALIGNED), z, float("-inf"))


@jit(do_not_specialize=[*SIDE, *INTS])
def fold_pair(
    x_ptr, y_ptr, own, ref, scratch, ref_scratch, gaps, ref_outer, ref_stride,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, REF_KIND: tl.constexpr, MEASURE: tl.constexpr, OUTPUTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The statistics of a leaf of both sides, and Σ e_p·gap relative to both leaves' peaks; grid: rows × leaves."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    ref_place = Place(inner, ref_outer, ref_stride, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    here = tl.cdiv(columns, LEAF)
    local_row, leaf = tl.program_id(0) // here, tl.program_id(0) % here
    row = local_row.to(tl.int64) + first_row
    if counts(own.tokens, sizes, row, True):
        column = leaf * LEAF + tl.arange(0, LEAF)
        inside, global_leaf = inside_of(place, column, ALIGNED), start // LEAF + leaf
        z = z_of(x_ptr, place, own, local_row, row, column, KIND, ALIGNED)
        ref_z = z_of(y_ptr, ref_place, ref, local_row, row, column, REF_KIND, ALIGNED)
        fold_leaf(z, inside, global_leaf, row, sizes, scratch, OUTPUTS)
        fold_leaf(ref_z, inside, global_leaf, row, sizes, ref_scratch, 0)
        if MEASURE != JSD:
            d, ref_d = z - finite(tl.max(z, axis=0)), ref_z - finite(tl.max(ref_z, axis=0))
            if MEASURE == REVERSE:
                term = gap_term(tl.exp(d), d - ref_d, z, ref_z)
            else:
                term = gap_term(tl.exp(ref_d), ref_d - d, ref_z, z)
            tl.store(gaps + global_leaf * tl.cast(rows, tl.int64) + row, tree_sum(term))
        softcap, logit_scale = tl.cast(own.scalars.softcap, tl.float32), tl.cast(own.scalars.logit_scale, tl.float32)
        temperature = temperature_of(own.tokens, own.scalars, row)
        fold_targets(
            x_ptr, place, own.tokens, sizes, scratch, local_row, leaf, temperature, softcap, logit_scale, KIND, ALIGNED
        )


@jit(do_not_specialize=Sizes._fields)
def merge_gaps(
    tokens, scratch, ref_scratch, gaps, value, centres, candidates, rows, vocab, leaves, MEASURE: tl.constexpr
):
    """KL(p‖q) = E_p[gap] + log(Σe_q / Σe_p) of MERGED_ROWS rows, E_p[gap], and for the gradient of q 1/Σe of q and of p."""
    sizes = Sizes(candidates, rows, vocab, leaves)
    row = tl.program_id(0).to(tl.int64) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    rows = tl.cast(rows, tl.int64)
    inside = row < rows
    live = counts(tokens, sizes, row, inside) & inside
    if MEASURE == REVERSE:
        p_sums, q_sums = scratch.sums, ref_scratch.sums
        p_peak, _ = row_peak(sizes, scratch, row, live)
        q_peak, _ = row_peak(sizes, ref_scratch, row, live)
    else:
        p_sums, q_sums = ref_scratch.sums, scratch.sums
        p_peak, _ = row_peak(sizes, ref_scratch, row, live)
        q_peak, _ = row_peak(sizes, scratch, row, live)
    one = tl.cast(leaves, tl.int64) * rows
    total, other, weighted = (tl.zeros(row.shape, tl.float32),) * 3
    for leaf in range(leaves):
        offset = leaf * rows + row
        p_distance, p_weight = scaled_leaf(p_sums, offset, p_peak, live)
        q_distance, q_weight = scaled_leaf(q_sums, offset, q_peak, live)
        part = tl.load(p_sums + one + offset, mask=live, other=0.0)
        gap = tl.load(gaps + offset, mask=live, other=0.0)
        total += p_weight * part
        other += q_weight * tl.load(q_sums + one + offset, mask=live, other=0.0)
        # an infinite gap counts, whatever its weight underflows to
        weighted += tl.where(gap == float("inf"), gap, p_weight * (gap + (p_distance - q_distance) * part))
    mean = tl.div_rn(weighted, total)
    kl = mean + tl.log(tl.div_rn(other, total))
    kl = tl.where(kl < 0.0, 0.0, kl)
    possible = tl.where(total > 0.0, other, 0.0) > 0.0
    of_p, of_q = (2 * rows, 0 * rows) if MEASURE == FORWARD else (0 * rows, 2 * rows)
    zero = tl.zeros(row.shape, tl.float32)
    store_row(value, kl, possible, live, inside, row)
    store_row(centres + of_p, mean, possible, live, inside, row)
    store_row(centres + of_p + rows, zero, possible, live, inside, row)
    store_row(centres + of_q, tl.div_rn(1.0, other), possible, live, inside, row)
    store_row(centres + of_q + rows, tl.div_rn(1.0, total), possible, live, inside, row)


@jit
def store_row(to, x, possible, live, inside, row):
    """A number a row; NaN where the divergence is undefined, 0 in skipped rows."""
    tl.store(to + row, tl.where(live, tl.where(possible, x, float("nan")), 0.0), mask=inside)


@jit(do_not_specialize=[*SIDE, *INTS])
def fold_mixed(
    x_ptr, y_ptr, own, ref, aux, ref_aux, halves, beta, rest, ref_outer, ref_stride,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, REF_KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Σ S·log S/M, Σ T·log T/M, Σ S and Σ T of a leaf; grid: rows × leaves."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    ref_place = Place(inner, ref_outer, ref_stride, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    beta, rest = tl.cast(beta, tl.float32), tl.cast(rest, tl.float32)
    here = tl.cdiv(columns, LEAF)
    local_row, leaf = tl.program_id(0) // here, tl.program_id(0) % here
    row = local_row.to(tl.int64) + first_row
    rows = tl.cast(rows, tl.int64)
    if counts(own.tokens, sizes, row, True):
        column = leaf * LEAF + tl.arange(0, LEAF)
        log_s = z_of(x_ptr, place, own, local_row, row, column, KIND, ALIGNED) - tl.load(aux + row)
        log_t = z_of(y_ptr, ref_place, ref, local_row, row, column, REF_KIND, ALIGNED) - tl.load(ref_aux + row)
        s_sum, t_sum = tl.load(aux + rows + row), tl.load(ref_aux + rows + row)
        m_over_s, m_over_t = over_mixture((log_t - log_s) - (t_sum - s_sum), beta, rest)
        s, t = exp(log_s - s_sum), exp(log_t - t_sum)
        at, one = halves + (start // LEAF + leaf) * rows + row, tl.cast(leaves, tl.int64) * rows
        tl.store(at, tree_sum(-s * m_over_s))
        tl.store(at + one, tree_sum(-t * m_over_t))
        tl.store(at + 2 * one, tree_sum(s))
        tl.store(at + 3 * one, tree_sum(t))


@jit(do_not_specialize=Sizes._fields)
def merge_mixed(tokens, halves, value, centres, beta, rest, candidates, rows, vocab, leaves):
    """JSD = β·KL(T‖M) + (1 − β)·KL(S‖M) of MERGED_ROWS rows, and the two halves as centres."""
    sizes = Sizes(candidates, rows, vocab, leaves)
    beta, rest = tl.cast(beta, tl.float32), tl.cast(rest, tl.float32)
    row = tl.program_id(0).to(tl.int64) * MERGED_ROWS + tl.arange(0, MERGED_ROWS)
    rows = tl.cast(rows, tl.int64)
    inside = row < rows
    live = counts(tokens, sizes, row, inside) & inside
    own, ref, s, t = (tl.zeros(row.shape, tl.float32),) * 4
    one = tl.cast(leaves, tl.int64) * rows
    for leaf in range(leaves):
        at = halves + leaf * rows + row
        own += tl.load(at, mask=live, other=0.0)
        ref += tl.load(at + one, mask=live, other=0.0)
        s += tl.load(at + 2 * one, mask=live, other=0.0)
        t += tl.load(at + 3 * one, mask=live, other=0.0)
    # S and T sum to 1 but for the rounding of log Σe
    own, ref = tl.div_rn(own, s), tl.div_rn(ref, t)
    d = beta * ref + rest * own
    possible = tl.where(s > 0.0, t, 0.0) > 0.0
    zero = tl.zeros(row.shape, tl.float32)
    store_row(value, tl.where(d < 0.0, 0.0, d), possible, live, inside, row)
    store_row(centres, own, possible, live, inside, row)
    store_row(centres + rows, zero, possible, live, inside, row)
    store_row(centres + 2 * rows, ref, possible, live, inside, row)
    store_row(centres + 3 * rows, zero, possible, live, inside, row)


@jit(do_not_specialize=[*SIDE, "out_outer", "out_inner", *INTS])
def pair_gradient(
    x_ptr, y_ptr, out_ptr, middle_ptr, low_ptr, own, other, saved, pair, beta, rest, ref_outer, ref_stride,
    out_outer, out_inner,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, REF_KIND: tl.constexpr, MEASURE: tl.constexpr, MORE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """∂L/∂x of BLOCK columns of a row of the own side; grid: rows × blocks. With ``low_ptr``, as a sum of three numbers."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    other_place = Place(inner, ref_outer, ref_stride, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    blocks = tl.cdiv(columns, BLOCK)
    local_row = tl.program_id(0) // blocks
    row = local_row.to(tl.int64) + first_row
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = inside_of(place, column, ALIGNED)
    rows = tl.cast(rows, tl.int64)
    g = tl.zeros([BLOCK], tl.float32)
    if counts(own.tokens, sizes, row, True):
        z = z_of(x_ptr, place, own, local_row, row, column, KIND, ALIGNED)
        if MORE:
            g = row_gradient(z, start + column, row, own.tokens, sizes, saved)
        if pair.g_value is not None:
            y = z_of(y_ptr, other_place, other, local_row, row, column, REF_KIND, ALIGNED)
            high, low = tl.load(pair.centre + row), tl.load(pair.centre + rows + row)
            d = divergence_gradient(
                z - tl.load(pair.aux + row), y - tl.load(pair.other + row), tl.load(pair.aux + rows + row),
                tl.load(pair.other + rows + row), high, low, tl.cast(beta, tl.float32), tl.cast(rest, tl.float32),
                MEASURE,
            )  # fmt: skip
            g += tl.load(pair.g_value + row) * tl.where(high == high, d, float("nan"))
        temperature = temperature_of(own.tokens, own.scalars, row)
        softcap, logit_scale = tl.cast(own.scalars.softcap, tl.float32), tl.cast(own.scalars.logit_scale, tl.float32)
        x = load_logits(x_ptr, place, own.tokens, local_row, column, ALIGNED)
        g = pulled_back(g, x, temperature, softcap, logit_scale, KIND)
    at = row_start(Place(inner, out_outer, out_inner, start, columns, first_row), local_row, ALIGNED) + column
    high = g.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, high, mask=inside)
    if low_ptr is not None:
        rest_of = g - high.to(tl.float32)
        middle = rest_of.to(middle_ptr.dtype.element_ty)
        tl.store(middle_ptr + at, middle, mask=inside)
        tl.store(low_ptr + at, (rest_of - middle.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=inside)


class Batch(NamedTuple):
    """The rows of a call, whatever tile they are in."""

    own: Side
    ref: Side
    sizes: Sizes
    kinds: dict  # KIND, REF_KIND
    measure: Measure


def batch_of(like, targets, mask, transforms, measure: Measure, biases, rows: int, vocab: int) -> Batch:
    """The records of a batch's rows; ``transforms`` and ``biases`` are the own side's and the other's."""
    candidates = 0 if targets is None else targets.numel() // rows
    targets = torch.empty(1, dtype=torch.int64, device=like.device) if targets is None else targets
    sizes = Sizes(candidates, rows, vocab, -(-vocab // LEAF.value))
    sides = []
    for transform, bias in zip(transforms, biases, strict=True):
        temperatures = transform.temperature if isinstance(transform.temperature, torch.Tensor) else None
        sides.append(Side(Tokens(targets, mask, temperatures, bias), scalars_of(transform)))
    kinds = {"KIND": kind_of(transforms[0]), "REF_KIND": kind_of(transforms[1])}
    return Batch(*sides, sizes, kinds, measure)


class Room(NamedTuple):
    """What the forward's kernels leave behind."""

    scratch: NamedTuple
    ref_scratch: NamedTuple
    partial: torch.Tensor  # [1, leaves, rows] of gaps, or [4, leaves, rows] of a JSD's sums


def room_for(batch: Batch, like) -> Room:
    """Scratch for every leaf of both sides."""
    sums = 4 if batch.measure.kind == JSD.value else 1
    partial = torch.empty((sums, batch.sizes.leaves, batch.sizes.rows), dtype=torch.float32, device=like.device)
    return Room(
        allocate_scratch(batch.sizes, like), allocate_scratch(batch.sizes._replace(candidates=0), like), partial
    )


def _launch(x, y, place: Place, batch: Batch) -> tuple:
    """(grid, where both lie, options) of a kernel with a program a leaf of each row."""
    to, aligned = place_of(y), alignment(x) and alignment(y)
    grid = (x.numel() // place.columns * -(-place.columns // LEAF.value),)
    where = (to.stride_outer, to.stride_inner, *place, *batch.sizes)
    return grid, where, batch.kinds | {"ALIGNED": aligned} | NARROW


def launch_fold(x, y, place: Place, batch: Batch, room: Room, outputs: int) -> None:
    """The statistics of every leaf of a pair of tensors or tiles, into the scratch."""
    grid, where, options = _launch(x, y, place, batch)
    fold_pair[grid](
        x, y, batch.own, batch.ref, room.scratch, room.ref_scratch, room.partial, *where,
        MEASURE=batch.measure.kind, OUTPUTS=outputs & ENTROPY, **options,
    )  # fmt: skip


def launch_mixed(x, y, place: Place, batch: Batch, room: Room, out: Outputs) -> None:
    """What every leaf of a pair adds to a JSD."""
    grid, where, options = _launch(x, y, place, batch)
    beta = batch.measure.beta
    fold_mixed[grid](
        x, y, batch.own, batch.ref, out.aux, _teacher(out, batch), room.partial, beta, 1.0 - beta, *where, **options
    )


def _teacher(out: Outputs, batch: Batch):
    return out.aux[student_rows(batch.sizes.candidates, 0 if out.entropy is None else ENTROPY) :]


def launch_merges(batch: Batch, room: Room, out: Outputs, outputs: int) -> None:
    """The outputs of either side from its leaves, and those of a KL."""
    grid = (-(-batch.sizes.rows // MERGED_ROWS.value),)
    options, ref_sizes = {"num_warps": 1, "enable_fp_fusion": False}, batch.sizes._replace(candidates=0)
    teacher, spare = _teacher(out, batch), out.value
    top1 = torch.empty(0, dtype=torch.uint8, device=spare.device)
    merged = Merged(*(spare if x is None else x for x in (out.logp, out.lse, out.entropy)), out.aux, top1)
    merge[grid](batch.own.tokens, room.scratch, merged, *batch.sizes, OUTPUTS=outputs & (ENTROPY | LSE), **options)
    ref = Merged(spare, spare if out.ref_lse is None else out.ref_lse, spare, teacher, top1)
    bits = LSE if outputs & REF_LSE else 0
    merge[grid](batch.own.tokens, room.ref_scratch, ref, *ref_sizes, OUTPUTS=bits, **options)
    if batch.measure.kind != JSD.value:
        merge_gaps[grid](
            batch.own.tokens, room.scratch, room.ref_scratch, room.partial, out.value, teacher[2:], *batch.sizes,
            MEASURE=batch.measure.kind, **options,
        )  # fmt: skip


def launch_merge_mixed(batch: Batch, room: Room, out: Outputs) -> None:
    """The outputs of a JSD."""
    grid, beta, teacher = (-(-batch.sizes.rows // MERGED_ROWS.value),), batch.measure.beta, _teacher(out, batch)
    merge_mixed[grid](
        batch.own.tokens, room.partial, out.value, teacher[2:], beta, 1.0 - beta, *batch.sizes,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def launch_gradient(x, y, out, rest, place: Place, batch: Batch, saved: Saved, pair: PairSaved) -> None:
    """∂L/∂logits of the own side of a pair of tensors or tiles."""
    rows, blocks = x.numel() // place.columns, -(-place.columns // BLOCK.value)
    other, to, beta = place_of(y), place_of(out), batch.measure.beta
    pair_gradient[(rows * blocks,)](
        x, y, out, *rest, batch.own, batch.ref, saved, pair, beta, 1.0 - beta, other.stride_outer, other.stride_inner,
        to.stride_outer, to.stride_inner, *place, *batch.sizes, MEASURE=batch.measure.kind,
        MORE=any(g is not None for g in saved[1:]), ALIGNED=alignment(x) and alignment(y) and alignment(out),
        **batch.kinds, **OPTIONS,
    )  # fmt: skip


def forward(logits, ref_logits, targets, mask, transform: Transform, ref_transform: Transform, measure, outputs):
    """See ``rlfast/ops/divergence.py``."""
    out = allocate(logits, tuple(logits.shape[:-1]), targets, outputs)
    if logits.numel() == 0:
        return out
    rows = logits.numel() // logits.shape[-1]
    transforms = (transform, ref_transform)
    batch = batch_of(logits, targets, mask, transforms, measure, (None, None), rows, logits.shape[-1])
    room, place = room_for(batch, logits), place_of(logits)
    with torch.cuda.device_of(logits):
        launch_fold(logits, ref_logits, place, batch, room, outputs)
        launch_merges(batch, room, out, outputs)
        if measure.kind == JSD.value:
            launch_mixed(logits, ref_logits, place, batch, room, out)
            launch_merge_mixed(batch, room, out)
    return out


def saved_of(saved, grads) -> tuple[Saved, PairSaved]:
    """What a forward saved, and the gradients of its outputs, as the kernel takes them."""
    return Saved(saved.aux, *grads[1:]), PairSaved(saved.aux, saved.other, saved.centre, grads[0])


def backward(own, other, targets, mask, transform, other_transform, measure: Measure, saved, grads, out) -> None:
    """See ``rlfast/ops/divergence.py``."""
    if own.numel() == 0:
        return
    rows = own.numel() // own.shape[-1]
    transforms = (transform, other_transform)
    batch = batch_of(own, targets, mask, transforms, measure, (None, None), rows, own.shape[-1])
    with torch.cuda.device_of(own):
        launch_gradient(own, other, out, (None, None), place_of(own), batch, *saved_of(saved, grads))


class CompileCase(NamedTuple):
    """One call whose launches ``make compile`` compiles: every output, targets, mask and temperatures where ``full``."""

    dtype: torch.dtype
    measure: Measure
    full: bool
    vocab: int  # a multiple of 16 or not: wide or narrow loads

    def __str__(self) -> str:
        name, width = KINDS[self.measure.kind], "wide" if self.vocab % 16 == 0 else "narrow"
        return f"{str(self.dtype).removeprefix('torch.')} {name} {width}{' all outputs' if self.full else ''}"


MEASURES = tuple(Measure(kind, 0.5) for kind in (FORWARD.value, REVERSE.value, JSD.value))
COMPILE = (
    *(
        CompileCase(dtype, m, full, 8192)
        for dtype in (torch.float32, torch.bfloat16)
        for m in MEASURES
        for full in (0, 1)
    ),
    *(CompileCase(torch.bfloat16, m, True, 8191) for m in MEASURES),
)


def batch_to_compile(case: CompileCase, rows: int) -> tuple:
    """(targets, mask, transforms, outputs, grads) of a case."""
    row, plain = torch.zeros(rows), Transform(1.0, 0.0, 1.0)
    if not case.full:
        return None, None, (plain, plain), 0, (row, None, None, None)
    capped, scaled = Transform(torch.ones(rows), 30.0, 1.0), Transform(0.7, 0.0, 1.0)
    mask, targets = torch.ones(rows, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    return targets, mask, (capped, scaled), ENTROPY | LSE | REF_LSE, (row, row, row, row)


def launch_to_compile(case: CompileCase) -> None:
    """Forward and both backwards of a case, for a driver that compiles and does not run."""
    targets, mask, transforms, outputs, grads = batch_to_compile(case, rows=3)
    logits, ref_logits = (torch.zeros(3, case.vocab, dtype=case.dtype) for _ in range(2))
    out = forward(logits, ref_logits, targets, mask, *transforms, case.measure, outputs)
    views = [views_of(out.aux, candidates_of(targets, 1), outputs & ENTROPY, teacher) for teacher in (False, True)]
    backward(logits, ref_logits, targets, mask, *transforms, case.measure, views[0], grads, logits)
    ref_grads = (grads[0], None, grads[2], None)
    backward(ref_logits, logits, None, mask, *transforms[::-1], case.measure.swapped(), views[1], ref_grads, logits)
