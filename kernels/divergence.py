"""The ``triton`` backend of divergences: one read of both logits forward, one read of both and one write backward.

Forward: ``fold_pair`` keeps the statistics of each leaf of both sides as ``fold`` does, and with them Σ e_p·gap of a
KL; ``merge`` adds up the leaves of either side, ``merge_gaps`` those of the gaps. A JSD takes a second sweep,
``fold_mixed`` and ``merge_mixed``, when both log Σe are known. Backward: ``pair_gradient``, elementwise, of one side.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.divergence import FORWARD, JSD, REVERSE
from rlfast.kernels.leaves import (
    LEAF,
    MERGED_ROWS,
    Merged,
    Place,
    Sizes,
    Tokens,
    alignment,
    allocate_scratch,
    merge,
    place_of,
)
from rlfast.kernels.pair import PairSaved, Side, fold_mixed, fold_pair, merge_gaps, merge_mixed, pair_gradient
from rlfast.kernels.token_logps import BLOCK, NARROW, OPTIONS, Saved, kind_of, scalars_of
from rlfast.ops.divergence_records import KINDS, REF_LSE, Measure, Outputs, allocate, candidates_of, student_rows
from rlfast.ops.divergence_records import saved_of as views_of
from rlfast.ops.records import ENTROPY, LSE, Transform


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
    options |= {"maxnreg": 128}  # told how many registers there are, ptxas does not spill a few for a second program
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
    aligned = alignment(x) and alignment(y) and alignment(out)
    options = OPTIONS if aligned else NARROW
    if batch.measure.kind == JSD.value:
        options = {**NARROW, "maxnreg": 128}  # a mixture has more numbers a column; one program on an SM, none spilled
    pair_gradient[(rows * blocks,)](
        x, y, out, *rest, batch.own, batch.ref, saved, pair, beta, 1.0 - beta, other.stride_outer, other.stride_inner,
        to.stride_outer, to.stride_inner, *place, *batch.sizes, MEASURE=batch.measure.kind,
        MORE=any(g is not None for g in saved[1:]), ALIGNED=aligned,
        **batch.kinds, **options,
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
    """One call whose launches ``make compile`` compiles: every output, targets, mask and temperatures where
    ``full``."""

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
