"""A loss whose gradients were taken as it was computed."""

from __future__ import annotations

import torch

from rlfast.ops.dispatch import first_derivatives_only
from rlfast.ops.response_losses import scaled


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, gradients, *inputs):
        ctx.save_for_backward(*gradients)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.view_as(loss)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        if g is None:
            return (None,) * (2 + len(ctx.dtypes))
        known = zip(ctx.needs_input_grad[2:], ctx.saved_tensors, ctx.dtypes, strict=True)
        return g, None, *(scaled(x, g, dtype) if need else None for need, x, dtype in known)


def with_gradients(loss: torch.Tensor, inputs: tuple, gradients: tuple) -> torch.Tensor:
    """``loss`` [] as a function of ``inputs`` too (None has no gradient); its gradients by them are given.

    They are kept until the backward, which multiplies them by the upstream gradient.
    """
    return _KnownGradients.apply(loss, gradients, *inputs)
