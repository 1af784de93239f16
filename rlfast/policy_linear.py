"""Policy losses straight from hidden states and the head.

What a token's ∂loss/∂logp, ∂loss/∂H and ∂loss/∂KL depend on is known with the log-probs of its sequence, or, where the
loss has no more to do with sequences, with its own. So the batch goes in chunks of whole sequences, or of tokens: their
logits, their log-probs, entropies and exact KLs, the loss's coefficients, and, while the logits are still there,
∂hidden, ∂weight and ∂bias. What the loss divides by is counted before.

Where a sequence's logits do not fit the memory budget, or too few rows would, the backward makes the logits again.
"""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch

from rlfast import backends, divergences, heads, row_inputs, validate
from rlfast.distributed import groups
from rlfast.full_kl import FULL
from rlfast.heads import Head, compacts, live_before, logits_bytes, most_rows, numbers, unit_strides
from rlfast.loss_inputs import Given
from rlfast.ops import linear_loss
from rlfast.ops.divergence_records import Head as Reference
from rlfast.ops.known_gradients import with_gradients
from rlfast.ops.linear_loss import Numbers, Rows, chunked
from rlfast.ops.lora import Lora
from rlfast.ops.loss_records import (
    METRICS,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_SUM_OVER_MAX_LEN,
    TOKEN_MEAN,
    TOKEN_SUM,
    Fields,
    Output,
    Plan,
    Settings,
    reads_sequences,
    row_wise,
)
from rlfast.ops.records import ENTROPY

WEIGHT = Rows._fields.index("weight")  # among the leaves too
BY_TOKEN = Fields._fields.index("cu_seqlens")  # the fields before it have one number a token
SCALE, ENTROPY_SCALE, TOKENS, SEQUENCES = map(METRICS.index, ("scale", "entropy_scale", "tokens", "sequences"))


class Tokens(NamedTuple):
    """A batch, checked."""

    rows: Rows  # its tokens, one after the other
    fields: Fields  # in the caller's shape; ``logp`` is a place for it, and ``entropy`` where the loss reads it
    settings: Settings
    into: torch.Tensor | None  # the weight, if its gradient is added straight to its own
    ends: list[int] | None  # of packed sequences, where they can be looked at

    def shaped(self, found: Numbers) -> Numbers:
        """Numbers [N] in the caller's shape."""
        return found.of(lambda x: x.view(self.fields.logp.shape))


def checked(
    loss, head: Head, hidden, targets, given: dict, call: tuple, ref: tuple, lora=None, sync=False, entropy=False
) -> Tokens:
    """The batch, or an error that names the argument.

    Args:
        loss: a ``Loss``.
        head: the head.
        hidden, targets: of the tokens, as they came.
        given: the fields of ``loss_inputs.Given`` beside logp and entropy, as they came.
        call: (max_len, world_size, accumulation).
        ref: (ref_hidden, ref_weight, ref_bias) as they came.
        lora: (a, b, scale) as it came, or None.
        sync, entropy: as they came.
    """
    validate.tensor("hidden", hidden)
    if hidden.dim() not in (2, 3):
        validate.fail("hidden", "shape [B, T, D], or [N, D] with cu_seqlens", validate.shape(hidden))
    said = functools.partial(asked, loss, head, hidden, targets, given, ref, lora, entropy)
    shards, hidden, weight, bias = row_inputs.shared_head(head.process_group, hidden, head.weight, head.bias, said)
    lead, source = hidden.shape[:-1], ("hidden", hidden)
    targets = row_inputs.checked_targets(lead, row_inputs.vocabulary(weight, shards), targets, source)
    if targets.shape != lead:
        validate.fail("targets", f"shape {tuple(lead)} like the rows of hidden", validate.shape(targets))
    mask = validate.mask_like(given["mask"], "targets", targets, "mask")
    live = targets != validate.IGNORE_INDEX
    given = given | {"mask": live if mask is None else live & mask}
    temperatures, temperature = row_inputs.checked_temperature("temperature", lead, head.temperature, source)
    place = torch.zeros(lead, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
                        device=hidden.device)  # fmt: skip
    made = {"entropy": place if loss.has_bonus else None, "full_kl": place if loss.has_full_kl else None}
    fields, settings = loss.checked(Given(place, **made, **given), *call, "targets")
    targets, mask, temperatures = (x if x is None else x.reshape(-1) for x in (targets, fields.mask, temperatures))
    rows = Rows(hidden.reshape(targets.shape[0], hidden.shape[-1]), weight, bias, targets, mask.contiguous(),
                temperatures, (temperature, *head.options()),
                checked_reference(loss, hidden, weight, *row_inputs.laid_out(shards or head.process_group, *ref)),
                checked_lora(hidden, weight, lora, shards or head.process_group),
                checked_sync(sync) and not compacts(hidden), shards)  # fmt: skip
    ends = given["cu_seqlens"]
    ends = ends.tolist() if ends is not None and validate.looked_at(ends) else None
    return Tokens(unit_strides(rows), fields, settings, head.accumulated(), ends)


def asked(loss, head: Head, hidden, targets, given: dict, ref: tuple, lora, entropy) -> dict:
    """What ranks have to ask for alike."""
    a = lora[0] if isinstance(lora, tuple | list) and lora else None
    more = head.asked(loss.name) | {
        "accumulate_grad": int(bool(head.accumulate_grad)),
        "rank of lora": a.shape[0] if isinstance(a, torch.Tensor) and a.dim() else 0,
        "gradients of lora": groups.learning(*(lora or ())),
        **row_inputs.counted(targets != validate.IGNORE_INDEX, given["mask"], given["cu_seqlens"]),
    }
    outputs = ("entropy",) if entropy or loss.has_bonus else ()
    return row_inputs.to_agree("policy loss", hidden, targets, None, outputs, ref, more)


def checked_reference(loss, hidden, weight, ref_hidden, ref_weight, ref_bias) -> Reference | None:
    """The reference's head over its hidden states [N, E], if the loss reads one."""
    given = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    for name, x in given.items():
        if x is not None and loss.kl != FULL:
            validate.fail(name, f"None: {loss.name} reads none", type(x).__name__)
        if x is None and loss.has_full_kl and name != "ref_bias":
            validate.fail(name, f"a tensor: {loss.name} needs it", "None")
    if not loss.has_full_kl:
        return None
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            validate.fail(name, "a tensor that needs no gradient", "requires_grad=True")
    ref_hidden, ref_weight, ref_bias = divergences.checked_reference(hidden, weight, *given.values())
    return Reference(ref_hidden.reshape(-1, ref_hidden.shape[-1]), ref_weight, ref_bias)


def checked_sync(sync) -> bool:
    """Whether rows that are masked may be looked for."""
    if validate.flag("sync", sync) and torch.compiler.is_compiling():
        validate.fail("sync", "False in compiled code, which does not look at a mask", "True")
    return sync


def checked_lora(hidden, weight, lora, process_group) -> Lora | None:
    """The low-rank part of a head, or an error that names it."""
    if lora is None:
        return None
    if not isinstance(lora, tuple | list) or len(lora) != 3:
        validate.fail("lora", "(a, b, scale)", type(lora).__name__, TypeError)
    a, b, scale = lora
    a, b = groups.everywhere(process_group, a, "lora[0]"), groups.alike(process_group, b, "lora[1]")
    if isinstance(a, torch.Tensor) and a.dim() != 2:
        validate.fail("lora[0]", f"shape (r, {hidden.shape[-1]})", validate.shape(a))
    (_, a, _), rank = row_inputs.checked_head(hidden, a, None, weight_name="lora[0]", sizes="rD"), len(a)
    _, b, _ = row_inputs.checked_head(hidden.new_zeros(rank), b, None, hidden_name="lora[0]", weight_name="lora[1]")
    if b.shape[0] != weight.shape[0]:
        validate.fail("lora[1]", f"shape ({weight.shape[0]}, {rank}) like the rows of weight", validate.shape(b))
    if weight.requires_grad:
        validate.fail("weight", "a tensor that needs no gradient, beside lora", "requires_grad=True")
    return Lora(a, b, validate.finite("lora[2]", scale))


def run(loss, tokens: Tokens, budget: float | None, entropy: bool) -> tuple:
    """(the op's output with its gradient, the tokens' numbers without) of a batch, in its shape."""
    rows, needs, budget = tokens.rows, needed(tokens.rows), room(loss, tokens, budget)
    outputs, backend = ENTROPY if entropy or loss.has_bonus else 0, backends.requested()
    chunks = chunks_of(loss, tokens, budget) if any(needs) else None
    if not any(needs) or (chunks is None and rows.lora is None and tokens.into is None):
        found = tokens.shaped(numbers(rows, any(needs), budget, outputs))
        if outputs and not loss.has_bonus:
            found = found._replace(entropy=found.entropy.detach())
        out, _ = launch(loss, tokens.fields, tokens.settings, found, any(needs), backend)
        return out, found.of(torch.Tensor.detach)
    ways = {None: in_two_passes, 1: in_one}
    taken = ways.get(chunks and len(chunks), in_chunks)
    with torch.no_grad():
        out, found, gradients, *times = taken(loss, tokens, chunks, needs, budget, outputs, backend)
    into = None if tokens.into is None else {WEIGHT: tokens.into}
    return out._replace(loss=with_gradients(out.loss, rows.leaves(), gradients, into, *times)), tokens.shaped(found)


def in_chunks(loss, tokens: Tokens, chunks, needs, budget, outputs, backend) -> tuple:
    """(output, numbers, gradients), a chunk after the other."""
    coefficients = taker(loss, tokens, chunks, counted(loss, tokens, backend), backend)
    slices = [(slice(*chunk),) for chunk in chunks]
    found, gradients = chunked(tokens.rows, slices, coefficients, needs, backend, outputs)
    out, _ = launch(loss, tokens.fields, tokens.settings, tokens.shaped(found), False, backend)
    return out, found, gradients


def in_one(loss, tokens: Tokens, chunks, needs, budget, outputs, backend) -> tuple:
    """The same of one chunk, whose loss is the loss; and ``times`` of ``linear_loss.in_one``, where that is the way."""
    out = None

    def coefficients(_, found: Numbers) -> Numbers:
        nonlocal out
        out, kl = launch(loss, tokens.fields, tokens.settings, tokens.shaped(found), True, backend)
        return gradient_of(loss, out, kl)

    if tokens.rows.lora is None and tokens.into is None and chunks[0] == (0, tokens.rows.mask.shape[0]):
        found, *gradients = linear_loss.in_one(tokens.rows, coefficients, needs, backend, outputs)
        return out, found, *gradients
    found, gradients = chunked(tokens.rows, [(slice(*chunks[0]),)], coefficients, needs, backend, outputs)
    return out, found, gradients


def in_two_passes(loss, tokens: Tokens, chunks, needs, budget, outputs, backend) -> tuple:
    """The same of rows that the loss has to see whole, and whose logits do not fit: they are made again."""
    rows = tokens.rows
    found = numbers(rows, False, budget, outputs)
    out, kl = launch(loss, tokens.fields, tokens.settings, tokens.shaped(found), True, backend)
    by, n = gradient_of(loss, out, kl), rows.mask.shape[0]
    most = second_pass(rows, budget)
    slices = [(slice(first, min(first + most, n)),) for first in range(0, n, most)]
    again = ENTROPY if loss.has_bonus else 0
    _, gradients = chunked(rows, slices, lambda i, _: by.of(lambda x: x[slices[i][0]]), needs, backend, again)
    return out, found, gradients


def second_pass(rows: Rows, budget: float) -> int:
    """Rows of a chunk whose logits are made a second time."""
    return max(heads.FEWEST_ROWS, int(budget // logits_bytes(rows)))


def room(loss, tokens: Tokens, budget: float | None) -> float:
    """Bytes of logits at once."""
    together = 1
    if budget is None and whole_sequences(loss.prepared.plan, tokens.settings):
        together = max([1, *(b - a for a, b in pairwise(ends_of(loss.prepared.plan, tokens) or ()))])
    return heads.room(tokens.rows, budget, together)


def needed(rows: Rows) -> list[bool]:
    """Whether each of the rows' leaves needs a gradient."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in rows.leaves()]


def launch(loss, fields: Fields, settings: Settings, found: Numbers, needs: bool, backend: str) -> tuple:
    """What ``loss.launch`` gives of tokens whose numbers are these."""
    fields = fields._replace(logp=found.logp, entropy=found.entropy)
    return loss.launch(fields, settings, found.full_kl, (needs, needs and loss.has_bonus, needs), backend)


def chunks_of(loss, tokens: Tokens, budget: float) -> list[tuple[int, int]] | None:
    """Rows ``first`` to ``last`` whose logits fit the budget together; None if the logits have to be made again."""
    plan, fields, rows = loss.prepared.plan, tokens.fields, tokens.rows
    if plan.gate_masks and (fields.old_logp is None or plan.entropy_mean):
        return None  # what the loss divides by depends on the log-probs; or how many entropies count
    n, live = rows.mask.shape[0], live_before(rows)
    if not n:
        return None
    if (n if live is None else live[n]) * logits_bytes(rows) <= budget:
        return [(0, n)]
    n = index(n)  # of a trace with symbolic sizes: the number of chunks is part of the graph
    live = range(n + 1) if live is None else live
    most, ends = most_rows(rows, budget), ends_of(plan, tokens)
    if not most or ends is None:
        return None
    if isinstance(ends, range) and ends.step == 1:
        most = math.ceil(live[n] / math.ceil(live[n] / most))  # as many in every chunk
    return packed_into(ends, live, most)


def whole_sequences(plan: Plan, settings: Settings) -> bool:
    """Whether a chunk has to hold whole sequences. For a mean over sequences alone it has not: see ``apart``."""
    return reads_sequences(plan, settings) or (row_wise(plan, settings) and bool(plan.gate_masks))


def apart(loss, tokens: Tokens, count) -> tuple:
    """(the loss of a chunk, what it divides by, what each token's part of it is multiplied by or None).

    A mean over sequences of means over tokens is a sum over tokens, weighed by 1 ÷ the tokens of the sequence, which
    the mask says beforehand: chunks may end anywhere.
    """
    plan, fields = loss.prepared.plan, tokens.fields
    if whole_sequences(plan, tokens.settings) or not row_wise(plan, tokens.settings):
        return loss, count, None
    alone = loss.with_options(reduce="token_mean")
    if plan.reduce != SEQ_MEAN_TOKEN_MEAN:
        return alone, count * tokens.settings.max_len if plan.reduce == SEQ_SUM_OVER_MAX_LEN else count, None
    mask, ends = fields.mask, fields.cu_seqlens
    if ends is None:
        each = (1.0 / mask.sum(-1, keepdim=True).clamp(min=1)).expand(mask.shape)
    else:
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[ends.long()]
        at = torch.searchsorted(ends, torch.arange(mask.shape[0], device=ends.device), right=True) - 1
        each = (1.0 / before.diff().clamp(min=1))[at]
    return alone, count, each.to(fields.logp.dtype).reshape(-1)


def ends_of(plan: Plan, tokens: Tokens):
    """Where chunks may end: at every token, or at the ends of sequences; None if that cannot be looked at."""
    fields, n = tokens.fields, index(tokens.rows.mask.shape[0])
    if not whole_sequences(plan, tokens.settings):
        return range(n + 1)
    if fields.cu_seqlens is None:
        width = index(fields.logp.shape[1])
        return range(0, n + 1, width) if width else [0]
    return tokens.ends


def packed_into(ends, live, most: int) -> list[tuple[int, int]] | None:
    """Pieces between ``ends``, as many together as have no more than ``most`` live rows; None if a piece has more."""
    chunks, first = [], 0
    for begin, end in pairwise(ends):
        if live[end] - live[begin] > most:
            return None
        if live[end] - live[first] > most:
            chunks.append((first, begin))
            first = begin
    return [*chunks, (first, ends[-1])]


def counted(loss, tokens: Tokens, backend: str):
    """float32 []: how many tokens or sequences the loss divides by; None where it does by none."""
    plan, fields = loss.prepared.plan, tokens.fields
    if fields.num_items is not None or plan.reduce == TOKEN_SUM:
        return fields.num_items
    place = fields.logp if fields.old_logp is None else fields.old_logp.to(fields.logp.dtype)
    metrics = launch(loss, fields, tokens.settings, Numbers(place, fields.entropy), False, backend)[0].metrics
    return metrics[TOKENS if plan.reduce == TOKEN_MEAN else SEQUENCES].to(torch.float32)


def taker(loss, tokens: Tokens, chunks, count, backend: str):
    """The function that gives a chunk's ∂loss by its numbers."""
    plan, whole = loss.prepared.plan, tokens.fields
    share = None
    if plan.entropy_mean and loss.has_bonus:
        kept = whole.mask if whole.keep is None else whole.mask & whole.keep
        share = [kept.reshape(-1)[first:last].sum() for first, last in chunks]
        share = torch.stack(share).clamp(min=1) / kept.sum().clamp(min=1)

    alone, count, each = apart(loss, tokens, count)

    def coefficients(number: int, found: Numbers) -> Numbers:
        part = part_of(plan, tokens, *chunks[number])
        found = found.of(lambda x: x.view(part.logp.shape))
        out, kl = launch(alone, part._replace(num_items=count), tokens.settings, found, True, backend)
        by = gradient_of(loss, out, kl, 1.0 if share is None else share[number])
        if each is None:
            return by
        weighed = by.of(lambda x: x * each[slice(*chunks[number])])
        return weighed._replace(entropy=by.entropy) if plan.entropy_mean else weighed

    return coefficients


def gradient_of(loss, out: Output, kl: Output | None, share=1.0) -> Numbers:
    """∂loss by the numbers of the rows; ``share`` is that of these rows in the mean of the bonus."""
    found = Numbers(
        out.dlogp * out.metrics[SCALE],
        out.dentropy * (out.metrics[ENTROPY_SCALE] * share) if loss.has_bonus else None,
        None if kl is None else kl.dentropy * kl.metrics[ENTROPY_SCALE],
    )
    return found.of(lambda x: x.reshape(-1))


def part_of(plan: Plan, tokens: Tokens, first: int, last: int) -> Fields:
    """The fields of rows ``first`` to ``last``."""
    fields, shape = tokens.fields, tokens.fields.logp.shape
    by_sequence, at, ends = whole_sequences(plan, tokens.settings), slice(first, last), fields.cu_seqlens
    by_token = fields[:BY_TOKEN]
    if len(shape) == 2 and by_sequence:
        at = slice(first // shape[1], last // shape[1])
    elif len(shape) == 2:
        by_token = [x if x is None else x.reshape(-1) for x in by_token]
    if ends is not None and not by_sequence:
        ends = None
    elif ends is not None and last - first < tokens.rows.mask.shape[0]:
        ends = ends[bisect_left(tokens.ends, first) : bisect_right(tokens.ends, last)] - first
    return Fields(*(x if x is None else x[at] for x in by_token), ends, *fields[BY_TOKEN + 1 :])
