"""Group advantages by the compiled kernels: the ``cpu`` backend."""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address
from rlfast.ops.group_records import Inputs, Options, allocate


def forward(x: Inputs, o: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``rlfast/ops/group_advantage.py``."""
    advantages, statistics = allocate(x)
    backends.extension("cpu").group_advantage(
        x.rewards.shape[0], x.rewards.data_ptr(), DTYPES[x.rewards.dtype], address(x.ids), o.group_size,
        address(x.mask), address(x.weights), o.baseline, o.scale, o.bessel, o.lone_raw, o.skip_zero, o.eps, o.tau,
        advantages.data_ptr(), statistics.data_ptr(), backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return advantages, statistics
