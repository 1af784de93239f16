"""The ``rlfast::linear`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(x, weight, bias, wide) -> out
    backward(x, weight, g, needs) -> (g_x, g_weight, g_bias)

with x [M, K] and weight [N, K] of one dtype, rows of any stride, the last dimension contiguous; bias [N] of that dtype,
or None; out [M, N] contiguous, of that dtype, or float32 (float64 for float64) if ``wide``. g [M, N] is of out's dtype.
``needs`` is three bools; a gradient that is not needed comes back with no elements and costs nothing.

    out = x·weightᵀ + bias        g_x = g·weight        g_weight = gᵀ·x        g_bias = Σ g

all with float32 sums, rounded once.
"""

from __future__ import annotations

import math

import torch

from rlfast import backends
from rlfast.native import linear as native
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode, unobserved
from rlfast.ops.linear_token_logps import as_given

NAME = "linear"

_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIB.define("linear(Tensor x, Tensor weight, Tensor? bias, bool wide, str backend) -> Tensor", tags=_TAGS)
LIB.define(
    "linear_backward(Tensor x, Tensor weight, Tensor g, bool[3] needs, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
op = torch.ops.rlfast.linear.default
op_backward = torch.ops.rlfast.linear_backward.default

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def batch_invariant(backend: str) -> bool:
    """Whether a row of the result has the same bits on this backend whatever the other rows and the threads.

    Args:
        backend: as ``rlfast.backends.active("linear", device, dtype)`` names it.
    """
    return backend == "cpu"


def _kernel(x, backend: str):
    return backends.implementation(NAME, backends.select(NAME, x.device.type, x.dtype, backend))


def _forward(x, weight, bias, wide, backend):
    with as_given(x):
        return _kernel(x, backend).forward(x, weight, bias, wide)


def _fake_forward(x, weight, bias, wide, backend):
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if wide and narrow else x.dtype)


def _backward(x, weight, g, needs, backend):
    with as_given(x):
        return _kernel(x, backend).backward(x, weight, g, tuple(needs))


def _fake_backward(x, weight, g, needs, backend):
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, wide, backend):
        ctx.save_for_backward(x, weight)
        ctx.backend = backend
        return _below_autograd(x, weight, bias, wide, backend)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        needs = list(ctx.needs_input_grad[:3])
        found = op_backward(*ctx.saved_tensors, g, needs, ctx.backend)
        return (*(y if need else None for y, need in zip(found, needs, strict=True)), None, None)


def _below_autograd(x, weight, bias, wide, backend):
    """Past the dispatcher where nobody would see the op there: see ``token_logps.py``."""
    if unobserved(x, weight, bias):
        return _forward(x, weight, bias, wide, backend)
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, weight, bias, wide, backend)


def _recorded(*tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _with_autograd(x, weight, bias, wide, backend):
    refuse_forward_mode(NAME, x, weight, bias)
    run = _Linear.apply if _recorded(x, weight, bias) else _below_autograd
    return run(x, weight, bias, wide, backend)


def call(*args):
    """The op; in eager mode its autograd kernel is called from here, which saves the dispatcher's way to it."""
    return op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)


def _plain(x, dtype: torch.dtype) -> bool:
    return type(x) in _PLAIN and x.dtype is dtype and x.is_cpu and x.is_contiguous()


def usual(x, weight, bias, wide):
    """The call of every layer of a decode step, past what its checks and the dispatcher take; else None.

    Contiguous tensors on the CPU whose sizes and dtypes agree, no gradient, kernels that are there, nobody who looks.
    """
    if torch.compiler.is_compiling() or type(x) is not torch.Tensor or type(wide) is not bool:
        return None
    dtype = x.dtype
    if not (_plain(x, dtype) and _plain(weight, dtype) and (bias is None or _plain(bias, dtype))):
        return None
    *lead, depth = x.shape or (0,)
    of_weight = weight.shape
    if len(of_weight) != 2 or of_weight[1] != depth or 0 in of_weight:
        return None
    if bias is not None and bias.shape != of_weight[:1]:
        return None
    wanted = backends.requested()
    if wanted not in ("", "cpu") or dtype not in native.DTYPES or backends.select(NAME, "cpu", dtype, wanted) != "cpu":
        return None
    if torch.is_autocast_enabled("cpu") or _recorded(x, weight, bias) or not unobserved(x, weight, bias):
        return None
    refuse_forward_mode(NAME, x, weight, bias)
    out = torch.empty((*lead, of_weight[0]), dtype=torch.float32 if wide else dtype)
    return native.into(out, x, weight, bias, math.prod(lead), depth)


for _key in ("CPU", "CUDA"):
    LIB.impl("linear", _forward, _key)
    LIB.impl("linear_backward", _backward, _key)
LIB.impl("linear", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::linear", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::linear_backward", _fake_backward, lib=LIB)
