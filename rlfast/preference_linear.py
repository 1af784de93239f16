"""Losses of whole responses straight from hidden states and the head.

Where the logits of all tokens fit the memory budget they are kept for the backward; where those of some pairs do, the
gradients of so many pairs at a time are taken in the forward, while their logits are there; else the backward makes
the logits again.
"""

from __future__ import annotations

import math
from itertools import pairwise
from operator import index
from typing import NamedTuple

import torch

from rlfast import backends, row_inputs, validate
from rlfast.distributed.gather import context_of
from rlfast.distributed.groups import learning
from rlfast.heads import Head, live_before, most_rows, numbers, room, unit_strides
from rlfast.loss_inputs import boundaries
from rlfast.ops import preference_records as records
from rlfast.ops.known_gradients import with_gradients
from rlfast.ops.linear_loss import Numbers, Rows, chunked
from rlfast.preference_inputs import Given, Names, PairGiven, fields_of, mean_length


class Tokens(NamedTuple):
    """The tokens of one side as they came."""

    hidden: object
    targets: object
    ref_logps: object
    mask: object
    cu_seqlens: object


class TokenNames(NamedTuple):
    """What those arguments are called."""

    hidden: str
    targets: str
    ref_logps: str
    mask: str
    cu_seqlens: str

    def of_loss(self) -> Names:
        """The names for the checks of the loss itself, which sees log-probs where the caller gave targets."""
        return Names(self.targets, self.ref_logps, "lengths", self.mask, self.cu_seqlens, "kl")


ROWS = TokenNames("hidden", "targets", "ref_logps", "mask", "cu_seqlens")
SIDES = tuple(
    TokenNames(f"{s}_hidden", f"{s}_targets", f"ref_{s}_logps", f"{s}_mask", f"{s}_cu_seqlens")
    for s in ("chosen", "rejected")
)


class Side(NamedTuple):
    """Checked tokens of one side, [n] each."""

    hidden: torch.Tensor  # [n, D]
    targets: torch.Tensor
    ref: torch.Tensor | None
    mask: torch.Tensor
    shape: tuple  # [B, T] of padded responses, [n] of packed ones
    cu_seqlens: torch.Tensor | None
    ends: list[int] | None  # the same, where it can be looked at

    def given(self, logp) -> Given:
        """What the loss takes: tokens in the caller's shape."""
        return given_of(logp, self.ref, self.mask, self.shape, self.cu_seqlens)


class Place(NamedTuple):
    """Where the responses of one kind, chosen or rejected, lie among the joined rows."""

    ends: list  # row numbers: response i is rows ends[i] to ends[i + 1]
    width: int | None
    cu_seqlens: torch.Tensor | None

    def rows(self, first: int, last: int) -> slice:
        """The rows of responses ``first`` to ``last``."""
        return slice(self.ends[first], self.ends[last])


class Joined(NamedTuple):
    """The rows of all sides, one after the other."""

    rows: Rows
    ref: torch.Tensor | None  # [N]

    def given(self, place: Place, first: int, last: int, logp) -> Given:
        """What the loss takes of responses ``first`` to ``last`` of a place, whose log-probs are given."""
        at, ends = place.rows(first, last), place.cu_seqlens
        shape = logp.shape if place.width is None else (last - first, place.width)
        ends = None if ends is None else ends[first : last + 1] - ends[first]
        return given_of(logp, self.ref if self.ref is None else self.ref[at], self.rows.mask[at], shape, ends)


def given_of(logp, ref, mask, shape, cu_seqlens) -> Given:
    """Tokens [n] in the caller's shape."""
    logp, ref, mask = (x if x is None else x.view(shape) for x in (logp, ref, mask))
    return Given(logp, ref, None, mask, cu_seqlens, None)


def run(loss, head: Head, sides: tuple, rest: PairGiven, nll, factor: float, per_pair: bool, outputs: int = 0) -> tuple:
    """(the loss of pairs whose tokens are given as hidden states, the tokens' numbers).

    Args:
        loss: a ``PreferenceLoss``.
        head: the head.
        sides: the ``Tokens`` of both kinds in one; or of the chosen and of the rejected.
        rest, nll, factor, per_pair: as in ``PreferenceLoss.run``.
        outputs: what is computed beside the log-probs: bits of ``rlfast/ops/records.py``.
    """
    with context_of(head.process_group):
        checked, joined, needs, places, groups, budget = prepared(loss, head, sides, outputs)
        if groups is None:
            found = numbers(joined.rows, any(needs), budget, outputs)
            parts = found.logp.split([side.targets.shape[0] for side in checked])
            given = [side.given(part) for side, part in zip(checked, parts, strict=True)]
            names = tuple(name.of_loss() for name in names_of(sides))
            out = loss.run(given[0], given[1] if len(given) == 2 else None, rest, nll, factor, per_pair, names)
        else:
            out, found = by_chunks(loss, joined, places, groups, needs, rest, nll, factor, per_pair, outputs)
    return out, found.of(torch.Tensor.detach)


def names_of(sides) -> tuple[TokenNames, ...]:
    """What the arguments of both kinds in one, or of either, are called."""
    return (ROWS,) if len(sides) == 1 else SIDES


def prepared(loss, head: Head, sides: tuple, outputs: int = 0) -> tuple:
    """(checked sides, their rows, which gradients are needed, where responses lie, groups of pairs or None, budget)."""
    if loss.kl:
        wanted = f"log-probs: {loss.name} reads KL(π_ref‖π), which rlfast.linear_divergence gives beside them"
        validate.fail(ROWS.hidden, wanted, "hidden states")
    given = head.budget()
    shards, weight, bias, checked = checked_sides(head, sides, names_of(sides), loss.name, outputs)
    joined = join(checked, weight, bias, head, shards)
    rows, places, groups = joined.rows, None, None
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in rows[:3]]
    if any(needs) and loss.sort is None and not loss.apart:
        places = places_of(checked)
        groups = places and groups_of(places, rows, given)
    return checked, joined, needs, places, groups, room(rows, given, 1)


def asked(head: Head, sides, loss: str, outputs: int) -> dict:
    """What ranks that share the head have to ask for alike."""
    every = [side.hidden for side in sides if isinstance(side.hidden, torch.Tensor)]
    rows = sum(math.prod(x.shape[:-1]) for x in every)
    counted = row_inputs.counted(
        *(x for side in sides for x in (side.targets != validate.IGNORE_INDEX, side.mask, side.cu_seqlens))
    )
    more = head.asked(loss) | {"rows": rows, "gradients of hidden": learning(*every)} | counted
    return row_inputs.to_agree("preference loss", sides[0].hidden, None, None, (str(outputs),), (), more)


def checked_sides(head: Head, sides, names, loss: str, outputs: int) -> tuple:
    """(the shards or None, weight, bias, the sides), or an error that names the argument."""
    found, share, weight, bias = [], head.process_group, head.weight, head.bias
    for given, name in zip(sides, names, strict=True):
        validate.tensor(name.hidden, given.hidden)
        if given.hidden.dim() != (3 if given.cu_seqlens is None else 2):
            wanted = f"shape [B, T, D], or [N, D] with {name.cu_seqlens}"
            validate.fail(name.hidden, wanted, validate.shape(given.hidden))
        shards, hidden, weight, bias = row_inputs.shared_head(
            share, given.hidden, weight, bias, lambda: asked(head, sides, loss, outputs), hidden_name=name.hidden
        )
        share = shards  # the second side has the same weight, gathered already if it was to be
        found.append(checked_side(hidden, row_inputs.vocabulary(weight, shards), given, name))
    return shards, weight, bias, found


def checked_side(hidden, vocab: int, given: Tokens, name: TokenNames) -> Side:
    """One side."""
    lead = hidden.shape[:-1]
    targets = row_inputs.checked_targets(lead, vocab, given.targets, (name.hidden, hidden), name.targets)
    if targets.shape != lead:
        validate.fail(name.targets, f"shape {tuple(lead)} like the rows of {name.hidden}", validate.shape(targets))
    ends = boundaries(given.cu_seqlens, targets, name.targets, name.cu_seqlens)
    mask = validate.mask_like(given.mask, name.targets, targets, name.mask)
    live = targets != validate.IGNORE_INDEX
    mask = (live if mask is None else live & mask).reshape(-1)
    ref = given.ref_logps
    if ref is not None:
        ref = reference_of(name, ref, targets, mask, ends)
    host = given.cu_seqlens.tolist() if ends is not None and validate.looked_at(given.cu_seqlens) else None
    return Side(
        hidden.reshape(mask.shape[0], hidden.shape[-1]), targets.reshape(-1), ref, mask, tuple(lead), ends, host
    )


def reference_of(name: TokenNames, ref, targets, mask, cu_seqlens):
    """log π_ref of the tokens, [n]. A response's sum counts as its first token's, which leaves the loss what it is."""
    validate.tensor(name.ref_logps, ref)
    if ref.requires_grad:
        validate.fail(name.ref_logps, "a tensor that needs no gradient", "requires_grad=True")
    validate.same_device(name.ref_logps, ref, name.targets, targets)
    rows = targets.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if ref.shape == targets.shape:
        return ref.reshape(-1)
    if tuple(ref.shape) != (rows,):
        wanted = f"shape {validate.shape(targets)} like {name.targets}, or ({rows},) of sums"
        validate.fail(name.ref_logps, wanted, validate.shape(ref))
    ends = torch.arange(rows + 1, device=ref.device) * targets.shape[1] if cu_seqlens is None else cu_seqlens
    counted = mask.cumsum(0)
    before = torch.cat([counted.new_zeros(1), counted])[ends[:-1]]
    first = torch.searchsorted(counted, before + 1)  # n for a response behind the last token that counts
    inside = first < ends[1:]
    spread = ref.new_zeros(mask.shape[0] + 1)
    return spread.index_add_(0, first, torch.where(inside, ref, 0))[:-1]


def join(sides: list[Side], weight, bias, head: Head, shards) -> Joined:
    """All rows, one after the other."""
    options = validate.positive("temperature", head.temperature), *head.options()

    def all_of(parts):
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)

    hidden, targets, ref, mask = (all_of(list(x)) for x in zip(*(side[:4] for side in sides), strict=True))
    return Joined(unit_strides(Rows(hidden, weight, bias, targets, mask, None, options, shards=shards)), ref)


def places_of(sides: list[Side]) -> tuple[Place, Place] | None:
    """Where chosen and rejected responses lie; None where that would have to be read from a device or in a trace."""
    found, start = [], 0
    for side in sides:
        if side.cu_seqlens is not None and side.ends is None:
            return None
        width = index(side.shape[1]) if side.cu_seqlens is None else None
        ends = side.ends if width is None else [i * width for i in range(index(side.shape[0]) + 1)]
        found.append(Place([start + end for end in ends], width, side.cu_seqlens))
        start += ends[-1]
    if len(found) == 2:
        return tuple(found)
    ends, width, cu_seqlens = found[0]
    pairs = (len(ends) - 1) // 2
    cut = (None, None) if cu_seqlens is None else (cu_seqlens[: pairs + 1], cu_seqlens[pairs:])
    return Place(ends[: pairs + 1], width, cut[0]), Place(ends[pairs:], width, cut[1])


def groups_of(places, rows: Rows, budget: float | None) -> list[tuple[int, int]] | None:
    """Pairs ``first`` to ``last`` whose logits fit the budget together.

    None if all of them do, for then the backward keeps them, or if a single pair's do not, or only those of a few rows.
    """
    if len({len(place.ends) for place in places}) != 1:
        return None
    live = live_before(rows) or range(index(rows.hidden.shape[0]) + 1)
    of_pair = [
        sum(live[b] - live[a] for a, b in ends) for ends in zip(*(pairwise(p.ends) for p in places), strict=True)
    ]
    longest = max([1, *of_pair])
    most = most_rows(rows, room(rows, budget, longest))
    if not most or live[-1] <= most or longest > most:
        return None
    groups, first, held = [], 0, 0
    for pair, n in enumerate(of_pair):
        if held + n > most:
            groups.append((first, pair))
            first, held = pair, 0
        held += n
    return [*groups, (first, len(of_pair))]


def by_chunks(
    loss, joined: Joined, places, groups, needs, rest: PairGiven, nll, factor, per_pair, outputs: int
) -> tuple:
    """(the loss, the tokens' numbers), and the gradients by the head, of a few pairs at a time."""
    rows, pairs = joined.rows, len(places[0].ends) - 1
    rest = whole_rest(loss, joined, places[0], pairs, rest)

    def coefficients(number: int, part: Numbers):
        first, last = groups[number]
        parts = part.logp.split([at.stop - at.start for at in (place.rows(first, last) for place in places)])
        given = [joined.given(place, first, last, part) for place, part in zip(places, parts, strict=True)]
        margin, extra, weights = (x if x is None else x[first:last] for x in (rest.margin, rest.extra, rest.weights))
        some = PairGiven(margin, extra, rest.shared, weights, rest.num_items)
        return Numbers(torch.cat([d.reshape(-1) for d in loss.gradients(*given, some, nll, factor)]))

    with torch.no_grad():
        chunks = [tuple(place.rows(*group) for place in places) for group in groups]
        found, gradients = chunked(rows, chunks, coefficients, needs, backends.requested(), outputs)
    given = [joined.given(place, 0, pairs, found.logp[place.rows(0, pairs)]) for place in places]
    out = loss.run(*given, rest, nll, factor, per_pair)
    return out._replace(loss=with_gradients(out.loss, rows[:3], gradients)), found


def whole_rest(loss, joined: Joined, chosen: Place, pairs: int, rest: PairGiven) -> PairGiven:
    """The arguments of pairs, checked; with what a chunk cannot know: how many pairs there are, how many tokens."""
    fields_of(rest, None, joined.rows.hidden, pairs)
    if loss.reduce == "mean" and rest.num_items is None:
        rest = rest._replace(num_items=float(max(pairs, 1)))
    if loss.nll_reduce == "batch" and loss.nll and rest.shared is None:
        mask = joined.rows.mask[chosen.rows(0, pairs)]
        one = joined.given(chosen, 0, pairs, mask)
        tokens = records.Side(one.logps, None, one.mask, one.cu_seqlens, None)
        rest = rest._replace(shared=mean_length(tokens, pairs))
    return rest
