"""The ``rlfast::token_logps`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(logits, targets, mask, transform, wanted) -> Outputs
    backward(logits, targets, mask, transform, aux, grads, out) -> None

with logits [*lead, V] of one or two leading dimensions, each of any stride, the last contiguous; targets int64 and
contiguous, [*lead] or [*lead, K]; mask bool [*lead] or None; ``out`` [*lead, V] of logits' dtype, which may be the
logits themselves. ``grads`` is (g_logp, g_lse, g_entropy), each float32 and contiguous, or None.

∂L/∂z_j = g_logp·(1[j = target] − p_j) + g_lse·p_j − g_entropy·p_j·(log p_j + H)
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.records import Outputs, Row, Transform, Wanted, allocate

NAME = "token_logps"
LIB = torch.library.Library("rlfast", "FRAGMENT")

_OPTIONS = "Tensor? temperatures, float temperature, float softcap, float logit_scale"
LIB.define(
    f"token_logps(Tensor logits, Tensor targets, Tensor? mask, {_OPTIONS}, int outputs, int top_k, bool inplace, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_BACKWARD = (
    f"Tensor targets, Tensor? mask, {_OPTIONS}, Tensor aux, int outputs, int top_k,"
    " Tensor? g_logp, Tensor? g_lse, Tensor? g_entropy, str backend"
)
LIB.define(f"token_logps_backward(Tensor logits, {_BACKWARD}) -> Tensor", tags=(torch.Tag.needs_fixed_stride_order,))
LIB.define(f"token_logps_backward_(Tensor(a!) logits, {_BACKWARD}) -> ()", tags=(torch.Tag.needs_fixed_stride_order,))


def _forward(
    logits, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, inplace, backend
) -> Outputs:
    name = backends.select(NAME, logits.device.type, logits.dtype, backend)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return backends.implementation(NAME, name).forward(logits, targets, mask, transform, Wanted(outputs, top_k))


def _fake_forward(
    logits, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, inplace, backend
):
    return allocate(logits, tuple(logits.shape[:-1]), targets, Wanted(outputs, top_k))


def _backward_into(logits, targets, mask, temperatures, temperature, softcap, logit_scale, aux, grads, backend, out):
    name = backends.select(NAME, logits.device.type, logits.dtype, backend)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    grads = tuple(g if g is None else g.contiguous() for g in grads)
    backends.implementation(NAME, name).backward(logits, targets, mask, transform, aux, grads, out)


def _backward(
    logits, targets, mask, temperatures, temperature, softcap, logit_scale, aux, outputs, top_k, g_logp, g_lse, g_entropy,
    backend,
):  # fmt: skip
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    grads = (g_logp, g_lse, g_entropy)
    _backward_into(logits, targets, mask, temperatures, temperature, softcap, logit_scale, aux, grads, backend, out)
    return out


def _backward_inplace(
    logits, targets, mask, temperatures, temperature, softcap, logit_scale, aux, outputs, top_k, g_logp, g_lse, g_entropy,
    backend,
):  # fmt: skip
    grads = (g_logp, g_lse, g_entropy)
    _backward_into(logits, targets, mask, temperatures, temperature, softcap, logit_scale, aux, grads, backend, logits)


LIB.impl("token_logps", _forward, "CompositeExplicitAutograd")
LIB.impl("token_logps_backward", _backward, "CompositeExplicitAutograd")
LIB.impl("token_logps_backward_", _backward_inplace, "CompositeExplicitAutograd")
torch.library.register_fake("rlfast::token_logps", _fake_forward, lib=LIB)
torch.library.register_fake(
    "rlfast::token_logps_backward", lambda logits, *_: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), lib=LIB
)
torch.library.register_fake("rlfast::token_logps_backward_", lambda *_: None, lib=LIB)

op = torch.ops.rlfast.token_logps.default
op_backward = torch.ops.rlfast.token_logps_backward.default
op_backward_ = torch.ops.rlfast.token_logps_backward_.default


def _setup_context(ctx, inputs, output):
    logits, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, inplace, backend = inputs
    _, _, _, aux, is_top1, topk_logp, topk_ids = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(aux, is_top1, topk_logp, topk_ids)
    ctx.save_for_backward(logits, targets, mask, temperatures, aux)
    ctx.options = (temperature, softcap, logit_scale)
    ctx.wanted = (outputs, top_k)
    ctx.inplace, ctx.spent, ctx.backend = inplace, False, backend


def _autograd(ctx, g_logp, g_lse, g_entropy, *_):
    if ctx.spent:
        raise RuntimeError(
            "token_logps: a second backward through inplace_backward=True: the logits now hold their gradient; "
            "pass inplace_backward=False to keep them"
        )
    nothing = (None,) * 10
    if g_logp is None and g_lse is None and g_entropy is None:
        return (None, *nothing)
    logits, targets, mask, temperatures, aux = ctx.saved_tensors
    args = (targets, mask, temperatures, *ctx.options, aux, *ctx.wanted, g_logp, g_lse, g_entropy, ctx.backend)
    if not ctx.inplace:
        return (op_backward(logits, *args), *nothing)
    ctx.spent = True
    gradient = logits.detach()
    op_backward_(gradient, *args)
    return (gradient, *nothing)


torch.library.register_autograd("rlfast::token_logps", _autograd, setup_context=_setup_context, lib=LIB)
