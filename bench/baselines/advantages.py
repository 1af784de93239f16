"""Advantages in plain PyTorch: the loops that trainers have, and the strongest that we could write."""

from __future__ import annotations

from collections import defaultdict

import torch

CHUNK = 64  # tokens of a chunk: its [64, 64] matrix of powers of γλ stays in the L1


def gae_loop(rewards, values, mask, gamma, lam):
    """The masked loop: a Python step a token, over all rows."""
    ahead, last, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in reversed(range(values.shape[1])):
        m = mask[:, t]
        here = rewards[:, t] + gamma * ahead - values[:, t] + gamma * lam * last
        ahead = values[:, t] * m + (1 - m) * ahead
        last = here * m + (1 - m) * last
        out.append(last)
    advantages = torch.stack(out[::-1], 1)
    return advantages, advantages + values


def gae_chunked(rewards, values, gamma, lam):
    """A chunk of tokens is one product with a matrix of powers of γλ; a Python step a chunk. No masked tokens."""
    rows, steps = values.shape
    delta = rewards - values
    delta[:, :-1].add_(values[:, 1:], alpha=gamma)
    delta = torch.nn.functional.pad(delta, (0, -steps % CHUNK)).view(rows, -1, CHUNK)
    place = torch.arange(CHUNK)
    gap = place.unsqueeze(1) - place  # of the later token over the earlier one
    powers = torch.where(gap >= 0, (gamma * lam) ** gap.clamp(min=0).double(), 0.0).float()
    out = delta @ powers
    decay = (gamma * lam) ** (CHUNK - place.double()).float()
    for chunk in reversed(range(out.shape[1] - 1)):
        out[:, chunk].addcmul_(out[:, chunk + 1, :1], decay)
    advantages = out.reshape(rows, -1)[:, :steps]
    return advantages, advantages + values


def vtrace_loop(rewards, values, log_ratio, mask, gamma, lam):
    """V-trace by a Python step a token."""
    rho = log_ratio.exp().clamp(max=1.0)
    ahead, last, errors, advantages = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), [], []
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * ahead - values[:, t]
        advantages.append(rho[:, t] * (delta + gamma * lam * last))
        here = rho[:, t] * (delta + gamma * lam * last)
        ahead = torch.where(mask[:, t], values[:, t], ahead)
        last = torch.where(mask[:, t], here, last)
        errors.append(last)
    return torch.stack(advantages[::-1], 1), torch.stack(errors[::-1], 1) + values


def unpacked(function, rewards, values, cu_seqlens, gamma, lam):
    """A padded loop for packed rows: to [rows, longest] and back."""
    lengths = cu_seqlens.diff()
    there = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    r, v = (torch.zeros(there.shape).masked_scatter_(there, x) for x in (rewards, values))
    return tuple(x[there] for x in function(r, v, there.float(), gamma, lam))


def group_loop(rewards, ids, eps):
    """A dict of lists, filled answer by answer."""
    groups, out = defaultdict(list), torch.empty_like(rewards)
    keys = ids.tolist()
    for i, key in enumerate(keys):
        groups[key].append(rewards[i])
    means = {key: torch.stack(found).mean() for key, found in groups.items()}
    stds = {key: torch.stack(found).std() for key, found in groups.items()}
    for i, key in enumerate(keys):
        out[i] = (rewards[i] - means[key]) / (stds[key] + eps)
    return out


def group_scatter(rewards, ids, eps):
    """Sums scattered to the groups and gathered back."""
    unique, index = ids.unique(return_inverse=True)
    zero = torch.zeros(len(unique))
    count = zero.index_add(0, index, torch.ones_like(rewards))
    mean = zero.index_add(0, index, rewards) / count
    centred = rewards - mean[index]
    std = (zero.index_add(0, index, centred.square()) / (count - 1)).sqrt()
    return centred / (std[index] + eps)


def group_view(rewards, size, eps):
    """Groups of one size, one after the other, as rows."""
    r = rewards.view(-1, size)
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + eps)).view(-1)
