"""Losses of ranked groups in plain PyTorch: the formulas on [groups, candidates, candidates], some groups at a time."""

from __future__ import annotations

import torch

from rlfast.fallback.pair_loss import denominator, of_pairs
from rlfast.kernels.formulas import RANKINGS
from rlfast.kernels.formulas.ranked import Group
from rlfast.kernels.lang import torch_version
from rlfast.ops.ranked_records import Groups, Metrics, Output, Settings, most_of, rows_of

PAIRS_AT_A_TIME = 1 << 20  # of candidates: 4 MiB a temporary


def forward(groups: Groups, form: str, settings: Settings, reduce: int, most: int, out: Output) -> None:
    """See ``rlfast/ops/ranked_loss.py``."""
    if not groups.scores.numel():
        for x in (out.loss, out.metrics, out.losses):
            x.zero_()
        return
    rows, scale = rows_of(groups), settings.factor / denominator(groups, reduce, rows_of(groups))
    most = most_of(groups, most, 0) or int(groups.cu_seqlens.diff().max())  # a synchronisation, on a GPU alone
    step = max(1, PAIRS_AT_A_TIME // max(most * most, 1))
    sums = torch.zeros(len(Metrics._fields) + 1, dtype=torch.float64, device=out.loss.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        inside, at = _places(groups, part, most)
        sums = sums + _some(groups, part, inside, at, form, settings, scale, out)
    loss, n, candidates, pairs, right, reward, score = sums
    loss, each = loss * scale, n.clamp(min=1)
    out.loss.copy_(loss)
    out.metrics.copy_(torch.stack((loss, n, candidates, right / pairs.clamp(min=1), reward / each, score / each)))


def _places(groups: Groups, part: slice, most: int):
    """(whether there is a candidate, where it is among the flattened ones) of some groups: [G, most]."""
    slot = torch.arange(most, device=groups.scores.device)
    if groups.cu_seqlens is None:
        begin = torch.arange(part.start, part.stop, device=slot.device).unsqueeze(1) * most
        return torch.ones_like(begin + slot, dtype=torch.bool), begin + slot
    ends = groups.cu_seqlens[part.start : part.stop + 1]
    inside = slot < ends.diff().unsqueeze(1)
    return inside, torch.where(inside, ends[:-1].unsqueeze(1) + slot, 0)


def _some(groups: Groups, part: slice, inside, at, form: str, settings: Settings, scale, out: Output):
    """The sums of some groups; their losses and gradients."""
    acc = out.loss.dtype
    valid = inside if groups.mask is None else inside & groups.mask.reshape(-1)[at]

    def field(x, missing):
        return missing if x is None else torch.where(valid, x.reshape(-1)[at].to(acc), 0.0)

    s = field(groups.scores, None)
    divisor = torch.where(valid, field(groups.divisor, torch.ones_like(s)), 1.0)
    x = settings.beta * (s - field(groups.ref_scores, torch.zeros_like(s))) / divisor
    group = group_of(x, field(groups.rewards, None), valid)
    formula, hyper, _ = RANKINGS[form]
    value, d = torch_version(formula)(group, hyper(settings.tau, settings.top))
    best = valid & (group.place == 0)
    if settings.nll:
        weight = settings.nll * ((group.count - 1) ** 2 if settings.nll_by_size else torch.ones_like(group.count))
        value = value - weight * torch.where(best, s, 0.0).sum(1)
    bad = sum(torch.where(y == y, 0.0, y).sum(1) for y in (x, group.reward))  # a comparison may drop a NaN
    weights = of_pairs(None if groups.weights is None else groups.weights[part], value, 1.0)
    used = (weights != 0) & (group.count > 1)
    losses = torch.where(used, weights * (value + bad), 0.0)  # not a product: what is left out may be infinite
    if out.losses.numel():
        out.losses[part] = losses
    if out.d_scores.numel():
        by_s = settings.beta / divisor * d
        if settings.nll:
            by_s = by_s - torch.where(best, weight.unsqueeze(1), 0.0)
        by_s = torch.where(used.unsqueeze(1) & valid, (scale * weights).unsqueeze(1) * (by_s + bad.unsqueeze(1)), 0.0)
        out.d_scores.view(-1)[at[inside]] = by_s[inside].to(acc)
    better = group.ahead & (group.reward.unsqueeze(2) > group.reward.unsqueeze(1))
    right = better & (x.unsqueeze(2) > x.unsqueeze(1))
    counts = used, group.count, better.sum((1, 2)), right.sum((1, 2))
    reward = torch.zeros_like(x) if groups.rewards is None else group.reward
    seen = (losses, *counts, torch.where(best, reward, 0.0).sum(1), torch.where(best, x, 0.0).sum(1))
    return torch.stack([torch.where(used, y.double(), 0.0).sum() for y in seen])


def group_of(x, reward, valid) -> Group:
    """What the formulas see. Without rewards the best comes first."""
    slot = torch.arange(x.shape[1], device=x.device)
    reward = torch.where(valid, -slot.to(x.dtype), 0.0) if reward is None else reward
    i, j = reward.unsqueeze(2), reward.unsqueeze(1)
    ahead = (i > j) | ((i == j) & (slot.unsqueeze(1) < slot))
    ahead = ahead & valid.unsqueeze(2) & valid.unsqueeze(1)
    return Group(x, reward, valid, ahead, ahead.sum(1).to(x.dtype), valid.sum(1).to(x.dtype))
