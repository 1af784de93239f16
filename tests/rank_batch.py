"""A batch that ranks share: the same in every process, and which rows of it are a rank's."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

ROWS, STEPS, GROUP = 12, 9, 3
SIZES = (2, 4)
EDGES = {2: [0, 7, ROWS], 4: [0, 5, 5, 10, ROWS]}  # the ranks' rows: not as many each, and none on one


def mine(group, x):
    """This rank's rows of a tensor or a list of the whole batch."""
    rank, edges = dist.get_rank(group), EDGES[dist.get_world_size(group)]
    return x[edges[rank] : edges[rank + 1]] if isinstance(x, torch.Tensor | list) else x


@functools.cache
def batch() -> dict:
    """What a step has, the same in every process."""
    draw = torch.Generator().manual_seed(4)
    rewards = torch.randint(3, (ROWS,), generator=draw).float()
    lengths = torch.randint(1, STEPS + 1, (ROWS,), generator=draw)
    lengths[4] = 0
    return {
        "logp": -torch.rand(ROWS, STEPS, generator=draw) - 0.1,
        "old_logp": -torch.rand(ROWS, STEPS, generator=draw) - 0.1,
        "adv": torch.randn(ROWS, generator=draw),
        "mask": torch.arange(STEPS) < lengths.unsqueeze(1),
        "values": torch.randn(ROWS, STEPS, generator=draw) + 3.0,
        "rewards": rewards,
        "lengths": lengths.clamp(min=1),
        "sums": torch.randn(4, ROWS, generator=draw) - 20.0,
    }


def mean_of(losses):
    """What a trainer makes of the ranks' losses or gradients."""
    return sum(losses) / len(losses)
