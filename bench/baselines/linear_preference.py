"""DPO from hidden states: with the logits in full, and the strongest plain PyTorch that we could write."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.baselines.preferences import alone, dpo

LOSS = alone(dpo)


def token_logps(hidden, weight, targets):
    """log_softmax and gather over the logits in full, in float32."""
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def eager(hidden, weight, targets, ref_hidden, ref_weight):
    """DPO of rows [2B, T], the chosen ones first, with the reference's head beside the policy's."""
    with torch.no_grad():
        ref = token_logps(ref_hidden, ref_weight, targets).sum(-1)
    return LOSS(*token_logps(hidden, weight, targets).sum(-1).chunk(2), *ref.chunk(2))


class Chunked(torch.autograd.Function):
    """A pair at a time: its logits, the softmax's gradient in their place, and two GEMMs more."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, ref_hidden, ref_weight, gemm):
        pairs, loss = len(hidden) // 2, 0.0
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        turned = weight.T.contiguous()
        for i in range(pairs):
            h, r, t = (x[i::pairs].flatten(0, 1) for x in (hidden, ref_hidden, targets))
            z = gemm(r, ref_weight).float()
            ref = z.gather(-1, t[:, None]).squeeze(-1) - z.logsumexp(-1)
            z = gemm(h, weight).float()
            lse = z.logsumexp(-1)
            logp = z.gather(-1, t[:, None]).squeeze(-1) - lse
            with torch.enable_grad():
                leaf = logp.view(2, -1).requires_grad_()
                one = LOSS(*leaf.sum(-1, keepdim=True), *ref.view(2, -1).sum(-1, keepdim=True)) / pairs
                (g,) = torch.autograd.grad(one, leaf)
            g, loss = g.reshape(-1), loss + one.detach()
            z.sub_(lse[:, None]).exp_().mul_(-g[:, None]).scatter_add_(-1, t[:, None], g[:, None])
            z = z.to(hidden.dtype)
            d_hidden[i::pairs] = gemm(z, turned).view(2, *hidden.shape[1:])
            d_weight.addmm_(z.T, h) if z.dtype == torch.float32 else d_weight.add_(z.T @ h)
        ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, g):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * g.to(d_hidden.dtype), d_weight.mul(g), None, None, None, None
