"""Token log-probs of a vocabulary that is shared out over ranks, from logits and from hidden states.

Forward: the op's kernel on each piece of the shard, its records gathered and merged (``merge.py``): one exchange.
Backward: the kernel again, with the row's m, log Σe and H in the place of the shard's. Of a token whose target is
elsewhere

    ∂L/∂z_v = −g·p_v

which is what a log-sum-exp with the gradient −g has; so its place is taken by a column of the piece, whose own is 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast import backends
from rlfast.distributed.groups import Shards, rows_of
from rlfast.distributed.merge import Layout, merged, nothing, record
from rlfast.fallback.token_logps import compute_dtype, counted_rows, transformed
from rlfast.native.token_logps import peak_unit
from rlfast.ops.dispatch import first_derivatives_only
from rlfast.ops.linear_token_logps import NAME as HEAD
from rlfast.ops.linear_token_logps import as_given, given_in
from rlfast.ops.records import ENTROPY, LSE, Outputs, Row, Transform, Wanted
from rlfast.ops.token_logps import NAME as LOGITS
from rlfast.ops.token_logps import differentiable, non_differentiable, refuse_spent


class Rows(NamedTuple):
    """What is said of the rows, and how the vocabulary is shared out."""

    shards: Shards
    lead: tuple
    targets: torch.Tensor | None  # [*lead] or [*lead, K], ids of the whole vocabulary
    mask: torch.Tensor | None
    transform: Transform

    def here(self, span: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(the targets as a piece's, a column of it for those that are not, whether they are)."""
        inside = (self.targets >= span[0]) & (self.targets < span[1])
        ids = torch.where(inside, self.targets - span[0], 0)
        return torch.where(self.targets == -100, self.targets, ids), inside


def rows_like(shards: Shards, lead, targets, mask, temperatures, options: tuple) -> Rows:
    """From the arguments of an op."""
    temperature, softcap, logit_scale = options
    transform = Transform(temperature if temperatures is None else temperatures, softcap, logit_scale)
    return Rows(shards, tuple(lead), targets, mask, transform)


class Found(NamedTuple):
    """A forward."""

    out: Outputs  # of whole rows
    logp: torch.Tensor  # [own pieces, K, n]: log p of what each piece has as its targets
    kept: list  # of each piece what its kernel keeps


def unit(kernel_name: str, transform: Transform, n: int):
    """What a backend's peaks are multiplied by to be a z: a number, or one a row [n]."""
    if kernel_name not in ("cpu", "cuda"):
        return 1.0
    by = peak_unit(transform)
    return by.reshape(n) if isinstance(by, torch.Tensor) else by


def compared(x, rows: Rows, name: str) -> torch.Tensor:
    """Of logits [*lead, k] without a soft-cap, what a backend's peak is the largest of."""
    if name not in ("cpu", "cuda"):
        return transformed(x.reshape(rows_of(rows.lead), x.shape[-1]), rows.transform, slice(None))
    return x * (1.0 if rows.transform.logit_scale > 0 else -1.0 if rows.transform.logit_scale else 0.0)


def statistics(rows: Rows, run, name: str, wanted: Wanted, like, given: bool = False) -> Found:
    """The outputs of whole rows; ``run(columns, ids, wanted)`` is a kernel's forward on this rank's columns.

    ``given``: in place of the log-probs of its top-k it has what ``unit`` is of.
    """
    n, ids = rows_of(rows.lead), rows.targets
    within, records, kept = wanted._replace(outputs=wanted.outputs & ~LSE), [], []
    flat, counted = counted_rows(ids, rows.mask, n)
    layout = Layout.of(flat.shape[1], within)
    for columns, span in rows.shards.own():
        width = span[1] - span[0]
        if not width:
            records.append(nothing(layout, n, like, compute_dtype(like)))
            kept.append(like.new_empty(0))
            continue
        out, logits = run(columns, rows.here(span)[0], within._replace(top_k=min(within.top_k, width)))
        records.append(record(out, layout, n))
        kept.append(logits)
    everyones = rows.shards.everyones(torch.stack(records))
    scale, shards = unit(name, rows.transform, n), rows.shards
    out, logp = merged(
        everyones, shards.spans, rows.lead, ids, flat, counted, wanted, scale, shards.first, len(shards.mine),
        given,
    )  # fmt: skip
    return Found(out, logp, kept)


def pieces(rows: Rows, aux, logp, grads: tuple):
    """Of each piece with a column: (number, columns, ids, aux, gradients), as a kernel's backward takes them."""
    g_logp, g_lse, g_entropy = grads
    many = rows.targets is not None and rows.targets.dim() > len(rows.lead)
    k = logp.shape[1]
    row = Row.of(k, Wanted(ENTROPY if g_entropy is not None else 0, 0))
    for i, (columns, span) in enumerate(rows.shards.own()):
        if span[0] == span[1]:
            continue
        ids = lse = None
        own = g_logp
        if rows.targets is not None:
            ids, inside = rows.here(span)
            lse = g_lse
            if g_logp is not None:
                own = torch.where(inside, g_logp, 0.0)
                away = torch.where(inside | (rows.targets == -100), 0.0, g_logp)
                away = away.sum(-1) if many else away
                lse = -away if g_lse is None else g_lse - away
        else:
            lse = g_lse
        saved = [aux[:2], logp[i].view(k, *rows.lead)]
        if row.entropy >= 0:
            saved.append(aux[row.entropy : row.entropy + 1])
        by = tuple(g if g is None else g.contiguous() for g in (own, lse, g_entropy))
        yield i, columns, ids, torch.cat(saved), by


def kernel_of(op: str, x, backend: str) -> tuple[str, object]:
    """(name, module) of the backend that serves an op."""
    name = backends.select(op, x.device.type, x.dtype, backend)
    return name, backends.implementation(op, name)


class _TokenLogps(torch.autograd.Function):
    """From logits [*lead, columns of this rank]."""

    @staticmethod
    def forward(ctx, logits, rows: Rows, wanted: Wanted, inplace: bool, backend: str):
        name, kernel = kernel_of(LOGITS, logits, backend)

        def run(columns, ids, some):
            x = logits[..., columns]
            out = kernel.forward(x, ids, rows.mask, rows.transform, some)
            if some.top_k and given:
                best = x.gather(-1, out.topk_ids.clamp(min=0)).to(out.topk_logp.dtype)
                out = out._replace(topk_logp=compared(best, rows, name))
            return out, None

        given = not rows.transform.softcap  # a kernel's tanh is its own
        found = statistics(rows, run, name, wanted, logits, given)
        asked = found.out.asked(wanted)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*non_differentiable(asked, wanted))
        ctx.save_for_backward(logits, found.out.aux, found.logp)
        ctx.rows, ctx.wanted, ctx.inplace, ctx.backend, ctx.spent = rows, wanted, inplace, backend, False
        return tuple(asked)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        refuse_spent(ctx)
        grads = differentiable(grads, ctx.wanted)
        if all(g is None for g in grads):
            return (None,) * 5
        logits, aux, logp = ctx.saved_tensors
        rows, (_, kernel) = ctx.rows, kernel_of(LOGITS, logits, ctx.backend)
        out = logits.detach() if ctx.inplace else torch.empty_like(logits)
        for _, columns, ids, saved, by in pieces(rows, aux, logp, grads):
            kernel.backward(logits[..., columns], ids, rows.mask, rows.transform, saved, by, out[..., columns])
        used = max(columns.stop for columns in rows.shards.mine)
        out[..., used:] = 0.0  # padding
        if ctx.inplace:
            ctx.spent = True
            torch.autograd.graph.increment_version(logits)
        return out, *(None,) * 4


def token_logps(logits, rows: Rows, wanted: Wanted, inplace: bool, backend: str) -> list:
    """The op's outputs, of logits [*lead, columns of this rank]."""
    return list(_TokenLogps.apply(logits, rows, wanted, inplace, backend))


class Head(NamedTuple):
    """This rank's rows of a head."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [columns of this rank, D]
    bias: torch.Tensor | None

    def piece(self, columns: slice) -> tuple:
        """Of some columns."""
        return self.hidden, self.weight[columns], None if self.bias is None else self.bias[columns]


def head_statistics(head: Head, rows: Rows, wanted: Wanted, keep: bool, backend: str) -> Found:
    """The outputs of whole rows."""
    name, kernel = kernel_of(HEAD, head.hidden, backend)

    def run(columns, ids, some):
        return kernel.forward(*head.piece(columns), ids, rows.mask, rows.transform, some, keep)

    with as_given(head.hidden):
        return statistics(rows, run, name, wanted, head.hidden)


def summed(shards: Shards, d_hidden, dtype: torch.dtype):
    """∂hidden over all columns, rounded once; of this rank's alone, if its sum is another's to take."""
    return (shards.total(d_hidden.contiguous()) if shards.sum_hidden else d_hidden).to(dtype)


def pulled(head: Head, run, shards: Shards, parts, needs, sums, wide: bool = False) -> tuple:
    """Gradients by the head; ``run(head, part, needs, sums)`` is a kernel's backward of a piece, in the compute dtype.

    With ``sums`` (weight, bias) those of the shard are added to them, and ∂hidden is the shard's part, in the compute
    dtype. Without, all three come back in the head's dtype, or the compute dtype if ``wide``, ∂hidden whole.
    """
    acc, dtype = compute_dtype(head.hidden), given_in(head.hidden, wide)
    with as_given(head.hidden):
        if sums is None and shards.mine == (slice(0, head.weight.shape[0]),) and parts:
            (part,) = parts
            d_hidden, *rest = run(head, part, needs, None)
            return (summed(shards, d_hidden, dtype) if needs[0] else d_hidden.to(dtype), *(x.to(dtype) for x in rest))
        total = sums
        if sums is None:
            total = [
                torch.zeros_like(x, dtype=acc) if need else None for x, need in zip(head[1:], needs[1:], strict=True)
            ]
        d_hidden = None
        for part in parts:
            columns = part[1]
            some = [x if x is None else x[columns] for x in total]
            d = run(Head(*head.piece(columns)), part, needs, some)[0]
            d_hidden = d if d_hidden is None else d_hidden.add_(d)
    nothing = head.hidden.new_empty(0)
    if needs[0] and d_hidden is None:
        d_hidden = torch.zeros_like(head.hidden, dtype=acc)
    if sums is not None:
        return d_hidden if needs[0] else nothing, nothing, nothing
    rest = (nothing if x is None else x.to(dtype) for x in total)
    return summed(shards, d_hidden, dtype) if needs[0] else nothing, *rest


def head_gradients(head: Head, rows: Rows, aux, logp, kept, grads, needs, sums, backend: str, wide=False) -> tuple:
    """As ``pulled``, of log-probs, log-sum-exps and entropies."""
    _, kernel = kernel_of(HEAD, head.hidden, backend)

    def run(piece, part, needs, sums):
        i, _, ids, saved, by = part
        given = ids, rows.mask, rows.transform, saved, by, tuple(needs), kept[i], sums
        return kernel.backward(*piece, *given, compute_dtype(head.hidden))

    return pulled(head, run, rows.shards, list(pieces(rows, aux, logp, grads)), needs, sums, wide)


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows: Rows, wanted: Wanted, keep: bool, backend: str):
        found = head_statistics(Head(hidden, weight, bias), rows, wanted, keep, backend)
        asked = found.out.asked(wanted)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*non_differentiable(asked, wanted))
        ctx.save_for_backward(hidden, weight, bias, found.out.aux, found.logp, *found.kept)
        ctx.rows, ctx.wanted, ctx.backend = rows, wanted, backend
        return tuple(asked)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        grads, needs = differentiable(grads, ctx.wanted), list(ctx.needs_input_grad[:3])
        if all(g is None for g in grads):
            return (None,) * 7
        with ctx.rows.shards.around():
            *head, aux, logp = ctx.saved_tensors[:5]
            kept = ctx.saved_tensors[5:]
            found = head_gradients(Head(*head), ctx.rows, aux, logp, kept, grads, needs, None, ctx.backend)
        return (*(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 4)


def linear_token_logps(hidden, weight, bias, rows: Rows, wanted: Wanted, keep: bool, backend: str) -> list:
    """The op's outputs but what it keeps, of hidden [N, D] and this rank's rows of the head."""
    return list(_HeadLogps.apply(hidden, weight, bias, rows, wanted, keep, backend))
