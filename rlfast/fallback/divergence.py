"""Divergences in plain PyTorch, a few rows at a time.

KL(p‖q) = E_p[x_p − x_q] − log Σe_p + log Σe_q, x = z − peak: the difference comes first, so that p = q gives exactly 0.

The terms of a JSD come from u = log T − log S and the smaller of the two probabilities over the larger, w = e^−|u|:
log M/S = log1p(β·(w − 1)) for u ≤ 0, where T = w·S, and log M/T = log1p((1 − β)·(w − 1)) for u > 0; the other is u
away.
"""

from __future__ import annotations

import math

import torch

from rlfast.fallback.token_logps import (
    Exponentials,
    chunks,
    counted_rows,
    exponentials,
    grads_by_row,
    pull_back,
    row_statistics,
    transformed,
    z_gradient,
)
from rlfast.ops.divergence_records import (
    FORWARD,
    JSD,
    REF_LSE,
    REVERSE,
    Measure,
    Outputs,
    Saved,
    allocate,
    candidates_of,
    student_rows,
)
from rlfast.ops.records import ENTROPY, LSE, Row, Transform, Wanted

FAR = 110.0  # nats beyond which e^−|u| is 0


def kl(p: Exponentials, q: Exponentials) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(p‖q), E_p[gap]) [n]; the last steps in float64, where nothing of V's size is."""
    possible = p.x > -torch.inf
    infinite = possible & (q.x == -torch.inf)
    gap = torch.where(possible & ~infinite, p.x - q.x, 0.0)
    mean = (p.e * gap).sum(-1, dtype=torch.float64) / p.total.double()
    value = mean - p.total.double().log() + q.total.double().log()
    return torch.where(infinite.any(-1), torch.inf, value.clamp(min=0.0)), mean


def mixed(s: Exponentials, t: Exponentials, beta: float) -> tuple:
    """(log S, log T, log M/S, log M/T) [n, V]."""
    log_s, log_t = s.x - s.log_sum.unsqueeze(-1), t.x - t.log_sum.unsqueeze(-1)
    u = (t.x - s.x) - (t.log_sum - s.log_sum).unsqueeze(-1)
    u = u.nan_to_num(nan=0.0, posinf=FAR, neginf=-FAR).clamp_(-FAR, FAR)  # −inf − (−inf): neither is possible
    share = torch.where(u > 0, 1.0 - beta, beta).to(u.dtype)
    smaller = torch.log1p(share * torch.expm1(-u.abs()))
    return log_s, log_t, smaller + u.clamp(min=0.0), smaller - u.clamp(max=0.0)


def centred(s: Exponentials, t: Exponentials, measure: Measure) -> tuple:
    """(divergence, centre of the student, centre of the teacher), each [n] float64."""
    if measure.kind == JSD:
        log_s, log_t, m_over_s, m_over_t = mixed(s, t, measure.beta)
        own = -(log_s.exp() * m_over_s).sum(-1, dtype=torch.float64)
        ref = -(log_t.exp() * m_over_t).sum(-1, dtype=torch.float64)
        value = (measure.beta * ref + (1.0 - measure.beta) * own).clamp(min=0.0)
    else:
        value, mean = kl(t, s) if measure.kind == FORWARD else kl(s, t)
        own, ref = (torch.zeros_like(mean), mean) if measure.kind == FORWARD else (mean, torch.zeros_like(mean))
    wrong = ~((s.total > 0) & (t.total > 0))  # NaN, or no token is possible
    return tuple(torch.where(wrong, torch.nan, x) for x in (value, own, ref))


def live_rows(mask: torch.Tensor | None, n: int, device) -> torch.Tensor:
    """Which rows are not skipped [n]."""
    return torch.ones(n, dtype=torch.bool, device=device) if mask is None else mask.reshape(n)


def ids_of(targets: torch.Tensor | None, mask, n: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``counted_rows``; no column where there are no targets."""
    if targets is None:
        return torch.empty((n, 0), dtype=torch.int64, device=device), torch.empty(
            (n, 0), dtype=torch.bool, device=device
        )
    return counted_rows(targets, mask, n)


def flattened(out: Outputs, candidates: int, n: int) -> dict:
    """The outputs with one row dimension: views, to be written into."""
    flat = {name: None if x is None else x.view(n) for name, x in out._asdict().items() if name not in ("aux", "logp")}
    logp = out.value.new_empty((n, 0)) if out.logp is None else out.logp.view(n, candidates)
    return flat | {"aux": out.aux.view(out.aux.shape[0], n), "logp": logp}


def pair_statistics(z, ref_z, ids, counted, live, flat: dict, rows, measure: Measure, outputs: int) -> None:
    """Every output of a chunk of rows from both z [n, V], into the flattened outputs."""
    row = Row.of(ids.shape[1], Wanted(outputs & ENTROPY, 0))
    s = row_statistics(z, ids[rows], counted[rows], flat, row, rows, Wanted(outputs & (ENTROPY | LSE), 0), live[rows])
    t = exponentials(ref_z)
    value, own, ref = centred(s, t, measure)
    first = student_rows(ids.shape[1], outputs)

    def put(to, x):
        to[rows] = torch.where(live[rows], x.to(to.dtype), torch.zeros((), dtype=to.dtype, device=to.device))

    acc = flat["aux"].dtype
    parts = [part for x in (own, ref) for part in (x.to(acc), x - x.to(acc))]
    for i, x in enumerate((t.peak, t.log_sum, *parts)):
        put(flat["aux"][first + i], x)
    put(flat["value"], value)
    if outputs & REF_LSE:
        put(flat["ref_lse"], t.peak + t.log_sum)


def saved_exponentials(z, aux, rows) -> Exponentials:
    """Those of a chunk, from the peak and log Σ that the forward saved; e and the sum are not made."""
    peak, log_sum = aux[0][rows], aux[1][rows]
    return Exponentials(z - peak.unsqueeze(-1), None, peak, None, log_sum)


def pair_gradient(z, other_z, ids, counted, measure: Measure, saved: Saved, rows, grads) -> torch.Tensor:
    """∂L/∂z of the own side of a chunk of rows."""
    g_value, rest = grads[0], grads[1:]
    row = Row.of(ids.shape[1], Wanted(ENTROPY, 0))
    g = torch.zeros_like(z)
    if any(x is not None for x in rest):
        g = z_gradient(z, ids[rows], counted[rows], saved.aux, row, rows, rest)
    if g_value is None:
        return g
    own, other = saved_exponentials(z, saved.aux, rows), saved_exponentials(other_z, saved.other, rows)
    log_p = own.x - own.log_sum.unsqueeze(-1)
    p, (high, low) = log_p.exp(), (x[rows].unsqueeze(-1) for x in saved.centre)
    if measure.kind == FORWARD:
        d = p - (other.x - other.log_sum.unsqueeze(-1)).exp()
    elif measure.kind == REVERSE:
        d = torch.where(p == 0, p, p * (((own.x - other.x) - high) - low))
    else:
        _, _, m_over_own, _ = mixed(own, other, measure.beta)
        d = -(1.0 - measure.beta) * p * ((m_over_own + high) + low)
    return g + g_value[rows] * d


def own_gradient(x, other_x, ids, counted, live, transforms, measure, saved: Saved, rows, grads) -> torch.Tensor:
    """∂L/∂logits of the own side of a chunk of rows; exactly 0 in skipped ones, whatever they hold."""
    z, other_z = transformed(x, transforms[0], rows), transformed(other_x, transforms[1], rows)
    g = pair_gradient(z, other_z, ids, counted, measure, saved, rows, grads)
    g = pull_back(g, x, transforms[0], rows)
    return torch.where(live[rows].unsqueeze(-1), g, torch.zeros_like(g))


def flat_saved(saved: Saved, n: int) -> Saved:
    """What a forward saved, with one row dimension."""
    return Saved(saved.aux.reshape(saved.aux.shape[0], n), saved.other.reshape(2, n), saved.centre.reshape(2, n))


def forward(logits, ref_logits, targets, mask, transform: Transform, ref_transform: Transform, measure, outputs):
    """See ``rlfast/ops/divergence.py``."""
    lead = tuple(logits.shape[:-1])
    out, n = allocate(logits, lead, targets, outputs), math.prod(lead)
    ids, counted = ids_of(targets, mask, n, logits.device)
    live = live_rows(mask, n, logits.device)
    flat = flattened(out, candidates_of(targets, len(lead)), n)
    for (rows, x), (_, y) in zip(chunks(logits), chunks(ref_logits), strict=True):
        z, ref_z = transformed(x, transform, rows), transformed(y, ref_transform, rows)
        pair_statistics(z, ref_z, ids, counted, live, flat, rows, measure, outputs)
    return out


def backward(own, other, targets, mask, transform, other_transform, measure: Measure, saved: Saved, grads, out) -> None:
    """See ``rlfast/ops/divergence.py``."""
    n = math.prod(own.shape[:-1])
    ids, counted = ids_of(targets, mask, n, own.device)
    live, saved, grads = live_rows(mask, n, own.device), flat_saved(saved, n), grads_by_row(grads, n)
    transforms = (transform, other_transform)
    for (rows, x), (_, y), (_, to) in zip(chunks(own), chunks(other), chunks(out), strict=True):
        to.copy_(own_gradient(x, y, ids, counted, live, transforms, measure, saved, rows, grads))
