"""Divergences of two distributions over the vocabulary, token by token: the definition.

S = softmax(z), T = softmax(ref_z);  forward KL(T‖S), reverse KL(S‖T),
JSD_β = β·KL(T‖M) + (1 − β)·KL(S‖M) with M = (1 − β)·S + β·T; β = 0 is KL(T‖S) and β = 1 is KL(S‖T).
"""

import math

import torch

from .token_logps import counted_targets, token_logps, transform


def kl(log_p, log_q):
    """Σ p·(log p − log q) [*]: an outcome with p = 0 adds 0, one with q = 0 < p makes it infinite."""
    zero = torch.zeros((), dtype=log_p.dtype, device=log_p.device)
    infinite = (log_q == -math.inf) & (log_p > -math.inf)
    left_out = (log_p == -math.inf) | infinite
    log_p, log_q = torch.where(left_out, zero, log_p), torch.where(left_out, zero, log_q)
    terms = torch.where(left_out, zero, log_p.exp() * (log_p - log_q))
    return terms.sum(-1) + torch.where(infinite.any(-1), math.inf, zero)


def jsd(log_s, log_t, beta):
    """JSD_β of log-probabilities [*, V]."""
    zero = torch.zeros((), dtype=log_s.dtype, device=log_s.device)
    neither = (log_s == -math.inf) & (log_t == -math.inf)
    left, right = (torch.where(neither, zero, x) for x in (log_s, log_t))
    log_m = torch.logaddexp(left + math.log(1 - beta), right + math.log(beta))
    log_m = torch.where(neither, -math.inf, log_m)
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def measure(log_s, log_t, kind, beta):
    """The divergence of log-probabilities [*, V]."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(log_t, log_s)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(log_s, log_t)
    return jsd(log_s, log_t, beta)


def chosen(z, ids, tail):
    """Log-probabilities of z [*, V] at ids [*, K] among themselves, or beside one bucket for all the others [*, K +
    1]."""
    here = z.gather(-1, ids)
    if tail == "bucket":
        rest = torch.logsumexp(z.scatter(-1, ids, -math.inf), -1, keepdim=True)
        here = torch.cat((here, rest), -1)
    return torch.log_softmax(here, -1)


def divergence(
    logits,  # [*, V]
    ref_logits,  # [*, V]
    targets=None,  # [*] or [*, K]
    *,
    kind="forward_kl",
    beta=0.5,
    temperature=1.0,
    ref_temperature=None,
    softcap=None,
    ref_softcap=None,
    logit_scale=1.0,
    ref_logit_scale=1.0,
    mask=None,  # [*]
    top_k=None,
    tail="renormalize",
    support=None,
    dtype=None,
):
    """Every output by its definition, as a dict. Computes in ``dtype`` (default: float32, or float64 for float64)."""
    dtype = dtype or (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    rows = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if targets is not None:
        rows = counted_targets(targets, mask, logits.dim() - 1)[2]
    elif mask is not None:
        rows = mask != 0
    zero = torch.zeros((), dtype=dtype, device=logits.device)
    logits, ref_logits = (torch.where(rows.unsqueeze(-1), x.to(dtype), zero) for x in (logits, ref_logits))
    z = transform(logits, temperature, softcap, logit_scale)
    ref_z = transform(ref_logits, ref_temperature, ref_softcap, ref_logit_scale)
    if top_k is None:
        log_s, log_t = torch.log_softmax(z, -1), torch.log_softmax(ref_z, -1)
    else:
        reverse = kind == "reverse_kl" or (kind == "jsd" and beta == 1)
        support = support or ("student" if reverse else "teacher")
        whose = z if support == "student" else ref_z
        ids = torch.sort(whose.detach(), dim=-1, descending=True, stable=True).indices[..., :top_k]
        log_s, log_t = chosen(z, ids, tail), chosen(ref_z, ids, tail)
    out = {
        "value": torch.where(rows, measure(log_s, log_t, kind, beta), zero),
        "ref_lse": torch.where(rows, torch.logsumexp(ref_z, -1), zero),
    }
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "mask": rows}
    ids = torch.zeros(rows.shape, dtype=torch.int64, device=rows.device) if targets is None else targets
    student = token_logps(logits, ids, dtype=dtype, **options)
    names = ("lse", "entropy") if targets is None else ("logp", "lse", "entropy")
    return out | {name: student[name] for name in names}
