"""A loss of log-probs fused with the head: each chunk's gradients are taken while its logits are there.

Of a token, ∂loss/∂logp is known as soon as the log-probs of its chunk are, if a chunk holds whatever the loss reads
together, as a pair. So per chunk of rows

    z = hidden·weightᵀ + bias                  kept for the chunk alone
    logp                                       the statistics of linear_token_logps
    g = ∂loss/∂logp                            the loss's own kernel
    ∂z = g·(onehot − softmax(z))·…             and from it ∂hidden, ∂weight += ∂zᵀ·hidden, ∂bias += Σ ∂z

which is three GEMMs where a backward that comes later has four, unless it has kept all logits. The sums over chunks
are float32. Of a loss with an exact KL to a reference, the chunk's logits of both heads are there, and what it has by
the KL goes into the same ∂z.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

import rlfast.distributed.pairs as shared_pairs
import rlfast.distributed.vocab as shared
from rlfast.distributed.groups import Shards
from rlfast.fallback.token_logps import compute_dtype
from rlfast.ops import divergence_records as pairs
from rlfast.ops import linear_divergence, linear_token_logps
from rlfast.ops.lora import Lora, Sums, widened
from rlfast.ops.records import Outputs, Row, Wanted


class Rows(NamedTuple):
    """A head over its rows, as ``rlfast::linear_token_logps`` takes them."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    targets: torch.Tensor  # [N]
    mask: torch.Tensor | None  # [N]
    temperatures: torch.Tensor | None  # [N]
    options: tuple  # temperature, softcap, logit_scale
    reference: pairs.Head | None = None  # of the same rows, vocabulary and options
    lora: Lora | None = None  # beside the weight
    compact: bool = False  # rows that are masked go into no product; a device is waited for to know which
    shards: Shards | None = None  # of the vocabulary, of which the weight and the bias are this rank's then

    def leaves(self) -> tuple:
        """What may have a gradient."""
        return self[:3] if self.lora is None else (*self[:3], self.lora.a, self.lora.b)

    def widened(self) -> Rows:
        """With the low-rank part, if there is one, as columns of hidden states and weight."""
        if self.lora is None:
            return self
        hidden, weight = widened(self.hidden, self.weight, self.mask, self.lora)
        return self._replace(hidden=hidden, weight=weight, lora=None)

    def part(self, chunk: tuple[slice, ...]) -> Rows:
        """The rows of a chunk."""
        return self._of_each(lambda x: _joined([x[rows] for rows in chunk]))

    def counted(self) -> tuple[Rows, torch.Tensor]:
        """The rows that count, and their numbers."""
        there = self.mask.nonzero().squeeze(1)
        return self._of_each(lambda x: x.index_select(0, there))._replace(compact=False), there

    def _of_each(self, function: Callable) -> Rows:
        """A function of everything that has an entry a row."""
        hidden, targets, mask, temperatures = (
            x if x is None else function(x) for x in (self.hidden, self.targets, self.mask, self.temperatures)
        )
        ref = self.reference
        if ref is not None:
            ref = ref._replace(hidden=function(ref.hidden))
        return self._replace(hidden=hidden, targets=targets, mask=mask, temperatures=temperatures, reference=ref)


class Numbers(NamedTuple):
    """What a loss reads of each row, [N] in the compute dtype; or its gradient by the first three. None: not asked for.

    The others are the metrics of ``rlfast.linear_token_logps``, and have no gradient.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None = None
    full_kl: torch.Tensor | None = None  # KL(π‖π_ref)
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None  # bool

    def of(self, function: Callable) -> Numbers:
        """A function of each that is there."""
        return Numbers(*(x if x is None else function(x) for x in self))


def numbers_of(rows: Rows, outputs: int, keep: bool, backend: str) -> tuple[Numbers, Callable]:
    """(the numbers, ``pull(by, sums, need_hidden, head, wide)``).

    That function takes the gradient by the numbers, adds to the sums of weight and bias, where they are not None, and
    gives ∂hidden; of another (hidden, weight, bias) with these logits, if it is given one. Without sums it gives all
    three gradients, those that are needed. All are of the compute dtype, since a factor is still to come; without sums
    and ``wide`` they are rounded to the head's.

    Args:
        rows: the head and its rows, widened.
        outputs: what is computed beside log-probs: bits of ``records.py``; beside a reference, entropies alone.
        keep: whether the logits are kept, else that function makes them again.
        backend: that was asked for.
    """
    if rows.compact:
        return _of_counted(rows, outputs, keep, backend)
    if rows.shards is not None:
        return _of_shards(rows, outputs, keep, backend)
    own, ref = rows[:3], rows.reference
    if ref is None:
        given, wanted = (rows.targets, rows.mask, rows.temperatures, *rows.options), Wanted(outputs, 0)
        *asked, kept = linear_token_logps.op(*own, *given, *wanted, keep, backend)
        out, at = Outputs.named(asked, wanted), Row.of(1, wanted)
        metrics = (out.aux[i] if i >= 0 else None for i in (at.log_sum_sq_probs, at.mean_logits))

        def pull(by: Numbers, sums, needs, head=own, wide=True):
            saved = (*head, *given, out.aux, kept, by.logp)
            if sums is None:
                return linear_token_logps.op_backward(*saved, None, by.entropy, needs, wide, backend)
            return linear_token_logps.op_accumulate(*saved, by.entropy, *sums, needs, backend)

        return Numbers(out.logp, out.entropy, None, *metrics, out.is_top1), pull

    both = [x for x in rows.options for _ in range(2)]
    given = (*ref, rows.targets, rows.mask, rows.temperatures, rows.temperatures, *both, pairs.REVERSE, 0.5)
    *asked, kept, ref_kept = linear_divergence.op(*own, *given, outputs, keep, backend)
    out = pairs.Outputs.named(asked, True, outputs)

    def pull_pair(by: Numbers, sums, needs, head=own, wide=True):
        grads = by.full_kl, by.logp, None, by.entropy
        saved = (*head, *given, *pairs.saved_of(out.aux, 1, outputs, False), *grads, kept, ref_kept)
        if sums is None:
            return linear_divergence.op_backward(*saved, needs, wide, backend)
        return linear_divergence.op_accumulate(*saved, *sums, needs, backend)

    return Numbers(out.logp, out.entropy, out.value), pull_pair


def _of_shards(rows: Rows, outputs: int, keep: bool, backend: str) -> tuple[Numbers, Callable]:
    """``numbers_of`` of a vocabulary that is shared out; with sums, ∂hidden is what this rank's columns add to it."""
    own, wanted = shared.Head(*rows[:3]), Wanted(outputs, 0)
    if rows.reference is not None:
        return _of_shared_pair(rows, own, outputs, keep, backend)
    place = rows.targets.shape
    said = shared.rows_like(rows.shards, place, rows.targets, rows.mask, rows.temperatures, rows.options)
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in own)
    found = None
    if recorded:
        out = Outputs.named(shared.linear_token_logps(*own, said, wanted, keep, backend), wanted)
    else:
        found = shared.head_statistics(own, said, wanted, keep, backend)
        out = found.out

    def pull(by: Numbers, sums, needs, head=own, wide=True):
        grads = by.logp, None, by.entropy
        needs = needs if sums is None else (needs, *(x is not None for x in sums))
        got = shared.head_gradients(
            shared.Head(*head), said, found.out.aux, found.logp, found.kept, grads, needs, sums, backend, wide
        )
        return got if sums is None else got[0]

    at = Row.of(1, wanted)
    metrics = (out.aux[i] if i >= 0 else None for i in (at.log_sum_sq_probs, at.mean_logits))
    entropy, top1 = (x if x is not None and x.numel() else None for x in (out.entropy, out.is_top1))
    return Numbers(out.logp, entropy, None, *metrics, top1), pull


def _of_shared_pair(rows: Rows, own, outputs: int, keep: bool, backend: str) -> tuple[Numbers, Callable]:
    """The same with the KL to a reference, whose head is shared out alike."""
    ref, both = shared.Head(*rows.reference), [x for x in rows.options for _ in range(2)]
    options = rows.temperatures, rows.temperatures, *both, pairs.REVERSE, 0.5
    call = shared_pairs.call_of(rows.shards, rows.targets.shape, rows.targets, rows.mask, options, outputs, backend)
    found = None
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in own):
        asked = shared_pairs.linear_divergence((*own, *ref), call, keep)
        out = pairs.Outputs.named(asked, True, outputs)
    else:
        found = shared_pairs.head_statistics(own, ref, call, keep)
        out = found.out

    def pull(by: Numbers, sums, needs, head=own, wide=True):
        needs = needs if sums is None else (needs, *(x is not None for x in sums))
        side = options, pairs.saved_of(out.aux, 1, outputs, False), (by.full_kl, by.logp, None, by.entropy)
        heads = shared.Head(*head), ref
        got = shared_pairs.head_gradients(call, heads, found.logp, found.kept, side, False, needs, sums, wide)
        return got if sums is None else got[0]

    return Numbers(out.logp, out.entropy, out.value), pull


def _of_counted(rows: Rows, outputs: int, keep: bool, backend: str) -> tuple[Numbers, Callable]:
    """``numbers_of`` by the rows that count alone; 0 for the others."""
    some, there = rows.counted()
    numbers, pull_some = numbers_of(some, outputs, keep, backend)

    def spread(x):
        return x.new_zeros((rows.mask.shape[0], *x.shape[1:])).index_copy(0, there, x)

    def pull(by: Numbers, sums, needs, head=rows[:3], wide=True):
        head, by = (head[0].index_select(0, there), *head[1:]), by.of(lambda x: x.index_select(0, there))
        if sums is None:
            d, *rest = pull_some(by, None, needs, head, wide)
            return spread(d) if needs[0] else d, *rest
        d = pull_some(by, sums, needs, head)
        return spread(d) if needs else d

    return numbers.of(spread), pull


def in_one(
    rows: Rows, coefficients: Callable, needs: list, backend: str, outputs: int = 0
) -> tuple[Numbers, tuple, Callable | None]:
    """(the numbers, the gradients, what makes the gradients times a factor) of all rows as one chunk.

    A factor of a power of two does not round, so bfloat16 gradients are rounded at once: half the memory to write. For
    any other they are made again, from the logits on. On a GPU, where a factor is not looked at, and in float16, which
    has not got the range, they stay in the compute dtype, and there is no such function.
    """
    hidden = rows.hidden
    early = hidden.dtype == torch.bfloat16 and hidden.is_cpu and not torch.compiler.is_compiling()
    numbers, pull = numbers_of(rows, outputs, True, backend)
    by, leaves = coefficients(0, numbers), rows.leaves()
    gradients, versions = pull(by, None, needs, wide=not early), [x is not None and x._version for x in leaves]

    def times(g) -> tuple:
        if versions != [x is not None and x._version for x in leaves]:
            raise RuntimeError("hidden, weight or bias has been changed in place since the loss was computed")
        around = nullcontext if rows.shards is None else rows.shards.around
        with torch.no_grad(), around():
            found = numbers_of(rows, outputs, True, backend)[1](by.of(lambda x: x * g), None, needs, wide=False)
        return tuple(x if need else None for x, need in zip(found, needs, strict=True))

    found = tuple(x if need else None for x, need in zip(gradients, needs, strict=True))
    return numbers, found, times if early else None


def chunked(
    rows: Rows, chunks: list, coefficients: Callable, needs: list, backend: str, outputs: int = 0
) -> tuple[Numbers, tuple]:
    """The numbers of all rows, and the loss's gradients by the head.

    Args:
        rows: the head and its rows.
        chunks: of each chunk the slices of rows that it consists of; every row that counts is in one of them.
        coefficients: of a chunk's number and its ``Numbers``: the ``Numbers`` of the loss's gradient by them.
        needs: whether each of ``rows.leaves()`` needs a gradient.
        backend: that was asked for.
        outputs: as in ``numbers_of``.

    Returns:
        The numbers, 0 in rows of no chunk; the gradients in the compute dtype, None where not needed.
    """
    hidden, acc, found = rows.hidden, compute_dtype(rows.hidden), None
    d_hidden, *sums = (
        torch.zeros(x.shape, dtype=acc, device=x.device) if need else None
        for x, need in zip(rows[:3], needs[:3], strict=True)
    )
    factors = None
    if rows.lora is not None:
        factors = Sums(rows.lora, hidden, needs[3:], sums[1], apart=backend != "reference")  # which keeps no logits
    widened_rows = rows.widened()
    for number, chunk in enumerate(chunks):
        part = widened_rows.part(chunk)
        numbers, pull = numbers_of(part, outputs, True, backend)
        found = found or numbers.of(lambda x: x.new_zeros(hidden.shape[0]))
        by = coefficients(number, numbers)
        d = pull(by, sums, needs[0]) if factors is None else factors.add(part, pull, by, needs[0])
        at = 0
        for place in chunk:
            end = at + place.stop - place.start
            for whole, some in zip(found, numbers, strict=True):
                if whole is not None:
                    whole[place] = some[at:end]
            if needs[0]:
                d_hidden[place] = d[at:end]
            at = end
    low_rank = [] if factors is None else list(factors.gradients())
    if rows.shards is not None:  # what every rank's columns add to them
        for x in (d_hidden if rows.shards.sum_hidden else None, *low_rank[:1]):
            if x is not None:
                rows.shards.total(x)
    return found, (d_hidden, *sums, *low_rank)


def _joined(parts: list) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
