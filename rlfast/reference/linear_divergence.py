"""Divergences of two heads: the definition. logits = hidden·weightᵀ + bias on each side."""

import torch

from .divergence import divergence
from .token_logps import counted_targets


def linear_divergence(
    hidden, weight, ref_hidden, ref_weight, bias=None, ref_bias=None, *, targets=None, mask=None, dtype=None, **options
):
    """``divergence`` of the two heads, with both logits in full."""
    dtype = dtype or (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    rows = None if mask is None else mask != 0
    if targets is not None:
        rows = counted_targets(targets, mask, hidden.dim() - 1)[2]

    def project(x, w, b):
        x = x.to(dtype)
        if rows is not None:
            x = torch.where(rows.unsqueeze(-1), x, torch.zeros((), dtype=dtype, device=x.device))
        logits = x @ w.to(dtype).T  # [*, V]
        return logits if b is None else logits + b.to(dtype)

    logits, ref_logits = project(hidden, weight, bias), project(ref_hidden, ref_weight, ref_bias)
    return divergence(logits, ref_logits, targets, mask=mask, dtype=dtype, **options)
