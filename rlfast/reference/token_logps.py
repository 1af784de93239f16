"""Token log-probabilities and their companions from logits: the definition.

z = softcap·tanh(logit_scale·logits / softcap) / temperature,  log p = log_softmax(z)
"""

import math

import torch


def transform(logits, temperature=1.0, softcap=None, logit_scale=1.0):
    """Logit scale, then soft-cap, then temperature (a float, or one per row)."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(z.dtype).unsqueeze(-1)
    return z / temperature


def counted_targets(targets, mask, lead: int):
    """ids [*, K], which of them count [*, K], and the rows [*] that have one: not −100, and not masked."""
    ids = targets.long() if targets.dim() > lead else targets.long().unsqueeze(-1)
    counted = ids != -100
    if mask is not None:
        counted = counted & (mask != 0).unsqueeze(-1)
    return ids, counted, counted.any(-1)


def token_logps(
    logits,  # [*, V]
    targets,  # [*] or [*, K]
    *,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    mask=None,  # [*]
    top_k=None,
    dtype=None,
):
    """Every output by its definition, as a dict. Computes in ``dtype`` (default: float32, or float64 for float64)."""
    dtype = dtype or (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    many = targets.dim() == logits.dim()
    ids, counted, rows = counted_targets(targets, mask, logits.dim() - 1)

    zero = torch.zeros((), dtype=dtype, device=logits.device)
    x = torch.where(rows.unsqueeze(-1), logits.to(dtype), zero)  # a skipped row gives neither value nor gradient
    z = transform(x, temperature, softcap, logit_scale)
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()

    def squeeze(x):
        return x if many else x.squeeze(-1)

    possible = p != 0  # lim p→0 of p·log p is 0
    summand = torch.where(possible, p * torch.where(possible, log_p, zero), zero)
    index = torch.arange(z.shape[-1], device=z.device)
    first_argmax = torch.where(z == z.amax(-1, keepdim=True), index, z.shape[-1]).amin(-1, keepdim=True)
    safe = ids.clamp(0, z.shape[-1] - 1)
    gathered = torch.where(safe == ids, log_p.gather(-1, safe), math.nan)  # NaN where a target is out of range
    out = {
        "logp": squeeze(torch.where(counted, gathered, zero)),
        "lse": torch.where(rows, torch.logsumexp(z, -1), zero),
        "entropy": torch.where(rows, -summand.sum(-1), zero),
        "log_sum_sq_probs": torch.where(rows, torch.logsumexp(2 * log_p, -1), zero),
        "mean_logits": torch.where(rows, z.mean(-1), zero),
        "is_top1": squeeze((first_argmax == ids) & counted),
    }
    if top_k is not None:
        order = torch.sort(log_p, dim=-1, descending=True, stable=True)
        head = order.indices[..., :top_k]
        rest = log_p.scatter(-1, head, -math.inf)
        out["topk_logp"] = torch.where(rows.unsqueeze(-1), order.values[..., :top_k], zero)
        out["topk_ids"] = torch.where(rows.unsqueeze(-1), head, -1)
        out["tail_mass"] = torch.where(rows, rest.exp().sum(-1), zero)
    return out
