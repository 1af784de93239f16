"""Divergences over a vocabulary that is shared out over ranks.

A KL has a chain rule (``merge.py``): one exchange. A JSD has none, since a shard's outcomes are mixed in the row's
proportions, not in the shard's: the masses of the shards first, then Σ S·log S/M and Σ T·log T/M, both in float64.
The backward is the op's kernel on a piece, with what is saved of whole rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.distributed.groups import Shards, rows_of
from rlfast.distributed.merge import (
    INF,
    Layout,
    Masses,
    PairMasses,
    masses,
    merged_kl,
    owned,
    piece_logps,
    target_logps,
    weighed,
)
from rlfast.distributed.vocab import Head, Rows, kernel_of, pieces, pulled, unit
from rlfast.fallback.divergence import centred, live_rows
from rlfast.fallback.linear_token_logps import logits_of, slices
from rlfast.fallback.token_logps import Exponentials, chunks, compute_dtype, counted_rows, transformed
from rlfast.ops.dispatch import first_derivatives_only
from rlfast.ops.divergence import NAME as LOGITS
from rlfast.ops.divergence import records, sides
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
from rlfast.ops.linear_divergence import NAME as HEADS
from rlfast.ops.linear_token_logps import as_given
from rlfast.ops.records import ENTROPY, LSE, Wanted


class Call(NamedTuple):
    """What the two forms share."""

    rows: Rows
    options: tuple  # the ten of ``rlfast/ops/divergence.py``
    outputs: int
    backend: str

    @property
    def measure(self) -> Measure:
        """The divergence."""
        return records(self.options)[2]


def call_of(shards: Shards, lead, targets, mask, options, outputs: int, backend: str) -> Call:
    """From the arguments of an op."""
    transform = records(options)[0]
    return Call(Rows(shards, tuple(lead), targets, mask, transform), tuple(options), outputs, backend)


class Found(NamedTuple):
    """A forward."""

    out: Outputs  # of whole rows
    logp: torch.Tensor  # [own pieces, K, n]
    kept: list  # (logits, ref_logits) of each piece


def statistics(call: Call, run, raw, name: str, like) -> Found:
    """The outputs of whole rows.

    Args:
        call: what is asked.
        run: ``run(columns, ids, measure)``: a kernel's (outputs, what it keeps) of a piece.
        raw: ``raw(columns)``: pieces of rows of both logits, as (rows, x, y).
        name: of the backend.
        like: a tensor of the logits' dtype and device.
    """
    rows, (own, other, measure) = call.rows, records(call.options)
    n, k = rows_of(rows.lead), candidates_of(rows.targets, len(rows.lead))
    size, acc = student_rows(k, call.outputs), compute_dtype(like)
    per_shard = Measure(REVERSE, 0.5) if measure.kind == JSD else measure
    found, kept = [], []
    for columns, span in rows.shards.own():
        if span[0] == span[1]:
            nothing = torch.zeros((size + 5, n), dtype=acc, device=like.device)
            nothing[1] = nothing[size + 1] = -INF
            found.append(nothing)
            kept.append((like.new_empty(0),) * 2)
            continue
        ids = None if rows.targets is None else rows.here(span)[0]
        out, logits = run(columns, ids, per_shard)
        aux = out.aux.reshape(out.aux.shape[0], n)
        centre = aux[size + 4 : size + 6] if per_shard.kind == FORWARD else aux[size + 2 : size + 4]
        found.append(torch.cat((aux[: size + 2], out.value.reshape(1, n), centre)))
        kept.append(logits)
    everyones = rows.shards.everyones(torch.stack(found)).double()
    scales = unit(name, own, n), unit(name, other, n)
    both = PairMasses(
        masses(everyones[:, 0], everyones[:, 1], scales[0]),
        masses(everyones[:, size], everyones[:, size + 1], scales[1]),
    )
    if measure.kind == JSD:
        value, centres = mixed_sums(call, raw, both, scales, acc)
    else:
        turned = measure.kind == FORWARD
        both_sides = PairMasses(both.other, both.own) if turned else both
        peaks = everyones[:, 0], everyones[:, size]
        value, centre = merged_kl(
            everyones[:, size + 2], everyones[:, size + 3] + everyones[:, size + 4], both_sides,
            peaks[::-1] if turned else peaks, scales[::-1] if turned else scales,
        )  # fmt: skip
        centres = (torch.zeros_like(centre), centre) if turned else (centre, torch.zeros_like(centre))
    out, logp = filled(call, like, everyones, both, scales, value, centres)
    return Found(out, logp, kept)


def mixed_sums(call: Call, raw, both: PairMasses, scales, acc) -> tuple:
    """(JSD, centres of both sides) [n] in float64: what the columns of all pieces add, with the saved masses."""
    rows, (own, other, measure) = call.rows, records(call.options)
    n, shards = rows_of(rows.lead), call.rows.shards
    sums = torch.zeros((len(shards.mine), 2, n), dtype=torch.float64, device=both.own.peak.device)
    live = live_rows(rows.mask, n, sums.device)

    def exponentials(x, transform, m: Masses, scale, at) -> Exponentials:
        z = transformed(torch.where(live[at].unsqueeze(-1), x.double(), 0.0), transform, at)
        scale = scale[at] if isinstance(scale, torch.Tensor) else scale
        log_sum = m.total[at].to(acc).double()  # rounded as it is saved: the backward's centre is of the same mixture
        return Exponentials(z - (scale * m.peak[at]).unsqueeze(-1), None, None, log_sum.exp(), log_sum)

    for i, (columns, span) in enumerate(shards.own()):
        for at, x, y in raw(columns) if span[0] < span[1] else ():
            s = exponentials(x, own, both.own, scales[0], at)
            t = exponentials(y, other, both.other, scales[1], at)
            sums[i, 0, at], sums[i, 1, at] = centred(s, t, measure)[1:]
    own_sum, ref_sum = shards.everyones(sums).sum(0)
    value = (measure.beta * ref_sum + (1.0 - measure.beta) * own_sum).clamp(min=0.0)
    wrong = ~(both.own.total.isfinite() & both.other.total.isfinite())
    value, own_sum, ref_sum = (torch.where(wrong, torch.nan, x) for x in (value, own_sum, ref_sum))
    return value, (own_sum, ref_sum)


def filled(call: Call, like, everyones, both: PairMasses, scales, value, centres) -> tuple[Outputs, torch.Tensor]:
    """(the outputs of whole rows, log p of this rank's pieces)."""
    rows, outputs = call.rows, call.outputs
    n, k = rows_of(rows.lead), candidates_of(rows.targets, len(rows.lead))
    out, size = allocate(like, rows.lead, rows.targets, outputs), student_rows(k, outputs)
    aux, live = out.aux.view(out.aux.shape[0], n), live_rows(rows.mask, n, like.device)

    def put(to, x, where=live):
        to.view(x.shape).copy_(torch.where(where, x, torch.zeros((), dtype=x.dtype, device=x.device)))

    put(out.value, value)
    for at, m in ((0, both.own), (size, both.other)):
        put(aux[at], m.peak)
        put(aux[at + 1], m.total)
    for at, x in zip((size + 2, size + 4), centres, strict=True):
        high = x.to(aux.dtype)
        put(aux[at], high)
        put(aux[at + 1], x - high)
    for there, to, m, scale in ((LSE, out.lse, both.own, scales[0]), (REF_LSE, out.ref_lse, both.other, scales[1])):
        if outputs & there:
            put(to, scale * m.peak + m.total)
    if outputs & ENTROPY:
        entropy = weighed(both.own.log_w, everyones[:, 2 + k] - both.own.log_w)
        entropy = torch.where(both.own.total.isfinite(), entropy, torch.nan)
        put(out.entropy, entropy)
        put(aux[2 + k], entropy)
    shards, layout = rows.shards, Layout.of(k, Wanted(outputs & ENTROPY, 0))
    if k:
        ids, counted = counted_rows(rows.targets, rows.mask, n)
        logp = target_logps(everyones, layout, both.own, owned(shards.spans, ids))
        put(out.logp, logp, counted)
        put(aux[2 : 2 + k], logp.T, counted.T)
    return out, piece_logps(everyones, layout, both.own, shards.first, len(shards.mine)).to(aux.dtype)


def saved_pieces(call: Call, logp, grads, options, saved: Saved, is_teacher: bool):
    """``pieces`` of one side: (number, columns, ids, ``Saved``, gradients)."""
    value, *rest = grads
    rows = call.rows._replace(transform=records(options)[0])
    if is_teacher:
        rows, logp = rows._replace(targets=None), logp[:, :0]
    for i, columns, ids, own, by in pieces(rows, saved.aux, logp, tuple(rest)):
        g = None if value is None else value.contiguous()
        yield i, columns, ids, saved._replace(aux=own), (g, *by)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, ref_logits, call: Call):
        name, kernel = kernel_of(LOGITS, logits, call.backend)
        own, other, _ = records(call.options)

        def run(columns, ids, measure):
            pair = logits[..., columns], ref_logits[..., columns]
            return kernel.forward(*pair, ids, call.rows.mask, own, other, measure, call.outputs & ENTROPY), (None, None)

        def raw(columns):
            pair = logits[..., columns], ref_logits[..., columns]
            for (at, x), (_, y) in zip(*(chunks(side) for side in pair), strict=True):
                yield at, x, y

        found = statistics(call, run, raw, name, logits)
        asked = found.out.asked()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(asked[1])
        ctx.save_for_backward(logits, ref_logits, asked[1], found.logp)
        ctx.call = call
        return tuple(asked)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        logits, ref_logits, aux, logp = ctx.saved_tensors
        call, found = ctx.call, [None, None]
        _, kernel = kernel_of(LOGITS, logits, call.backend)
        both = sides(grads, call.outputs, call.rows.targets, len(call.rows.lead), aux, call.options)
        for i, (side, pair) in enumerate(zip(both, ((logits, ref_logits), (ref_logits, logits)), strict=True)):
            if side is None or not ctx.needs_input_grad[i]:
                continue
            options, saved, mine = side
            out = found[i] = torch.empty_like(pair[0])
            for _, columns, ids, some, by in saved_pieces(call, logp, mine, options, saved, bool(i)):
                own, other = (x[..., columns] for x in pair)
                kernel.backward(own, other, ids, call.rows.mask, *records(options), some, by, out[..., columns])
            out[..., max(columns.stop for columns in call.rows.shards.mine) :] = 0.0  # padding
        return *found, None


def divergence(logits, ref_logits, call: Call) -> list:
    """The op's outputs, of logits [*lead, columns of this rank]."""
    return list(_Divergence.apply(logits, ref_logits, call))


def head_statistics(head: Head, ref_head: Head, call: Call, keep: bool) -> Found:
    """The outputs of whole rows of two heads."""
    name, kernel = kernel_of(HEADS, head.hidden, call.backend)
    own, other, _ = records(call.options)

    def run(columns, ids, measure):
        pair = Head(*head.piece(columns)), Head(*ref_head.piece(columns))
        out, *kept = kernel.forward(*pair, ids, call.rows.mask, own, other, measure, call.outputs & ENTROPY, keep)
        return out, tuple(kept)

    def raw(columns):
        for at in slices(head.hidden.shape[0], columns.stop - columns.start):
            pair = (h.piece(columns) for h in (head, ref_head))
            yield at, *(logits_of(hidden[at], weight, bias) for hidden, weight, bias in pair)

    with as_given(head.hidden):
        return statistics(call, run, raw, name, head.hidden)


def head_gradients(call: Call, heads, logp, kept, side, is_teacher: bool, needs, sums, wide=False) -> tuple:
    """As ``pulled``, of one side: ``heads`` is its own head and the other, ``kept`` in that order of each piece."""
    options, saved, mine = side
    _, kernel = kernel_of(HEADS, heads[0].hidden, call.backend)

    def run(piece, part, needs, sums):
        i, columns, ids, some, by = part
        other, mask = Head(*heads[1].piece(columns)), call.rows.mask
        given = ids, mask, *records(options), some, by, tuple(needs), *kept[i], sums
        return kernel.backward(piece, other, *given, compute_dtype(piece.hidden))

    parts = list(saved_pieces(call, logp, mine, options, saved, is_teacher))
    return pulled(heads[0], run, call.rows.shards, parts, needs, sums, wide)


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *heads, call, keep = args
        found = head_statistics(Head(*heads[:3]), Head(*heads[3:]), call, keep)
        asked = found.out.asked()
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(asked[1])
        kept = [x for pair in found.kept for x in pair]
        ctx.save_for_backward(*heads, asked[1], found.logp, *kept)
        ctx.call = call
        return tuple(asked)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        *heads, aux, logp = ctx.saved_tensors[:8]
        flat, call, found = ctx.saved_tensors[8:], ctx.call, []
        kept = list(zip(flat[::2], flat[1::2], strict=True))
        own, other = Head(*heads[:3]), Head(*heads[3:])
        both = sides(grads, call.outputs, call.rows.targets, 1, aux, call.options)
        for i, (side, pair) in enumerate(zip(both, ((own, other), (other, own)), strict=True)):
            needs = list(ctx.needs_input_grad[3 * i : 3 * i + 3])
            if side is None or not any(needs):
                found += (None,) * 3
                continue
            ours = [x[::-1] for x in kept] if i else kept
            with call.rows.shards.around():
                got = head_gradients(call, pair, logp, ours, side, bool(i), needs, None)
            found += (x if need else None for x, need in zip(got, needs, strict=True))
        return *found, None, None


def linear_divergence(heads: tuple, call: Call, keep: bool) -> list:
    """The op's outputs but what it keeps, of both heads' hidden states and this rank's rows of them."""
    return list(_HeadDivergence.apply(*heads, call, keep))
