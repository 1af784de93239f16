"""A linear layer by the compiled kernels: the ``cpu`` backend."""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.fallback.linear import backward  # noqa: F401
from rlfast.native.linear_token_logps import row_stride
from rlfast.native.token_logps import DTYPES


def into(out, x, weight, bias, rows: int, stride_x: int) -> torch.Tensor:
    """x·weightᵀ + bias of ``rows`` rows of x, ``stride_x`` apart, into ``out``, which is contiguous."""
    columns, depth = weight.shape
    backends.extension("cpu").linear(
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), DTYPES[x.dtype], rows, depth, columns,
        stride_x, row_stride(weight), out.data_ptr(), out.dtype is torch.float32, backends.isa(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def forward(x, weight, bias, wide: bool) -> torch.Tensor:
    """See ``rlfast/ops/linear.py``."""
    rows = x.shape[0]
    out = torch.empty((rows, weight.shape[0]), dtype=torch.float32 if wide else x.dtype)
    return into(out, x, weight, bias if bias is None else bias.contiguous(), rows, row_stride(x))
