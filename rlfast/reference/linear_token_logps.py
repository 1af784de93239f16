"""Token log-probabilities from hidden states: the definition. logits = hidden·weightᵀ + bias."""

import torch

from .token_logps import counted_targets, token_logps


def linear_token_logps(hidden, weight, targets, bias=None, *, dtype=None, **options):
    """``token_logps`` of ``hidden @ weight.T + bias``, with the logits in full."""
    dtype = dtype or (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    _, _, rows = counted_targets(targets, options.get("mask"), hidden.dim() - 1)
    hidden = torch.where(rows.unsqueeze(-1), hidden.to(dtype), torch.zeros((), dtype=dtype, device=hidden.device))
    logits = hidden @ weight.to(dtype).T  # [*, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    return token_logps(logits, targets, dtype=dtype, **options)
