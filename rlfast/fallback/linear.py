"""A linear layer in plain PyTorch.

The forward is ``torch.nn.functional.linear``, whose sums are float32 but whose kernel depends on the number of rows:
the bits of a row may change with the rows beside it. The backward is the one of every backend but the reference.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

COLUMNS = 8192  # of a float32 copy of the weight, at a time


def forward(x, weight, bias, wide: bool) -> torch.Tensor:
    """See ``rlfast/ops/linear.py``."""
    if not wide or x.dtype in (torch.float32, torch.float64):
        return linear(x, weight, bias)
    return linear(x.float(), weight.float(), None if bias is None else bias.float())


def backward(x, weight, g, needs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``rlfast/ops/linear.py``."""
    if g.dtype != x.dtype:
        return _wide_backward(x, weight, g, needs)
    nothing = x.new_empty
    return (
        g @ weight if needs[0] else nothing(0),
        g.T @ x if needs[1] else nothing(0),
        g.sum(0) if needs[2] else nothing(0),
    )


def _wide_backward(x, weight, g, needs):
    """Of a float32 gradient and narrower operands, which are widened: g rounded to their dtype would lose digits."""
    out = [x.new_empty(shape if need else (0,)) for shape, need in zip(_shapes(x, weight), needs, strict=True)]
    wide = x.float()
    g_x = torch.zeros_like(wide) if needs[0] else None
    for columns in map(slice, range(0, weight.shape[0], COLUMNS), range(COLUMNS, weight.shape[0] + COLUMNS, COLUMNS)):
        part = g[:, columns]
        if needs[0]:
            g_x.addmm_(part, weight[columns].float())
        if needs[1]:
            out[1][columns] = part.T @ wide
    if needs[0]:
        out[0].copy_(g_x)
    if needs[2]:
        out[2].copy_(g.sum(0))
    return tuple(out)


def _shapes(x, weight):
    return x.shape, weight.shape, weight.shape[:1]
