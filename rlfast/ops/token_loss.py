"""The ``rlfast::token_loss`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(fields, surrogate, estimator, plan, settings, hyper, kl_hyper, needs) -> Output

with the records of ``loss_records``; ``surrogate`` and ``estimator`` ("" for none) name formulas, ``hyper`` and
``kl_hyper`` are their hyper-parameters in order; ``needs`` is two bools, for logp and entropy. A backend that has not
got every surrogate has ``why_not(surrogate)`` too: a reason, or None. Per token, where m is the mask, u the unit's
log-ratio and everything of ρ, its gate, keep and weights is detached:

    x_t = clamp(lp − lp_old, inner)            u = clamp(x of the unit (+ Σ log ρ), unit),  r = e^u
    s_t = surrogate(lp, lp_old, u, r, A, extra)
    ℓ_t = s_t · keep·gate·off-policy · ρ · weights + beta·KL·(r) − entropy_coef·H
    loss = factor/n · Σ_t m_t·c_t·ℓ_t,   c_t = 1/L of the sequence for seq_mean_token_mean, else 1

The gradient comes out of the same launch, divided by factor/n, which is known only when every token has been counted;
``metrics.scale`` brings it back. Masked tokens have no effect, whatever they hold. Sums are in a fixed order.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode, unobserved
from rlfast.ops.loss_records import METRICS, Fields, Output, allocate

NAME = "token_loss"
SCALE, ENTROPY_SCALE = METRICS.index("scale"), METRICS.index("entropy_scale")

LIB.define(
    "token_loss(Tensor logp, Tensor? old_logp, Tensor? ref_logp, Tensor? rollout_logp, Tensor adv, Tensor? entropy,"
    " Tensor? weights, Tensor? extra, Tensor? mask, Tensor? keep, Tensor? cu_seqlens, Tensor? num_items, Tensor? coefs,"
    " str surrogate, str estimator, int[] plan, float[] settings, float[] hyper, float[] kl_hyper, bool[2] needs,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIB.define("token_loss_backward(Tensor gradient, Tensor scale, Tensor g, ScalarType dtype) -> Tensor")

op = torch.ops.rlfast.token_loss.default
op_backward = torch.ops.rlfast.token_loss_backward.default
FIELDS = len(Fields._fields)


def _kernel(logp, surrogate: str, backend: str):
    """The backend's module. One that has not got this surrogate is passed over, unless it was asked for."""
    name = backends.select(NAME, logp.device.type, logp.dtype, backend)
    kernel = backends.implementation(NAME, name)
    reason = kernel.why_not(surrogate) if hasattr(kernel, "why_not") else None
    if reason and backend:
        raise RuntimeError(f"backend {name!r} cannot run {NAME}: {reason}")
    return backends.implementation(NAME, "torch") if reason else kernel


def _forward(*args):
    *objective, needs, backend = args[FIELDS:]
    kernel = _kernel(args[0], objective[0], backend)
    return tuple(kernel.forward(Fields(*args[:FIELDS]), *objective, tuple(needs)))


def _fake_forward(*args):
    return tuple(allocate(Fields(*args[:FIELDS]), args[-2]))


def _backward(gradient, scale, g, dtype):
    return (gradient * (scale * g)).to(dtype)


def _fake_backward(gradient, scale, g, dtype):
    return torch.empty_like(gradient, dtype=dtype)


def _below_autograd(*args):
    if unobserved(*args[:FIELDS]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _scaled(gradient, scale, g, dtype):
    """gradient·scale·g. On a CPU a factor of 1 costs nothing: the saved gradient is the answer."""
    if not unobserved(gradient, g):
        return op_backward(gradient, scale, g, dtype)
    if gradient.device.type == "cpu" and gradient.dtype == dtype and scale.item() * g.item() == 1.0:
        return gradient
    return _backward(gradient, scale, g, dtype)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, args):
        loss, metrics, dlogp, dentropy = _below_autograd(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(metrics, dlogp, dentropy)
        ctx.save_for_backward(metrics, dlogp, dentropy)
        ctx.dtypes = logp.dtype, None if entropy is None else entropy.dtype
        return loss, metrics, dlogp, dentropy

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g, *_):
        if g is None:
            return None, None, None
        metrics, dlogp, dentropy = ctx.saved_tensors
        by_logp, by_entropy = ctx.needs_input_grad[:2]
        return (
            _scaled(dlogp, metrics[SCALE], g, ctx.dtypes[0]) if by_logp else None,
            _scaled(dentropy, metrics[ENTROPY_SCALE], g, ctx.dtypes[1]) if by_entropy else None,
            None,
        )


def _needs(x) -> bool:
    return x is not None and x.requires_grad


def _with_autograd(*args):
    refuse_forward_mode(NAME, args[0], args[5])
    if torch.is_grad_enabled() and (_needs(args[0]) or _needs(args[5])):
        return _TokenLoss.apply(args[0], args[5], args)
    return _below_autograd(*args)


def call(*args) -> Output:
    """The op. In eager mode its autograd kernel is called from here, which saves the dispatcher's way to it (5 µs)."""
    return Output(*(op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)))


for _key in ("CPU", "CUDA"):
    LIB.impl("token_loss", _forward, _key)
    LIB.impl("token_loss_backward", _backward, _key)
LIB.impl("token_loss", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::token_loss", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::token_loss_backward", _fake_backward, lib=LIB)
