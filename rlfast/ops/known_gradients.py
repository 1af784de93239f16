"""A loss whose gradients were taken as it was computed."""

from __future__ import annotations

import torch

from rlfast.ops.dispatch import first_derivatives_only
from rlfast.ops.response_losses import scaled


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, gradients, size, *inputs):
        ctx.save_for_backward(size, *gradients)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.view_as(loss)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        if g is None:
            return (None,) * (3 + len(ctx.dtypes))
        size, *gradients = ctx.saved_tensors
        by = g if size is None else g / size
        known = zip(ctx.needs_input_grad[3:], gradients, ctx.dtypes, strict=True)
        return g, None, None, *(scaled(x, by, dtype) if need else None for need, x, dtype in known)


def with_gradients(loss: torch.Tensor, inputs: tuple, gradients: tuple, size: torch.Tensor | None = None):
    """``loss`` [] as a function of ``inputs`` too (None has no gradient); its gradients by them are given.

    They are kept until the backward, which multiplies them by the upstream gradient, and divides by ``size`` [] if they
    come multiplied by it.
    """
    return _KnownGradients.apply(loss, gradients, size, *inputs)
