"""The ``rlfast::token_logps`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(logits, targets, mask, transform, wanted) -> Outputs
    backward(logits, targets, mask, transform, aux, grads, out) -> None

with logits [*lead, V] of one or two leading dimensions, each of any stride, the last contiguous; targets int64 and
contiguous, [*lead] or [*lead, K]; mask bool [*lead] or None; ``out`` [*lead, V] of logits' dtype, which may be the
logits themselves. ``grads`` is (g_logp, g_lse, g_entropy), each contiguous, or None.

∂L/∂z_j = g_logp·(1[j = target] − p_j) + g_lse·p_j − g_entropy·p_j·(log p_j + H)
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode, unobserved
from rlfast.ops.records import Outputs, Transform, Wanted, allocate

NAME = "token_logps"
OPTIONS = "Tensor? temperatures, float temperature, float softcap, float logit_scale"

_GRADS = "Tensor? g_logp, Tensor? g_lse, Tensor? g_entropy"
_BACKWARD = f"Tensor targets, Tensor? mask, {OPTIONS}, Tensor aux, {_GRADS}, str backend"
_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIB.define(
    f"token_logps(Tensor logits, Tensor targets, Tensor? mask, {OPTIONS}, int outputs, int top_k,"
    " bool inplace_backward, str backend) -> Tensor[]",
    tags=_TAGS,
)
LIB.define(f"token_logps_backward(Tensor logits, {_BACKWARD}) -> Tensor", tags=_TAGS)
LIB.define(f"token_logps_backward_(Tensor(a!) logits, {_BACKWARD}) -> ()", tags=_TAGS)

op = torch.ops.rlfast.token_logps.default
op_backward = torch.ops.rlfast.token_logps_backward.default
op_backward_ = torch.ops.rlfast.token_logps_backward_.default


def _forward(logits, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, _, backend):
    kernel = backends.implementation(NAME, backends.select(NAME, logits.device.type, logits.dtype, backend))
    wanted = Wanted(outputs, top_k)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return kernel.forward(logits, targets, mask, transform, wanted).asked(wanted)


def _fake_forward(logits, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, _, backend):
    wanted = Wanted(outputs, top_k)
    return allocate(logits, tuple(logits.shape[:-1]), targets, wanted).asked(wanted)


def _backward_into(
    out, logits, targets, mask, temperatures, temperature, softcap, logit_scale, aux, g_logp, g_lse, g_entropy, backend
):
    kernel = backends.implementation(NAME, backends.select(NAME, logits.device.type, logits.dtype, backend))
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    grads = tuple(g if g is None else g.contiguous() for g in (g_logp, g_lse, g_entropy))
    kernel.backward(logits, targets, mask, transform, aux, grads, out)


def _backward(logits, *args):
    out = _fake_backward(logits)
    _backward_into(out, logits, *args)
    return out


def _backward_(logits, *args):
    _backward_into(logits, logits, *args)


def _fake_backward(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _below_autograd(*args):
    """The op without its derivative; past the dispatcher, which takes 12 µs, where nobody would see it there."""
    if unobserved(*args[:4]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_spent(ctx) -> None:
    """A backward in place has no logits for a second one."""
    if ctx.spent:
        raise RuntimeError(
            "token_logps: second backward with inplace_backward=True, which has left the gradient where the logits "
            "were: pass inplace_backward=False"
        )


class _TokenLogps(torch.autograd.Function):
    """The op with its derivative. Written out, since ``register_autograd`` costs 40 µs a call and this costs 10."""

    @staticmethod
    def forward(ctx, *args):
        logits, targets, mask, temperatures, *options, outputs, top_k, inplace, backend = args
        asked = _below_autograd(*args)
        ctx.set_materialize_grads(False)
        wanted = Wanted(outputs, top_k)
        ctx.mark_non_differentiable(*non_differentiable(asked, wanted))
        ctx.save_for_backward(logits, targets, mask, temperatures, asked[1])
        ctx.options, ctx.wanted, ctx.backend = options, wanted, backend
        ctx.inplace, ctx.spent = inplace, False
        return tuple(asked)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        refuse_spent(ctx)
        grads = differentiable(grads, ctx.wanted)
        if all(g is None for g in grads):
            return (None,) * 11
        logits, targets, mask, temperatures, aux = ctx.saved_tensors
        args = (targets, mask, temperatures, *ctx.options, aux, *grads, ctx.backend)
        if not ctx.inplace:
            return (op_backward(logits, *args), *(None,) * 10)
        ctx.spent = True
        gradient = logits.detach()
        op_backward_(gradient, *args)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits too is told by autograd
        return (gradient, *(None,) * 10)


def differentiable(asked, wanted: Wanted) -> tuple:
    """(logp, lse, entropy) among the outputs of a forward, or among their gradients."""
    out = Outputs.named(asked, wanted)
    return out.logp, out.lse, out.entropy


def non_differentiable(asked, wanted: Wanted) -> list:
    """The other outputs."""
    out = Outputs.named(asked, wanted)
    return [x for x in (out.aux, out.is_top1, out.topk_logp, out.topk_ids) if x is not None]


def _with_autograd(*args):
    refuse_forward_mode(NAME, args[0])
    if torch.is_grad_enabled() and args[0].requires_grad:
        return list(_TokenLogps.apply(*args))
    return _below_autograd(*args)


def call(*args):
    """The op. In eager mode its autograd kernel is called from here, which saves the dispatcher's way to it (5 µs)."""
    return op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("token_logps", _forward, _key)
    LIB.impl("token_logps_backward", _backward, _key)
    LIB.impl("token_logps_backward_", _backward_, _key)
LIB.impl("token_logps", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::token_logps", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::token_logps_backward", _fake_backward, lib=LIB)
torch.library.register_fake("rlfast::token_logps_backward_", lambda *_: None, lib=LIB)
