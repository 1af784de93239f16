"""Divergences by the compiled kernels: the ``cpu`` and ``cuda`` backends.

The arguments are listed in ``csrc/bindings_divergence.h``.
"""

from __future__ import annotations

import torch

from rlfast.native.token_logps import DTYPES, address, extension_of, strides_of
from rlfast.ops.divergence_records import Measure, Saved, allocate, candidates_of
from rlfast.ops.records import Transform


def option_arguments(targets, mask, transform: Transform, other: Transform, measure: Measure, lead: int) -> tuple:
    """The transforms, targets, mask and measure, as both forms of the op pass them."""
    one, two = transform.temperature, other.temperature
    tensors = isinstance(one, torch.Tensor), isinstance(two, torch.Tensor)
    return (
        one.data_ptr() if tensors[0] else 0, two.data_ptr() if tensors[1] else 0,
        1.0 if tensors[0] else one, 1.0 if tensors[1] else two,
        transform.softcap, other.softcap, transform.logit_scale, other.logit_scale,
        address(targets), address(mask), candidates_of(targets, lead), *measure,
    )  # fmt: skip


def _inputs(logits, ref_logits, targets, mask, transform, ref_transform, measure) -> tuple:
    shape, lead = logits.shape, logits.dim() - 1
    return (
        logits.data_ptr(), ref_logits.data_ptr(), DTYPES[logits.dtype], shape[0] if lead == 2 else 1, shape[-2],
        shape[-1], *strides_of(logits), *strides_of(ref_logits),
        *option_arguments(targets, mask, transform, ref_transform, measure, lead),
    )  # fmt: skip


def forward(logits, ref_logits, targets, mask, transform: Transform, ref_transform: Transform, measure, outputs):
    """See ``rlfast/ops/divergence.py``."""
    out = allocate(logits, tuple(logits.shape[:-1]), targets, outputs)
    if not logits.numel():
        return out
    extension, last = extension_of(logits)
    if logits.is_cuda:
        vocab = logits.shape[-1]
        floats = extension.divergence_scratch(logits.numel() // vocab, vocab, logits.device.index)
        scratch = torch.empty(floats, dtype=torch.float32, device=logits.device)
        last = (scratch.data_ptr(), *last)
    extension.divergence_forward(
        *_inputs(logits, ref_logits, targets, mask, transform, ref_transform, measure),
        *map(address, (out.value, out.logp, out.lse, out.entropy, out.ref_lse, out.aux)), *last,
    )  # fmt: skip
    return out


def backward(own, other, targets, mask, transform, other_transform, measure: Measure, saved: Saved, grads, out) -> None:
    """See ``rlfast/ops/divergence.py``."""
    if not own.numel():
        return
    extension, last = extension_of(own)
    extension.divergence_backward(
        *_inputs(own, other, targets, mask, transform, other_transform, measure), *map(address, (*saved, *grads)),
        out.data_ptr(), *strides_of(out), *last,
    )  # fmt: skip
