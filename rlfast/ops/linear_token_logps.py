"""The ``rlfast::linear_token_logps`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(hidden, weight, bias, targets, mask, transform, wanted, keep) -> (Outputs, kept)
    backward(hidden, weight, bias, targets, mask, transform, aux, grads, needs, kept) -> (g_hidden, g_weight, g_bias)

with hidden [N, D] and weight [V, D] of one dtype, rows of any stride, the last dimension contiguous; bias [V] or None;
targets int64 [N] or [N, K]; mask bool [N] or None. ``keep`` asks for the float32 logits [N, V] to be kept for the
backward; the backend says how its rows are laid out, and only reads them, so that a second backward is right. ``needs`` is three bools, and a gradient
that is not needed comes back with no elements and costs nothing. Gradients accumulate in float32.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.records import Transform, Wanted, allocate
from rlfast.ops.token_logps import LIB

NAME = "linear_token_logps"

_OPTIONS = "Tensor? temperatures, float temperature, float softcap, float logit_scale"
LIB.define(
    f"linear_token_logps(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, {_OPTIONS},"
    " int outputs, int top_k, bool keep, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
LIB.define(
    f"linear_token_logps_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, {_OPTIONS},"
    " Tensor aux, Tensor kept, int outputs, int top_k, Tensor? g_logp, Tensor? g_lse, Tensor? g_entropy, bool[3] needs, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)


def _forward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, keep, backend
):
    name = backends.select(NAME, hidden.device.type, hidden.dtype, backend)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    out, kept = backends.implementation(NAME, name).forward(
        hidden, weight, bias, targets, mask, transform, Wanted(outputs, top_k), keep
    )
    return (*out, kept)


def _fake_forward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, keep, backend
):
    out = allocate(hidden, (hidden.shape[0],), targets, Wanted(outputs, top_k))
    kept = (hidden.shape[0], weight.shape[0]) if keep else (0,)
    return (*out, hidden.new_empty(kept, dtype=torch.float32))


def _backward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, aux, kept, outputs, top_k,
    g_logp, g_lse, g_entropy, needs, backend,
):  # fmt: skip
    name = backends.select(NAME, hidden.device.type, hidden.dtype, backend)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    grads = tuple(g if g is None else g.contiguous() for g in (g_logp, g_lse, g_entropy))
    return backends.implementation(NAME, name).backward(
        hidden, weight, bias, targets, mask, transform, aux, grads, tuple(needs), kept
    )


def _fake_backward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, aux, kept, outputs, top_k,
    g_logp, g_lse, g_entropy, needs, backend,
):  # fmt: skip
    return tuple(
        hidden.new_empty(x.shape if need else (0,)) for x, need in zip((hidden, weight, bias), needs, strict=True)
    )


LIB.impl("linear_token_logps", _forward, "CompositeExplicitAutograd")
LIB.impl("linear_token_logps_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlfast::linear_token_logps", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::linear_token_logps_backward", _fake_backward, lib=LIB)

op = torch.ops.rlfast.linear_token_logps.default
op_backward = torch.ops.rlfast.linear_token_logps_backward.default


def _setup_context(ctx, inputs, output):
    (hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, keep, backend) = inputs
    _, _, _, aux, is_top1, topk_logp, topk_ids, kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(aux, is_top1, topk_logp, topk_ids, kept)
    ctx.save_for_backward(hidden, weight, bias, targets, mask, temperatures, aux, kept)
    ctx.options = (temperature, softcap, logit_scale)
    ctx.wanted = (outputs, top_k)
    ctx.backend = backend


def _autograd(ctx, g_logp, g_lse, g_entropy, *_):
    nothing = (None,) * 10
    needs = list(ctx.needs_input_grad[:3])
    if (g_logp is None and g_lse is None and g_entropy is None) or not any(needs):
        return (None, None, None, *nothing)
    hidden, weight, bias, targets, mask, temperatures, aux, kept = ctx.saved_tensors
    g = op_backward(
        hidden, weight, bias, targets, mask, temperatures, *ctx.options, aux, kept, *ctx.wanted,
        g_logp, g_lse, g_entropy, needs, ctx.backend,
    )  # fmt: skip
    return (*(x if need else None for x, need in zip(g, needs, strict=True)), *nothing)


torch.library.register_autograd("rlfast::linear_token_logps", _autograd, setup_context=_setup_context, lib=LIB)
