"""A policy loss: the definition, by autograd alone, a padded sequence a row.

loss = factor/n · Σ_t m_t·c_t·(s_t·ρ_t·w_t + beta·KL_t) − bonus,   every weight beside s_t detached
"""

from types import SimpleNamespace

import torch

from . import surrogates

INF = float("inf")
SEQUENCE = ("seq_mean", "seq_sum", "seq_mean_through")

# What an objective may say, in words; the names are those of rlfast.Loss and rlfast.Correction.
OPTIONS = {
    "unit": "token", "signed": False, "mean_adv": False, "inner_low": -INF, "inner_high": INF, "unit_low": -INF,
    "unit_high": INF, "kl": None, "beta": 0.0, "kl_d_max": INF, "kl_max": INF, "kl_ratio": None,
    "reduce": "token_mean", "count_empty": False, "max_len": 1.0, "factor": 1.0, "entropy_coef": 0.0,
    "entropy_mean": False, "entropy_factor": 1.0, "weight": None, "weight_low": 0.0, "weight_high": INF,
    "weight_in_ratio": False, "gate": None, "gate_kind": "k1", "gate_low": -INF, "gate_high": INF,
    "gate_masks": False, "off_policy": INF,
}  # fmt: skip


def _mean(x, mask):
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _at(level, x, mask):
    """x of each token, or its sum or mean over the sequence for each of its tokens."""
    if level == "token":
        return x
    return ((x * mask).sum(-1, keepdim=True) if level == "seq_sum" else _mean(x, mask)).expand_as(x)


def _importance(old, rollout, mask, o):
    """(log ρ of the tokens, the weight ρ, whether the gate is open): a NaN counts as ρ = 1."""
    drift = torch.zeros_like(old) if rollout is None else (old - rollout).nan_to_num(nan=0.0)
    weight = torch.ones_like(drift)
    if o.weight:
        weight = _at(o.weight, drift, mask).exp().clamp(o.weight_low, o.weight_high)
    opened = torch.ones_like(mask)
    if o.gate:
        seen = {"k1": drift, "k2": drift**2 / 2, "k3": drift.exp() - 1 - drift}[o.gate_kind]
        seen = _at(o.gate, seen, mask)
        opened = ((seen >= o.gate_low) & (seen <= o.gate_high)).to(mask.dtype)
    return drift, weight, opened


def _log_ratio(logp, old, adv, mask, weight, o):
    """(x of the tokens, x of their unit)."""
    raw = logp - old
    low, high = torch.full_like(raw, o.inner_low), torch.full_like(raw, o.inner_high)
    if o.signed:
        low, high = torch.where(adv > 0, -INF, low), torch.where(adv < 0, INF, high)
    x = torch.minimum(torch.maximum(raw, low), high)
    unit = x
    if o.unit in SEQUENCE:
        total = (x * mask).sum(-1, keepdim=True)
        if o.weight_in_ratio:
            total = total + (weight.log().clamp(-18.420680743952367, 20.0) * mask).sum(-1, keepdim=True)
        unit = total if o.unit == "seq_sum" else total / mask.sum(-1, keepdim=True).clamp(min=1)
        if o.unit == "seq_mean_through":
            unit = logp - logp.detach() + unit.detach()
    return x, unit.clamp(o.unit_low, o.unit_high).expand_as(raw)


def _kl(logp, ref, x, ratio, o):
    """The estimate, multiplied by the ratio where that is asked for."""
    value = surrogates.kl_estimate(o.kl, ref - logp, o.kl_d_max, o.kl_max)
    if o.kl_ratio == "score":
        free = value.detach().abs() < o.kl_max
        return value + value.detach() * free * (torch.exp(logp - logp.detach()) - 1)
    return value * {None: 1.0, "unit": ratio, "token": x.exp()}[o.kl_ratio]


def token_loss(
    logp,  # [B, T]
    adv,
    old_logp=None,
    ref_logp=None,
    rollout_logp=None,
    entropy=None,
    weights=None,
    extra=None,
    mask=None,
    keep=None,
    num_items=None,
    full_kl=None,
    *,
    surrogate,
    hyper,
    dtype=None,
    **options,
):
    """(loss, metrics) by the definition, in ``dtype``. ``options`` are those of ``OPTIONS``."""
    o = SimpleNamespace(**(OPTIONS | options))
    dtype = dtype or (torch.float64 if logp.dtype == torch.float64 else torch.float32)
    counted = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask != 0

    def clean(x):
        return None if x is None else torch.where(counted, x.to(dtype).expand_as(logp), torch.zeros((), dtype=dtype))

    lp, adv, ref, rollout, extra = (clean(x) for x in (logp, adv, ref_logp, rollout_logp, extra))
    extra = torch.zeros_like(lp) if extra is None else extra
    old = lp.detach() if old_logp is None else clean(old_logp)
    h = torch.zeros_like(lp) if entropy is None else clean(entropy)
    m = counted.to(dtype)
    drift, weight, opened = _importance(old, rollout, m, o)
    m = m * opened if o.gate_masks else m
    if o.mean_adv:
        mean = _mean(adv, m).expand_as(lp)
    applied = weight * opened
    x, unit = _log_ratio(lp, old, adv, m, applied, o)
    adv = mean if o.mean_adv else adv
    ratio = unit.exp()
    seen = SimpleNamespace(logp=lp, old_logp=old, log_ratio=unit, ratio=ratio, adv=adv, extra=extra)
    value = getattr(surrogates, surrogate)(seen, **hyper)
    beyond = (lp - old != x) & (lp != old)
    clipped = surrogates.clipped(surrogate, seen, hyper) | beyond

    kept = m * (1.0 if keep is None else keep.to(dtype))
    factor = torch.ones_like(m) if o.weight_in_ratio else torch.where(opened > 0, weight, torch.zeros_like(weight))
    factor = factor if weights is None else factor * clean(weights)
    factor = torch.where(kept > 0, factor, torch.zeros_like(factor))
    if o.off_policy < INF:
        moved = _mean(((old if rollout is None else rollout) - lp.detach()).nan_to_num(nan=0.0), m)
        factor = factor * ((adv >= 0) | (moved <= o.off_policy))
    used = (m > 0) & (factor != 0)
    value = torch.where(used, value * factor, torch.zeros_like(value))
    kl = torch.zeros_like(lp)
    if o.kl:
        kl = torch.where(m > 0, clean(full_kl) if o.kl == "full" else _kl(lp, ref, x, ratio, o), kl)
    return _reduced(o, m, kept, value, kl, h, num_items, (x, ratio, drift, applied, used, clipped & used))


def _reduced(o, m, kept, value, kl, h, num_items, seen):
    length = m.sum(-1, keepdim=True)
    c = m / length.clamp(min=1) if o.reduce == "seq_mean_token_mean" else m
    tokens, sequences = m.sum(), (length > 0).sum().to(m.dtype)
    sequences = torch.full_like(tokens, m.shape[0]) if o.count_empty else sequences
    n = {"token_mean": tokens, "token_sum": torch.ones_like(tokens)}.get(o.reduce, sequences)
    n = n if num_items is None else torch.as_tensor(num_items).to(m.dtype)
    n = n * o.max_len if o.reduce == "seq_sum_over_max_len" else n
    scale = o.factor / torch.where(n > 0, n, torch.ones_like(n))
    policy, penalty = (c * value).sum() * scale, (c * kl).sum() * scale
    entropy_scale = o.entropy_factor / kept.sum().clamp(min=1) if o.entropy_mean else scale
    bonus = ((kept if o.entropy_mean else c) * h).sum() * entropy_scale
    loss = policy + o.beta * penalty - o.entropy_coef * bonus
    part = (c * value).abs().sum() * scale
    whole = part + o.beta * (c * kl).abs().sum() * scale + abs(o.entropy_coef) * bonus.abs()
    metrics = _metrics(o, m, kl, h, (loss, scale, entropy_scale, tokens, sequences, policy), seen)
    return loss, metrics | {"sizes": _sizes(m, kl, seen[0]) | {"loss": whole.detach(), "policy_loss": part.detach()}}


def _sizes(m, kl, x):
    """Σ|terms| of the metrics whose terms may cancel: what the rounding of a sum is measured against."""
    n = m.sum().clamp(min=1)

    def size(y):
        return torch.where(m > 0, y.detach().abs(), torch.zeros_like(y)).sum() / n

    return {"kl": size(kl), "approx_kl_k1": size(x)}


def _metrics(o, m, kl, h, sums, seen):
    """Every metric by its name."""
    x, ratio, drift, applied, used, clipped = (y.detach() for y in seen)
    n = m.sum().clamp(min=1)

    def mean(y):
        return torch.where(m > 0, y, torch.zeros_like(y)).sum() / n

    def largest(y):
        return torch.where(m > 0, y, torch.zeros_like(y)).max() if y.numel() else n.new_zeros(())

    w = torch.where(m > 0, ratio if o.weight_in_ratio else ratio * applied, torch.zeros_like(m)).clamp(max=1e15)
    w = torch.where(w < 1e-15, torch.zeros_like(w), w)  # the squares stay within float32
    squares = (w * w).sum()
    ess = torch.where(squares != 0, w.sum() ** 2 / (n * squares), torch.zeros_like(n))
    names = ("loss", "scale", "entropy_scale", "tokens", "sequences", "policy_loss")
    return dict(zip(names, (y.detach() for y in sums), strict=True)) | {
        "kl": mean(kl.detach()), "entropy": mean(h.detach()), "approx_kl_k1": mean(-x),
        "approx_kl_k3": mean(torch.expm1(x) - x), "clip_low": mean((clipped & (ratio < 1)).to(m.dtype)),
        "clip_high": mean((clipped & (ratio >= 1)).to(m.dtype)), "ratio_mean": mean(ratio),
        "ratio_max": largest(ratio), "ess": ess, "dropped": mean(1.0 - used.to(m.dtype)),
        "rollout_ratio_mean": mean(drift.exp()),
        "rollout_ratio_max": largest(drift.exp()),
    }  # fmt: skip
