"""The sums that a batch's loss and metrics are made of: what a program adds to them, and what becomes of them."""

from rlfast.kernels.formulas.elementary import exp, expm1
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.loss_rows import INFINITE, total, within
from rlfast.ops.loss_records import METRICS, SEQ_SUM_OVER_MAX_LEN

TILE = tl.constexpr(64)  # programs that the last one adds at a time
COLUMNS = tl.constexpr(32)  # of the partial sums, a power of two
TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
OVER_MAX_LEN = tl.constexpr(SEQ_SUM_OVER_MAX_LEN)
SMALLEST_WEIGHT, LARGEST_WEIGHT = tl.constexpr(1e-15), tl.constexpr(1e15)
WRITTEN = tl.constexpr(len(METRICS))

# Columns of the partial sums. Those from LARGEST on are maxima.
NAMES = ("policy", "kl_part", "entropy_part", "kept", "tokens", "sequences", "kl", "entropy", "k1", "k3", "low", "high")
NAMES += ("ratio", "weight", "weight2", "dropped", "drift")
(
    POLICY, KL_PART, ENTROPY_PART, KEPT, TOKENS, SEQUENCES, KL, ENTROPY, K1, K3, LOW, HIGH, RATIO, WEIGHTS, SQUARES,
    DROPPED, DRIFT,
) = (tl.constexpr(i) for i in range(len(NAMES)))  # fmt: skip
LARGEST, RATIO_MAX, DRIFT_MAX = tl.constexpr(24), tl.constexpr(24), tl.constexpr(25)


@jit
def add(sums, column: tl.constexpr, value):
    """The sums with a value added to one of them."""
    return tl.where(tl.arange(0, COLUMNS) == column, sums + value, sums)


@jit
def raise_(sums, column: tl.constexpr, value):
    """The sums with one of them raised to a value."""
    return tl.where(tl.arange(0, COLUMNS) == column, tl.maximum(sums, value.to(tl.float64)), sums)


@jit
def pick(sums, column: tl.constexpr):
    """One of the sums."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS) == column, sums, 0.0), 0)


@jit
def put(found, column: tl.constexpr, value):
    """A vector with one value set."""
    return tl.where(tl.arange(0, COLUMNS) == column, value, found)


@jit
def metrics_of(sums, inside, used, clipped, x, ratio, drift, applied, IN_RATIO: tl.constexpr):
    """The sums with what the metrics want of a block of tokens."""
    w = ratio
    if not IN_RATIO:
        w = ratio * applied
    w = tl.where(w < SMALLEST_WEIGHT, 0.0, tl.where(w > LARGEST_WEIGHT, LARGEST_WEIGHT, w))  # a NaN stays one
    w = tl.where(inside, w, 0.0)
    hit = tl.where(used, clipped, 0.0)
    rho = tl.where(inside, exp(within(drift, -INFINITE, 89.0)), 0.0)
    r = tl.where(inside, ratio, 0.0)
    sums = add(sums, TOKENS, total(tl.where(inside, 1.0, 0.0)))
    sums = add(sums, DROPPED, total(tl.where(inside & (used == 0), 1.0, 0.0)))
    sums = add(sums, K1, total(tl.where(inside, -x, 0.0)))
    sums = add(sums, K3, total(tl.where(inside, expm1(within(x, -INFINITE, 89.0)) - x, 0.0)))
    sums = add(sums, LOW, total(tl.where(ratio < 1.0, hit, 0.0)))
    sums = add(sums, HIGH, total(tl.where(ratio >= 1.0, hit, 0.0)))
    sums = add(sums, RATIO, total(r))
    sums = add(sums, WEIGHTS, total(w))
    sums = add(sums, SQUARES, total(w * w))
    sums = add(sums, DRIFT, total(rho))
    sums = raise_(sums, RATIO_MAX, tl.max(r, 0))
    return raise_(sums, DRIFT_MAX, tl.max(rho, 0))


@jit
def finish(
    fields, where, s, beta, entropy_coef, programs, rows, REDUCE: tl.constexpr, COUNT_EMPTY: tl.constexpr,
    ENTROPY_MEAN: tl.constexpr,
):  # fmt: skip
    """Loss and metrics from every program's sums, in ascending order."""
    lane = tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, programs, TILE):
        program = first + tl.arange(0, TILE)
        at = where.partial + program[:, None] * COLUMNS + lane[None, :]
        x = tl.load(at, mask=(program < programs)[:, None], other=0.0, cache_modifier=".cg")
        sums = tl.where(lane >= LARGEST, tl.maximum(sums, tl.max(x, 0)), sums + tl.sum(x, 0))
    tokens, sequences = pick(sums, TOKENS), pick(sums, SEQUENCES)
    if COUNT_EMPTY:
        sequences = sequences * 0.0 + rows
    n = sequences
    if REDUCE == TOKEN_MEAN:
        n = tokens
    elif REDUCE == TOKEN_SUM:
        n = tokens * 0.0 + 1.0
    if fields.num_items is not None:
        n = tl.load(fields.num_items).to(tl.float64)
    if REDUCE == OVER_MAX_LEN:
        n = n * s.max_len
    # float32: a division of doubles is a call, and spills
    scale = (s.factor / tl.where(n > 0.0, n, 1.0).to(tl.float32)).to(tl.float64)
    entropy_scale = scale
    if ENTROPY_MEAN:
        entropy_scale = (s.entropy_factor / tl.maximum(pick(sums, KEPT), 1.0).to(tl.float32)).to(tl.float64)
    policy = scale * pick(sums, POLICY)
    loss = policy + beta * (scale * pick(sums, KL_PART)) - entropy_coef * (entropy_scale * pick(sums, ENTROPY_PART))
    each = (1.0 / tl.maximum(tokens, 1.0).to(tl.float32)).to(tl.float64)
    w, squares = pick(sums, WEIGHTS), pick(sums, SQUARES)
    # in float32 neither the square of w nor that of a weight leaves the range: w / √squares is at most √tokens
    per = w.to(tl.float32) / tl.sqrt(tl.where(squares == 0.0, 1.0, squares).to(tl.float32))
    ess = tl.where(squares != 0.0, per.to(tl.float64) * per.to(tl.float64) * each, 0.0)
    found = tl.zeros([COLUMNS], tl.float64)
    found = put(put(put(found, 0, loss), 1, scale), 2, entropy_scale)
    found = put(put(put(found, 3, tokens), 4, sequences), 5, policy)
    found = put(put(found, 6, each * pick(sums, KL)), 7, each * pick(sums, ENTROPY))
    found = put(put(found, 8, each * pick(sums, K1)), 9, each * pick(sums, K3))
    found = put(put(found, 10, each * pick(sums, LOW)), 11, each * pick(sums, HIGH))
    mean = each * pick(sums, RATIO)  # a maximum may drop a NaN
    found = put(put(found, 12, mean), 13, tl.where(mean == mean, pick(sums, RATIO_MAX), mean))
    found = put(put(found, 14, ess), 15, each * pick(sums, DROPPED))
    found = put(put(found, 16, each * pick(sums, DRIFT)), 17, pick(sums, DRIFT_MAX))
    tl.store(where.metrics + lane, found.to(tl.float32), mask=lane < WRITTEN)
    tl.store(where.loss, loss.to(tl.float32))
