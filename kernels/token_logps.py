"""The ``triton`` backend of token log-probs: one read of the logits forward, one read and one write backward.

Forward: ``fold`` keeps the statistics of each leaf of LEAF columns, ``merge`` adds up the leaves of a row
(``leaves.py``); with top-k, the heads of the leaves are merged too (``topk.py``). Backward: ``gradient``,
elementwise, in place if asked to. Nothing synchronises with the host, and the only shapes that compile anew are the
wide or narrow load and the power of two above the number of leaves.

Fused multiply-adds are off (enable_fp_fusion=False, whose default differs among Triton versions): which products the
compiler would fuse depends on what is inlined beside them, and the same row must have the same bits in every kernel.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.elementary import exp, expm1
from rlfast.kernels.formulas.logit import IDENTITY, SCALED, SOFTCAPPED, pulled_back, transformed, z_gradient
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    INTS,
    LEAF,
    MERGED_ROWS,
    Merged,
    Place,
    Scalars,
    Sizes,
    Tokens,
    alignment,
    allocate_scratch,
    counts,
    fold,
    inside_of,
    load_logits,
    merge,
    place_of,
    row_start,
    temperature_of,
)
from rlfast.kernels.topk import TopK, allocate_heads, fold_topk, merge_topk
from rlfast.ops.records import LSE, Outputs, Row, Transform, Wanted, allocate

BLOCK = tl.constexpr(2048)  # columns of a gradient program: 16 a thread of 128, read once and written once

# Leaves of one fold program: enough programs to fill an H100 (132 SMs × 8 × 2 waves), then fewer, longer ones, because
# every program loads the row's target and mask again.
PROGRAMS = 2112
LEAVES_PER_PROGRAM = 4

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Narrow loads have an address and a predicate an element: half the elements a thread, or registers spill.
NARROW = {**OPTIONS, "num_warps": 16}


class Saved(NamedTuple):
    """What the backward knows of each row."""

    aux: torch.Tensor  # float32 [·, rows]
    g_logp: torch.Tensor | None  # float32 [rows, candidates]
    g_lse: torch.Tensor | None  # float32 [rows]
    g_entropy: torch.Tensor | None  # float32 [rows]


@jit(do_not_specialize=["out_outer", "out_inner", *INTS])
def gradient(
    x_ptr, out_ptr, middle_ptr, low_ptr, tokens, scalars, saved, out_outer, out_inner,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """∂L/∂x of BLOCK columns of a row; grid: rows × blocks. With ``low_ptr``, as a sum of three numbers.

    ∂L/∂z_j = Σ_k g_k·(1[j = t_k] − p_j) + g_lse·p_j − g_entropy·p_j·(log p_j + H)
    """
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    blocks = tl.cdiv(columns, BLOCK)
    local_row = tl.program_id(0) // blocks
    row = local_row.to(tl.int64) + first_row
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = inside_of(place, column, ALIGNED)
    g = tl.zeros([BLOCK], tl.float32)
    if counts(tokens, sizes, row, True):
        x = load_logits(x_ptr, place, tokens, local_row, column, ALIGNED)
        temperature = temperature_of(tokens, scalars, row)
        softcap, logit_scale = tl.cast(scalars.softcap, tl.float32), tl.cast(scalars.logit_scale, tl.float32)
        z = transformed(x, temperature, softcap, logit_scale, KIND)
        g = row_gradient(z, start + column, row, tokens, sizes, saved)
        g = pulled_back(g, x, temperature, softcap, logit_scale, KIND)
    at = row_start(Place(inner, out_outer, out_inner, start, columns, first_row), local_row, ALIGNED) + column
    high = g.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, high, mask=inside)
    if low_ptr is not None:
        rest = g - high.to(tl.float32)
        middle = rest.to(middle_ptr.dtype.element_ty)
        tl.store(middle_ptr + at, middle, mask=inside)
        tl.store(low_ptr + at, (rest - middle.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=inside)


@jit
def shares(row, target, tokens, sizes, saved):
    """(Σ ∂L/∂log p of a row's candidates that are this one, Σ of the others): their difference would cancel."""
    own, others = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for j in range(sizes.candidates):
        other = tl.load(tokens.targets + row * sizes.candidates + j)
        g = tl.load(saved.g_logp + row * sizes.candidates + j)
        if other == target:
            own += g
        elif other != -100:
            others += g
    return own, others


@jit
def row_gradient(z, ids, row, tokens, sizes, saved):
    """∂L/∂z of one row's z; at a target 1 − p is −expm1(log p), which keeps its digits as p → 1."""
    rows = tl.cast(sizes.rows, tl.int64)
    log_p = (z - tl.load(saved.aux + row)) - tl.load(saved.aux + rows + row)
    p = exp(log_p)
    g = tl.zeros(z.shape, tl.float32)
    if saved.g_logp is not None:
        total = tl.zeros([], tl.float32)
        for k in range(sizes.candidates):
            if tl.load(tokens.targets + row * sizes.candidates + k) != -100:
                total += tl.load(saved.g_logp + row * sizes.candidates + k)
        g = -total * p
        for k in range(sizes.candidates):
            target = tl.load(tokens.targets + row * sizes.candidates + k)
            if target != -100:
                own, others = shares(row, target, tokens, sizes, saved)
                logp = tl.load(saved.aux + (2 + k) * rows + row)
                g = tl.where(ids == target, -others * p - own * expm1(logp), g)
    g_lse, g_entropy, entropy = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if saved.g_lse is not None:
        g_lse = tl.load(saved.g_lse + row)
    if saved.g_entropy is not None:
        g_entropy = tl.load(saved.g_entropy + row)
        entropy = tl.load(saved.aux + (2 + sizes.candidates) * rows + row)
    return g + z_gradient(p, log_p, g_lse, g_entropy, entropy)


def batch_of(targets, mask, transform: Transform, bias, rows: int, vocab: int) -> tuple[Tokens, Sizes]:
    """The records of a batch's rows."""
    temperatures = transform.temperature if isinstance(transform.temperature, torch.Tensor) else None
    sizes = Sizes(targets.numel() // rows, rows, vocab, -(-vocab // LEAF.value))
    return Tokens(targets, mask, temperatures, bias), sizes


def scalars_of(transform: Transform) -> Scalars:
    """The transform's floats; 1.0 stands for a temperature that is a tensor."""
    t = transform.temperature
    temperature = 1.0 if isinstance(t, torch.Tensor) else float(t)
    return Scalars(temperature, float(transform.softcap), float(transform.logit_scale))


def kind_of(transform: Transform) -> int:
    """IDENTITY, SCALED or SOFTCAPPED."""
    if transform.softcap:
        return SOFTCAPPED.value
    t = transform.temperature
    plain = not isinstance(t, torch.Tensor) and t == 1.0 and transform.logit_scale == 1.0
    return IDENTITY.value if plain else SCALED.value


def launch_fold(x, place: Place, tokens, sizes: Sizes, transform: Transform, scratch, heads, wanted: Wanted) -> None:
    """The statistics of every leaf of a tensor or a tile, into the scratch."""
    rows, leaves = x.numel() // place.columns, -(-place.columns // LEAF.value)
    per_program = max(1, min(LEAVES_PER_PROGRAM, leaves * rows // PROGRAMS))
    kind, scalars, aligned = kind_of(transform), scalars_of(transform), alignment(x)
    fold[(rows * -(-leaves // per_program),)](
        x, tokens, scalars, scratch, per_program, *place, *sizes,
        KIND=kind, OUTPUTS=wanted.outputs & ~LSE, ALIGNED=aligned, **(OPTIONS if aligned else NARROW),
    )  # fmt: skip
    if heads is not None:
        fold_topk[(rows * leaves,)](
            x, tokens, scalars, scratch, heads, wanted.top_k, *place, *sizes, KIND=kind, ALIGNED=aligned, **OPTIONS
        )


def launch_merge(tokens: Tokens, sizes: Sizes, scratch, heads, out: Outputs, wanted: Wanted) -> None:
    """The op's outputs from the statistics of every leaf."""
    merged = Merged(out.logp, out.lse, out.entropy, out.aux, out.is_top1.view(torch.uint8))
    grid = (-(-sizes.rows // MERGED_ROWS.value),)
    merge[grid](tokens, scratch, merged, *sizes, OUTPUTS=wanted.outputs, num_warps=1, enable_fp_fusion=False)
    if heads is not None:
        tail = out.aux[Row.of(sizes.candidates, wanted).tail_mass]
        leaves = max(2, 1 << (sizes.leaves - 1).bit_length())
        merge_topk[(sizes.rows,)](
            tokens, scratch, heads, out.aux, TopK(out.topk_logp, out.topk_ids, tail), wanted.top_k, *sizes,
            LEAVES=leaves, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def launch_gradient(x, out, rest, place: Place, tokens, sizes: Sizes, transform: Transform, saved: Saved) -> None:
    """∂L/∂logits of a tensor or a tile."""
    rows, blocks, to = x.numel() // place.columns, -(-place.columns // BLOCK.value), place_of(out)
    gradient[(rows * blocks,)](
        x, out, *rest, tokens, scalars_of(transform), saved, to.stride_outer, to.stride_inner, *place, *sizes,
        KIND=kind_of(transform), ALIGNED=alignment(x) and alignment(out), **OPTIONS,
    )  # fmt: skip


def forward(logits, targets, mask, transform: Transform, wanted: Wanted) -> Outputs:
    """See ``rlfast/ops/token_logps.py``."""
    out = allocate(logits, tuple(logits.shape[:-1]), targets, wanted)
    if logits.numel() == 0:
        return out
    rows = logits.numel() // logits.shape[-1]
    tokens, sizes = batch_of(targets, mask, transform, None, rows, logits.shape[-1])
    scratch = allocate_scratch(sizes, logits)
    heads = allocate_heads(sizes, wanted.top_k, logits) if wanted.top_k else None
    with torch.cuda.device_of(logits):
        launch_fold(logits, place_of(logits), tokens, sizes, transform, scratch, heads, wanted)
        launch_merge(tokens, sizes, scratch, heads, out, wanted)
    return out


def backward(logits, targets, mask, transform: Transform, aux, grads, out) -> None:
    """See ``rlfast/ops/token_logps.py``."""
    if logits.numel() == 0:
        return
    rows = logits.numel() // logits.shape[-1]
    tokens, sizes = batch_of(targets, mask, transform, None, rows, logits.shape[-1])
    with torch.cuda.device_of(logits):
        launch_gradient(logits, out, (None, None), place_of(logits), tokens, sizes, transform, Saved(aux, *grads))


class CompileCase(NamedTuple):
    """One call whose launches ``make compile`` compiles: rows are skipped and have temperatures where ``full``."""

    dtype: torch.dtype
    transform: Transform
    full: bool  # every output, top-k, mask, temperatures; else log-probs alone
    vocab: int  # a multiple of 16 or not: wide or narrow loads

    def __str__(self) -> str:
        kind = ("plain", "scaled", "softcapped")[kind_of(self.transform)]
        width = "wide" if self.vocab % 16 == 0 else "narrow"
        return f"{str(self.dtype).removeprefix('torch.')} {kind} {width}{' all outputs' if self.full else ''}"


TRANSFORMS = (Transform(1.0, 0.0, 1.0), Transform(0.7, 0.0, 1.0), Transform(0.7, 30.0, 1.0))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILE = (
    *(CompileCase(dtype, t, True, 8192) for dtype in DTYPES for t in TRANSFORMS),
    *(CompileCase(dtype, t, False, 8192) for dtype in DTYPES[:2] for t in TRANSFORMS[:2]),
    *(CompileCase(dtype, TRANSFORMS[1], full, 8191) for dtype in DTYPES[:2] for full in (False, True)),
)


def batch_to_compile(case: CompileCase, rows: int):
    """(targets, mask, transform, wanted, grads) of a case."""
    row = torch.zeros(rows)
    targets = torch.zeros(rows, dtype=torch.int64)
    if not case.full:
        return targets, None, case.transform, Wanted(0, 0), (row, None, None)
    transform = case.transform
    if kind_of(transform) != IDENTITY.value:
        transform = transform._replace(temperature=torch.ones(rows))
    return targets, torch.ones(rows, dtype=torch.bool), transform, Wanted(31, 5), (row, row, row)


def launch_to_compile(case: CompileCase) -> None:
    """Forward and backward of a case, for a driver that compiles and does not run."""
    targets, mask, transform, wanted, grads = batch_to_compile(case, rows=3)
    logits = torch.zeros(3, case.vocab, dtype=case.dtype)
    out = forward(logits, targets, mask, transform, wanted)
    backward(logits, targets, mask, transform, out.aux, grads, logits)
