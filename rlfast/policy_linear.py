"""Policy losses straight from hidden states and the head.

What a token's ∂loss/∂logp and ∂loss/∂H depend on is known with the log-probs of its sequence, or, where the loss has no
more to do with sequences, with its own. So the batch goes in chunks of whole sequences, or of tokens: their logits,
their log-probs, the loss's coefficients, and, while the logits are still there, ∂hidden, ∂weight and ∂bias. What the
loss divides by is counted before.

Where a sequence's logits do not fit the memory budget, or too few rows would, the backward makes the logits again.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch

from rlfast import backends, logps, validate
from rlfast.heads import Head, log_probs, logits_bytes, most_rows, unit_strides
from rlfast.loss_inputs import Given
from rlfast.ops import token_loss as op
from rlfast.ops.known_gradients import with_gradients
from rlfast.ops.linear_loss import Rows, chunked
from rlfast.ops.linear_token_logps import NAME as HEAD
from rlfast.ops.loss_records import (
    METRICS,
    SEQ_SUM_OVER_MAX_LEN,
    TOKEN_MEAN,
    TOKEN_SUM,
    Fields,
    Output,
    Plan,
    Settings,
    row_wise,
)

MEMORY_BUDGET = 512 << 20  # bytes of logits at once: heads.FEWEST_ROWS of them up to a vocabulary of 262,144
BY_TOKEN = Fields._fields.index("cu_seqlens")  # the fields before it have one number a token
SCALE, ENTROPY_SCALE, TOKENS, SEQUENCES = map(METRICS.index, ("scale", "entropy_scale", "tokens", "sequences"))


class Tokens(NamedTuple):
    """A batch, checked."""

    rows: Rows  # its tokens, one after the other
    fields: Fields  # in the caller's shape; ``logp`` is a place for it, and ``entropy`` where the loss reads it
    settings: Settings

    def filled(self, logp, entropy) -> Fields:
        """The fields with log-probs and entropies [N] in their places."""
        logp, entropy = (x if x is None else x.view(self.fields.logp.shape) for x in (logp, entropy))
        return self.fields._replace(logp=logp, entropy=entropy)


def checked(loss, head: Head, hidden, targets, given: dict, call: tuple) -> Tokens:
    """The batch, or an error that names the argument.

    Args:
        loss: a ``Loss``.
        head: the head.
        hidden, targets: of the tokens, as they came.
        given: the fields of ``loss_inputs.Given`` beside logp and entropy, as they came.
        call: (max_len, world_size, accumulation).
    """
    validate.tensor("hidden", hidden)
    if hidden.dim() not in (2, 3):
        validate.fail("hidden", "shape [B, T, D], or [N, D] with cu_seqlens", validate.shape(hidden))
    hidden, weight, bias = logps.checked_head(hidden, head.weight, head.bias)
    lead, source = hidden.shape[:-1], ("hidden", hidden)
    targets = logps.checked_targets(lead, weight.shape[0], targets, source)
    if targets.shape != lead:
        validate.fail("targets", f"shape {tuple(lead)} like the rows of hidden", validate.shape(targets))
    mask = validate.mask_like(given["mask"], "targets", targets, "mask")
    live = targets != validate.IGNORE_INDEX
    given = given | {"mask": live if mask is None else live & mask}
    temperatures, temperature = logps.checked_temperature("temperature", lead, head.temperature, source)
    place = torch.zeros(lead, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
                        device=hidden.device)  # fmt: skip
    fields, settings = loss.checked(Given(place, entropy=place if loss.has_bonus else None, **given), *call, "targets")
    targets, mask, temperatures = (x if x is None else x.reshape(-1) for x in (targets, fields.mask, temperatures))
    rows = Rows(hidden.reshape(targets.shape[0], hidden.shape[-1]), weight, bias, targets, mask.contiguous(),
                temperatures, (temperature, *head.options()))  # fmt: skip
    return Tokens(unit_strides(rows), fields, settings)


def run(loss, tokens: Tokens, budget: float, entropy: bool) -> tuple:
    """(the op's output with its gradient, log-probs, entropies or None) of a batch, in its shape."""
    rows, shape = tokens.rows, tokens.fields.logp.shape
    needs = needed(rows)
    entropy, backend = entropy or loss.has_bonus, backends.requested()
    chunks = chunks_of(loss, tokens, budget) if any(needs) else None
    if chunks is None:
        logp, entropies = log_probs(rows, any(needs), budget, entropy)
        entropies = entropies if loss.has_bonus or entropies is None else entropies.detach()
        out = launch(loss, tokens.filled(logp, entropies), tokens.settings, any(needs), backend)
    else:
        with torch.no_grad():
            count = counted(loss, tokens, backend)
            size = power_of_two(loss, tokens, count)
            taken = taker(loss, tokens, chunks, count, size, backend)
            slices = [(slice(*chunk),) for chunk in chunks]
            logp, entropies, gradients = chunked(rows, slices, taken, needs, backend, entropy)
            out = launch(loss, tokens.filled(logp, entropies), tokens.settings, False, backend)
        out = out._replace(loss=with_gradients(out.loss, rows[:3], gradients, size))
    logp, entropies = (x if x is None else x.detach().view(shape) for x in (logp, entropies))
    return out, logp, entropies


def needed(rows: Rows) -> list[bool]:
    """Whether hidden, weight and bias need a gradient."""
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in rows[:3]]


def launch(loss, fields: Fields, settings: Settings, needs: bool, backend: str) -> Output:
    """The loss of given log-probs."""
    surrogate, kl, plan, _, hyper, bounds, *_ = loss.prepared
    wanted = (needs, needs and loss.has_bonus)
    return op.call(*fields, surrogate, kl, plan, settings, hyper, bounds, wanted, backend)


def chunks_of(loss, tokens: Tokens, budget: float) -> list[tuple[int, int]] | None:
    """Rows ``first`` to ``last`` whose logits fit the budget together; None if the logits have to be made again."""
    plan, fields, rows = loss.prepared.plan, tokens.fields, tokens.rows
    if plan.gate_masks and (fields.old_logp is None or plan.entropy_mean):
        return None  # what the loss divides by depends on the log-probs; or how many entropies count
    n = rows.mask.shape[0]
    if not n:
        return None
    live = live_before(rows)
    if live[n] * logits_bytes(rows) <= budget:
        return [(0, n)]
    most, ends = most_rows(rows, budget), ends_of(plan, tokens)
    if not most or ends is None:
        return None
    if isinstance(ends, range) and ends.step == 1:
        most = math.ceil(live[n] / math.ceil(live[n] / most))  # as many in every chunk
    return packed_into(ends, live, most)


def live_before(rows: Rows):
    """How many of the rows before each one, and before the end, are projected: on the CPU those that count."""
    hidden, backend = rows.hidden, backends.requested()
    if validate.looked_at(rows.mask) and backends.select(HEAD, hidden.device.type, hidden.dtype, backend) == "cpu":
        return [0, *rows.mask.cumsum(0).tolist()]
    return range(rows.mask.shape[0] + 1)


def ends_of(plan: Plan, tokens: Tokens):
    """Where chunks may end: at every token, or at the ends of sequences; None if that cannot be looked at."""
    fields, n = tokens.fields, tokens.rows.mask.shape[0]
    if not row_wise(plan, tokens.settings):
        return range(n + 1)
    if fields.cu_seqlens is None:
        width = fields.logp.shape[1]
        return range(0, n + 1, width) if width else [0]
    return fields.cu_seqlens.tolist() if validate.looked_at(fields.cu_seqlens) else None


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
    metrics = launch(loss, fields._replace(logp=place), tokens.settings, False, backend).metrics
    return metrics[TOKENS if plan.reduce == TOKEN_MEAN else SEQUENCES].to(torch.float32)


def power_of_two(loss, tokens: Tokens, count):
    """float32 []: about n, by which float16 gradients are larger until they are scaled; None for other dtypes."""
    if tokens.rows.hidden.dtype != torch.float16 or count is None:
        return None
    n = count * (tokens.settings.max_len if loss.prepared.plan.reduce == SEQ_SUM_OVER_MAX_LEN else 1.0)
    n = torch.where(n > 0, n, torch.ones_like(n))
    return n / torch.frexp(n).mantissa


def taker(loss, tokens: Tokens, chunks, count, size, backend: str):
    """The function that gives a chunk's (∂loss/∂logp, ∂loss/∂entropy) · size."""
    plan, whole = loss.prepared.plan, tokens.fields
    share = None
    if plan.entropy_mean and loss.has_bonus:
        kept = whole.mask if whole.keep is None else whole.mask & whole.keep
        share = [kept.reshape(-1)[first:last].sum() for first, last in chunks]
        share = torch.stack(share).clamp(min=1) / kept.sum().clamp(min=1)

    def coefficients(number: int, logp, entropy):
        part = part_of(plan, tokens, *chunks[number])
        shape = part.logp.shape
        entropy = entropy.view(shape) if loss.has_bonus else None
        part = part._replace(logp=logp.view(shape), entropy=entropy, num_items=count)
        out = launch(loss, part, tokens.settings, True, backend)
        by_logp, by_entropy = out.metrics[SCALE], out.metrics[ENTROPY_SCALE]
        if share is not None:
            by_entropy = by_entropy * share[number]
        if size is not None:
            by_logp, by_entropy = by_logp * size, by_entropy * size
        d_entropy = (out.dentropy * by_entropy).reshape(-1) if loss.has_bonus else None
        return (out.dlogp * by_logp).reshape(-1), d_entropy

    return coefficients


def part_of(plan: Plan, tokens: Tokens, first: int, last: int) -> Fields:
    """The fields of rows ``first`` to ``last``."""
    fields, shape = tokens.fields, tokens.fields.logp.shape
    by_sequence, at, ends = row_wise(plan, tokens.settings), slice(first, last), fields.cu_seqlens
    by_token = fields[:BY_TOKEN]
    if len(shape) == 2 and by_sequence:
        at = slice(first // shape[1], last // shape[1])
    elif len(shape) == 2:
        by_token = [x if x is None else x.reshape(-1) for x in by_token]
    if ends is not None and not by_sequence:
        ends = None
    elif ends is not None and last - first < tokens.rows.mask.shape[0]:  # else no look at a device
        ends = ends[(ends >= first) & (ends <= last)] - first
    return Fields(*(x if x is None else x[at] for x in by_token), ends, *fields[BY_TOKEN + 1 :])
