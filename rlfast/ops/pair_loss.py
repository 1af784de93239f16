"""The ``rlfast::pair_loss`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(chosen, rejected, rest, terms, settings, reduce, out) -> None

which fills ``out``, an ``Output`` whose gradients are views of the two sides; the records are those of
``preference_records``. Per pair, where everything but S is constant:

    S = Σ_t m_t·log π_t, S_ref, n of each response     (c = tail beyond the shorter response's length, else 1)
    s = score_k(S, S − S_ref, n) (÷ n)
    ℓ = w·Σ_k weight_k·link_k(s_chosen, s_rejected, n_chosen, n_rejected, margin, extra, shared)
    loss = factor/n · Σ ℓ

and the gradient of a token is m·c times that of its S. Sums are in a fixed order. ``rejected`` may be missing: then the
first half of ``chosen`` are the chosen responses, the second half the rejected, in one tensor with one gradient.
"""

from __future__ import annotations

import torch

from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode, unobserved
from rlfast.ops.preference_records import METRICS, Output, Rest, Settings, Side, allocate, halves, rows_of, terms_of
from rlfast.ops.response_losses import kernel_of, scaled

NAME = "pair_loss"
SIDE, REST = len(Side._fields), len(Rest._fields)
TENSORS = 2 * SIDE + REST

_SIDES = ", ".join(
    f"Tensor{'' if side == 'chosen' and field == 'logp' else '?'} {side}_{field}"
    for side in ("chosen", "rejected")
    for field in Side._fields
)
LIB.define(
    f"pair_loss({_SIDES}, {', '.join(f'Tensor? {name}' for name in Rest._fields)}, str[] scores, bool[] means,"
    " str[] links, float[] numbers, float[] settings, int reduce, bool[3] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

op = torch.ops.rlfast.pair_loss.default


def _sides(args) -> tuple[Side, Side | None]:
    chosen, rejected = Side(*args[:SIDE]), Side(*args[SIDE : 2 * SIDE])
    return chosen, None if rejected.logp is None else rejected


def _allocated(args) -> Output:
    chosen, rejected = _sides(args)
    pairs = rows_of(chosen) if rejected else rows_of(chosen) // 2
    return allocate(chosen.logp, rejected and rejected.logp, pairs, len(METRICS), args[-2])


def views(out: Output, chosen: Side, rejected: Side | None) -> tuple[Output, Side, Side]:
    """The two sides, and the outputs with a gradient for each of them."""
    if rejected is not None:
        return out, chosen, rejected
    first, second = halves(chosen)
    if out.d_first.numel() and chosen.cu_seqlens is None:
        pairs = rows_of(first)
        return out._replace(d_first=out.d_first[:pairs], d_second=out.d_first[pairs:]), first, second
    return out._replace(d_second=out.d_first), first, second


def clear_around(out: Output, *sides: Side | None) -> None:
    """Zeros for packed tokens, which need not be in a response."""
    for side, gradient in zip(sides, (out.d_first, out.d_second), strict=True):
        if side is not None and side.cu_seqlens is not None and gradient.numel():
            gradient.zero_()


def _forward(*args):
    *_, scores, means, links, numbers, settings, reduce, _, backend = args
    chosen, rejected = _sides(args)
    out = _allocated(args)
    kernel = kernel_of(NAME, chosen.logp, (scores, links), backend)
    clear_around(out, chosen, rejected)
    terms, settings = terms_of(scores, means, links, numbers), Settings(*settings)
    whole, chosen, rejected = views(out, chosen, rejected)
    kernel.forward(chosen, rejected, Rest(*args[2 * SIDE : TENSORS]), terms, settings, reduce, whole)
    return tuple(out)


def _fake_forward(*args):
    return tuple(_allocated(args))


def _below_autograd(*args):
    if unobserved(*args[:TENSORS]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chosen, rejected, args):
        out = _below_autograd(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*out[1:])
        ctx.save_for_backward(*out[2:4])
        ctx.dtypes = chosen.dtype, None if rejected is None else rejected.dtype
        return out

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g, *_):
        if g is None:
            return None, None, None
        pairs = zip(ctx.needs_input_grad, ctx.saved_tensors, ctx.dtypes, strict=False)
        return (*(scaled(x, g, dtype) if need else None for need, x, dtype in pairs), None)


def _needs(x) -> bool:
    return x is not None and x.requires_grad


def _with_autograd(*args):
    refuse_forward_mode(NAME, args[0], args[SIDE])
    if torch.is_grad_enabled() and (_needs(args[0]) or _needs(args[SIDE])):
        return _PairLoss.apply(args[0], args[SIDE], args)
    return _below_autograd(*args)


def call(*args) -> Output:
    """The op. In eager mode its autograd kernel is called from here, past the dispatcher."""
    return Output(*(op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)))


for _key in ("CPU", "CUDA"):
    LIB.impl("pair_loss", _forward, _key)
LIB.impl("pair_loss", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::pair_loss", _fake_forward, lib=LIB)
