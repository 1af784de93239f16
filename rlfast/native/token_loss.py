"""Policy losses by the compiled kernels: the ``cpu`` and ``cuda`` backends.

The arguments are listed in ``csrc/bindings_loss.h``.
"""

from __future__ import annotations

import functools

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address, extension_of
from rlfast.ops.loss_records import Fields, Output, allocate


@functools.cache
def _surrogates(name: str) -> frozenset[str]:
    return frozenset(backends.extension(name).token_loss_surrogates())


def why_not(surrogate: str) -> str | None:
    """Why the C++ kernels have not got this formula; None if they have."""
    if surrogate in _surrogates("cuda" if backends.why_not("cpu") else "cpu"):
        return None
    return f"{surrogate} has no C++ formula: it was not in kernels/formulas when the extension was built"


def _field(x: torch.Tensor | None, packed: bool):
    if x is None:
        return None
    stride = x.stride()
    return x.data_ptr(), DTYPES[x.dtype], 0 if packed else stride[0], 1 if stride[-1] else 0


@functools.cache
def _counter(device: int, stream: int) -> torch.Tensor:
    """What the blocks of a launch count themselves with: 0 before and after each, which a stream makes in turn."""
    return torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")


def scratch_of(logp, doubles: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for what the pieces of the batch add up to, and the counter."""
    scratch = torch.empty(doubles, dtype=torch.float64, device=logp.device)
    if torch.cuda.is_current_stream_capturing():  # a graph may run on any stream, and has a counter of its own
        return scratch, torch.zeros(1, dtype=torch.int32, device=logp.device)
    return scratch, _counter(logp.device.index, stream)


def forward(fields: Fields, surrogate, estimator, plan, settings, hyper, kl_hyper, needs) -> Output:
    """See ``rlfast/ops/token_loss.py``."""
    out = allocate(fields, needs)
    logp, shape = fields.logp, fields.logp.shape
    flat = len(shape) == 1
    floats = [_field(x, flat) for x in fields[:8]]
    flags = [None if x is None else (x.data_ptr(), 0 if flat else x.stride(0)) for x in fields[8:10]]
    rows = 1 if flat else shape[0]
    if fields.cu_seqlens is not None:
        rows = fields.cu_seqlens.shape[0] - 1
    extension, last = extension_of(logp)
    arguments = (
        (*floats, *flags), (*map(address, fields[10:]), rows, shape[-1]), surrogate, estimator, plan, settings, hyper,
        kl_hyper, (out.loss.data_ptr(), out.metrics.data_ptr(), *map(_gradient, out[2:])),
    )  # fmt: skip
    if logp.is_cuda:
        scratch, counter = scratch_of(logp, extension.token_loss_scratch(*arguments), last[1])
        last = (scratch.data_ptr(), counter.data_ptr(), *last)
    extension.token_loss(*arguments, *last)
    return out


def _gradient(x: torch.Tensor) -> int:
    return x.data_ptr() if x.numel() else 0
