"""Sums over the tokens of responses: the definition, a padded response a row."""

import torch


def sequence_sums(logp, ref_logp, mask, shared_length=None, tail=1.0):
    """(S, S_ref, n) of each row: Σ m·c·log p, with c = tail after the first ``shared_length`` tokens that count."""
    logp = torch.where(mask, logp, torch.zeros((), dtype=logp.dtype))
    position = mask.cumsum(-1)
    weight = torch.ones_like(logp)
    if shared_length is not None and tail != 1.0:
        weight = torch.where(position > shared_length.unsqueeze(-1), tail, weight)
    ref = torch.zeros_like(logp) if ref_logp is None else torch.where(mask, ref_logp, torch.zeros((), dtype=logp.dtype))
    return (weight * logp).sum(-1), (weight * ref).sum(-1), mask.sum(-1).to(logp.dtype)
