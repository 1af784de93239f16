"""The ``rlfast::linear_token_logps`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(hidden, weight, bias, targets, mask, transform, wanted, keep) -> (Outputs, kept)
    backward(hidden, weight, bias, targets, mask, transform, aux, grads, needs, kept, sums, dtype)
        -> (g_hidden, g_weight, g_bias)

with hidden [N, D] and weight [V, D] of one dtype, rows of any stride, the last dimension contiguous; bias [V] or None;
targets int64 [N] or [N, K]; mask bool [N] or None. ``keep`` asks for the float32 logits [N, V] to be kept for the
backward (``kept`` has no elements otherwise); the backend says how its rows lie, and only reads them, so that a
second backward is right. ``needs`` is three bools; a gradient that is not needed comes back with no elements and costs
nothing. Gradients accumulate in float32 and come back in ``dtype``: hidden's or the compute dtype. ``sums``, if it is
not None, holds (weight [V, D], bias [V]) in the compute dtype, contiguous: what is needed of those gradients is added
to them and comes back with no elements; ``dtype`` is the compute dtype then.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

from rlfast import backends
from rlfast.fallback.token_logps import compute_dtype
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode
from rlfast.ops.records import Transform, Wanted, allocate
from rlfast.ops.token_logps import OPTIONS, differentiable, non_differentiable

NAME = "linear_token_logps"

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIB.define(
    f"linear_token_logps({_HEAD}, Tensor targets, Tensor? mask, {OPTIONS}, int outputs, int top_k, bool keep,"
    " str backend) -> Tensor[]",
    tags=_TAGS,
)
LIB.define(
    f"linear_token_logps_backward({_HEAD}, Tensor targets, Tensor? mask, {OPTIONS}, Tensor aux, Tensor kept,"
    " Tensor? g_logp, Tensor? g_lse, Tensor? g_entropy, bool[3] needs, bool wide, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

# The backward of one chunk of rows, where a loss takes it as soon as the chunk's log-probs are there.
LIB.define(
    f"linear_token_logps_accumulate({_HEAD}, Tensor targets, Tensor? mask, {OPTIONS}, Tensor aux, Tensor kept,"
    " Tensor? g_logp, Tensor? g_entropy, Tensor(a!)? weight_sum, Tensor(b!)? bias_sum, bool need_hidden, str backend)"
    " -> Tensor",
    tags=_TAGS,
)

op = torch.ops.rlfast.linear_token_logps.default
op_backward = torch.ops.rlfast.linear_token_logps_backward.default
op_accumulate = torch.ops.rlfast.linear_token_logps_accumulate.default


def given_in(x, wide: bool) -> torch.dtype:
    """The dtype of gradients: the compute dtype if they are ``wide``, for what is still to be multiplied; else x's."""
    return compute_dtype(x) if wide else x.dtype


def as_given(x):
    """Autocast has cast the head already; inside a kernel it would round the logits to bfloat16."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _forward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, keep, backend
):
    kernel = backends.implementation(NAME, backends.select(NAME, hidden.device.type, hidden.dtype, backend))
    wanted = Wanted(outputs, top_k)
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    with as_given(hidden):
        out, kept = kernel.forward(hidden, weight, bias, targets, mask, transform, wanted, keep)
    return [*out.asked(wanted), kept]


def _fake_forward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, outputs, top_k, keep, backend
):
    wanted = Wanted(outputs, top_k)
    out = allocate(hidden, (hidden.shape[0],), targets, wanted)
    kept = hidden.new_empty((hidden.shape[0], weight.shape[0]) if keep else (0,), dtype=out.logp.dtype)
    return [*out.asked(wanted), kept]


def _backward(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, aux, kept,
    g_logp, g_lse, g_entropy, needs, wide, backend,
):  # fmt: skip
    kernel = backends.implementation(NAME, backends.select(NAME, hidden.device.type, hidden.dtype, backend))
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    grads = tuple(g if g is None else g.contiguous() for g in (g_logp, g_lse, g_entropy))
    with as_given(hidden):
        return kernel.backward(
            hidden, weight, bias, targets, mask, transform, aux, grads, tuple(needs), kept, None, given_in(hidden, wide)
        )


def _fake_backward(hidden, weight, bias, *rest):
    needs, wide, _ = rest[-3:]
    dtype, like = given_in(hidden, wide), zip((hidden, weight, bias), needs, strict=True)
    return tuple(hidden.new_empty(x.shape if need else (0,), dtype=dtype) for x, need in like)


def _accumulate(
    hidden, weight, bias, targets, mask, temperatures, temperature, softcap, logit_scale, aux, kept, g_logp, g_entropy,
    weight_sum, bias_sum, need_hidden, backend,
):  # fmt: skip
    kernel = backends.implementation(NAME, backends.select(NAME, hidden.device.type, hidden.dtype, backend))
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    needs, grads = (need_hidden, weight_sum is not None, bias_sum is not None), (g_logp, None, g_entropy)
    sums = weight_sum, bias_sum
    with as_given(hidden):
        return kernel.backward(
            hidden, weight, bias, targets, mask, transform, aux, grads, needs, kept, sums, compute_dtype(hidden)
        )[0]


def _fake_accumulate(hidden, *rest):
    return hidden.new_empty(hidden.shape if rest[-2] else (0,), dtype=compute_dtype(hidden))


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        hidden, weight, bias, targets, mask, temperatures, *options, outputs, top_k, _, backend = args
        with torch._C._AutoDispatchBelowAutograd():
            *asked, kept = op(*args)
        ctx.set_materialize_grads(False)
        wanted = Wanted(outputs, top_k)
        ctx.mark_non_differentiable(*non_differentiable(asked, wanted), kept)
        ctx.save_for_backward(hidden, weight, bias, targets, mask, temperatures, asked[1], kept)
        ctx.options, ctx.wanted, ctx.backend = options, wanted, backend
        return (*asked, kept)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        grads, needs = differentiable(grads, ctx.wanted), list(ctx.needs_input_grad[:3])
        if all(g is None for g in grads):
            return (None,) * 13
        *head, targets, mask, temperatures, aux, kept = ctx.saved_tensors
        saved = (*head, targets, mask, temperatures, *ctx.options, aux, kept)
        found = op_backward(*saved, *grads, needs, False, ctx.backend)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 10)


def _with_autograd(*args):
    refuse_forward_mode(NAME, *args[:3])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:3]):
        return list(_LinearTokenLogps.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("linear_token_logps", _forward, _key)
    LIB.impl("linear_token_logps_backward", _backward, _key)
    LIB.impl("linear_token_logps_accumulate", _accumulate, _key)
LIB.impl("linear_token_logps", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::linear_token_logps", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::linear_token_logps_backward", _fake_backward, lib=LIB)
torch.library.register_fake("rlfast::linear_token_logps_accumulate", _fake_accumulate, lib=LIB)
