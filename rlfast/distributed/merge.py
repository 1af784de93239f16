"""The statistics of a row from those of its shards, in float64, without an exchange.

A record is what a kernel says of a shard (``rlfast/ops/records.py``), its log-probs and its entropy those of a softmax
over the shard alone. With Z_s = Σe of a shard, w_s = Z_s / Σ Z, and o the shard that holds the target

    odds    = (1/p_o − 1) + 1/p_o · Σ_{s≠o} Z_s / Z_o,   log p = −log(1 + odds)
    H       = Σ w_s·(H_s − log w_s)
    log Σp² = log Σ w_s²·exp(log Σp²_s)

whose terms have one sign each: nothing cancels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.ops.records import ENTROPY, IS_TOP1, LSE, Outputs, Row, Wanted, allocate

INF = torch.inf


class Layout(NamedTuple):
    """Rows of a record [F, n] on the wire: those of ``aux``, then what was asked for beside it."""

    row: Row
    candidates: int
    is_top1: int  # the first of K; −1: not there
    topk: int  # the first of top_k log-probs, or what peaks are of where logits are given, then ids; −1: not there
    top_k: int
    size: int

    @staticmethod
    def of(candidates: int, wanted: Wanted) -> Layout:
        """For K candidates a row and the wanted outputs."""
        row = Row.of(candidates, wanted)
        top1 = row.rows if wanted.outputs & IS_TOP1 else -1
        size = row.rows + (candidates if top1 >= 0 else 0)
        topk = size if wanted.top_k else -1
        return Layout(row, candidates, top1, topk, wanted.top_k, size + 2 * wanted.top_k)


def record(out: Outputs, layout: Layout, n: int) -> torch.Tensor:
    """The record [F, n] of a shard. A shard of fewer columns than top_k has the id −1 for the others."""
    parts = [out.aux.reshape(layout.row.rows, n)]
    if layout.is_top1 >= 0:
        parts.append(out.is_top1.reshape(n, layout.candidates).T.to(out.aux.dtype))
    for x in (out.topk_logp, out.topk_ids) if layout.top_k else ():
        x = x.reshape(n, x.numel() // max(n, 1)).to(out.aux.dtype)
        parts.append(torch.nn.functional.pad(x, (0, layout.top_k - x.shape[1]), value=-1.0).T)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def nothing(layout: Layout, n: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The record of a shard without a column."""
    found = torch.zeros((layout.size, n), dtype=dtype, device=like.device)
    found[layout.row.log_sum] = -INF
    if layout.row.log_sum_sq_probs >= 0:
        found[layout.row.log_sum_sq_probs] = -INF
    if layout.topk >= 0:
        found[layout.topk :] = -1
    return found


class Masses(NamedTuple):
    """Where the probability of rows is, [P, n] and [n] in float64."""

    peak: torch.Tensor  # [n]: the largest of the shards', as the kernels count it
    log_z: torch.Tensor  # [P, n]: log Σ exp(z − peak) of each shard
    total: torch.Tensor  # [n]: of all
    log_w: torch.Tensor  # [P, n]: log of the share of each


def masses(peak, log_sum, scale) -> Masses:
    """From the peaks and log Σe of shards [P, n]; ``scale`` is what a kernel's peak is multiplied by to be a z."""
    some = torch.where(log_sum == -INF, -INF, peak)
    top = some.amax(0)
    top = torch.where(top == -INF, 0.0, top)
    log_z = torch.where(log_sum == -INF, -INF, scale * (peak - top) + log_sum)
    total = torch.logsumexp(log_z, 0)
    return Masses(top, log_z, total, log_z - total)


def weighed(log_w, x) -> torch.Tensor:
    """Σ w·x over the shards; one without mass adds nothing, whatever x is there."""
    return torch.where(log_w == -INF, 0.0, log_w.exp() * x).sum(0)


def without(log_z, mine) -> torch.Tensor:
    """log Σ Z over the shards [P, …] that are not ``mine``."""
    return torch.logsumexp(torch.where(mine, -INF, log_z), 0)


def log_prob(logp, log_z, others) -> torch.Tensor:
    """log p of a target from that within its shard, the shard's log Z and that of the others."""
    logp = torch.where(log_z == -INF, -INF, logp)
    within = torch.log(-torch.expm1(logp)) - logp
    beyond = torch.where(others == -INF, -INF, others - log_z - logp)
    odds = torch.logaddexp(within, beyond)
    return -torch.logaddexp(odds, torch.zeros_like(odds))


def owned(spans, ids) -> torch.Tensor:
    """[P, n, K]: the shard of each target."""
    first, last = torch.tensor(spans, dtype=torch.int64, device=ids.device).T.reshape(2, -1, 1, 1)
    return (ids >= first) & (ids < last)


def target_logps(records, layout: Layout, m: Masses, mine) -> torch.Tensor:
    """log p [n, K] of the targets; NaN of one that no shard has."""
    within = records[:, layout.row.logp : layout.row.logp + layout.candidates].transpose(1, 2)
    log_z = m.log_z.unsqueeze(-1)
    own = torch.where(mine, log_z, 0.0).sum(0)
    logp = torch.where(mine, within, 0.0).sum(0)
    found = log_prob(logp, own, without(log_z, mine))
    return torch.where(mine.any(0) & (m.total > -INF).unsqueeze(-1), found, torch.nan)


def piece_logps(records, layout: Layout, m: Masses, first: int, count: int) -> torch.Tensor:
    """log p [count, K, n] of what each of this rank's pieces has as its targets, another's or not."""
    found, index = [], torch.arange(records.shape[0], device=records.device).unsqueeze(-1)
    for p in range(first, first + count):
        within = records[p, layout.row.logp : layout.row.logp + layout.candidates]
        found.append(log_prob(within, m.log_z[p], without(m.log_z, index == p)))
    return torch.where(m.total > -INF, torch.stack(found), torch.nan)


def first_argmax(records, layout: Layout, m: Masses, mine) -> torch.Tensor:
    """[n, K]: whether the target is the first argmax of the row."""
    flag = records[:, layout.is_top1 : layout.is_top1 + layout.candidates].transpose(1, 2) > 0
    peak = torch.where(m.log_z == -INF, -INF, records[:, layout.row.peak])
    highest = peak == peak.amax(0)
    leads = highest & (highest.cumsum(0) == 1)  # the first shard that has the row's peak
    return (flag & mine & leads.unsqueeze(-1)).any(0) & ~m.total.isnan().unsqueeze(-1)


def best(records, layout: Layout, spans, m: Masses, scale, given: bool) -> tuple[torch.Tensor, ...]:
    """(log-probs [n, k], ids [n, k], the mass outside [n]) of the k largest.

    Given logits are compared as they are, so that ties are ties; the lower id is first.
    """
    k = layout.top_k
    first = torch.tensor([a for a, _ in spans], dtype=torch.int64, device=records.device).reshape(-1, 1, 1)
    ids = records[:, layout.topk + k : layout.topk + 2 * k].long()
    ids = torch.where(ids < 0, -1, ids + first).permute(2, 0, 1).flatten(1)
    key = records[:, layout.topk : layout.topk + k]
    key = key if given else key + m.log_w.unsqueeze(1)
    logp = key = key.permute(2, 0, 1).flatten(1)
    if given:
        scale = scale.unsqueeze(-1) if isinstance(scale, torch.Tensor) else scale
        logp = scale * (key - m.peak.unsqueeze(-1)) - m.total.unsqueeze(-1)
    logp, key = (torch.where(ids < 0, -INF, x) for x in (logp, key))
    order = torch.sort(key, dim=-1, descending=True, stable=True).indices
    there = (ids < 0).gather(-1, order).to(torch.uint8)
    order = order.gather(-1, torch.sort(there, dim=-1, stable=True).indices)  # what is no column comes last
    logp, ids = logp.gather(-1, order), ids.gather(-1, order)
    outside = weighed(m.log_w, records[:, layout.row.tail_mass]) + logp[:, k:].exp().sum(-1)
    return logp[:, :k], ids[:, :k], outside


def merged(
    records, spans, lead, targets, ids, counted, wanted: Wanted, scale, first: int, count: int, given: bool = False
) -> tuple:
    """(the outputs of whole rows, log p of this rank's pieces [count, K, n]).

    Args:
        records: [P, F, n], of all shards.
        spans: their columns.
        lead: the leading dimensions.
        targets: as the op takes them.
        ids, counted: [n, K], as ``counted_rows`` gives them.
        wanted: as the op takes it.
        scale: of ``masses``.
        first, count: this rank's pieces among the shards.
        given: whether a record has, of its top-k, what its peak is of, in place of the log-probs.
    """
    out, layout = allocate(records, lead, targets, wanted), Layout.of(ids.shape[1], wanted)
    n, row, records = ids.shape[0], layout.row, records.double()
    live, aux = counted.any(-1), out.aux.view(out.aux.shape[0], n)
    m, mine = masses(records[:, row.peak], records[:, row.log_sum], scale), owned(spans, ids)

    def put(to, x, where=live):
        to.view(x.shape).copy_(torch.where(where, x, torch.zeros((), dtype=x.dtype, device=x.device)))

    put(aux[row.peak], m.peak)
    put(aux[row.log_sum], m.total)
    logp = target_logps(records, layout, m, mine)
    put(out.logp, logp, counted)
    put(aux[row.logp : row.logp + ids.shape[1]], logp.T, counted.T)
    if wanted.outputs & LSE:
        put(out.lse, scale * m.peak + m.total)
    if wanted.outputs & ENTROPY:
        entropy = weighed(m.log_w, records[:, row.entropy] - m.log_w)
        entropy = torch.where(m.total.isfinite(), entropy, torch.nan)
        put(aux[row.entropy], entropy)
        put(out.entropy, entropy)
    if row.log_sum_sq_probs >= 0:
        squares = 2 * m.log_w + records[:, row.log_sum_sq_probs]
        put(aux[row.log_sum_sq_probs], torch.logsumexp(torch.where(m.log_w == -INF, -INF, squares), 0))
    if row.mean_logits >= 0:
        widths = torch.tensor([b - a for a, b in spans], dtype=torch.float64, device=records.device).unsqueeze(-1)
        put(aux[row.mean_logits], (widths * records[:, row.mean_logits]).sum(0) / widths.sum())
    if wanted.outputs & IS_TOP1:
        put(out.is_top1, first_argmax(records, layout, m, mine), counted)
    if wanted.top_k:
        values, places, outside = best(records, layout, spans, m, scale, given)
        put(out.topk_logp, values, live.unsqueeze(-1))
        out.topk_ids.view(n, wanted.top_k).copy_(torch.where(live.unsqueeze(-1), places, -1))
        put(aux[row.tail_mass], outside)
    return out, piece_logps(records, layout, m, first, count).to(out.aux.dtype)


class PairMasses(NamedTuple):
    """Those of both sides."""

    own: Masses
    other: Masses


def merged_kl(value, centre, both: PairMasses, raw, scales) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(p‖q), E_p[gap]) [n] of whole rows from those of their shards.

    KL(p‖q) = Σ w_s·(KL_s + log w_s/u_s): how the shares differ, and how what is within them does.

    Args:
        value, centre: [P, n], of the shards.
        both: the masses of p and of q.
        raw: the peaks [P, n] of p's shards and of q's.
        scales: of both.
    """
    p, q = both
    possible = p.log_w > -INF
    infinite = possible & ((q.log_w == -INF) | (value == INF))
    total = weighed(torch.where(infinite, -INF, p.log_w), value + (p.log_w - q.log_w))
    shift = scales[0] * (raw[0] - p.peak) - scales[1] * (raw[1] - q.peak)
    mean = weighed(torch.where(infinite, -INF, p.log_w), centre + shift)
    total, mean = (torch.where(infinite.any(0), INF, x) for x in (total.clamp(min=0.0), mean))
    wrong = ~(p.total.isfinite() & q.total.isfinite())
    return torch.where(wrong, torch.nan, total), torch.where(wrong, torch.nan, mean)
