"""Preference losses in plain PyTorch: sums → scores → links → Σ, and back, a whole batch at a time."""

from __future__ import annotations

import torch

from rlfast.fallback.sequences import Sums, pull_back, shared_lengths, sums_of, within
from rlfast.kernels.formulas import PAIRS, SCORES
from rlfast.kernels.formulas.pair import Pair
from rlfast.kernels.formulas.score import Response
from rlfast.kernels.lang import torch_version
from rlfast.ops.preference_records import MEAN, Metrics, Output, Rest, Settings, Side, Term


def formula_of(table: dict, name: str, numbers) -> tuple:
    """(a formula as a function of tensors, its hyper-parameters)."""
    found = table[name]
    return torch_version(found.function), found.hyper(*numbers[: len(found.hyper._fields)])


def scored(term: Term, sums: Sums):
    """(s, ∂s/∂S) of each response."""
    formula, hyper = formula_of(SCORES, term.score, term.score_hyper)
    n = sums.length.clamp(min=1)  # the mean of no tokens is 0
    s, slope = formula(Response(sums.logp, sums.log_ratio, n), hyper)
    slope = torch.as_tensor(slope, device=s.device).to(s).expand_as(s)
    return (s / n, slope / n) if term.mean else (s, slope)


def denominator(rest: Rest, reduce: int, rows: int):
    """n, 1 where it would be 0."""
    if rest.num_items is not None:
        return torch.where(rest.num_items > 0, rest.num_items, torch.ones_like(rest.num_items))
    return max(rows, 1) if reduce == MEAN else 1


def of_pairs(x, like, value: float = 0.0):
    """A field in the compute dtype, or a constant where it is missing."""
    return torch.full_like(like, value) if x is None else x.to(like.dtype).expand_as(like)


def forward(chosen: Side, rejected: Side, rest: Rest, terms, settings: Settings, reduce: int, out: Output) -> None:
    """See ``rlfast/ops/pair_loss.py``."""
    chosen, whole_chosen = within(chosen), chosen
    rejected, whole_rejected = within(rejected), rejected
    shared_length = shared_lengths(chosen, rejected, settings.tail)
    w, l_ = (sums_of(side, shared_length, settings.tail) for side in (chosen, rejected))
    fields = [of_pairs(x, w.logp) for x in (rest.margin, rest.extra, rest.shared)]
    total, d_w, d_l = (torch.zeros_like(w.logp) for _ in range(3))
    reward, *terms = terms
    for term in terms:
        (s_w, slope_w), (s_l, slope_l) = scored(term, w), scored(term, l_)
        link, hyper = formula_of(PAIRS, term.link, term.link_hyper)
        value, by_w, by_l = link(Pair(s_w, s_l, w.length, l_.length, *fields), hyper)
        value = torch.where((s_w == s_w) & (s_l == s_l), value, s_w + s_l)  # a minimum or maximum may drop a NaN
        total = total + term.weight * value
        d_w, d_l = d_w + term.weight * (slope_w * by_w), d_l + term.weight * (slope_l * by_l)

    scale = settings.factor / denominator(rest, reduce, w.logp.shape[0])
    weights, zero = of_pairs(rest.weights, w.logp, 1.0), torch.zeros_like(w.logp)
    used = weights != 0
    losses = torch.where(used, weights * total, zero)  # not a product: what is left out may be infinite
    loss = losses.sum(dtype=torch.float64) * scale
    rewards = [reward.weight * scored(reward, sums)[0] for sums in (w, l_)]
    n = used.sum(dtype=torch.float64)

    def mean(x):
        return torch.where(used, x, zero).sum(dtype=torch.float64) / n.clamp(min=1)

    better = (rewards[0] > rewards[1]).to(zero.dtype)
    found = Metrics(
        loss, n, mean(rewards[0]), mean(rewards[1]), mean(better), mean(rewards[0] - rewards[1]), mean(w.logp),
        mean(l_.logp), mean(w.length), mean(l_.length),
    )  # fmt: skip
    out.loss.copy_(loss)
    out.metrics.copy_(torch.stack(found))
    if out.losses.numel():
        out.losses.copy_(losses)
        out.rewards.copy_(torch.stack(rewards))
    for side, whole, sums, d, to in (
        (chosen, whole_chosen, w, d_w, out.d_first), (rejected, whole_rejected, l_, d_l, out.d_second),
    ):  # fmt: skip
        if to.numel():
            d = torch.where(used, scale * weights * d, zero).to(to.dtype)
            part = to if whole.cu_seqlens is None else to[whole.cu_seqlens[0] : whole.cu_seqlens[-1]]
            pull_back(side, sums, d, part)
