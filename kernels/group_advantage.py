"""The ``triton`` backend of group advantages: a program a group, its samples a block at a time, in float64.

Where groups are told by ids, samples are sorted by them first, and the program of a group's first sample does its work.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.lang import jit, tl
from rlfast.ops import group_records
from rlfast.ops.group_records import Inputs, Options, allocate
from rlfast.reductions import total

BLOCK = 64  # samples of a step: the usual group in one
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
MEAN, LEAVE_ONE_OUT, WEIGHTED, SOFT, SECOND = (tl.constexpr(i) for i in range(5))  # as in ops/group_records.py
UNSCALED, STD, OTHERS_STD = (tl.constexpr(i) for i in range(3))


class Samples(NamedTuple):
    """The tensors of a call; None: not given."""

    rewards: torch.Tensor  # [N]
    mask: torch.Tensor | None  # uint8 [N]
    weights: torch.Tensor | None  # float64 [N]
    order: torch.Tensor | None  # int64 [N]: samples by group
    begin: torch.Tensor | None  # int64 [N]: where in the order the group of a place begins, and ends
    end: torch.Tensor | None


class Kind(NamedTuple):
    """What is compiled for."""

    baseline: int
    scale: int
    bessel: bool
    lone_raw: bool
    skip_zero: bool


@jit
def members(x, base, end, BLOCK: tl.constexpr):
    """(samples, which are there, which are valid, their rewards in float64) of the next places of a group."""
    place = base + tl.arange(0, BLOCK)
    inside = place < end
    sample = place
    if x.order is not None:
        sample = tl.load(x.order + place, mask=inside, other=0)
    valid = inside
    if x.mask is not None:
        valid = inside & (tl.load(x.mask + sample, mask=inside, other=0) != 0)
    return sample, inside, valid, tl.load(x.rewards + sample, mask=valid, other=0.0).to(tl.float64)


@jit
def deviation(squares, degrees):
    """√(squares/degrees), 0 where there are no degrees of freedom."""
    return tl.where(degrees > 0, tl.sqrt(tl.maximum(squares, 0.0) / tl.maximum(degrees, 1.0)), 0.0)


@jit
def divided(x, std, eps, KIND: tl.constexpr):
    """x over the deviation."""
    by = std + eps
    if KIND.skip_zero:
        by = tl.where(std == 0.0, 1.0, by)
    return x / by


@jit(do_not_specialize=["size", "eps", "tau"])
def advantages_of_groups(x, out, statistics, size, eps, tau, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """A_i = (r_i − b) / (s + eps) of one group; grid: groups, or with an order samples."""
    place = tl.program_id(0).to(tl.int64)
    eps, tau = tl.cast(eps, tl.float64), tl.cast(tau, tl.float64)
    begin, end = place * size, (place + 1) * size
    if x.begin is not None:
        begin, end = tl.load(x.begin + place), tl.load(x.end + place)
        end = tl.where(begin == place, end, begin)  # not the first of its group: nothing to do
    nothing = tl.zeros([], tl.float64)
    n, sum, weight, weighted = nothing, nothing, nothing, nothing
    low, high = nothing + float("inf"), nothing - float("inf")
    for base in range(begin, end, BLOCK):
        sample, inside, valid, r = members(x, base, end, BLOCK)
        n += tl.sum(valid.to(tl.float64), axis=0)
        sum += tl.sum(r, axis=0)
        low = tl.minimum(low, tl.min(tl.where(valid, r, float("inf")), axis=0))
        high = tl.maximum(high, tl.max(tl.where(valid, r, float("-inf")), axis=0))
        if KIND.baseline == WEIGHTED:
            w = tl.load(x.weights + sample, mask=valid, other=0.0)
            weight += tl.sum(w, axis=0)
            weighted += tl.sum(w * r, axis=0)
    mean = sum / tl.maximum(n, 1.0)
    squares, soft, lows, highs = nothing, nothing, nothing, nothing
    best, second = end, nothing - float("inf")
    for base in range(begin, end, BLOCK):
        sample, inside, valid, r = members(x, base, end, BLOCK)
        squares += tl.sum(tl.where(valid, (r - mean) * (r - mean), 0.0), axis=0)
        lows += tl.sum((valid & (r == low)).to(tl.float64), axis=0)
        highs += tl.sum((valid & (r == high)).to(tl.float64), axis=0)
        if KIND.baseline == SOFT:
            soft += tl.sum(tl.where(valid, tl.exp((r - high) / tau), 0.0), axis=0)
        if KIND.baseline == SECOND:
            at = base + tl.arange(0, BLOCK)
            best = tl.minimum(best, tl.min(tl.where(valid & (r == high), at, end), axis=0))
            second = tl.maximum(second, tl.max(tl.where(valid & (r < high), r, float("-inf")), axis=0))
    std = deviation(squares, n - KIND.bessel)
    baseline = mean
    if KIND.baseline == WEIGHTED:
        baseline = weighted / weight
    if KIND.baseline == SOFT:
        baseline = high + tau * tl.log(soft / n)
    if KIND.baseline == SECOND:
        baseline = tl.where(highs > 1, high, second)
    for base in range(begin, end, BLOCK):
        sample, inside, valid, r = members(x, base, end, BLOCK)
        b = baseline
        if KIND.baseline == LEAVE_ONE_OUT:
            b = (n * mean - r) / tl.maximum(n - 1.0, 1.0)
        a = r - b
        if KIND.scale == STD:
            a = divided(a, std, eps, KIND)
        if KIND.scale == OTHERS_STD:
            left = squares - (r - mean) * (r - mean) * n / tl.maximum(n - 1.0, 1.0)
            # of equal others 0, not what rounding leaves of it
            rest = n - tl.where(r == high, highs, lows)  # those at the other end, if there is nothing between
            odd = tl.where(r == high, highs, lows) == 1.0
            all_at_one = tl.where(r == high, lows, tl.where(r == low, highs, -1.0)) == rest
            equal = tl.where(low == high, 1, (odd & all_at_one).to(tl.int32)) != 0
            a = divided(a, deviation(tl.where(equal, 0.0, left), n - 1.0 - KIND.bessel), eps, KIND)
        if KIND.baseline == SECOND:
            a = tl.where(base + tl.arange(0, BLOCK) == best, a, 0.0)
        alone = tl.zeros([BLOCK], tl.float64)
        if KIND.lone_raw:
            alone = r / (1.0 + (0.0 if KIND.scale == UNSCALED else eps))
        a = tl.where(n == 1, alone, a)
        tl.store(out + sample, tl.where(valid, a, 0.0).to(tl.float32), mask=inside)
    here = n > 0
    tl.store(statistics + place * 4, here.to(tl.float64))
    tl.store(statistics + place * 4 + 1, (here & (low == high)).to(tl.float64))
    tl.store(statistics + place * 4 + 2, tl.where(here, mean, 0.0))
    tl.store(statistics + place * 4 + 3, tl.where(here, std, 0.0))


def forward(x: Inputs, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``rlfast/ops/group_advantage.py``."""
    out, statistics = allocate(x)
    n = x.rewards.shape[0]
    if n == 0:
        return out, statistics.zero_()
    order = begin = end = None
    if x.ids is not None:
        ids, order = torch.sort(x.ids, stable=True)
        begin, end = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)
    groups = n // o.group_size if x.ids is None else n
    by_group = torch.empty((groups, 4), dtype=torch.float64, device=out.device)
    mask = None if x.mask is None else x.mask.view(torch.uint8)
    kind = Kind(o.baseline, o.scale, o.bessel, o.lone_raw, o.skip_zero)
    with torch.cuda.device_of(out):
        advantages_of_groups[(groups,)](
            Samples(x.rewards, mask, x.weights, order, begin, end), out, by_group, o.group_size, o.eps, o.tau,
            KIND=kind, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
    statistics.copy_(torch.stack([total(by_group[:, i]) for i in range(4)]))
    return out, statistics


class CompileCase(NamedTuple):
    """One call whose launch ``make compile`` compiles."""

    baseline: int
    scale: int
    dtype: torch.dtype
    ids: bool

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} baseline {self.baseline} scale {self.scale} all outputs"


COMPILE = (
    *(CompileCase(b, s, torch.float32, True) for b in range(5) for s in range(3)),
    *(CompileCase(group_records.MEAN, group_records.STD, dtype, False) for dtype in (torch.bfloat16, torch.float16)),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launch of a case, for a driver that compiles and does not run."""
    ids, mask = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool)
    weights = torch.ones(8, dtype=torch.float64)
    x = Inputs(torch.zeros(8, dtype=case.dtype), ids if case.ids else None, mask, weights)
    forward(x, Options(8 if not case.ids else 1, case.baseline, case.scale, True, True, True, 1e-4, 1.0))
