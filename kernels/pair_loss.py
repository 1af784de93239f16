"""The ``triton`` backend of preference losses: one launch for the loss, its gradient and the metrics.

A program takes blocks of pairs whose sums are given, or one pair of token rows at a time: sums → scores → links → Σ,
and the gradient back to the tokens. Programs leave partial sums behind, and the last one to finish adds them up in
ascending order. Which pairs a program takes depends on their number alone. Fused multiply-adds are off, as in
``token_loss``.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas import PAIRS
from rlfast.kernels.formulas.pair import Pair
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.loss_rows import load, total
from rlfast.kernels.loss_sums import COLUMNS, TILE, add, pick, put
from rlfast.kernels.preferences import (
    OPTIONS,
    PROGRAMS,
    RESPONSES_AT_A_TIME,
    TOKENS_AT_A_TIME,
    Sums,
    count_of,
    given,
    laid,
    numbers_of,
    pulled_back,
    reduced,
    rest_of,
    scale_of,
    scored,
    span_of,
    strides_of,
    structure_of,
    term_of,
    written,
)
from rlfast.kernels.token_loss import counter_of
from rlfast.ops.preference_records import METRICS, SUM, Output, Rest, Settings, Side, Term, allocate, rows_of

LOSS, PAIRS_USED, CHOSEN, REJECTED, BETTER, LOGP_W, LOGP_L, LENGTH_W, LENGTH_L = (tl.constexpr(i) for i in range(9))
WRITTEN = tl.constexpr(len(METRICS))
STRIDES = ("logp", "ref", "mask")
INTS = ("pairs", *(f"{name}_{side}" for side in ("w", "l") for name in (*STRIDES, "length")))


class Where(NamedTuple):
    """What a launch writes, and its scratch."""

    loss: torch.Tensor
    metrics: torch.Tensor
    d_chosen: torch.Tensor | None
    d_rejected: torch.Tensor | None
    losses: torch.Tensor | None
    rewards_chosen: torch.Tensor | None
    rewards_rejected: torch.Tensor | None
    partial: torch.Tensor  # float64 [programs, COLUMNS]
    counter: torch.Tensor  # int32 [1]: 0 before and after a launch


@jit
def finish(where, scale, programs):
    """Loss and metrics from every program's sums, in ascending order."""
    lane = tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, programs, TILE):
        program = first + tl.arange(0, TILE)
        at = where.partial + program[:, None] * COLUMNS + lane[None, :]
        sums += tl.sum(tl.load(at, mask=(program < programs)[:, None], other=0.0, cache_modifier=".cg"), 0)
    used = pick(sums, PAIRS_USED)
    each = (1.0 / tl.maximum(used, 1.0).to(tl.float32)).to(tl.float64)  # a division of doubles is a call, and spills
    loss = pick(sums, LOSS) * scale.to(tl.float64)
    w, l_ = pick(sums, CHOSEN), pick(sums, REJECTED)
    found = put(put(tl.zeros([COLUMNS], tl.float64), 0, loss), 1, used)
    found = put(put(found, 2, each * w), 3, each * l_)
    found = put(put(found, 4, each * pick(sums, BETTER)), 5, each * (w - l_))
    found = put(put(found, 6, each * pick(sums, LOGP_W)), 7, each * pick(sums, LOGP_L))
    found = put(put(found, 8, each * pick(sums, LENGTH_W)), 9, each * pick(sums, LENGTH_L))
    tl.store(where.metrics + lane, found.to(tl.float32), mask=lane < WRITTEN)
    tl.store(where.loss, loss.to(tl.float32))


@jit
def linked(pair_fields, w, l_, numbers, SCORES: tl.constexpr, MEANS: tl.constexpr, LINKS: tl.constexpr):
    """(Σ weight·ℓ, Σ weight·∂ℓ/∂S of the chosen, of the rejected) over the terms."""
    margin, extra, shared = pair_fields
    loss, d_w, d_l = margin * 0.0, margin * 0.0, margin * 0.0
    for k in tl.static_range(len(LINKS)):
        s_w, slope_w = scored(w, numbers.scores[k + 1], SCORES[k + 1], MEANS[k + 1])
        s_l, slope_l = scored(l_, numbers.scores[k + 1], SCORES[k + 1], MEANS[k + 1])
        value, by_w, by_l = LINKS[k](Pair(s_w, s_l, w.length, l_.length, margin, extra, shared), numbers.links[k])
        # a formula's minimum and maximum may drop a NaN
        value = tl.where((s_w == s_w) & (s_l == s_l), value, s_w + s_l)
        weight = numbers.weights[k + 1]
        loss, d_w, d_l = loss + weight * value, d_w + weight * (slope_w * by_w), d_l + weight * (slope_l * by_l)
    return loss, d_w, d_l


@jit(do_not_specialize=[*INTS])
def pair_loss(
    chosen, rejected, rest, where, numbers, pairs, logp_w, ref_w, mask_w, length_w, logp_l, ref_l, mask_l, length_l,
    SCORES: tl.constexpr, MEANS: tl.constexpr, LINKS: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr,
    TAIL: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Everything; the module's docstring says how. Grid: min(blocks of pairs, PROGRAMS)."""
    s = numbers.settings
    scale = scale_of(rest, s.factor, pairs, SUM)
    sums = tl.zeros([COLUMNS], tl.float64)
    for first in range(tl.program_id(0) * BLOCK, pairs, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = i < pairs
        zero = tl.zeros(i.shape, tl.float32)
        weights = zero + 1.0
        if rest.weights is not None:
            weights = load(rest.weights, i, inside)
        used = inside & (weights != 0.0)
        shared = zero
        if rest.shared is not None:
            shared = zero + tl.load(rest.shared)
        if TOKENS:  # a block is one pair
            row = tl.zeros([], tl.int64) + first
            span_w = span_of(chosen, row, logp_w, ref_w, mask_w, length_w)
            span_l = span_of(rejected, row, logp_l, ref_l, mask_l, length_l)
            shortest = tl.zeros([], tl.int32)
            if TAIL:
                shortest = tl.minimum(count_of(chosen, span_w, SPAN), count_of(rejected, span_l, SPAN))
            of_w = reduced(chosen, span_w, shortest, s.tail, TAIL, SPAN)
            of_l = reduced(rejected, span_l, shortest, s.tail, TAIL, SPAN)
            w = Sums(zero + of_w.logp, zero + of_w.log_ratio, zero + of_w.length)
            l_ = Sums(zero + of_l.logp, zero + of_l.log_ratio, zero + of_l.length)
        else:
            w, l_ = given(chosen, i, inside), given(rejected, i, inside)
        r_w, _ = scored(w, numbers.scores[0], SCORES[0], MEANS[0])
        r_l, _ = scored(l_, numbers.scores[0], SCORES[0], MEANS[0])
        r_w, r_l = numbers.weights[0] * r_w, numbers.weights[0] * r_l
        fields = load(rest.margin, i, inside), load(rest.extra, i, inside), shared
        loss, d_w, d_l = linked(fields, w, l_, numbers, SCORES, MEANS, LINKS)
        loss = tl.where(used, weights * loss, 0.0)  # not a product: what is left out may be infinite
        d_w = tl.where(used, scale * weights * d_w, 0.0)
        d_l = tl.where(used, scale * weights * d_l, 0.0)
        if where.losses is not None:
            tl.store(where.losses + i, loss, mask=inside)
            tl.store(where.rewards_chosen + i, r_w, mask=inside)
            tl.store(where.rewards_rejected + i, r_l, mask=inside)
        if where.d_chosen is not None:
            if TOKENS:
                d = tl.sum(d_w, 0)
                pulled_back(chosen, span_w, d, where.d_chosen, shortest, s.tail, TAIL, SPAN)
            else:
                tl.store(where.d_chosen + i, d_w, mask=inside)
        if where.d_rejected is not None:
            if TOKENS:
                d = tl.sum(d_l, 0)
                pulled_back(rejected, span_l, d, where.d_rejected, shortest, s.tail, TAIL, SPAN)
            else:
                tl.store(where.d_rejected + i, d_l, mask=inside)
        sums = add(add(sums, LOSS, total(loss)), PAIRS_USED, total(tl.where(used, 1.0, 0.0)))
        sums = add(add(sums, CHOSEN, total(tl.where(used, r_w, 0.0))), REJECTED, total(tl.where(used, r_l, 0.0)))
        sums = add(sums, BETTER, total(tl.where(used & (r_w > r_l), 1.0, 0.0)))
        sums = add(add(sums, LOGP_W, total(tl.where(used, w.logp, 0.0))), LOGP_L, total(tl.where(used, l_.logp, 0.0)))
        sums = add(sums, LENGTH_W, total(tl.where(used, w.length, 0.0)))
        sums = add(sums, LENGTH_L, total(tl.where(used, l_.length, 0.0)))
    tl.store(where.partial + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), sums)
    tl.debug_barrier()  # the sums of every thread are there before one of them counts
    if tl.atomic_add(where.counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        finish(where, scale, tl.num_programs(0))
        tl.store(where.counter, 0)


def where_of(out: Output, programs: int) -> Where:
    """What a launch writes: only what is needed."""
    partial = torch.empty(programs, COLUMNS.value, dtype=torch.float64, device=out.loss.device)
    rewards = (out.rewards[0], out.rewards[1])
    return Where(
        out.loss, out.metrics, *map(written, (out.d_first, out.d_second, out.losses, *rewards)), partial,
        counter_of(partial),
    )  # fmt: skip


def forward(
    chosen: Side, rejected: Side, rest: Rest, terms: list[Term], settings: Settings, reduce: int, out: Output
) -> None:
    """See ``rlfast/ops/pair_loss.py``."""
    pairs, tokens = rows_of(chosen), chosen.logp.dim() == 2 or chosen.cu_seqlens is not None
    block = 1 if tokens else RESPONSES_AT_A_TIME
    programs = max(1, min(-(-pairs // block), PROGRAMS))
    with torch.cuda.device_of(chosen.logp):
        pair_loss[(programs,)](
            laid(chosen), laid(rejected), rest_of(rest), where_of(out, programs), numbers_of(terms, PAIRS, settings),
            pairs, *strides_of(chosen), *strides_of(rejected), **structure_of(terms, PAIRS), SUM=int(reduce == SUM),
            TOKENS=int(tokens), TAIL=int(settings.tail != 1.0 and tokens), BLOCK=block, SPAN=TOKENS_AT_A_TIME,
            **OPTIONS,
        )  # fmt: skip


class CompileCase(NamedTuple):
    """One call whose launch ``make compile`` compiles."""

    links: tuple[str, ...]
    score: str = "log_ratio"
    mean: bool = False
    dtype: torch.dtype = torch.float32
    form: str = "sums"  # or "padded", "packed"
    full: bool = False  # every field, and a tail

    def __str__(self) -> str:
        words = (
            str(self.dtype).removeprefix("torch."),
            *self.links,
            self.score,
            "mean" if self.mean else "",
            self.form,
        )
        return " ".join(filter(None, (*words, "all fields" if self.full else "")))


COMPILE = (
    *(CompileCase((name,)) for name in PAIRS),
    *(CompileCase(("logistic",), score) for score in ("power", "forward_kl", "jensen_shannon", "alpha_divergence")),
    *(
        CompileCase(("logistic",), "log_ratio", True, dtype, form, full)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for form in ("sums", "padded", "packed")
        for full in (False, True)
    ),
    CompileCase(("logistic", "bco", "nll"), form="packed", dtype=torch.bfloat16, full=True),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launch of a case, for a driver that compiles and does not run."""
    shape, ends = {"sums": ((3,), None), "padded": ((3, 40), None), "packed": ((90,), torch.tensor([0, 40, 80, 90]))}[
        case.form
    ]
    logp = torch.zeros(shape, dtype=case.dtype)
    mask = logp == 0 if case.full and case.form != "sums" else None
    lengths = torch.ones(3) if case.full and case.form == "sums" else None
    side = Side(logp, logp, mask, ends, lengths)
    field = torch.zeros(3, dtype=case.dtype) if case.full else None
    rest = Rest(field, field, field, field, torch.ones(()) if case.full else None)

    out = allocate(logp, logp, 3, len(METRICS), (True, True, case.full))
    terms = [term_of(PAIRS, ""), *(term_of(PAIRS, link, case.score, case.mean) for link in case.links)]
    forward(side, side, rest, terms, Settings(tail=0.5 if case.full else 1.0), 0, out)
