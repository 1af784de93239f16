"""A linear layer: the definition."""

import torch


def linear(x, weight, bias=None, *, dtype=None):
    """x·weightᵀ + bias of x [*, K], weight [N, K], bias [N] or None, in ``dtype``: float32, or float64 for float64."""
    dtype = dtype or (torch.float64 if x.dtype == torch.float64 else torch.float32)
    y = x.to(dtype) @ weight.to(dtype).T  # [*, N]
    return y if bias is None else y + bias.to(dtype)
