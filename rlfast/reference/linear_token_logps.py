"""Token log-probabilities from hidden states: the definition. logits = hidden·weightᵀ + bias."""

import torch

from .token_logps import token_logps


def linear_token_logps(hidden, weight, targets, bias=None, *, dtype=None, **options):
    """``token_logps`` of ``hidden @ weight.T + bias``, with the logits in full."""
    dtype = dtype or (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # [*, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_logps(logits, targets, dtype=dtype, **options)
