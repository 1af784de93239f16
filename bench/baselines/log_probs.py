"""Log-probs in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROWS = 16  # 16 rows of 49152 float32 logits are 3 MiB: the temporaries of a chunk stay in the cache


def eager(logits, targets):
    """log_softmax, then gather: what everyone writes first."""
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def eager_statistics(logits, targets):
    """(logp, entropy, log Σp²) from one log_softmax."""
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1), torch.logsumexp(2 * log_p, -1)


def chunk_logps(logits, targets):
    """logp of a few rows in float32, with no [rows, V] result kept."""
    x = logits.float()
    return x.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(x, -1)


def chunk_statistics(logits, targets):
    """(logp, entropy, log Σp²) of a few rows in float32."""
    x = logits.float()
    x = x - x.amax(-1, keepdim=True)
    e = x.exp()
    total = e.sum(-1)
    lse = total.log()
    logp = x.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - lse
    return logp, lse - (e * x).sum(-1) / total, (e * e).sum(-1).log() - 2 * lse


def chunked(function, rows=ROWS):
    """``function(logits, targets)`` over chunks of rows, results joined."""

    def run(logits, targets):
        parts = [function(x, t) for x, t in zip(logits.split(rows), targets.split(rows), strict=True)]
        return tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts)

    return run


class ChunkedLogps(torch.autograd.Function):
    """logp whose backward writes the softmax gradient a chunk at a time: one [N, V] gradient, no other temporary."""

    @staticmethod
    def forward(ctx, logits, targets):
        parts = [torch.logsumexp(x.float(), -1) for x in logits.split(ROWS)]
        lse = torch.cat(parts)
        ctx.save_for_backward(logits, targets, lse)
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float() - lse

    @staticmethod
    def backward(ctx, g):
        logits, targets, lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for at in range(0, logits.shape[0], ROWS):
            rows = slice(at, at + ROWS)
            x = (logits[rows].float() - lse[rows, None]).exp_().mul_(-g[rows, None])
            x.scatter_add_(-1, targets[rows, None], g[rows, None])
            out[rows] = x
        return out, None


class LinearLogps(torch.autograd.Function):
    """logp from hidden states: logits kept in the dtype that the GEMM gives, softmax gradient in place, two more
    GEMMs."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, gemm):
        logits = gemm(hidden, weight)
        lse = torch.cat([torch.logsumexp(x.float(), -1) for x in logits.split(ROWS)])
        ctx.save_for_backward(hidden, weight, targets, logits, lse)
        ctx.gemm = gemm
        return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1).float() - lse

    @staticmethod
    def backward(ctx, g):
        hidden, weight, targets, logits, lse = ctx.saved_tensors
        for at in range(0, logits.shape[0], ROWS):
            rows = slice(at, at + ROWS)
            x = logits[rows].float().sub_(lse[rows, None]).exp_().mul_(-g[rows, None])
            logits[rows] = x.scatter_add_(-1, targets[rows, None], g[rows, None])
        return ctx.gemm(logits, weight.T.contiguous()), logits.T @ hidden, None, None


def linear_eager(hidden, weight, targets):
    """The logits in full, then log_softmax and gather."""
    return eager(F.linear(hidden, weight), targets)
