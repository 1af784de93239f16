"""Sampled tokens by the compiled kernels: the ``cpu`` backend."""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address
from rlfast.ops.sample_records import Inputs, Outputs, allocate


def forward(x: Inputs) -> Outputs:
    """See ``rlfast/ops/sample.py``."""
    out, logits = allocate(x), x.logits
    backends.extension("cpu").sample(
        logits.data_ptr(), DTYPES[logits.dtype], *logits.shape, logits.stride(0), *map(address, x[1:10]),
        0 if x.edit_ids is None else x.edit_ids.shape[0], address(x.allowed), *map(address, out),
        backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out
