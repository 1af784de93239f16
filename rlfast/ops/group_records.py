"""What the ``group_advantage`` op passes to its backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The baseline b of a sample, from its group; and what its distance is divided by. As in csrc/rlfast/group_advantage.h.
MEAN, LEAVE_ONE_OUT, WEIGHTED, SOFT, SECOND = range(5)
UNSCALED, STD, OTHERS_STD = range(3)


class Inputs(NamedTuple):
    """Tensors of one call, on one device."""

    rewards: torch.Tensor  # [N], contiguous
    ids: torch.Tensor | None  # int64 [N]; None: groups of group_size, one after the other
    mask: torch.Tensor | None  # bool [N]
    weights: torch.Tensor | None  # float64 [N], of WEIGHTED


class Options(NamedTuple):
    """Numbers of one call."""

    group_size: int
    baseline: int
    scale: int
    bessel: bool  # divide the squares by n − 1
    lone_raw: bool  # a group of one keeps its reward over a deviation of 1; else its advantage is 0
    skip_zero: bool  # where the deviation is 0, divide by 1
    eps: float
    tau: float  # of SOFT


def allocate(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantages [N], statistics float64 [4]: groups, groups of equal rewards, Σ of their means, Σ of their stds)."""
    dtype = torch.float64 if x.rewards.dtype == torch.float64 else torch.float32
    device = x.rewards.device
    return torch.empty(x.rewards.shape, dtype=dtype, device=device), torch.empty(4, dtype=torch.float64, device=device)
