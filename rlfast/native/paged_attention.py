"""Attention over a paged cache by the compiled kernels: the ``cpu`` backend."""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address
from rlfast.ops.attention_records import Inputs, Options, allocate


def forward(x: Inputs, o: Options) -> torch.Tensor:
    """See ``rlfast/ops/paged_attention.py``."""
    q, k, v, table, cu, lens, sinks = x
    out = allocate(x)
    if not out.numel():
        return out
    _, page_size, kv_heads, width = k.shape
    backends.extension("cpu").paged_attention(
        q.data_ptr(), DTYPES[q.dtype], q.stride(0), q.stride(1), k.data_ptr(), *k.stride()[:3], width,
        v.data_ptr(), *v.stride()[:3], v.shape[3], page_size, table.data_ptr(), table.stride(0), cu.data_ptr(),
        lens.data_ptr(), address(sinks), lens.shape[0], q.shape[1], kv_heads, o.scale, o.softcap, o.window,
        out.data_ptr(), backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out
