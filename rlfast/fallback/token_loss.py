"""Policy losses in plain PyTorch: the same stages as the kernels, a whole batch at a time.

ρ and its gate → x of the unit → surrogate → weights → + β·KL − c·H → weighted sum
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.kernels.formulas import SURROGATES, kl, token
from rlfast.kernels.lang import torch_version
from rlfast.ops import loss_records as records
from rlfast.ops.loss_records import LOG_LEAST, Fields, Metrics, Output, Plan, Settings


class Batch(NamedTuple):
    """The fields in the compute dtype, zeros where masked; every one [rows, T] or [N]."""

    lp: torch.Tensor
    old: torch.Tensor
    ref: torch.Tensor | None
    rollout: torch.Tensor | None
    adv: torch.Tensor
    entropy: torch.Tensor
    weights: torch.Tensor | None
    extra: torch.Tensor | float
    mask: torch.Tensor  # bool
    keep: torch.Tensor  # bool: counts, and its surrogate does
    cu_seqlens: torch.Tensor | None

    def rows(self, x):
        """Σ over each sequence, as [rows, 1] or [N]: what broadcasts over its tokens."""
        x = torch.where(self.mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
        total = self.segments(x) if self.cu_seqlens is not None else x.sum(-1, keepdim=True, dtype=torch.float64)
        return self.spread(total.to(x.dtype))

    def segments(self, x):
        """Σ over each packed sequence: [rows]."""
        return torch.segment_reduce(x.double(), "sum", offsets=self.cu_seqlens, initial=0)

    def spread(self, x):
        """One number a packed sequence, for each of its tokens."""
        if self.cu_seqlens is None:
            return x
        return torch.repeat_interleave(x, self.cu_seqlens.diff(), output_size=self.lp.shape[0])


def batch_of(fields: Fields) -> Batch:
    """The batch, with what is missing or masked replaced by what has no effect."""
    logp = fields.logp
    acc = torch.float64 if logp.dtype == torch.float64 else torch.float32
    mask = torch.ones_like(logp, dtype=torch.bool) if fields.mask is None else fields.mask
    zero = torch.zeros((), dtype=acc, device=logp.device)

    def clean(x):
        return None if x is None else torch.where(mask, x.to(acc), zero)

    lp, entropy, extra = clean(logp), clean(fields.entropy), clean(fields.extra)
    old = lp if fields.old_logp is None else clean(fields.old_logp)
    keep = mask if fields.keep is None else mask & fields.keep
    rest = clean(fields.ref_logp), clean(fields.rollout_logp), clean(fields.adv)
    entropy = torch.zeros_like(lp) if entropy is None else entropy
    extra = 0.0 if extra is None else extra
    return Batch(lp, old, *rest, entropy, clean(fields.weights), extra, mask, keep, fields.cu_seqlens)


def at_level(b: Batch, x, level: int, count):
    """x of the token, or its sum or mean over the sequence."""
    if level == records.AT_TOKEN:
        return x
    total = b.rows(x)
    return total if level == records.AT_SEQ_SUM else total / count


def corrected(b: Batch, plan: Plan, s: Settings):
    """(log ρ of the token, ρ as it is applied, whether the gate is open)."""
    drift = torch.zeros_like(b.lp) if b.rollout is None else (b.old - b.rollout).nan_to_num(nan=0.0)
    count = b.rows(b.mask.to(drift.dtype)).clamp(min=1.0)
    weight, opened = torch.ones_like(drift), torch.ones_like(b.mask)
    if plan.weight:
        weight = at_level(b, drift, plan.weight, count).exp().clamp(s.weight_low, s.weight_high)
    if plan.gate:
        looked_at = {1: drift, 2: 0.5 * drift.square(), 3: torch.expm1(drift) - drift}[plan.gate_kind]
        looked_at = at_level(b, looked_at, plan.gate, count)
        opened = (looked_at >= s.gate_low) & (looked_at <= s.gate_high)
    return drift, weight.expand_as(drift), opened.expand_as(b.mask)


def log_ratios(b: Batch, plan: Plan, s: Settings, applied):
    """(x of the token within its bounds, its slope, x of the unit, its slope)."""
    raw = b.lp - b.old
    low, high = s.inner_low, s.inner_high
    if plan.signed:
        infinite = torch.full_like(raw, torch.inf)
        low, high = torch.where(b.adv > 0, -infinite, low), torch.where(b.adv < 0, infinite, high)
    x = torch.minimum(torch.maximum(raw, torch.as_tensor(low).to(raw)), torch.as_tensor(high).to(raw))
    slope = ((raw >= low) & (raw <= high)).to(raw.dtype)
    if plan.unit == records.TOKEN:
        unit = x
    else:
        total = b.rows(x)
        if plan.weight_in_ratio:
            total = total + b.rows(applied.log().clamp(LOG_LEAST, 20.0))
        count = b.rows(b.mask.to(x.dtype)).clamp(min=1.0)
        unit = total if plan.unit == records.SEQ_SUM else total / count
    bounded = unit.clamp(s.unit_low, s.unit_high)
    inside = ((unit >= s.unit_low) & (unit <= s.unit_high)).to(x.dtype)
    return x, slope, bounded.expand_as(x), inside


def pulled_back(b: Batch, plan: Plan, per_token, slope, inside):
    """∂/∂log p of each token from ∂/∂x of each token's unit."""
    if plan.unit == records.TOKEN:
        return per_token * slope * inside
    if plan.unit == records.SEQ_MEAN_THROUGH:
        return per_token * inside
    total = b.rows(per_token * inside)
    if plan.unit == records.SEQ_MEAN:
        total = total / b.rows(b.mask.to(slope.dtype)).clamp(min=1.0)
    return torch.where(b.mask, total * slope, torch.zeros_like(slope))


def forward(fields: Fields, surrogate: str, estimator: str, plan, settings, hyper, kl_hyper, needs) -> Output:
    """See ``rlfast/ops/token_loss.py``."""
    plan, s = Plan(*plan), Settings(*settings)
    b = batch_of(fields)
    beta, entropy_coef = s.beta, s.entropy_coef
    if fields.coefs is not None:
        beta, entropy_coef = beta * fields.coefs[0], entropy_coef * fields.coefs[1]
    drift, weight, opened = corrected(b, plan, s)
    if plan.gate_masks:
        b = b._replace(mask=b.mask & opened, keep=b.keep & opened)
    applied = torch.where(opened, weight, torch.zeros_like(weight))
    zero, ones = torch.zeros_like(b.lp), b.mask.to(b.lp.dtype)
    count = b.rows(ones)
    adv = (b.rows(b.adv) / count.clamp(min=1.0)).expand_as(b.lp) if plan.mean_adv else b.adv

    x, slope, unit, inside = log_ratios(b, plan, s, applied)
    ratio = unit.exp()
    formula = SURROGATES[surrogate]
    seen = token.Token(b.lp, b.old, unit, ratio, adv, b.extra)
    value, d_x, d_lp, clipped = torch_version(formula.function)(seen, formula.hyper(*hyper))

    value = torch.where(unit == unit, value, unit)  # a formula's minimum and maximum may drop a NaN

    multiplier = ones if plan.weight_in_ratio else applied
    if b.weights is not None:
        multiplier = multiplier * b.weights
    multiplier = torch.where(b.keep, multiplier, zero)  # not a product: what is left out may be infinite
    if s.off_policy < float("inf"):
        sampled = b.old if b.rollout is None else b.rollout
        moved = b.rows((sampled - b.lp).nan_to_num(nan=0.0)) / count.clamp(min=1.0)
        multiplier = torch.where((adv >= 0) | (moved <= s.off_policy), multiplier, zero)
    clipped = torch.where(slope == 0, torch.ones_like(slope), torch.as_tensor(clipped).to(slope))
    used = b.mask & (multiplier != 0)
    value, d_x, d_lp = (torch.where(used, multiplier * y, zero) for y in (value, d_x, d_lp))

    kl_value = zero
    if estimator:
        d = b.ref - b.lp
        bounds = kl.KlBounds(*kl_hyper)
        kl_value, d_kl = torch_version(getattr(kl, estimator))(d, bounds)
        d_kl = -d if plan.kl_through else d_kl
        through = torch.zeros_like(d)
        if plan.kl_ratio == 3:
            d_kl = d_kl + torch.where(kl_value.abs() < bounds.kl_max, kl_value, zero)
        elif plan.kl_ratio:
            r = ratio if plan.kl_ratio == 1 else x.exp()
            kl_value, d_kl = r * kl_value, r * d_kl
            through = kl_value
        kl_value, d_kl, through = (torch.where(b.mask, y, zero) for y in (kl_value, d_kl, through))
        if plan.kl_ratio == 2:
            d_kl, through = d_kl + through * slope, zero
        d_x, d_lp = d_x + beta * through, d_lp + beta * d_kl

    c = ones / count.clamp(min=1.0) if plan.reduce == records.SEQ_MEAN_TOKEN_MEAN else ones
    dlogp = c * d_lp + pulled_back(b, plan, c * d_x, slope, inside)
    kept = b.keep.to(ones.dtype) if plan.entropy_mean else c
    totals = _totals(b, plan, c, kept, (value, kl_value), (x, ratio, clipped, used, drift, applied))
    return _finished(fields, plan, s, needs, totals, (beta, entropy_coef), (dlogp, kept))


def _totals(b: Batch, plan: Plan, c, kept, parts, seen) -> dict:
    """The sums that the loss and the metrics are made of."""
    value, kl_value = parts
    x, ratio, clipped, used, drift, applied = seen
    ones = b.mask.to(x.dtype)

    def total(y):
        return torch.where(b.mask, y, torch.zeros_like(y)).sum(dtype=torch.float64)

    def largest(y):
        return torch.where(b.mask, y, torch.zeros_like(y)).amax() if y.numel() else y.new_zeros(())

    w = (ratio if plan.weight_in_ratio else ratio * applied).clamp(max=records.LARGEST_WEIGHT)
    w = torch.where(w < records.SMALLEST_WEIGHT, torch.zeros_like(w), w)
    clipped = torch.where(used, clipped, torch.zeros_like(x))
    per_row = ones.sum(-1) if b.cu_seqlens is None else b.segments(ones)
    return {
        "policy": total(c * value), "kl_part": total(c * kl_value), "entropy_part": total(kept * b.entropy),
        "kept": total(kept), "tokens": total(ones),
        "sequences": per_row.numel() if plan.count_empty else (per_row > 0).sum(dtype=torch.float64),
        "kl": total(kl_value), "entropy": total(b.entropy), "k1": total(-x), "k3": total(torch.expm1(x) - x),
        "low": total(clipped * (ratio < 1)), "high": total(clipped * (ratio >= 1)),
        "ratio": total(ratio), "ratio_max": largest(ratio), "w": total(w), "w2": total(w * w),
        "dropped": total((~used).to(x.dtype)), "drift": total(drift.exp()), "drift_max": largest(drift.exp()),
    }  # fmt: skip


def denominator(reduce: int, tokens, sequences, num_items, max_len: float):
    """n of a reduction, 1 where it would be 0."""
    if num_items is not None:
        n = num_items
    elif reduce == records.TOKEN_SUM:
        n = tokens * 0 + 1
    else:
        n = tokens if reduce == records.TOKEN_MEAN else tokens * 0 + sequences
    n = n * max_len if reduce == records.SEQ_SUM_OVER_MAX_LEN else n
    return torch.where(n > 0, n, torch.ones_like(n))


def _finished(fields: Fields, plan: Plan, s: Settings, needs, t: dict, coefs, gradients) -> Output:
    """The loss, the metrics and the gradients before their scale."""
    (beta, entropy_coef), (dlogp, kept) = coefs, gradients
    scale = s.factor / denominator(plan.reduce, t["tokens"], t["sequences"], fields.num_items, s.max_len)
    entropy_scale = s.entropy_factor / t["kept"].clamp(min=1.0) if plan.entropy_mean else scale
    policy = scale * t["policy"]
    loss = policy + beta * (scale * t["kl_part"]) - entropy_coef * (entropy_scale * t["entropy_part"])
    n = t["tokens"].clamp(min=1.0)
    one = torch.ones_like(n)
    ess = torch.where(t["w2"] != 0, t["w"] * t["w"] / (n * t["w2"]), torch.zeros_like(n))
    found = Metrics(
        loss, scale, entropy_scale, t["tokens"], one * t["sequences"], policy, t["kl"] / n, t["entropy"] / n,
        t["k1"] / n, t["k3"] / n, t["low"] / n, t["high"] / n, t["ratio"] / n, t["ratio_max"], ess,
        t["dropped"] / n, t["drift"] / n, t["drift_max"],
    )  # fmt: skip
    metrics = torch.stack([one * x for x in found]).to(dlogp.dtype)
    dentropy = -entropy_coef * kept * torch.ones_like(dlogp) if needs[1] else dlogp.new_empty(0)
    return Output(loss.to(dlogp.dtype, copy=True), metrics, dlogp if needs[0] else dlogp.new_empty(0), dentropy)
