"""What the ops of whole responses share: backend choice by formula, and gradients that a launch hands out final."""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode, unobserved

LIB.define("scaled_gradient(Tensor gradient, Tensor g, ScalarType dtype) -> Tensor")

op_scaled = torch.ops.rlfast.scaled_gradient.default


def kernel_of(name: str, x: torch.Tensor, asked, backend: str):
    """The backend's module. One whose ``why_not(asked)`` has a reason is passed over, unless it was asked for."""
    chosen = backends.select(name, x.device.type, x.dtype, backend)
    kernel = backends.implementation(name, chosen)
    reason = kernel.why_not(asked) if hasattr(kernel, "why_not") else None
    if reason and backend:
        raise RuntimeError(f"backend {chosen!r} cannot run {name}: {reason}")
    return backends.implementation(name, "torch") if reason else kernel


def _scaled(gradient, g, dtype):
    return (gradient * g).to(dtype)


def _fake_scaled(gradient, g, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def scaled(gradient, g, dtype):
    """gradient·g. On a CPU a factor of 1 costs nothing: the saved gradient is the answer."""
    if torch.compiler.is_compiling() or not unobserved(gradient, g):
        return op_scaled(gradient, g, dtype)
    if gradient.device.type == "cpu" and gradient.dtype == dtype and g.item() == 1.0:
        return gradient
    return _scaled(gradient, g, dtype)


class OneGradient(torch.autograd.Function):
    """An op of (loss, metrics, ∂loss/∂x, …) as a function of x, the first of its arguments."""

    @staticmethod
    def forward(ctx, x, run, args):
        out = run(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(out[2])
        ctx.dtype = x.dtype
        return out

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g, *_):
        return None if g is None else scaled(*ctx.saved_tensors, g, ctx.dtype), None, None


def with_one_gradient(name: str, run, args):
    """``run(*args)``, differentiable by the first of the arguments."""
    refuse_forward_mode(name, args[0])
    if torch.is_grad_enabled() and args[0].requires_grad:
        return OneGradient.apply(args[0], run, args)
    return run(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("scaled_gradient", _scaled, _key)
torch.library.register_fake("rlfast::scaled_gradient", _fake_scaled, lib=LIB)
