"""Sums of responses over their tokens by the kernel of ``unpaired_loss``: one pass over policy and reference.

The way back is torch's: a token that counts has the gradient of its response.
"""

from __future__ import annotations

import torch

from rlfast.ops import unpaired_loss
from rlfast.ops.dispatch import first_derivatives_only, refuse_forward_mode
from rlfast.ops.preference_records import SUM, Rest, Settings, Side, Term, rows_of

# The reward is D; the loss of what is to be kept is −S.
TERMS = Term("log_ratio", False, "", 1.0, (), ()), Term("total", False, "retain", 1.0, (), ())
SCORES, MEANS, LINKS = [t.score for t in TERMS], [t.mean for t in TERMS], [t.link for t in TERMS]
NUMBERS = [x for t in TERMS for x in t.numbers()]


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, side, backend):
        ctx.save_for_backward(side.mask, side.cu_seqlens)
        ctx.shape, ctx.dtype = logp.shape, logp.dtype
        kept = torch.ones(rows_of(side), dtype=torch.bool, device=logp.device)
        rest = Rest(*(None,) * len(Rest._fields))
        out = unpaired_loss.call(
            *side, kept, *rest, SCORES, MEANS, LINKS, NUMBERS, Settings(), SUM, [False, True], backend
        )
        return -out.losses, out.rewards[0]

    @staticmethod
    @first_derivatives_only
    def backward(ctx, by_sum, by_ratio):
        mask, ends = ctx.saved_tensors
        d = by_sum + by_ratio
        if ends is None:
            d = d.unsqueeze(-1).expand(ctx.shape)
        else:
            d = torch.repeat_interleave(d, ends.diff(), output_size=ctx.shape[0])
        d = d if mask is None else torch.where(mask, d, 0.0)
        return d.to(ctx.dtype).contiguous(), None, None


def response_sums(side: Side, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(S, D = S − S_ref) [B] of responses whose tokens are given, as functions of their log-probs."""
    refuse_forward_mode("ranked_loss", side.logp)
    return _Sums.apply(side.logp, side, backend)
