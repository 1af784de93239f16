"""Token log-probs from hidden states by the compiled kernels: the ``cpu`` backend.

The arguments are listed in ``csrc/bindings.h``. ``kept`` holds the float32 logits, before the transform, of the rows
that count, one after the other from its first row on.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address
from rlfast.ops.records import Transform, Wanted, allocate


def row_stride(x: torch.Tensor) -> int:
    """Elements from row to row."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def _inputs(hidden, weight, bias, targets, mask, transform: Transform) -> tuple:
    temperature, tensor = transform.temperature, isinstance(transform.temperature, torch.Tensor)
    return (
        hidden.data_ptr(), weight.data_ptr(), address(bias), DTYPES[hidden.dtype], *hidden.shape, weight.shape[0],
        row_stride(hidden), row_stride(weight),
        temperature.data_ptr() if tensor else 0, 1.0 if tensor else temperature, transform.softcap,
        transform.logit_scale, targets.data_ptr(), address(mask), targets.shape[1] if targets.dim() > 1 else 1,
    )  # fmt: skip


def forward(hidden, weight, bias, targets, mask, transform: Transform, wanted: Wanted, keep: bool):
    """See ``rlfast/ops/linear_token_logps.py``."""
    n, vocab = hidden.shape[0], weight.shape[0]
    out = allocate(hidden, (n,), targets, wanted)
    kept = torch.empty((n, vocab) if keep else (0,), dtype=torch.float32)
    bias = bias if bias is None else bias.contiguous()
    backends.extension("cpu").linear_token_logps_forward(
        *_inputs(hidden, weight, bias, targets, mask, transform), out.logp.data_ptr(), out.lse.data_ptr(),
        out.entropy.data_ptr(), out.is_top1.data_ptr(), out.topk_logp.data_ptr(), out.topk_ids.data_ptr(), wanted.top_k,
        out.aux.data_ptr(), wanted.outputs, kept.data_ptr(), backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out, kept


def backward(hidden, weight, bias, targets, mask, transform: Transform, aux, grads, needs, kept, sums, dtype):
    """See ``rlfast/ops/linear_token_logps.py``."""
    bias = bias if bias is None else bias.contiguous()
    like, own = (hidden, weight, bias), [need and (i == 0 or sums is None) for i, need in enumerate(needs)]
    out = tuple(torch.empty(x.shape if need else (0,), dtype=dtype) for x, need in zip(like, own, strict=True))
    written = [x.data_ptr() for x in out] if sums is None else [out[0].data_ptr(), *map(address, sums)]
    backends.extension("cpu").linear_token_logps_backward(
        *_inputs(hidden, weight, bias, targets, mask, transform), aux.data_ptr(), *map(address, grads),
        kept.data_ptr(), *written, dtype == torch.float32, sums is not None, backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out
