"""The ``triton`` backend of losses of ranked groups: one launch for the loss, its gradient and the metrics.

A program takes blocks of groups, as many as fill a tile of [groups, candidates, candidates], whose pairs say who is
ahead of whom: nothing is sorted. Programs leave partial sums behind, and the last one adds them up in ascending order.
Which groups a program takes depends on their number and size alone. Fused multiply-adds are off, as in ``token_loss``.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas import RANKINGS
from rlfast.kernels.formulas.ranked import Group, Ranking
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.loss_rows import load, total
from rlfast.kernels.loss_sums import COLUMNS, TILE, add, pick, put
from rlfast.kernels.preferences import PROGRAMS, scale_of, written
from rlfast.kernels.token_loss import counter_of
from rlfast.ops.preference_records import SUM as SUMMED
from rlfast.ops.ranked_records import METRICS, Groups, Output, Settings, allocate, most_of, rows_of

MOST = 64  # candidates of a group: a tile of 64² takes 8 warps; one of 128² spills, whatever it takes
PAIRS_AT_A_TIME = 1024
LOSS, GROUPS, CANDIDATES, PAIRS, RIGHT, REWARD, SCORE = (tl.constexpr(i) for i in range(7))
WRITTEN = tl.constexpr(len(METRICS))
# left alone, ptxas spills some bytes to fit one more program on a multiprocessor
OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}


class Where(NamedTuple):
    """What a launch writes, and its scratch."""

    loss: torch.Tensor
    metrics: torch.Tensor
    d_scores: torch.Tensor | None
    losses: torch.Tensor | None
    partial: torch.Tensor  # float64 [programs, COLUMNS]
    counter: torch.Tensor  # int32 [1]: 0 before and after a launch


class Tile(NamedTuple):
    """Some groups as they lie in memory, and what the formulas do not see of them."""

    at: object  # [G, K]: offsets
    inside: object  # [G, K]: there is a candidate
    score: object  # [G, K]
    slope: object  # [G, K]: ∂x/∂s
    size: object  # [G]: candidates that are there


@jit
def finish(where, scale, programs):
    """Loss and metrics from every program's sums, in ascending order."""
    lane = tl.arange(0, COLUMNS)
    sums = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, programs, TILE):
        program = first + tl.arange(0, TILE)
        at = where.partial + program[:, None] * COLUMNS + lane[None, :]
        sums += tl.sum(tl.load(at, mask=(program < programs)[:, None], other=0.0, cache_modifier=".cg"), 0)
    groups, loss = pick(sums, GROUPS), pick(sums, LOSS) * scale.to(tl.float64)
    # a division of doubles is a call, and spills
    each = (1.0 / tl.maximum(groups, 1.0).to(tl.float32)).to(tl.float64)
    accuracy = tl.div_rn(pick(sums, RIGHT).to(tl.float32), tl.maximum(pick(sums, PAIRS), 1.0).to(tl.float32))
    found = put(put(tl.zeros([COLUMNS], tl.float64), 0, loss), 1, groups)
    found = put(put(found, 2, pick(sums, CANDIDATES)), 3, accuracy.to(tl.float64))
    found = put(put(found, 4, each * pick(sums, REWARD)), 5, each * pick(sums, SCORE))
    tl.store(where.metrics + lane, found.to(tl.float32), mask=lane < WRITTEN)
    tl.store(where.loss, loss.to(tl.float32))


@jit
def opened(groups, group, rows, size, beta, K: tl.constexpr):
    """(tile, group) of some groups: x = beta·(s − s_ref)/divisor, and who is ahead of whom."""
    slot, there = tl.arange(0, K), group < rows
    begin, n = group * size, tl.zeros(group.shape, tl.int64) + size
    if groups.cu_seqlens is not None:
        begin = tl.load(groups.cu_seqlens + group, mask=there, other=0)
        n = tl.load(groups.cu_seqlens + group + 1, mask=there, other=0) - begin
    at = begin[:, None] + slot[None, :]
    inside = there[:, None] & (slot[None, :] < n[:, None])
    valid = inside
    if groups.mask is not None:
        valid = inside & (tl.load(groups.mask + at, mask=inside, other=0) != 0)
    score, divisor = load(groups.scores, at, valid), tl.zeros(at.shape, tl.float32) + 1.0
    if groups.divisor is not None:
        divisor = tl.load(groups.divisor + at, mask=valid, other=1.0)
    x = tl.div_rn(beta * (score - load(groups.ref_scores, at, valid)), divisor)
    reward = tl.where(valid, tl.zeros(at.shape, tl.float32) - slot[None, :].to(tl.float32), 0.0)
    if groups.rewards is not None:
        reward = load(groups.rewards, at, valid)
    i, j = reward[:, :, None], reward[:, None, :]
    ahead = (i > j) | ((i == j) & (slot[None, :, None] < slot[None, None, :]))
    ahead = ahead & valid[:, :, None] & valid[:, None, :]
    place, count = tl.sum(tl.where(ahead, 1.0, 0.0), 1), tl.sum(tl.where(valid, 1.0, 0.0), 1)
    slope = tl.div_rn(tl.zeros(at.shape, tl.float32) + beta, divisor)
    return Tile(at, inside, score, slope, n), Group(x, reward, valid, ahead, place, count)


@jit
def measured(sums, used, loss, g, groups):
    """The sums with what the metrics want of some groups."""
    better = g.ahead & (g.reward[:, :, None] > g.reward[:, None, :])
    right = better & (g.x[:, :, None] > g.x[:, None, :])
    best = g.valid & (g.place == 0.0)
    pairs = tl.sum(tl.sum(tl.where(better, 1.0, 0.0), 2), 1)
    sums = add(add(sums, LOSS, total(loss)), GROUPS, total(tl.where(used, 1.0, 0.0)))
    sums = add(add(sums, CANDIDATES, total(tl.where(used, g.count, 0.0))), PAIRS, total(tl.where(used, pairs, 0.0)))
    ordered = tl.sum(tl.sum(tl.where(right, 1.0, 0.0), 2), 1)
    score = tl.sum(tl.where(best, g.x, 0.0), 1)
    sums = add(add(sums, RIGHT, total(tl.where(used, ordered, 0.0))), SCORE, total(tl.where(used, score, 0.0)))
    if groups.rewards is not None:
        reward = tl.sum(tl.where(best, g.reward, 0.0), 1)
        sums = add(sums, REWARD, total(tl.where(used, reward, 0.0)))
    return sums


@jit(do_not_specialize=["rows", "size"])
def ranked_loss(
    groups, where, s, rows, size, FORM: tl.constexpr, SUM: tl.constexpr, NLL: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Everything; the module's docstring says how. Grid: min(blocks of groups, PROGRAMS)."""
    scale = scale_of(groups, s.factor, rows, SUM)
    sums = tl.zeros([COLUMNS], tl.float64)
    for first in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        group = first + tl.arange(0, BLOCK).to(tl.int64)
        weights = tl.zeros(group.shape, tl.float32) + 1.0
        if groups.weights is not None:
            weights = load(groups.weights, group, group < rows)
        tile, g = opened(groups, group, rows, size, s.beta, K)
        value, d = FORM(g, Ranking(s.tau, s.top))
        d = tile.slope * d
        if NLL:
            weight = s.nll + s.nll_by_size * (s.nll * ((g.count - 1.0) * (g.count - 1.0)) - s.nll)
            best = g.valid & (g.place == 0.0)
            value -= weight * tl.sum(tl.where(best, tile.score, 0.0), 1)
            d = tl.where(best, d - weight[:, None], d)
        # a comparison may drop a NaN; a group that the tile cannot hold has none but that
        bad = tl.sum(tl.where(g.x != g.x, g.x, 0.0) + tl.where(g.reward != g.reward, g.reward, 0.0), 1)
        bad = tl.where(tile.size > K, float("nan"), bad)
        used = (group < rows) & (weights != 0.0) & (g.count > 1.0)
        loss = tl.where(used, weights * (value + bad), 0.0)  # not a product: what is left out may be infinite
        if where.losses is not None:
            tl.store(where.losses + group, loss, mask=group < rows)
        if where.d_scores is not None:
            d = (scale * weights)[:, None] * (d + bad[:, None])
            tl.store(where.d_scores + tile.at, tl.where(used[:, None] & g.valid, d, 0.0), mask=tile.inside)
        sums = measured(sums, used, loss, g, groups)
    tl.store(where.partial + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), sums)
    tl.debug_barrier()  # the sums of every thread are there before one of them counts
    if tl.atomic_add(where.counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        finish(where, scale, tl.num_programs(0))
        tl.store(where.counter, 0)


def why_not(most: int) -> str | None:
    """Why groups of this size do not run here; None if they do."""
    return f"scores: expected at most {MOST} candidates a group, got {most}" if most > MOST else None


def tile_of(most: int) -> tuple[int, int, int]:
    """(candidates, groups, warps) of a tile."""
    k = 1 << max(most - 1, 1).bit_length()
    return k, max(1, PAIRS_AT_A_TIME // (k * k)), max(4, k * k // 512)


def forward(groups: Groups, form: str, settings: Settings, reduce: int, most: int, out: Output) -> None:
    """See ``rlfast/ops/ranked_loss.py``."""
    rows, most = rows_of(groups), most_of(groups, most, MOST)
    if most > MOST:
        raise ValueError(why_not(most))
    k, block, warps = tile_of(most)
    programs = max(1, min(-(-rows // block), PROGRAMS))
    partial = torch.empty(programs, COLUMNS.value, dtype=torch.float64, device=out.loss.device)
    asked = written(out.d_scores), written(out.losses)
    where = Where(out.loss, out.metrics, *asked, partial, counter_of(partial))
    laid = Groups(*(x if x is None else x.contiguous() for x in groups))
    with torch.cuda.device_of(out.loss):
        ranked_loss[(programs,)](
            laid, where, settings, rows, groups.scores.shape[-1], FORM=RANKINGS[form].function,
            SUM=int(reduce == SUMMED), NLL=int(settings.nll != 0), K=k, BLOCK=block, num_warps=warps,
            **OPTIONS,
        )  # fmt: skip


class CompileCase(NamedTuple):
    """One call whose launch ``make compile`` compiles."""

    form: str
    most: int = 8
    dtype: torch.dtype = torch.float32
    packed: bool = False
    full: bool = False  # every field, and the likelihood

    def __str__(self) -> str:
        words = str(self.dtype).removeprefix("torch."), "ranked", self.form, f"K={self.most}"
        return " ".join((*words, *(["packed"] if self.packed else []), *(["all fields"] if self.full else [])))


COMPILE = (
    *(CompileCase(form, most, full=True) for form in RANKINGS for most in (4, 64)),
    *(
        CompileCase("plackett_luce", 8, dtype, packed, full)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for packed in (False, True)
        for full in (False, True)
    ),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launch of a case, for a driver that compiles and does not run."""
    scores = torch.zeros(3 * case.most if case.packed else (3, case.most), dtype=case.dtype)
    ends = torch.arange(4) * case.most if case.packed else None
    full = scores if case.full else None
    divisor, one = (torch.ones_like(scores, dtype=torch.float32), torch.ones(())) if case.full else (None, None)
    mask, weights = (scores == 0, torch.zeros(3, dtype=case.dtype)) if case.full else (None, None)
    groups = Groups(scores, full, full, divisor, mask, ends, weights, one)
    settings = Settings(0.1, 1.0, float("inf"), 1.0 if case.full else 0.0, 1.0, 1.0)
    forward(groups, case.form, settings, 0, case.most, allocate(groups, (True, case.full)))
