"""A loss whose gradients were taken as it was computed."""

from __future__ import annotations

import math

import torch

from rlfast.distributed.gather import is_dtensor, laid_out_like
from rlfast.ops.dispatch import first_derivatives_only
from rlfast.ops.response_losses import scaled


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, gradients, into, times, *inputs):
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.into, ctx.times = into, times
        return loss.view_as(loss)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        if g is None:
            return (None,) * (4 + len(ctx.dtypes))
        into = ctx.into or {}
        if None in into.values():
            raise RuntimeError("accumulate_grad: a first backward has added the gradient and given up its memory")
        needs, known = list(ctx.needs_input_grad[4:]), list(_saved(ctx))
        if ctx.times is not None and not _exact(g.item()):
            return g, None, None, None, *ctx.times(g)
        for at, parameter in into.items():
            accumulate(parameter, known[at], g)
            needs[at], into[at] = False, None
        found = zip(needs, known, ctx.dtypes, strict=True)
        return g, None, None, None, *(scaled(x, g, dtype) if need else None for need, x, dtype in found)


def _exact(g: float) -> bool:
    """Whether a product with g does not round: a power of two; or what leaves no digit to round."""
    return not math.isfinite(g) or abs(math.frexp(g)[0]) in (0.0, 0.5)


def _saved(ctx) -> tuple:
    """The gradients. A backward whose upstream gradient is 1 has handed them out as they are."""
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "another backward of this loss: the gradients that one has handed out were changed in place since "
            "(a third backward into the same leaves does that): compute the loss again"
        ) from error


def accumulate(parameter, gradient, g) -> None:
    """Add gradient·g to the parameter's ``main_grad`` if it has one, else to its ``grad``; the gradient is used up."""
    gradient.mul_(g)
    total = getattr(parameter, "main_grad", None)
    total = parameter.grad if total is None else total
    if total is not None:
        (total.to_local() if is_dtensor(total) else total).add_(gradient)
    elif is_dtensor(parameter):
        parameter.grad = laid_out_like(parameter, gradient.to(parameter.dtype))
    else:
        parameter.grad = gradient.to(parameter.dtype)


def with_gradients(loss: torch.Tensor, inputs: tuple, gradients: tuple, into: dict | None = None, times=None):
    """``loss`` [] as a function of ``inputs`` too (None has no gradient); its gradients by them are given.

    They are kept until the backward, which multiplies them by the upstream gradient and rounds them to the dtype of
    their input. Those that ``into`` has a parameter for, by their place, it adds to that parameter's own instead. If
    they are rounded already, ``times(g)`` makes them again for a factor that would round them twice.
    """
    return _KnownGradients.apply(loss, gradients, into, times, *inputs)
