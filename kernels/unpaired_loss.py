"""The ``triton`` backend of losses of single responses; ``pair_loss`` says how the work is shared out."""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas import SINGLES
from rlfast.kernels.formulas.unpaired import Single
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.loss_rows import load, total
from rlfast.kernels.loss_sums import COLUMNS, TILE, add, pick, put
from rlfast.kernels.preferences import (
    OPTIONS,
    PROGRAMS,
    RESPONSES_AT_A_TIME,
    TOKENS_AT_A_TIME,
    Sums,
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
from rlfast.ops.preference_records import SINGLE_METRICS, SUM, Output, Rest, Settings, Side, Term, allocate, rows_of

LOSS, GOOD, BAD, GOOD_REWARD, BAD_REWARD, GOOD_LOGP, BAD_LOGP = (tl.constexpr(i) for i in range(7))
WRITTEN = tl.constexpr(len(SINGLE_METRICS))
INTS = ("rows", "stride_logp", "stride_ref", "stride_mask", "length")


class Where(NamedTuple):
    """What a launch writes, and its scratch."""

    loss: torch.Tensor
    metrics: torch.Tensor
    d_logp: torch.Tensor | None
    losses: torch.Tensor | None
    rewards: torch.Tensor | None
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
    good, bad = pick(sums, GOOD), pick(sums, BAD)
    # float32: a division of doubles is a call, and spills
    per_good = (1.0 / tl.maximum(good, 1.0).to(tl.float32)).to(tl.float64)
    per_bad = (1.0 / tl.maximum(bad, 1.0).to(tl.float32)).to(tl.float64)
    loss = pick(sums, LOSS) * scale.to(tl.float64)
    found = put(put(put(tl.zeros([COLUMNS], tl.float64), 0, loss), 1, good), 2, bad)
    found = put(put(found, 3, per_good * pick(sums, GOOD_REWARD)), 4, per_bad * pick(sums, BAD_REWARD))
    found = put(put(found, 5, per_good * pick(sums, GOOD_LOGP)), 6, per_bad * pick(sums, BAD_LOGP))
    tl.store(where.metrics + lane, found.to(tl.float32), mask=lane < WRITTEN)
    tl.store(where.loss, loss.to(tl.float32))


@jit
def linked(good, extra, shared, sums, numbers, SCORES: tl.constexpr, MEANS: tl.constexpr, LINKS: tl.constexpr):
    """(Σ weight·ℓ, Σ weight·∂ℓ/∂S) over the terms."""
    loss, d = extra * 0.0, extra * 0.0
    for k in tl.static_range(len(LINKS)):
        s, slope = scored(sums, numbers.scores[k + 1], SCORES[k + 1], MEANS[k + 1])
        value, by_s = LINKS[k](Single(s, good, extra, shared), numbers.links[k])
        weight = numbers.weights[k + 1]
        loss, d = loss + weight * tl.where(s == s, value, s), d + weight * (slope * by_s)
    return loss, d


@jit(do_not_specialize=[*INTS])
def unpaired_loss(
    side, desirable, rest, where, numbers, rows, stride_logp, stride_ref, stride_mask, length, SCORES: tl.constexpr,
    MEANS: tl.constexpr, LINKS: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Everything. Grid: min(blocks of responses, PROGRAMS)."""
    s = numbers.settings
    scale = scale_of(rest, s.factor, rows, SUM)
    sums = tl.zeros([COLUMNS], tl.float64)
    for first in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK).to(tl.int64)
        inside = i < rows
        zero = tl.zeros(i.shape, tl.float32)
        weights = zero + 1.0
        if rest.weights is not None:
            weights = load(rest.weights, i, inside)
        used = inside & (weights != 0.0)
        good = tl.load(desirable + i, mask=inside, other=0) != 0
        shared = zero
        if rest.shared is not None:
            shared = zero + tl.load(rest.shared)
        if TOKENS:  # a block is one response
            row = tl.zeros([], tl.int64) + first
            span = span_of(side, row, stride_logp, stride_ref, stride_mask, length)
            of = reduced(side, span, 0, 1.0, 0, SPAN)
            x = Sums(zero + of.logp, zero + of.log_ratio, zero + of.length)
        else:
            x = given(side, i, inside)
        reward, _ = scored(x, numbers.scores[0], SCORES[0], MEANS[0])
        reward = numbers.weights[0] * reward
        kind = tl.where(good, 1.0, 0.0)
        loss, d = linked(kind, load(rest.extra, i, inside), shared, x, numbers, SCORES, MEANS, LINKS)
        loss = tl.where(used, weights * loss, 0.0)  # not a product: what is left out may be infinite
        d = tl.where(used, scale * weights * d, 0.0)
        if where.losses is not None:
            tl.store(where.losses + i, loss, mask=inside)
            tl.store(where.rewards + i, reward, mask=inside)
        if where.d_logp is not None:
            if TOKENS:
                pulled_back(side, span, tl.sum(d, 0), where.d_logp, 0, 1.0, 0, SPAN)
            else:
                tl.store(where.d_logp + i, d, mask=inside)
        is_good, is_bad = used & good, used & (good == 0)
        sums = add(sums, LOSS, total(loss))
        sums = add(add(sums, GOOD, total(tl.where(is_good, 1.0, 0.0))), BAD, total(tl.where(is_bad, 1.0, 0.0)))
        sums = add(sums, GOOD_REWARD, total(tl.where(is_good, reward, 0.0)))
        sums = add(sums, BAD_REWARD, total(tl.where(is_bad, reward, 0.0)))
        sums = add(sums, GOOD_LOGP, total(tl.where(is_good, x.logp, 0.0)))
        sums = add(sums, BAD_LOGP, total(tl.where(is_bad, x.logp, 0.0)))
    tl.store(where.partial + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), sums)
    tl.debug_barrier()  # the sums of every thread are there before one of them counts
    if tl.atomic_add(where.counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        finish(where, scale, tl.num_programs(0))
        tl.store(where.counter, 0)


def forward(side: Side, desirable, rest: Rest, terms: list[Term], settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/unpaired_loss.py``."""
    rows, tokens = rows_of(side), side.logp.dim() == 2 or side.cu_seqlens is not None
    block = 1 if tokens else RESPONSES_AT_A_TIME
    programs = max(1, min(-(-rows // block), PROGRAMS))
    partial = torch.empty(programs, COLUMNS.value, dtype=torch.float64, device=out.loss.device)
    asked = map(written, (out.d_first, out.losses, out.rewards[0]))
    where = Where(out.loss, out.metrics, *asked, partial, counter_of(partial))
    with torch.cuda.device_of(side.logp):
        unpaired_loss[(programs,)](
            laid(side), desirable.contiguous(), rest_of(rest), where, numbers_of(terms, SINGLES, settings), rows,
            *strides_of(side), **structure_of(terms, SINGLES), SUM=int(reduce == SUM), TOKENS=int(tokens), BLOCK=block,
            SPAN=TOKENS_AT_A_TIME, **OPTIONS,
        )  # fmt: skip


class CompileCase(NamedTuple):
    """One call whose launch ``make compile`` compiles."""

    link: str
    dtype: torch.dtype = torch.float32
    form: str = "sums"  # or "padded", "packed"
    full: bool = False

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')} {self.link} {self.form}"
        return f"{kind} all fields" if self.full else kind


COMPILE = (
    *(CompileCase(name) for name in SINGLES),
    *(
        CompileCase("kto", dtype, form, True)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for form in ("sums", "padded", "packed")
    ),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launch of a case, for a driver that compiles and does not run."""
    shape, ends = {"sums": ((3,), None), "padded": ((3, 40), None), "packed": ((90,), torch.tensor([0, 40, 80, 90]))}[
        case.form
    ]
    logp = torch.zeros(shape, dtype=case.dtype)
    mask = logp == 0 if case.full and case.form != "sums" else None
    side = Side(logp, logp, mask, ends, torch.ones(3) if case.full and case.form == "sums" else None)
    field = torch.zeros(3, dtype=case.dtype) if case.full else None
    rest = Rest(None, field, field, field, torch.ones(()) if case.full else None)
    out = allocate(logp, None, 3, len(SINGLE_METRICS), (True, False, case.full), sides=1)
    terms = [term_of(SINGLES, ""), term_of(SINGLES, case.link)]
    forward(side, torch.ones(3, dtype=torch.bool), rest, terms, Settings(), 0, out)
