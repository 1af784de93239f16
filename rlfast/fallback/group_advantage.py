"""Group advantages in plain PyTorch: sums scattered to groups and gathered back, in float64."""

from __future__ import annotations

import torch

from rlfast.ops.group_records import (
    LEAVE_ONE_OUT,
    OTHERS_STD,
    SECOND,
    SOFT,
    UNSCALED,
    WEIGHTED,
    Inputs,
    Options,
    allocate,
)
from rlfast.reductions import total


class Groups:
    """Sums and extremes over the valid samples of each group, of which there are at most as many as samples."""

    def __init__(self, x: Inputs, o: Options):
        n, device = x.rewards.shape[0], x.rewards.device
        if x.ids is None:
            self.of = torch.arange(n, device=device) // o.group_size
        else:  # the place of an id among the sorted ones: no look at how many there are
            order = torch.sort(x.ids).values
            self.of = torch.searchsorted(order, x.ids)
        self.valid = torch.ones(n, dtype=torch.bool, device=device) if x.mask is None else x.mask
        self.size = n

    def total(self, y):
        """Σ y of each sample's group [n groups]; a running sum per group in the order of the samples."""
        zero = torch.zeros(self.size, dtype=y.dtype, device=y.device)
        return zero.index_add(0, self.of, torch.where(self.valid, y, 0.0))

    def largest(self, y, valid):
        """The largest y of each group, −inf of none."""
        low = torch.full((self.size,), -torch.inf, dtype=y.dtype, device=y.device)
        return low.scatter_reduce(0, self.of, torch.where(valid, y, -torch.inf), "amax")


def _baseline(groups: Groups, r, x: Inputs, o: Options, count, mean):
    """b of each sample."""
    if o.baseline == LEAVE_ONE_OUT:
        return (count * mean - r) / (count - 1).clamp(min=1)
    if o.baseline == WEIGHTED:
        return (groups.total(x.weights * r) / groups.total(x.weights))[groups.of]
    if o.baseline == SOFT:
        top = groups.largest(r, groups.valid)[groups.of]
        return top + o.tau * (groups.total(((r - top) / o.tau).exp())[groups.of] / count).log()
    return mean


def _best(groups: Groups, r):
    """(the first of each group with the largest reward, the largest of the others)."""
    top = groups.largest(r, groups.valid)[groups.of]
    place = torch.arange(groups.size, device=r.device)
    first = torch.full_like(place, groups.size).scatter_reduce(
        0, groups.of, torch.where(groups.valid & (r == top), place, groups.size), "amin"
    )
    best = place == first[groups.of]
    return best, groups.largest(r, groups.valid & ~best)[groups.of]


def forward(x: Inputs, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``rlfast/ops/group_advantage.py``."""
    out, statistics = allocate(x)
    groups = Groups(x, o)
    r = torch.where(groups.valid, x.rewards, 0.0).double()
    counts = groups.total(torch.ones_like(r))
    means = groups.total(r) / counts
    count, mean = counts[groups.of], means[groups.of]
    squares = groups.total((r - mean).square())
    stds = (squares / (counts - int(o.bessel)).clamp(min=1)).sqrt()
    baseline = _baseline(groups, r, x, o, count, mean)
    best = torch.ones_like(groups.valid)
    if o.baseline == SECOND:
        best, baseline = _best(groups, r)
    scale = torch.ones_like(r)
    if o.scale != UNSCALED:
        scale = stds[groups.of]
        if o.scale == OTHERS_STD:
            left = squares[groups.of] - (r - mean).square() * count / (count - 1).clamp(min=1)
            left = torch.where(_equal_without(groups, r), 0.0, left)
            scale = (left.clamp(min=0.0) / (count - 1 - int(o.bessel)).clamp(min=1)).sqrt()
        scale = torch.where(scale == 0, 1.0, scale + o.eps) if o.skip_zero else scale + o.eps
    advantages = torch.where(best, (r - baseline) / scale, 0.0)
    alone = r / (1.0 + (o.eps if o.scale != UNSCALED else 0.0)) if o.lone_raw else torch.zeros_like(r)
    advantages = torch.where(count == 1, alone, advantages)
    out.copy_(torch.where(groups.valid, advantages, 0.0))
    here = counts > 0
    equal = here & (groups.largest(r, groups.valid) == -groups.largest(-r, groups.valid))
    means, stds = torch.where(here, means, 0.0), torch.where(here, stds, 0.0)
    statistics.copy_(torch.stack([total(y) for y in (here, equal, means, stds)]))
    return out, statistics


def _equal_without(groups: Groups, r):
    """Whether the others of a sample's group have one reward: their deviation is 0, not what rounding leaves."""
    top, low = groups.largest(r, groups.valid), -groups.largest(-r, groups.valid)
    tops = groups.total((r == top[groups.of]).double())[groups.of]
    lows = groups.total((r == low[groups.of]).double())[groups.of]
    top, low = top[groups.of], low[groups.of]
    count = groups.total(torch.ones_like(r))[groups.of]
    return (
        (top == low)
        | ((r == top) & (tops == 1) & (lows == count - 1))
        | ((r == low) & (lows == 1) & (tops == count - 1))
    )
