"""Token log-probs by the compiled kernels: the ``cpu`` and ``cuda`` backends.

The extensions take addresses and sizes, so that they need no torch to be built; the arguments are listed in
``csrc/bindings.h``.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.records import Outputs, Transform, Wanted, allocate

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def address(x: torch.Tensor | None) -> int:
    """Where a tensor's elements are; 0: there is none."""
    return 0 if x is None else x.data_ptr()


def strides_of(x: torch.Tensor) -> tuple[int, int]:
    """(outer, inner) strides of rows [*lead, V] of one or two leading dimensions."""
    return (x.stride(0), x.stride(1)) if x.dim() == 3 else (0, x.stride(0))


def peak_unit(transform: Transform):
    """What a saved peak is multiplied by to be a z: ``RowScale::c`` of csrc/rlfast/row_stats.h."""
    by = transform.softcap or abs(transform.logit_scale) or 1.0
    t = transform.temperature
    return by / (t.double() if isinstance(t, torch.Tensor) else t)


def _inputs(logits, targets, mask, transform: Transform) -> tuple:
    shape, lead = logits.shape, logits.dim() - 1
    temperature, tensor = transform.temperature, isinstance(transform.temperature, torch.Tensor)
    return (
        logits.data_ptr(), DTYPES[logits.dtype], shape[0] if lead == 2 else 1, shape[-2], shape[-1],
        *strides_of(logits),
        temperature.data_ptr() if tensor else 0, 1.0 if tensor else temperature,
        transform.softcap, transform.logit_scale,
        targets.data_ptr(), address(mask), targets.shape[-1] if targets.dim() > lead else 1,
    )  # fmt: skip


def extension_of(logits):
    """The extension, and what its kernels take last: an instruction set and threads, or a device and a stream."""
    if logits.is_cuda:
        device = logits.device
        return backends.extension("cuda"), (device.index, torch.cuda.current_stream(device).cuda_stream)
    return backends.extension("cpu"), (backends.isa(), torch.get_num_threads())


def forward(logits, targets, mask, transform: Transform, wanted: Wanted) -> Outputs:
    """See ``rlfast/ops/token_logps.py``."""
    out = allocate(logits, tuple(logits.shape[:-1]), targets, wanted)
    extension, last = extension_of(logits)
    if logits.is_cuda:
        vocab = logits.shape[-1]
        floats = extension.token_logps_scratch(logits.numel() // vocab, vocab, wanted.top_k, logits.device.index)
        scratch = torch.empty(floats, dtype=torch.float32, device=logits.device)
        last = (scratch.data_ptr(), *last)
    extension.token_logps_forward(
        *_inputs(logits, targets, mask, transform), out.logp.data_ptr(), out.lse.data_ptr(), out.entropy.data_ptr(),
        out.is_top1.data_ptr(), out.topk_logp.data_ptr(), out.topk_ids.data_ptr(), wanted.top_k, out.aux.data_ptr(),
        wanted.outputs, *last,
    )  # fmt: skip
    return out


def backward(logits, targets, mask, transform: Transform, aux, grads, out) -> None:
    """See ``rlfast/ops/token_logps.py``."""
    extension, last = extension_of(logits)
    extension.token_logps_backward(
        *_inputs(logits, targets, mask, transform), aux.data_ptr(), *map(address, grads), out.data_ptr(),
        *strides_of(out),
        *last,
    )  # fmt: skip
