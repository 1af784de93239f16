"""The ``rlfast::packed_attention`` op: the forward of ``paged_attention`` on packed sequences, with a gradient.

Each key is a page of its own, so that the forward is the very call of a rollout and gives its bits. The backward is
``gradients`` of ``rlfast/fallback/paged_attention.py`` on every backend but the reference.
"""

from __future__ import annotations

import torch

from rlfast.fallback import paged_attention as fallback
from rlfast.ops.attention_records import Options, paged
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode
from rlfast.ops.paged_attention import kernel_of

NAME = "packed_attention"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? sinks, float scale, float softcap, int window"
_TAGS = (torch.Tag.needs_fixed_stride_order,)

LIB.define(f"packed_attention({_INPUTS}, str backend) -> Tensor", tags=_TAGS)
LIB.define(f"packed_attention_backward(Tensor g, {_INPUTS}, str backend) -> Tensor[]", tags=_TAGS)
op = torch.ops.rlfast.packed_attention.default
op_backward = torch.ops.rlfast.packed_attention_backward.default


def _forward(q, k, v, cu_seqlens, sinks, scale, softcap, window, backend):
    return kernel_of(q, backend).forward(paged(q, k, v, cu_seqlens, sinks), Options(scale, softcap, window))


def _fake_forward(q, k, v, *_):
    return torch.empty((*q.shape[:2], v.shape[-1]), dtype=q.dtype, device=q.device)


def _backward(g, q, k, v, cu_seqlens, sinks, scale, softcap, window, backend):
    gradients = getattr(kernel_of(q, backend), "gradients", fallback.gradients)
    return list(gradients(g, q, k, v, cu_seqlens, sinks, Options(scale, softcap, window)))


def _fake_backward(g, q, k, v, cu_seqlens, sinks, *_):
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    own = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    return [*own, torch.empty(0 if sinks is None else sinks.shape[0], dtype=wide, device=q.device)]


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.save_for_backward(*args[:5])
        ctx.options = args[5:]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        *found, g_sinks = op_backward(g, *ctx.saved_tensors, *ctx.options)
        return (*found, None, g_sinks if ctx.needs_input_grad[4] else None, None, None, None, None)


def _with_autograd(*args):
    refuse_forward_mode(NAME, *args[:3], args[4])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:5]):
        return _Packed.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("packed_attention", _forward, _key)
    LIB.impl("packed_attention_backward", _backward, _key)
LIB.impl("packed_attention", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::packed_attention", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::packed_attention_backward", _fake_backward, lib=LIB)
