"""The ``triton`` backend of token log-probs: one read of the logits forward, one read and one write backward.

Forward: ``fold`` keeps the statistics of each leaf of LEAF columns, ``merge`` adds up the leaves of a row (``leaves.py``); with
top-k, the heads of the leaves are merged too (``topk.py``). Backward: ``gradient``, elementwise, in place if asked to.
Nothing synchronises with the host, and the only shapes that compile anew are the wide or narrow load and the power of two
above the number of leaves.

Fused multiply-adds are off (enable_fp_fusion=False, whose default differs among Triton versions): which products the compiler
would fuse depends on what is inlined beside them, and the same row must have the same bits in every kernel.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.logit import (
    IDENTITY,
    SCALED,
    SOFTCAPPED,
    exp,
    expm1,
    pulled_back,
    transformed,
    z_gradient,
)
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    LEAF,
    MERGED_ROWS,
    Merged,
    Place,
    Scalars,
    Tokens,
    alignment,
    allocate_scratch,
    counts,
    fold,
    load_logits,
    merge,
    place_of,
    row_start,
    temperature_of,
)
from rlfast.kernels.topk import TopK, allocate_heads, fold_topk, merge_topk
from rlfast.ops.records import Outputs, Row, Transform, Wanted, allocate

BLOCK = tl.constexpr(2048)  # columns of a gradient program: 16 a thread of 128, read once and written once

# Leaves of one fold program: enough programs to fill an H100 (132 SMs × 8 × 2 waves), then fewer, longer ones, because every
# program loads the row's target and mask again.
PROGRAMS = 2112
LEAVES_PER_PROGRAM = 4

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class Saved(NamedTuple):
    """What the backward knows of each row."""

    aux: torch.Tensor  # float32 [·, rows]
    g_logp: torch.Tensor | None  # float32 [rows, candidates]
    g_lse: torch.Tensor | None  # float32 [rows]
    g_entropy: torch.Tensor | None  # float32 [rows]


@jit(do_not_specialize=["place", "out_place", "tokens", "scalars", "saved"])
def gradient(
    x_ptr, out_ptr, low_ptr, place, out_place, tokens, scalars, saved,
    KIND: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """∂L/∂x of BLOCK columns of a row; grid: rows × blocks. With ``low_ptr``, as the sum of two numbers of out's dtype.

    ∂L/∂z_j = Σ_k g_k·(1[j = t_k] − p_j) + g_lse·p_j − g_entropy·p_j·(log p_j + H)
    """
    blocks = tl.cdiv(place.columns, BLOCK)
    local_row = (tl.program_id(0) // blocks).to(tl.int64)
    row = local_row + place.first_row
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < place.columns
    g = tl.zeros([BLOCK], tl.float32)
    if counts(tokens, row, True):
        x = load_logits(x_ptr, place, tokens, local_row, columns, ALIGNED)
        temperature = temperature_of(tokens, scalars, row)
        softcap, logit_scale = tl.cast(scalars.softcap, tl.float32), tl.cast(scalars.logit_scale, tl.float32)
        z = transformed(x, temperature, softcap, logit_scale, KIND)
        g = row_gradient(z, place.start + columns, row, tokens, saved)
        g = pulled_back(g, x, temperature, softcap, logit_scale, KIND)
    at = row_start(out_place, local_row, ALIGNED) + columns
    high = g.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, high, mask=inside)
    if low_ptr is not None:
        tl.store(low_ptr + at, (g - high.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=inside)


@jit
def row_gradient(z, ids, row, tokens, saved):
    """∂L/∂z of one row's z; at a target 1 − p is −expm1(log p), which keeps its digits as p → 1."""
    rows = tl.cast(tokens.rows, tl.int64)
    log_p = (z - tl.load(saved.aux + row)) - tl.load(saved.aux + rows + row)
    p = exp(log_p)
    g = tl.zeros(z.shape, tl.float32)
    if saved.g_logp is not None:
        total = tl.zeros([], tl.float32)
        for k in range(tokens.candidates):
            if tl.load(tokens.targets + row * tokens.candidates + k) != -100:
                total += tl.load(saved.g_logp + row * tokens.candidates + k)
        g = -total * p
        for k in range(tokens.candidates):
            target = tl.load(tokens.targets + row * tokens.candidates + k)
            if target != -100:
                g_k = tl.load(saved.g_logp + row * tokens.candidates + k)
                logp = tl.load(saved.aux + (2 + k) * rows + row)
                # −g·p + g·p is exactly 0: what is left is g·(1 − p)
                g = tl.where(ids == target, (g + g_k * p) - g_k * expm1(logp), g)
    g_lse, g_entropy, entropy = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    if saved.g_lse is not None:
        g_lse = tl.load(saved.g_lse + row)
    if saved.g_entropy is not None:
        g_entropy = tl.load(saved.g_entropy + row)
        entropy = tl.load(saved.aux + (2 + tokens.candidates) * rows + row)
    return g + z_gradient(p, log_p, g_lse, g_entropy, entropy)


def tokens_of(targets, mask, transform: Transform, bias, rows: int, vocab: int) -> Tokens:
    """The record of a batch's rows."""
    temperatures = transform.temperature if isinstance(transform.temperature, torch.Tensor) else None
    candidates = targets.numel() // rows
    return Tokens(targets, mask, temperatures, bias, candidates, rows, vocab)


def scalars_of(transform: Transform) -> Scalars:
    """The transform's floats; 1.0 stands for a temperature that is a tensor."""
    t = transform.temperature
    return Scalars(1.0 if isinstance(t, torch.Tensor) else float(t), float(transform.softcap), float(transform.logit_scale))


def kind_of(transform: Transform) -> int:
    """IDENTITY, SCALED or SOFTCAPPED."""
    if transform.softcap:
        return SOFTCAPPED.value
    t = transform.temperature
    return IDENTITY.value if not isinstance(t, torch.Tensor) and t == 1.0 and transform.logit_scale == 1.0 else SCALED.value


def launch_fold(x, place: Place, tokens: Tokens, transform: Transform, scratch, heads, wanted: Wanted) -> None:
    """The statistics of every leaf of a tensor or a tile, into the scratch."""
    leaves, scalars = -(-place.columns // LEAF.value), scalars_of(transform)
    per_program = max(1, min(LEAVES_PER_PROGRAM, leaves * place.rows // PROGRAMS))
    kind, aligned = kind_of(transform), alignment(x)
    fold[(place.rows * -(-leaves // per_program),)](
        x, place, tokens, scalars, scratch, per_program, KIND=kind, OUTPUTS=wanted.outputs, ALIGNED=aligned, **OPTIONS
    )
    if heads is not None:
        fold_topk[(place.rows * leaves,)](x, place, tokens, scalars, scratch, heads, KIND=kind, ALIGNED=aligned, **OPTIONS)


def launch_merge(tokens: Tokens, scratch, heads, out: Outputs, wanted: Wanted) -> None:
    """The op's outputs from the statistics of every leaf."""
    merged = Merged(out.logp, out.lse, out.entropy, out.aux, out.is_top1.view(torch.uint8))
    grid = (-(-tokens.rows // MERGED_ROWS.value),)
    merge[grid](tokens, scratch, merged, OUTPUTS=wanted.outputs, num_warps=1, enable_fp_fusion=False)
    if heads is not None:
        tail = out.aux[Row.of(tokens.candidates, wanted).tail_mass]
        leaves = max(2, 1 << (scratch.leaves - 1).bit_length())
        merge_topk[(tokens.rows,)](
            tokens, scratch, heads, out.aux, TopK(out.topk_logp, out.topk_ids, tail),
            LEAVES=leaves, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip


def launch_gradient(x, out, low, place: Place, out_place: Place, tokens: Tokens, transform: Transform, saved: Saved) -> None:
    """∂L/∂logits of a tensor or a tile."""
    gradient[(place.rows * -(-place.columns // BLOCK.value),)](
        x, out, low, place, out_place, tokens, scalars_of(transform), saved,
        KIND=kind_of(transform), ALIGNED=alignment(x) and alignment(out), **OPTIONS,
    )  # fmt: skip


def forward(logits, targets, mask, transform: Transform, wanted: Wanted) -> Outputs:
    """See ``rlfast/ops/token_logps.py``."""
    out = allocate(logits, tuple(logits.shape[:-1]), targets, wanted)
    place = place_of(logits)
    if place.rows == 0:
        return out
    tokens = tokens_of(targets, mask, transform, None, place.rows, logits.shape[-1])
    scratch = allocate_scratch(tokens, logits)
    heads = allocate_heads(tokens, scratch, wanted.top_k) if wanted.top_k else None
    with torch.cuda.device_of(logits):
        launch_fold(logits, place, tokens, transform, scratch, heads, wanted)
        launch_merge(tokens, scratch, heads, out, wanted)
    return out


def backward(logits, targets, mask, transform: Transform, aux, grads, out) -> None:
    """See ``rlfast/ops/token_logps.py``."""
    place = place_of(logits)
    if place.rows == 0:
        return
    tokens = tokens_of(targets, mask, transform, None, place.rows, logits.shape[-1])
    with torch.cuda.device_of(logits):
        launch_gradient(logits, out, None, place, place_of(out), tokens, transform, Saved(aux, *grads))
