"""Losses of ranked groups as plain PyTorch writes them, and the strongest that we could write."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

BETA = 0.1  # of log-ratios


def plackett_luce(scores, rewards):
    """Sorted by reward; a cumulative log-sum-exp from the end."""
    s = scores.gather(1, rewards.argsort(1, descending=True))
    return (s.flip(1).logcumsumexp(1).flip(1) - s).sum(1).mean()


def all_pairs(scores, rewards):
    """Sorted by reward; the pairs by index."""
    s = scores.gather(1, rewards.argsort(1, descending=True))
    i, j = torch.triu_indices(s.shape[1], s.shape[1], 1, device=s.device)
    return -logsigmoid(s[:, i] - s[:, j]).mean()


def exo(scores, rewards, ref_scores):
    """The KL of two softmaxes."""
    log_p = torch.log_softmax(BETA * (scores - ref_scores), 1)
    return (log_p.exp() * (log_p - torch.log_softmax(rewards, 1))).sum(1).mean()


def plackett_luce_pairs(scores, rewards):
    """Without a sort: who is ahead of whom, [P, K, K]."""
    behind = rewards.unsqueeze(2) >= rewards.unsqueeze(1)
    z = scores.unsqueeze(1).masked_fill(~behind, -torch.inf)
    return (torch.logsumexp(z, 2) - scores).sum(1).mean()


def all_pairs_matrix(scores, rewards):
    """Without a sort."""
    better = rewards.unsqueeze(2) > rewards.unsqueeze(1)
    z = logsigmoid(scores.unsqueeze(2) - scores.unsqueeze(1))
    pairs = scores.shape[1] * (scores.shape[1] - 1) // 2
    return -torch.where(better, z, 0.0).sum() / (pairs * scores.shape[0])


LOSSES = {"plackett_luce": plackett_luce, "all_pairs": all_pairs, "exo": exo}
UNSORTED = {"plackett_luce": plackett_luce_pairs, "all_pairs": all_pairs_matrix}
