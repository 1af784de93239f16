"""The ``triton`` backend of policy losses: one launch for the loss, its gradient and the metrics.

A program takes whole sequences; of the few long rows of a batch where a token's part does not depend on its sequence,
it takes chunks. It walks over its tokens up to three times, the second and the third time out of the L2: the sequence's
sums (``loss_rows``); the loss, its derivative and the metrics; the pull-back of a sequence's log-ratio. Programs leave
partial sums behind, and the last one to finish adds them up in ascending order and writes loss and metrics, so that
neither the schedule nor a second launch matters. Which sequences a program takes depends on their number alone.

Fused multiply-adds are off, as in ``token_logps``: a token's gradient must have the same bits in every specialisation.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas import ESTIMATORS, SURROGATES
from rlfast.kernels.formulas.elementary import exp
from rlfast.kernels.formulas.kl import KlBounds
from rlfast.kernels.formulas.token import Token
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.loss_rows import (
    INFINITE,
    SEQ_MEAN,
    SEQ_MEAN_THROUGH,
    TOKEN,
    Row,
    bounded_ratio,
    corrected,
    load,
    no_sequence,
    raw_ratio,
    sequence_of,
    total,
    within,
)  # fmt: skip
from rlfast.kernels.loss_sums import (
    COLUMNS,
    ENTROPY,
    ENTROPY_PART,
    KEPT,
    KL,
    KL_PART,
    POLICY,
    SEQ_MEAN_TOKEN_MEAN,
    SEQUENCES,
    add,
    finish,
    metrics_of,
)  # fmt: skip
from rlfast.ops.loss_records import Fields, Output, Plan, Settings, allocate, row_wise

CHUNK = 4096  # tokens of a program where sequences do not matter
PROGRAMS = 1024  # fills 132 SMs × 7; more would only make the last program's sum longer
# Told how many registers there are, ptxas does not spill a few to fit one more program on an SM.
OPTIONS = {"num_warps": 8, "maxnreg": 128, "enable_fp_fusion": False}
BLOCK = 1024  # tokens at a time: 4 a thread, one load of 16 bytes a field


STRIDED = ("logp", "old_logp", "ref_logp", "rollout_logp", "adv", "entropy", "weights", "extra", "mask", "keep")
INTS = ("rows", "splits", "chunk", "length", "adv_step", "out_stride", *(f"stride_{name}" for name in STRIDED))


class Numbers(NamedTuple):
    """The objective's run-time floats."""

    settings: Settings
    hyper: tuple
    bounds: KlBounds


class Where(NamedTuple):
    """What a launch writes, and its scratch."""

    loss: torch.Tensor
    metrics: torch.Tensor
    dlogp: torch.Tensor | None
    dentropy: torch.Tensor | None
    partial: torch.Tensor  # float64 [programs, COLUMNS]
    counter: torch.Tensor  # int32 [1]: 0 before and after a launch
    seen: torch.Tensor | None  # int32 [rows], zeros: which rows have a token that counts, where a row is split


@jit
def kl_of(d, x, ratio, inside, in_bounds, numbers, ESTIMATOR: tl.constexpr, THROUGH: tl.constexpr, BY: tl.constexpr):
    """(KL of the tokens, its derivative by log p, and by x of the unit)."""
    value, slope = ESTIMATOR(d, numbers.bounds)
    slope = slope + tl.zeros(d.shape, tl.float32)
    if THROUGH:
        slope = -d
    by_unit = tl.zeros(d.shape, tl.float32)
    if BY == 1:
        value, slope = ratio * value, ratio * slope
        by_unit = value
    elif BY == 2:
        own = exp(within(x, -INFINITE, 89.0))
        value, slope = own * value, own * slope
        slope += tl.where(in_bounds, value, 0.0)
    elif BY == 3:
        slope += tl.where(tl.abs(value) < numbers.bounds.kl_max, value, 0.0)
    return tl.where(inside, value, 0.0), tl.where(inside, slope, 0.0), tl.where(inside, by_unit, 0.0)


@jit
def surrogate_of(
    fields, row, column, inside, applied, u, ratio, adv, seq, numbers, SURROGATE: tl.constexpr, IN_RATIO: tl.constexpr,
    OFF_POLICY: tl.constexpr,
):  # fmt: skip
    """(value, ∂/∂x, ∂/∂log p, clipped, whether it counts) of the tokens, with everything that multiplies them."""
    factor = applied
    if IN_RATIO:
        factor = tl.where(inside, 1.0, 0.0)
    if fields.weights is not None:
        factor = factor * load(fields.weights, row.weights + column, inside)
    kept = inside
    if fields.keep is not None:
        kept = kept & (tl.load(fields.keep + row.keep + column, mask=inside, other=0) != 0)
    factor = tl.where(kept, factor, 0.0)
    if OFF_POLICY:
        factor = tl.where(adv >= 0.0, factor, tl.where(seq.moved <= numbers.settings.off_policy, factor, 0.0))
    used = factor != 0.0
    logp = load(fields.logp, row.logp + column, inside)
    old = logp
    if fields.old_logp is not None:
        old = load(fields.old_logp, row.old_logp + column, inside)
    extra = load(fields.extra, row.extra + column, inside)
    value, by_x, by_logp, clipped = SURROGATE(Token(logp, old, u, ratio, adv, extra), numbers.hyper)
    nothing = tl.zeros(column.shape, tl.float32)
    value = tl.where(used, factor * value, nothing)
    by_x, by_logp = tl.where(used, factor * by_x, nothing), tl.where(used, factor * by_logp, nothing)
    return value, by_x, by_logp, clipped + nothing, used, kept


@jit
def pull_back(
    fields, where, row, seq, s, pulled, SIGNED: tl.constexpr, WEIGHT: tl.constexpr, GATE: tl.constexpr,
    KIND: tl.constexpr, MASKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds to each token of a sequence its part of the unit's derivative: one more walk."""
    tl.debug_barrier()
    for begin in range(row.start, row.end, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside, _, _ = corrected(fields, row, column, seq, s, WEIGHT, GATE, KIND, MASKS)
        adv = load(fields.adv, row.adv + column * row.adv_step, inside)
        _, in_bounds = bounded_ratio(raw_ratio(fields, row, column, inside), adv, s, SIGNED)
        at = where.dlogp + row.out + column
        g = tl.load(at, mask=inside & in_bounds, other=0.0)
        tl.store(at, g + pulled, mask=inside & in_bounds)


@jit(do_not_specialize=[*INTS])
def token_loss(
    fields, where, numbers, rows, splits, chunk, length, adv_step, out_stride, stride_logp, stride_old_logp,
    stride_ref_logp, stride_rollout_logp, stride_adv, stride_entropy, stride_weights, stride_extra, stride_mask,
    stride_keep, SURROGATE: tl.constexpr, ESTIMATOR: tl.constexpr, ROW_WISE: tl.constexpr, OFF_POLICY: tl.constexpr,
    UNIT: tl.constexpr, SIGNED: tl.constexpr, MEAN_ADV: tl.constexpr, KL_THROUGH: tl.constexpr, KL_RATIO: tl.constexpr,
    REDUCE: tl.constexpr, COUNT_EMPTY: tl.constexpr, ENTROPY_MEAN: tl.constexpr, WEIGHT: tl.constexpr,
    WEIGHT_IN_RATIO: tl.constexpr, GATE: tl.constexpr, GATE_KIND: tl.constexpr, GATE_MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything; the module's docstring says how. Grid: min(rows·splits, PROGRAMS)."""
    s = numbers.settings
    beta, entropy_coef = s.beta, s.entropy_coef
    if fields.coefs is not None:
        beta, entropy_coef = beta * tl.load(fields.coefs), entropy_coef * tl.load(fields.coefs + 1)
    sums = tl.zeros([COLUMNS], tl.float64)
    for piece in range(tl.program_id(0), rows * splits, tl.num_programs(0)):
        r = (piece // splits).to(tl.int64)
        start = (piece % splits) * chunk
        end = tl.minimum(start + chunk, length)
        row = Row(
            r * stride_logp, r * stride_old_logp, r * stride_ref_logp, r * stride_rollout_logp, r * stride_adv,
            r * stride_entropy, r * stride_weights, r * stride_extra, r * stride_mask, r * stride_keep, r * out_stride,
            adv_step, start, end,
        )  # fmt: skip
        if fields.cu_seqlens is not None:
            begin = tl.load(fields.cu_seqlens + r)
            end = (tl.load(fields.cu_seqlens + r + 1) - begin).to(tl.int32)
            row = Row(begin, begin, begin, begin, begin, begin, begin, begin, begin, begin, begin, adv_step, start, end)
        seq = no_sequence()
        if ROW_WISE:
            seq = sequence_of(fields, row, s, UNIT, SIGNED, WEIGHT, WEIGHT_IN_RATIO, GATE, GATE_KIND, GATE_MASKS, BLOCK)
        share = tl.zeros([], tl.float32) + 1.0
        if REDUCE == SEQ_MEAN_TOKEN_MEAN:
            share = 1.0 / tl.maximum(seq.count, 1.0)
        pulled, seen = tl.zeros([], tl.float64), tl.zeros([], tl.int32)
        for first in range(row.start, row.end, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside, drift, applied = corrected(fields, row, column, seq, s, WEIGHT, GATE, GATE_KIND, GATE_MASKS)
            seen = tl.maximum(seen, tl.max(inside.to(tl.int32), 0))
            adv = load(fields.adv, row.adv + column * row.adv_step, inside)
            x, in_bounds = bounded_ratio(raw_ratio(fields, row, column, inside), adv, s, SIGNED)
            unit = x
            if UNIT != TOKEN:
                unit = tl.zeros(column.shape, tl.float32) + seq.unit
            if MEAN_ADV:
                adv = tl.zeros(column.shape, tl.float32) + seq.adv
            u = within(unit, s.unit_low, s.unit_high)
            in_unit = (unit >= s.unit_low) & (unit <= s.unit_high)
            ratio = exp(within(u, -INFINITE, 89.0))
            value, by_x, by_logp, clipped, used, kept = surrogate_of(
                fields, row, column, inside, applied, u, ratio, adv, seq, numbers, SURROGATE, WEIGHT_IN_RATIO,
                OFF_POLICY,
            )  # fmt: skip
            clipped = tl.where(in_bounds, clipped, 1.0)
            c = tl.where(inside, share, 0.0)
            if ESTIMATOR is not None:
                d = load(fields.ref_logp, row.ref_logp + column, inside) - load(fields.logp, row.logp + column, inside)
                k, by_d, by_unit = kl_of(d, x, ratio, inside, in_bounds, numbers, ESTIMATOR, KL_THROUGH, KL_RATIO)
                by_x, by_logp = by_x + beta * by_unit, by_logp + beta * by_d
                sums = add(add(sums, KL, total(k)), KL_PART, total(c * k))
            by_x = tl.where(in_unit, c * by_x, 0.0)
            g = c * by_logp
            if UNIT == TOKEN:
                g += tl.where(in_bounds, by_x, 0.0)
            elif UNIT == SEQ_MEAN_THROUGH:
                g += by_x
            else:
                pulled += total(by_x)
            if where.dlogp is not None:
                tl.store(where.dlogp + row.out + column, g, mask=column < row.end)
            bonus = c
            if ENTROPY_MEAN:
                bonus = tl.where(kept, 1.0, 0.0)
                sums = add(sums, KEPT, total(bonus))
            if fields.entropy is not None:
                h = load(fields.entropy, row.entropy + column, inside)
                sums = add(add(sums, ENTROPY, total(h)), ENTROPY_PART, total(bonus * h))
            if where.dentropy is not None:
                tl.store(where.dentropy + row.out + column, -entropy_coef * bonus, mask=column < row.end)
            value = tl.where(used & (ratio != ratio), ratio, value)  # a formula's minimum and maximum may drop a NaN
            sums = add(sums, POLICY, total(c * value))
            sums = metrics_of(sums, inside, used, clipped, x, ratio, drift, applied, WEIGHT_IN_RATIO)
        if where.seen is not None:  # whoever is first counts the row: their sum does not depend on who that is
            seen = tl.where(tl.atomic_max(where.seen + r, seen) == 0, seen, 0)
        sums = add(sums, SEQUENCES, seen.to(tl.float64))
        if UNIT != TOKEN and UNIT != SEQ_MEAN_THROUGH and where.dlogp is not None:
            part = pulled.to(tl.float32)
            if UNIT == SEQ_MEAN:
                part = part / tl.maximum(seq.count, 1.0)
            pull_back(fields, where, row, seq, s, part, SIGNED, WEIGHT, GATE, GATE_KIND, GATE_MASKS, BLOCK)
    tl.store(where.partial + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), sums)
    tl.debug_barrier()  # the sums of every thread are there before one of them counts
    if tl.atomic_add(where.counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        counted = rows
        finish(fields, where, s, beta, entropy_coef, tl.num_programs(0), counted, REDUCE, COUNT_EMPTY, ENTROPY_MEAN)
        tl.store(where.counter, 0)


_COUNTERS: dict[tuple, torch.Tensor] = {}  # per device and stream: a launch leaves its counter at 0 for the next


def counter_of(x: torch.Tensor) -> torch.Tensor:
    """What the programs of a launch count themselves with; a captured graph, which any stream may run, has its own."""
    if x.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=x.device)
    key = (x.device.index, torch.cuda.current_stream(x.device).cuda_stream)
    if key not in _COUNTERS:
        _COUNTERS[key] = torch.zeros(1, dtype=torch.int32, device=x.device)
    return _COUNTERS[key]


class Pieces(NamedTuple):
    """How a batch is cut: ``rows`` in ``splits`` of ``chunk`` tokens each."""

    rows: int
    splits: int
    chunk: int
    length: int


def pieces_of(fields: Fields, whole: bool) -> Pieces:
    """Whole sequences where they matter, are packed, are short or fill the GPU; else chunks of the few long rows."""
    packed, length = fields.cu_seqlens is not None, fields.logp.shape[-1]
    rows = fields.cu_seqlens.shape[0] - 1 if packed else fields.logp.shape[0] if fields.logp.dim() == 2 else 1
    if whole or packed or length <= CHUNK or rows >= PROGRAMS // 2:
        return Pieces(rows, 1, max(length, 1), length)
    return Pieces(rows, -(-length // CHUNK), CHUNK, length)


def where_of(out: Output, needs, programs: int, pieces: Pieces) -> Where:
    """What a launch writes: only the gradients that are needed."""
    gradients = (x if need else None for x, need in zip(out[2:], needs, strict=True))
    partial = torch.empty(programs, COLUMNS.value, dtype=torch.float64, device=out.loss.device)
    seen = torch.zeros(pieces.rows, dtype=torch.int32, device=out.loss.device) if pieces.splits > 1 else None
    return Where(out.loss, out.metrics, *gradients, partial, counter_of(partial), seen)


def forward(fields: Fields, surrogate: str, estimator: str, plan, settings, hyper, kl_hyper, needs) -> Output:
    """See ``rlfast/ops/token_loss.py``."""
    plan, settings = Plan(*plan), Settings(*settings)
    out, by_row = allocate(fields, needs), row_wise(plan, settings)
    pieces = pieces_of(fields, by_row)
    programs = max(1, min(pieces.rows * pieces.splits, PROGRAMS))
    formula = SURROGATES[surrogate]
    numbers = Numbers(settings, formula.hyper(*hyper), KlBounds(*kl_hyper))
    strides = [0 if x is None or x.dim() == 1 else x.stride(0) for x in (getattr(fields, name) for name in STRIDED)]
    out_stride = fields.logp.shape[-1] if fields.logp.dim() == 2 else 0
    with torch.cuda.device_of(fields.logp):
        token_loss[(programs,)](
            fields, where_of(out, needs, programs, pieces), numbers, *pieces, int(fields.adv.stride(-1) != 0),
            out_stride, *strides, SURROGATE=formula.function,
            ESTIMATOR=ESTIMATORS[estimator] if estimator else None, ROW_WISE=by_row,
            OFF_POLICY=settings.off_policy < float("inf"), BLOCK=BLOCK,
            **{name.upper(): value for name, value in plan._asdict().items()}, **OPTIONS,
        )  # fmt: skip
    return out


class CompileCase(NamedTuple):
    """One call whose launch ``make compile`` compiles."""

    surrogate: str
    estimator: str
    plan: Plan
    dtype: torch.dtype
    full: bool  # every field, packed; else what a loss without a KL and a correction needs

    def __str__(self) -> str:
        kind = f"{str(self.dtype).removeprefix('torch.')} {self.surrogate} {self.estimator}".strip()
        plan = " ".join(f"{name}={value}" for name, value in self.plan._asdict().items() if value)
        return f"{kind} {plan}{' all fields' if self.full else ''}".replace("  ", " ")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIMPLE = Plan(reduce=SEQ_MEAN_TOKEN_MEAN.value)
BY_SEQUENCE = Plan(unit=1, reduce=SEQ_MEAN_TOKEN_MEAN.value, weight=1, gate=2, gate_kind=3, gate_masks=1)
EVERYTHING = Plan(2, 1, 1, 1, 1, 4, 1, 1, 3, 1, 1, 2, 1)
COMPILE = (
    *(CompileCase(name, "k3", SIMPLE, torch.float32, True) for name in SURROGATES),
    *(CompileCase("ppo_clip", name, Plan(kl_ratio=2), torch.bfloat16, False) for name in ESTIMATORS),
    *(CompileCase("ppo_clip", "", Plan(unit=unit), torch.float32, False) for unit in range(4)),
    *(CompileCase("ppo_clip", "k3", plan, dtype, True) for plan in (BY_SEQUENCE, EVERYTHING) for dtype in DTYPES),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launch of a case, for a driver that compiles and does not run."""
    tokens, ends = torch.zeros(3, 40, dtype=case.dtype), torch.tensor([0, 40, 80, 120])
    field, flag = (tokens.view(-1), tokens.view(-1) == 0) if case.full else (tokens, None)
    rest = (field,) * 3 if case.full else (None,) * 3
    ref = field if case.full or case.estimator else None
    fields = Fields(
        field, field, ref, rest[0], field, *rest, flag, flag, ends if case.full else None,
        torch.zeros(()) if case.full else None, torch.zeros(2) if case.full else None,
    )  # fmt: skip
    hyper = SURROGATES[case.surrogate].hyper()
    settings = Settings(off_policy=0.5 if case.full else float("inf"))
    forward(fields, case.surrogate, case.estimator, case.plan, settings, hyper, KlBounds(), (True, case.full))
