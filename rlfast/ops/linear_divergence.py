"""The ``rlfast::linear_divergence`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(head, ref_head, targets, mask, transform, ref_transform, measure, outputs, keep) -> (Outputs, kept,
    ref_kept)
    backward(own, other, targets, mask, transform, other_transform, measure, saved, grads, needs, kept, other_kept,
    sums) -> (g_hidden, g_weight, g_bias)

with heads of one vocabulary V and one dtype: hidden [N, D], weight [V, D], each with its own D, rows of any stride,
the last dimension contiguous, bias [V] or None. ``keep`` asks for the float32 logits of both sides to be kept for the
backward; the backend says how their rows lie, and only reads them. ``needs`` is three bools of the own head; a gradient
that is not needed comes back with no elements and costs nothing. ``sums`` is as in ``linear_token_logps``, of the own
head. The rest is as in ``divergence``.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.fallback.token_logps import compute_dtype
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode
from rlfast.ops.divergence import GRADS, OPTIONS, SAVED, records, sides
from rlfast.ops.divergence_records import Head, Saved, allocate
from rlfast.ops.linear_token_logps import as_given, given_in

NAME = "linear_divergence"

_HEADS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"
_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIB.define(
    f"linear_divergence({_HEADS}, Tensor? targets, Tensor? mask, {OPTIONS}, int outputs, bool keep, str backend)"
    " -> Tensor[]",
    tags=_TAGS,
)
LIB.define(
    f"linear_divergence_backward({_HEADS}, Tensor? targets, Tensor? mask, {OPTIONS}, {SAVED}, {GRADS}, Tensor kept,"
    " Tensor other_kept, bool[3] needs, bool wide, str backend) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

# The student's backward of one chunk of rows, where a loss takes it as soon as the chunk's numbers are there.
LIB.define(
    f"linear_divergence_accumulate({_HEADS}, Tensor? targets, Tensor? mask, {OPTIONS}, {SAVED}, {GRADS}, Tensor kept,"
    " Tensor other_kept, Tensor(a!)? weight_sum, Tensor(b!)? bias_sum, bool need_hidden, str backend) -> Tensor",
    tags=_TAGS,
)

op = torch.ops.rlfast.linear_divergence.default
op_backward = torch.ops.rlfast.linear_divergence_backward.default
op_accumulate = torch.ops.rlfast.linear_divergence_accumulate.default


def _kernel(x, backend):
    return backends.implementation(NAME, backends.select(NAME, x.device.type, x.dtype, backend))


def _forward(*args):
    *heads, targets, mask, outputs, keep, backend = *args[:8], *args[-3:]
    head, ref_head = Head(*heads[:3]), Head(*heads[3:])
    with as_given(head.hidden):
        out, *kept = _kernel(head.hidden, backend).forward(
            head, ref_head, targets, mask, *records(args[8:18]), outputs, keep
        )
    return [*out.asked(), *kept]


def _fake_forward(*args):
    hidden, weight, targets, outputs, keep = args[0], args[1], args[6], args[18], args[19]
    out = allocate(hidden, (hidden.shape[0],), targets, outputs)
    shape = (hidden.shape[0], weight.shape[0]) if keep else (0,)
    return [*out.asked(), *(hidden.new_empty(shape, dtype=out.value.dtype) for _ in range(2))]


def _backward(*args):
    *_, needs, wide, backend = args
    return _pulled(args, tuple(needs), backend, None, given_in(args[0], wide))


def _accumulate(*args):
    *sums, need_hidden, backend = args[-4:]
    return _pulled(args, (need_hidden, *(x is not None for x in sums)), backend, sums, compute_dtype(args[0]))[0]


def _pulled(args, needs: tuple, backend: str, sums, dtype: torch.dtype):
    *heads, targets, mask = args[:8]
    aux, other_aux, centre, *grads, kept, other_kept = args[18:27]
    own, other = Head(*heads[:3]), Head(*heads[3:])
    grads = tuple(g if g is None else g.contiguous() for g in grads)
    with as_given(own.hidden):
        return _kernel(own.hidden, backend).backward(
            own, other, targets, mask, *records(args[8:18]), Saved(aux, other_aux, centre), grads, needs, kept,
            other_kept, sums, dtype,
        )  # fmt: skip


def _fake_backward(hidden, weight, bias, *rest):
    needs, wide, _ = rest[-3:]
    dtype, like = given_in(hidden, wide), zip((hidden, weight, bias), needs, strict=True)
    return tuple(hidden.new_empty(x.shape if need else (0,), dtype=dtype) for x, need in like)


def _fake_accumulate(hidden, *rest):
    return hidden.new_empty(hidden.shape if rest[-2] else (0,), dtype=compute_dtype(hidden))


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        heads, targets, mask, options, outputs, backend = args[:6], args[6], args[7], args[8:18], args[18], args[20]
        with torch._C._AutoDispatchBelowAutograd():
            *asked, kept, ref_kept = op(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(asked[1], kept, ref_kept)
        ctx.save_for_backward(*heads, targets, mask, *options[:2], asked[1], kept, ref_kept)
        ctx.options, ctx.outputs, ctx.backend = options[2:], outputs, backend
        return (*asked, kept, ref_kept)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        *heads, targets, mask, t, ref_t, aux, kept, ref_kept = ctx.saved_tensors
        student, teacher = sides(grads[:-2], ctx.outputs, targets, 1, aux, (t, ref_t, *ctx.options))
        found = []
        for side, own, other, ids, mine, others in (
            (student, heads[:3], heads[3:], targets, kept, ref_kept),
            (teacher, heads[3:], heads[:3], None, ref_kept, kept),
        ):
            needs = list(ctx.needs_input_grad[len(found) : len(found) + 3])
            if side is None or not any(needs):
                found += (None,) * 3
                continue
            seen, saved, g = side
            pulled = op_backward(*own, *other, ids, mask, *seen, *saved, *g, mine, others, needs, False, ctx.backend)
            found += (x if need else None for x, need in zip(pulled, needs, strict=True))
        return (*found, *(None,) * 15)


def _with_autograd(*args):
    refuse_forward_mode(NAME, *args[:6])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:6]):
        return list(_LinearDivergence.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("linear_divergence", _forward, _key)
    LIB.impl("linear_divergence_backward", _backward, _key)
    LIB.impl("linear_divergence_accumulate", _accumulate, _key)
LIB.impl("linear_divergence", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::linear_divergence", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::linear_divergence_backward", _fake_backward, lib=LIB)
torch.library.register_fake("rlfast::linear_divergence_accumulate", _fake_accumulate, lib=LIB)
