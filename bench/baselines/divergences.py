"""Divergences as trainers write them, and the strongest plain PyTorch that we could write, at most 40 lines each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ROWS = 16  # 16 rows of 49152 float32 logits are 3 MiB: the temporaries of a chunk stay in the cache


def eager(logits, ref_logits):
    """KL(ref‖policy) a token: two log_softmaxes and kl_div, what everyone writes first."""
    terms = F.kl_div(logits.log_softmax(-1), ref_logits.log_softmax(-1), reduction="none", log_target=True)
    return terms.sum(-1)


def log_ratio(x, y):
    """(log Σe^x, log Σe^y, Σ T·(y − x)) of a few rows in float32, T = softmax(y)."""
    x, y = x.float(), y.float()
    lse, ref_lse = torch.logsumexp(x, -1), torch.logsumexp(y, -1)
    mean = ((y - ref_lse[:, None]).exp_() * (y - x)).sum(-1)
    return lse, ref_lse, mean


class ChunkedKL(torch.autograd.Function):
    """KL(ref‖policy) whose backward writes S − T a chunk at a time: one [N, V] gradient, no other temporary of its
    size."""

    @staticmethod
    def forward(ctx, logits, ref_logits):
        parts = [log_ratio(x, y) for x, y in zip(logits.split(ROWS), ref_logits.split(ROWS), strict=True)]
        lse, ref_lse, mean = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(logits, ref_logits, lse, ref_lse)
        return mean - ref_lse + lse

    @staticmethod
    def backward(ctx, g):
        logits, ref_logits, lse, ref_lse = ctx.saved_tensors
        out = torch.empty_like(logits)
        for at in range(0, logits.shape[0], ROWS):
            rows = slice(at, at + ROWS)
            p = (logits[rows].float() - lse[rows, None]).exp_()
            q = (ref_logits[rows].float() - ref_lse[rows, None]).exp_()
            out[rows] = p.sub_(q).mul_(g[rows, None])
        return out, None


def linear_eager(hidden, weight, ref_hidden, ref_weight):
    """Both logits in full."""
    return eager(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight))


class LinearKL(torch.autograd.Function):
    """KL(ref‖policy) of two heads: both logits kept, S − T in place of the student's, two more GEMMs."""

    @staticmethod
    def forward(ctx, hidden, weight, ref_hidden, ref_weight, gemm):
        logits, ref_logits = gemm(hidden, weight), gemm(ref_hidden, ref_weight)
        parts = [log_ratio(x, y) for x, y in zip(logits.split(ROWS), ref_logits.split(ROWS), strict=True)]
        lse, ref_lse, mean = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, logits, ref_logits, lse, ref_lse)
        ctx.gemm = gemm
        return mean - ref_lse + lse

    @staticmethod
    def backward(ctx, g):
        hidden, weight, logits, ref_logits, lse, ref_lse = ctx.saved_tensors
        for at in range(0, logits.shape[0], ROWS):
            rows = slice(at, at + ROWS)
            p = logits[rows].float().sub_(lse[rows, None]).exp_()
            q = ref_logits[rows].float().sub_(ref_lse[rows, None]).exp_()
            logits[rows] = p.sub_(q).mul_(g[rows, None]).to(logits.dtype)
        return ctx.gemm(logits, weight.T.contiguous()), logits.T @ hidden, None, None, None


def eager_jsd(logits, ref_logits):
    """The JSD of β = ½ a token, as TRL's distillation writes it."""
    log_s, log_t = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    half = -0.6931471805599453
    log_m = torch.logaddexp(log_s + half, log_t + half)
    kl_t = F.kl_div(log_m, log_t, reduction="none", log_target=True)
    kl_s = F.kl_div(log_m, log_s, reduction="none", log_target=True)
    return (0.5 * kl_t + 0.5 * kl_s).sum(-1)


def linear_eager_jsd(hidden, weight, ref_hidden, ref_weight):
    """Both logits in full."""
    return eager_jsd(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight))
