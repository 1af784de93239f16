"""The ``reference`` backend of ``group_advantage``: its oracle behind a kernel's interface."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.ops.group_records import Inputs, Options, allocate
from rlfast.reference import group_advantage as oracle

BASELINES = ("mean", "leave one out", "weighted", "soft", "second")
SCALES = ("none", "std", "others")


def outputs(x: Inputs, o: Options, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What the op returns, computed in ``dtype``."""
    return oracle.group_advantage(
        x.rewards.to(dtype), group_size=o.group_size, ids=x.ids, mask=x.mask, baseline=BASELINES[o.baseline],
        scale=SCALES[o.scale], bessel=o.bessel, eps=o.eps, weights=x.weights, tau=o.tau, lone_raw=o.lone_raw,
        skip_zero=o.skip_zero,
    )  # fmt: skip


def _forward(x: Inputs, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    out = allocate(x)
    for to, found in zip(out, outputs(x, o, out[0].dtype), strict=True):
        to.copy_(found)
    return out


group_advantage = SimpleNamespace(forward=_forward)
