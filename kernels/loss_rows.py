"""What ``token_loss`` reads of a sequence, and the first walk over one: the sums that its tokens' parts depend on."""

from typing import NamedTuple

from rlfast.kernels.formulas.elementary import exp, expm1
from rlfast.kernels.lang import jit, tl

TOKEN, SEQ_MEAN, SEQ_SUM, SEQ_MEAN_THROUGH = (tl.constexpr(i) for i in range(4))  # as in ops/loss_records.py
NO_LEVEL, AT_TOKEN, AT_SEQ_SUM, AT_SEQ_MEAN = (tl.constexpr(i) for i in range(4))
INFINITE = tl.constexpr(float("inf"))
LOG_LEAST, LOG_MOST = tl.constexpr(-18.420680743952367), tl.constexpr(20.0)


class Row(NamedTuple):
    """Where the first token of a sequence is in each field, and which of its tokens a program takes."""

    logp: int
    old_logp: int
    ref_logp: int
    rollout_logp: int
    adv: int
    entropy: int
    weights: int
    extra: int
    mask: int
    keep: int
    out: int
    adv_step: int  # 0 where a sequence has one advantage, else 1
    start: int
    end: int


class Sequence(NamedTuple):
    """What the first walk finds: scalars."""

    count: object  # Σ m
    weight: object  # ρ of its level
    opened: object  # 1 where its gate is open
    unit: object  # x of the unit, before its bounds
    moved: object  # mean of log π_rollout − log π
    adv: object  # mean of the advantages


@jit
def load(ptr, at, inside):
    """A field's tokens as float32; 0 where it is not there, or outside of the mask: what is masked is never read."""
    x = tl.zeros(at.shape, tl.float32)
    if ptr is not None:
        x = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
    return x


@jit
def within(x, low, high):
    """x between two bounds; a NaN stays one."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@jit
def total(x):
    """Σ in double: the sums of a batch must not drift from those of its halves."""
    return tl.sum(x.to(tl.float64), 0)


@jit
def mask_of(fields, row, column):
    """The tokens that count."""
    inside = column < row.end
    if fields.mask is not None:
        inside = inside & (tl.load(fields.mask + row.mask + column, mask=inside, other=0) != 0)
    return inside


@jit
def drift_of(fields, row, column, inside):
    """log ρ = log π_old − log π_rollout of the tokens; a NaN counts as 0."""
    x = tl.zeros(column.shape, tl.float32)
    if fields.rollout_logp is not None:
        old = load(fields.logp, row.logp + column, inside)
        if fields.old_logp is not None:
            old = load(fields.old_logp, row.old_logp + column, inside)
        x = old - load(fields.rollout_logp, row.rollout_logp + column, inside)
        x = tl.where(x == x, x, 0.0)
    return x


@jit
def estimate(drift, KIND: tl.constexpr):
    """What a gate looks at: k1, k2 or k3 of log ρ."""
    if KIND == 1:
        return drift
    elif KIND == 2:
        return 0.5 * drift * drift
    else:
        return expm1(drift) - drift


@jit
def open_at(x, s):
    """Whether a gate is open."""
    return (x >= s.gate_low) & (x <= s.gate_high)


@jit
def bounded_ratio(raw, adv, s, SIGNED: tl.constexpr):
    """(x of the token within its bounds, whether it is inside)."""
    low, high = s.inner_low, s.inner_high
    if SIGNED:
        low, high = tl.where(adv > 0.0, -INFINITE, low), tl.where(adv < 0.0, INFINITE, high)
    return within(raw, low, high), (raw >= low) & (raw <= high)


@jit
def raw_ratio(fields, row, column, inside):
    """log π − log π_old of the tokens."""
    x = tl.zeros(column.shape, tl.float32)
    if fields.old_logp is not None:
        x = load(fields.logp, row.logp + column, inside) - load(fields.old_logp, row.old_logp + column, inside)
    return x


@jit
def moved_of(fields, row, column, inside):
    """log π_rollout, or else log π_old, − log π; a NaN counts as 0."""
    x = tl.zeros(column.shape, tl.float32)
    logp = load(fields.logp, row.logp + column, inside)
    if fields.rollout_logp is not None:
        x = load(fields.rollout_logp, row.rollout_logp + column, inside) - logp
    elif fields.old_logp is not None:
        x = load(fields.old_logp, row.old_logp + column, inside) - logp
    return tl.where(x == x, x, 0.0)


@jit
def weight_at_token(drift, s):
    """ρ within its bounds, from its logarithm."""
    return within(exp(within(drift, -INFINITE, 89.0)), s.weight_low, s.weight_high)


@jit
def sequence_of(
    fields, row, s, UNIT: tl.constexpr, SIGNED: tl.constexpr, WEIGHT: tl.constexpr,
    IN_RATIO: tl.constexpr, GATE: tl.constexpr, KIND: tl.constexpr, MASKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a sequence: one walk over its tokens."""
    zero = tl.zeros([], tl.float64)
    counted, count, ratio, drifted, seen, moved, adv, log_weight = zero, zero, zero, zero, zero, zero, zero, zero
    for begin in range(row.start, row.end, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = mask_of(fields, row, column)
        drift = drift_of(fields, row, column, inside)
        counted += total(tl.where(inside, 1.0, 0.0))
        drifted += total(drift)
        kept = inside
        opened = tl.full(column.shape, 1, tl.int1)
        if GATE == AT_TOKEN:
            opened = open_at(estimate(drift, KIND), s)
            if MASKS:
                kept = inside & opened
        else:
            seen += total(tl.where(inside, estimate(drift, KIND), 0.0))
        a = load(fields.adv, row.adv + column * row.adv_step, inside)
        x, _ = bounded_ratio(raw_ratio(fields, row, column, inside), a, s, SIGNED)
        count += total(tl.where(kept, 1.0, 0.0))
        ratio += total(tl.where(kept, x, 0.0))
        adv += total(tl.where(kept, a, 0.0))
        moved += total(tl.where(kept, moved_of(fields, row, column, inside), 0.0))
        if IN_RATIO:
            log_w = tl.zeros(column.shape, tl.float32)
            if WEIGHT == AT_TOKEN:
                log_w = tl.minimum(tl.maximum(tl.log(weight_at_token(drift, s)), LOG_LEAST), LOG_MOST)
            log_weight += total(tl.where(kept, tl.where(opened, log_w, LOG_LEAST), 0.0))
    n = tl.maximum(counted, 1.0).to(tl.float32)  # float32 from here: a division of doubles is a call, and spills
    weight, gate = tl.zeros([], tl.float32) + 1.0, tl.zeros([], tl.float32) + 1.0
    if WEIGHT >= AT_SEQ_SUM:
        log_rho = drifted.to(tl.float32)
        if WEIGHT == AT_SEQ_MEAN:
            log_rho = log_rho / n
        weight = weight_at_token(log_rho, s)
    if GATE >= AT_SEQ_SUM:
        level = seen.to(tl.float32)
        if GATE == AT_SEQ_MEAN:
            level = level / n
        gate = tl.where(open_at(level, s), 1.0, 0.0)
        if MASKS:
            closed = gate == 0.0
            count, ratio = tl.where(closed, 0.0, count), tl.where(closed, 0.0, ratio)
            adv, moved, log_weight = tl.where(closed, 0.0, adv), tl.where(closed, 0.0, moved), log_weight * gate
    m = tl.maximum(count, 1.0).to(tl.float32)
    if IN_RATIO:
        if WEIGHT >= AT_SEQ_SUM:
            # not the logarithm of ρ: its rounding would count once a token
            applied = within(within(log_rho, tl.log(s.weight_low), tl.log(s.weight_high)), LOG_LEAST, LOG_MOST)
            log_weight = tl.where(gate > 0.0, applied, LOG_LEAST).to(tl.float64) * count
        elif GATE >= AT_SEQ_SUM:
            log_weight = tl.where(gate > 0.0, log_weight, LOG_LEAST * count)
        ratio += log_weight
    unit = ratio.to(tl.float32)
    if UNIT != SEQ_SUM:
        unit = unit / m
    return Sequence(count.to(tl.float32), weight, gate, unit, moved.to(tl.float32) / m, adv.to(tl.float32) / m)


@jit
def no_sequence():
    """Where a token's part does not depend on its sequence."""
    zero = tl.zeros([], tl.float32)
    return Sequence(zero, zero + 1.0, zero + 1.0, zero, zero, zero)


@jit
def corrected(
    fields, row, column, seq, s, WEIGHT: tl.constexpr, GATE: tl.constexpr, KIND: tl.constexpr, MASKS: tl.constexpr
):
    """(the tokens that count, log ρ, ρ as it is applied)."""
    inside = mask_of(fields, row, column)
    drift = drift_of(fields, row, column, inside)
    weight = tl.zeros(column.shape, tl.float32) + seq.weight
    if WEIGHT == AT_TOKEN:
        weight = weight_at_token(drift, s)
    opened = (tl.zeros(column.shape, tl.float32) + seq.opened) > 0.0
    if GATE == AT_TOKEN:
        opened = open_at(estimate(drift, KIND), s)
    if MASKS:
        inside = inside & opened
    return inside, drift, tl.where(opened, weight, 0.0)
