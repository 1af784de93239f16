"""GRPO from hidden states: with the logits in full, and the strongest plain PyTorch that we could write."""

from __future__ import annotations

import torch

from bench.baselines.linear_preference import token_logps
from bench.baselines.token_loss import grpo


def loss_of(logp, old_logp, adv, mask, ref_logp):
    """GRPO's number alone."""
    total, count, _ = grpo(logp, old_logp, adv, mask, ref_logp)
    return total / count


def eager(hidden, weight, targets, old_logp, adv, mask, ref_logp):
    """The logits of the whole batch."""
    return loss_of(token_logps(hidden, weight, targets), old_logp, adv, mask, ref_logp)


class Chunked(torch.autograd.Function):
    """Some sequences at a time: the logits of their tokens that count, the softmax's gradient in their place, and two
    GEMMs more."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, old_logp, adv, mask, ref_logp, gemm, sequences):
        loss, d_hidden = 0.0, torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        turned = weight.T.contiguous()
        for start in range(0, len(hidden), sequences):
            at = slice(start, start + sequences)
            live = mask[at] != 0
            h, t = hidden[at][live], targets[at][live]
            z = gemm(h, weight).float()
            lse = z.logsumexp(-1)
            with torch.enable_grad():
                leaf = (z.gather(-1, t[:, None]).squeeze(-1) - lse).requires_grad_()
                logp = torch.zeros_like(mask[at]).masked_scatter(live, leaf)
                one = loss_of(logp, old_logp[at], adv[at], mask[at], ref_logp[at]) * (len(logp) / len(hidden))
                (g,) = torch.autograd.grad(one, leaf)
            loss = loss + one.detach()
            z.sub_(lse[:, None]).exp_().mul_(-g[:, None]).scatter_add_(-1, t[:, None], g[:, None])
            z = z.to(hidden.dtype)
            d_hidden[at][live] = gemm(z, turned)
            if d_weight is not None:
                d_weight.addmm_(z.T, h) if z.dtype == torch.float32 else d_weight.add_(z.T @ h)
        ctx.save_for_backward(d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, g):
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = d_weight if d_weight is None else d_weight.mul(g)
        return d_hidden * g.to(d_hidden.dtype), d_weight, *(None,) * 7
