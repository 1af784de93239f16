"""A linear layer as plain PyTorch writes it, and the strongest that we could write for a few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

PADDED = 16  # rows: from here on torch's GEMM takes another kernel


def eager(x, weight):
    """What nn.Linear runs."""
    return F.linear(x, weight)


def weight_first(x, weight):
    """The weight as the left operand: many rows by few columns."""
    return torch.mm(weight, x.T).T


def padded(x, weight):
    """Rows of zeros up to a full tile."""
    rows = x.shape[0]
    return F.linear(F.pad(x, (0, 0, 0, max(PADDED - rows, 0))), weight)[:rows]


def one_by_one(x, weight):
    """A matrix-vector product a row."""
    return torch.stack([torch.mv(weight, row) for row in x])
