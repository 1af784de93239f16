"""Losses of single responses in plain PyTorch, a whole batch at a time."""

from __future__ import annotations

import torch

from rlfast.fallback.pair_loss import denominator, formula_of, of_pairs, scored
from rlfast.fallback.sequences import pull_back, sums_of, within
from rlfast.kernels.formulas import SINGLES
from rlfast.kernels.formulas.unpaired import Single
from rlfast.ops.preference_records import Output, Rest, Settings, Side, SingleMetrics


def forward(side: Side, desirable, rest: Rest, terms, settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/unpaired_loss.py``."""
    whole, side = side, within(side)
    sums = sums_of(side, None, 1.0)
    good = desirable.to(sums.logp.dtype)
    extra, shared = (of_pairs(x, sums.logp) for x in (rest.extra, rest.shared))
    total, d = torch.zeros_like(sums.logp), torch.zeros_like(sums.logp)
    reward, *terms = terms
    for term in terms:
        s, slope = scored(term, sums)
        link, hyper = formula_of(SINGLES, term.link, term.link_hyper)
        value, by_s = link(Single(s, good, extra, shared), hyper)
        total = total + term.weight * torch.where(s == s, value, s)
        d = d + term.weight * (slope * by_s)
    scale = settings.factor / denominator(rest, reduce, sums.logp.shape[0])
    weights, zero = of_pairs(rest.weights, sums.logp, 1.0), torch.zeros_like(sums.logp)
    used = weights != 0
    losses = torch.where(used, weights * total, zero)
    rewards = reward.weight * scored(reward, sums)[0]
    loss = losses.sum(dtype=torch.float64) * scale

    def mean(x, kind):
        return torch.where(used & kind, x, zero).sum(dtype=torch.float64) / (used & kind).sum().clamp(min=1)

    kinds = desirable, ~desirable
    counts = [(used & kind).sum(dtype=torch.float64) for kind in kinds]
    found = SingleMetrics(loss, *counts, *(mean(x, kind) for x in (rewards, sums.logp) for kind in kinds))
    out.loss.copy_(loss)
    out.metrics.copy_(torch.stack(found))
    if out.losses.numel():
        out.losses.copy_(losses)
        out.rewards[0].copy_(rewards)
    if out.d_first.numel():
        d = torch.where(used, scale * weights * d, zero).to(out.d_first.dtype)
        part = out.d_first
        part = part if whole.cu_seqlens is None else part[whole.cu_seqlens[0] : whole.cu_seqlens[-1]]
        pull_back(side, sums, d, part)
