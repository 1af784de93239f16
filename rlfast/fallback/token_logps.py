"""Token log-probs in plain PyTorch, a few rows at a time.

log p = −softplus(lse_others − z_t), with the target left out of the sum: exact as p → 1, and never positive.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from rlfast.ops.records import ENTROPY, IS_TOP1, LSE, Outputs, Row, Transform, Wanted, allocate

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32 temporaries a tensor: stays in a last-level cache, costs nothing on a GPU


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def transformed(logits: torch.Tensor, transform: Transform, rows) -> torch.Tensor:
    """z of a chunk of rows, in the compute dtype."""
    z = logits.to(compute_dtype(logits))
    if transform.logit_scale != 1.0:
        z = z * transform.logit_scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    t = transform.temperature
    if isinstance(t, torch.Tensor):
        return z / t.view(-1)[rows].to(z.dtype).unsqueeze(-1)
    return z / t if t != 1.0 else z


def pull_back(g: torch.Tensor, logits: torch.Tensor, transform: Transform, rows) -> torch.Tensor:
    """∂L/∂logits from ∂L/∂z: through the temperature, the soft-cap and the logit scale, in that order."""
    t = transform.temperature
    if isinstance(t, torch.Tensor):
        g = g / t.view(-1)[rows].to(g.dtype).unsqueeze(-1)
    elif t != 1.0:
        g = g / t
    if transform.softcap:
        x = logits.to(g.dtype) * (transform.logit_scale / transform.softcap)
        g = g / torch.cosh(x).square()
    return g * transform.logit_scale if transform.logit_scale != 1.0 else g


def counted_rows(targets: torch.Tensor, mask: torch.Tensor | None, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [rows, K] and whether each counts: not −100, in a row that is not masked."""
    ids = targets.reshape(rows, targets.numel() // max(rows, 1))
    counted = ids != -100
    if mask is not None:
        counted = counted & mask.reshape(-1, 1)
    return ids, counted


class Exponentials(NamedTuple):
    """x = z − peak [n, V], e = exp(x), their sum [n] and its logarithm; the peak of a row of −inf is 0."""

    x: torch.Tensor
    e: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor
    log_sum: torch.Tensor


def exponentials(z) -> Exponentials:
    """Those of a chunk of rows z [n, V]."""
    peak = z.amax(-1)
    peak = torch.where(peak == -torch.inf, torch.zeros_like(peak), peak)
    x = z - peak.unsqueeze(-1)
    e = x.exp()
    total = e.sum(-1)
    return Exponentials(x, e, peak, total, total.log())


def target_logp(others, x) -> torch.Tensor:
    """−softplus(log Σ − x) of a target and the Σ of the others [n]: rounded once, where the device has float64."""
    wide = x.dtype if x.device.type == "mps" else torch.float64
    odds = others.to(wide).log() - x.to(wide)
    return -torch.logaddexp(odds, torch.zeros_like(odds)).to(x.dtype)  # over the whole range of odds


def row_statistics(z, ids, counted, out: dict, row: Row, rows, wanted: Wanted, live=None) -> Exponentials:
    """Every output of a chunk of rows from its z [n, V], into the flattened outputs; ``live``: rows not skipped."""
    live = counted.any(-1) if live is None else live
    found = exponentials(z)
    x, e, peak, total, log_sum = found

    def put(name, index, value):
        out[name][index][rows] = torch.where(live, value, torch.zeros_like(value))

    put("aux", row.peak, peak)
    put("aux", row.log_sum, log_sum)
    if wanted.outputs & LSE:
        out["lse"][rows] = torch.where(live, peak + log_sum, torch.zeros_like(peak))
    safe = ids.clamp(0, z.shape[-1] - 1)
    for k in range(ids.shape[1]):
        one = safe[:, k : k + 1]
        others = e.scatter(-1, one, 0.0).sum(-1)
        logp = target_logp(others, x.gather(-1, one).squeeze(-1))
        logp = torch.where(safe[:, k] == ids[:, k], logp, torch.full_like(logp, torch.nan))
        logp = torch.where(counted[:, k], logp, torch.zeros_like(logp))
        out["logp"][rows, k] = logp
        out["aux"][row.logp + k][rows] = logp
    if row.entropy >= 0:
        # H = log Σe − Σ e·(z − peak) / Σe: two non-negative terms, nothing cancels
        entropy = log_sum - (torch.where(e > 0, e * x, e)).sum(-1) / total
        put("aux", row.entropy, entropy)
        out["entropy"][rows] = torch.where(live, entropy, torch.zeros_like(entropy))
    if row.log_sum_sq_probs >= 0:
        put("aux", row.log_sum_sq_probs, torch.logsumexp(2 * (x - log_sum.unsqueeze(-1)), -1))
    if row.mean_logits >= 0:
        put("aux", row.mean_logits, z.mean(-1))
    if wanted.outputs & IS_TOP1:
        index = torch.arange(z.shape[-1], device=z.device)
        first = torch.where(x == 0, index, z.shape[-1]).amin(-1, keepdim=True)
        out["is_top1"][rows] = (first == ids) & counted
    if wanted.top_k:
        order = torch.sort(x, dim=-1, descending=True, stable=True)
        head = order.indices[:, : wanted.top_k]
        logp = order.values[:, : wanted.top_k] - log_sum.unsqueeze(-1)
        out["topk_logp"][rows] = torch.where(live.unsqueeze(-1), logp, torch.zeros_like(logp))
        out["topk_ids"][rows] = torch.where(live.unsqueeze(-1), head, torch.full_like(head, -1))
        put("aux", row.tail_mass, e.scatter(-1, head, 0.0).sum(-1) / total)
    return found


def flattened(out: Outputs, rows: int) -> dict:
    """The outputs with one row dimension: views, to be written into."""
    flat = {"aux": out.aux.view(out.aux.shape[0], rows), "lse": out.lse.view(-1), "entropy": out.entropy.view(-1)}
    for name in ("logp", "is_top1", "topk_logp", "topk_ids"):
        x = getattr(out, name)
        flat[name] = x.view(rows, x.numel() // rows) if x.numel() else x
    return flat


def z_gradient(z, ids, counted, aux, row: Row, rows, grads) -> torch.Tensor:
    """∂L/∂z of a chunk of rows from z [n, V] and what the forward saved."""
    log_p = (z - aux[row.peak][rows].unsqueeze(-1)) - aux[row.log_sum][rows].unsqueeze(-1)
    p = log_p.exp()
    g_logp, g_lse, g_entropy = (g if g is None else g[rows] for g in grads)
    g = torch.zeros_like(z)
    if g_entropy is not None:
        g = -g_entropy * torch.where(p > 0, p * (log_p + aux[row.entropy][rows].unsqueeze(-1)), p)
    if g_lse is not None:
        g = g + g_lse * p
    if g_logp is None:
        return g
    g_logp = torch.where(counted, g_logp, torch.zeros_like(g_logp))
    safe = ids.clamp(0, z.shape[-1] - 1)
    same = safe.unsqueeze(-1) == safe.unsqueeze(-2)  # [n, K, K]: candidates may repeat
    own = torch.where(same, g_logp.unsqueeze(-2), 0.0).sum(-1)
    others = torch.where(same, 0.0, g_logp.unsqueeze(-2)).sum(-1)
    logp = aux[row.logp : row.logp + ids.shape[1], rows].T
    # 1 − p_t = −expm1(log p_t) keeps its digits as p_t → 1
    at_target = g.gather(-1, safe) - own * torch.expm1(logp) - others * logp.exp()
    g = g - g_logp.sum(-1, keepdim=True) * p
    for k in range(ids.shape[1]):
        one = safe[:, k : k + 1]
        g = g.scatter(-1, one, torch.where(counted[:, k : k + 1], at_target[:, k : k + 1], g.gather(-1, one)))
    return g


def logits_gradient(logits, ids, counted, transform: Transform, aux, row: Row, rows, grads) -> torch.Tensor:
    """∂L/∂logits of a chunk of rows; exactly 0 in skipped ones, whatever they hold."""
    g = z_gradient(transformed(logits, transform, rows), ids, counted, aux, row, rows, grads)
    g = pull_back(g, logits, transform, rows)
    return torch.where(counted.any(-1, keepdim=True), g, torch.zeros_like(g))


def grads_by_row(grads: tuple, n: int) -> tuple:
    """(g_logp [n, K], g_lse [n, 1], g_entropy [n, 1]), each or None."""
    return tuple(g if g is None else g.reshape(n, g.numel() // max(n, 1)) for g in grads)


def chunks(x: torch.Tensor):
    """(rows, x[rows]) over the flattened rows of x [*lead, V], as views, a few rows at a time."""
    if not x.numel():
        return
    blocks = [x] if x.dim() == 2 else list(x)
    step, start = max(1, CHUNK_ELEMENTS // max(1, x.shape[-1])), 0
    for block in blocks:
        for part in block.split(step):
            yield slice(start, start + part.shape[0]), part
            start += part.shape[0]


def forward(logits, targets, mask, transform: Transform, wanted: Wanted) -> Outputs:
    """See ``rlfast/ops/token_logps.py``."""
    lead = tuple(logits.shape[:-1])
    out, n = allocate(logits, lead, targets, wanted), math.prod(lead)
    ids, counted = counted_rows(targets, mask, n)
    row, flat = Row.of(ids.shape[1], wanted), flattened(out, n)
    for rows, part in chunks(logits):
        z = transformed(part, transform, rows)
        row_statistics(z, ids[rows], counted[rows], flat, row, rows, wanted)
    return out


def backward(logits, targets, mask, transform: Transform, aux, grads, out) -> None:
    """See ``rlfast/ops/token_logps.py``."""
    n = math.prod(logits.shape[:-1])
    ids, counted = counted_rows(targets, mask, n)
    row, aux = Row.of(ids.shape[1], Wanted(ENTROPY, 0)), aux.view(aux.shape[0], n)
    grads = grads_by_row(grads, n)
    for (rows, part), (_, part_out) in zip(chunks(logits), chunks(out), strict=True):
        part_out.copy_(logits_gradient(part, ids[rows], counted[rows], transform, aux, row, rows, grads))
