"""The ``reference`` backend of ``linear``."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.reference.linear import linear as oracle


def _forward(x, weight, bias, wide):
    y = oracle(x, weight, bias)
    return y if wide else y.to(x.dtype)


def _backward(x, weight, g, needs):
    leaves = [y.detach().requires_grad_() for y in (x, weight, weight.new_zeros(weight.shape[0]))]
    with torch.enable_grad():
        y = oracle(*leaves)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        pulled = iter(torch.autograd.grad(y, wanted, g.to(y.dtype)))
    return tuple(next(pulled) if need else x.new_empty(0) for need in needs)


def summed(found: list, needs: tuple, sums: tuple) -> tuple:
    """The gradients of a chunk: those of weight and bias are added to the sums."""
    for total, g, need in zip(sums, found[1:], needs[1:], strict=True):
        if need:
            total.add_(g)
    return found[0], found[0].new_empty(0), found[0].new_empty(0)


linear = SimpleNamespace(forward=_forward, backward=_backward)
