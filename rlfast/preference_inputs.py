"""The checks that a preference loss makes of its arguments, once, and the layout that its op wants."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast import validate
from rlfast.fallback import sequences
from rlfast.fallback.token_logps import compute_dtype
from rlfast.loss_inputs import boundaries, counted, in_rows, like_first, number_of
from rlfast.ops.preference_records import Side, halves


class Given(NamedTuple):
    """The arguments of one side as they came."""

    logps: object
    ref_logps: object
    lengths: object
    mask: object
    cu_seqlens: object
    kl: object


class PairGiven(NamedTuple):
    """Those of the pairs."""

    margin: object
    extra: object
    shared: object
    weights: object
    num_items: object


class Names(NamedTuple):
    """What the arguments of a side are called, for messages."""

    logps: str
    ref_logps: str
    lengths: str
    mask: str
    cu_seqlens: str
    kl: str


CHOSEN, REJECTED = (
    Names(*(f"{pattern.format(side)}" for pattern in (
        "{}_logps", "ref_{}_logps", "{}_lengths", "{}_mask", "{}_cu_seqlens", "{}_kl"
    )))
    for side in ("chosen", "rejected")
)  # fmt: skip
SIDES = CHOSEN, REJECTED
FIELDS = ("margin", "extra", "shared", "weights")  # of pairs, which a loss reads or not
ROWS = Names("logps", "ref_logps", "lengths", "mask", "cu_seqlens", "kl")


def asked_for(loss, reads: frozenset, given: dict, called: dict | None = None) -> None:
    """What a loss needs is there, and no field that it does not read; ``called`` has names of fields for messages."""
    for name, x in given.items():
        said = (called or {}).get(name, name)
        if x is None and name in loss.needs:
            validate.fail(said, f"a tensor: {loss.name} needs it", "None")
        if x is not None and name in FIELDS and name not in reads:
            validate.fail(said, f"None: {loss.name} does not read it", "a value")


def checked(sides: tuple, names: tuple, rest: PairGiven, objective, lengths: bool, referenced: bool) -> tuple:
    """The tensors of the op, or an error that names the argument.

    Args:
        sides: the chosen side and the rejected; or both in one, and None.
        names: what their arguments are called.
        rest: of the pairs.
        objective: a ``PreferenceLoss``.
        lengths: whether the loss reads the lengths.
        referenced: whether it reads the reference.
    """
    together = sides[1] is None
    options = objective.name, lengths, referenced, objective.kl
    first = side_of(sides[0], names[0], *options, objective.kl_detached, together, objective.tail)
    second, pairs = Side(*(None,) * 5), rows_of(first)
    if together:
        if pairs % 2:
            validate.fail(names[0].logps, "an even number of responses, the chosen first", str(pairs))
        pairs //= 2
    else:
        second = side_of(sides[1], names[1], *options, tail=objective.tail)
        _alike(first, second, names[0].logps, names[1].logps)
    if objective.sort:
        first, second = sorted_sides(first, second, objective.sort, objective.tail)
    shared = rest.shared
    if objective.nll_reduce == "batch" and objective.nll and not objective.apart and shared is None:
        shared = mean_length(first, pairs)
    return (*first, *second, *fields_of(rest, shared, first.logp, pairs))


def _alike(first: Side, second: Side, name: str, other: str) -> None:
    """Two sides of as many responses, in one form, on one device."""
    validate.same_device(other, second.logp, name, first.logp)
    if rows_of(second) != rows_of(first) or is_tokens(second) != is_tokens(first):
        wanted = f"{rows_of(first)} responses, {'tokens' if is_tokens(first) else 'sums'} like {name}"
        validate.fail(other, wanted, validate.shape(second.logp))
    if (first.logp.dtype == torch.float64) != (second.logp.dtype == torch.float64):
        validate.fail(other, f"dtype {first.logp.dtype} like {name}", str(second.logp.dtype))


def fields_of(rest: PairGiven, shared, logp, pairs: int) -> tuple:
    """margin, extra, shared, weights and num_items as the op has them."""
    of_pairs = [_field(name, getattr(rest, name), logp, pairs) for name in ("margin", "extra", "weights")]
    number = number_of("shared", _constant("shared", shared), logp)
    number = number if number is None else number.expand(pairs)
    return *of_pairs[:2], number, of_pairs[2], counted(rest.num_items, logp)


def checked_single(given: Given, desirable, rest: PairGiven, name: str, lengths: bool, referenced: bool) -> tuple:
    """The tensors of the op of single responses."""
    side = side_of(given, ROWS, name, lengths, referenced)
    rows = rows_of(side)
    validate.tensor("desirable", desirable, (torch.bool,))
    if tuple(desirable.shape) != (rows,):
        validate.fail("desirable", f"shape ({rows},), one a response", validate.shape(desirable))
    validate.same_device("desirable", desirable, "logps", side.logp)
    return (*side, desirable, *fields_of(rest, rest.shared, side.logp, rows))


def side_of(
    given: Given, names: Names, loss: str, lengths: bool, referenced: bool, kl_coef: float = 0.0,
    detached: bool = False, together: bool = False, tail: float = 1.0,
) -> Side:  # fmt: skip
    """One side.

    Args:
        given: its arguments.
        names: what they are called.
        loss: the name of the loss, for messages.
        lengths: whether it reads the lengths.
        referenced: whether it reads the reference.
        kl_coef: of the KL that is added to the log-probs.
        detached: whether that is without gradient.
        together: of the chosen responses alone, which are the first half.
        tail: weight of the tokens beyond the shorter response's length.
    """
    logp = given.logps
    validate.tensor(names.logps, logp)
    if logp.dim() not in (1, 2):
        wanted = f"shape [B] of sums, [B, T] of tokens, or [N] with {names.cu_seqlens}"
        validate.fail(names.logps, wanted, validate.shape(logp))
    ends = boundaries(given.cu_seqlens, logp, names.logps, names.cu_seqlens)
    if referenced and given.ref_logps is None:
        validate.fail(names.ref_logps, f"a tensor: {loss} needs it", "None")
    ref = given.ref_logps
    if ref is not None:
        ref = like_first(names.ref_logps, _constant(names.ref_logps, ref), logp, names.logps)
    if kl_coef:
        if given.kl is None:
            validate.fail(names.kl, f"a tensor: {loss} needs it", "None")
        kl = like_first(names.kl, given.kl, logp, names.logps)
        if detached:
            kl = torch.where(first_half(logp, ends), kl.detach(), kl) if together else kl.detach()
        logp = wide(logp) + kl_coef * wide(kl)
    elif given.kl is not None:
        validate.fail(names.kl, f"None: {loss} does not read it", "a value")
    tokens = logp.dim() == 2 or ends is not None
    if tail != 1.0 and not tokens:
        wanted = f"tokens, [B, T] or [N] with {names.cu_seqlens}: {loss} weighs those beyond the shorter response"
        validate.fail(names.logps, wanted, f"sums {validate.shape(logp)}")
    mask = validate.mask_like(given.mask, names.logps, logp, names.mask)
    if mask is not None and not tokens:
        validate.fail(names.mask, f"None beside sums of log-probs {validate.shape(logp)}", "a mask")
    count = given.lengths
    if tokens and count is not None:
        validate.fail(names.lengths, "None beside tokens, which are counted", "a tensor")
    if not tokens and lengths and count is None:
        validate.fail(names.lengths, f"a tensor [B]: {loss} divides by it", "None")
    if count is not None:
        count = _lengths(names.lengths, count, logp)
    mask = mask if mask is None else in_rows(mask)
    return Side(in_rows(logp), ref if ref is None else in_rows(ref), mask, ends, count)


def wide(x):
    """In the compute dtype: float32, float64 of float64."""
    return x if x is None else x.to(compute_dtype(x))


def first_half(logp, cu_seqlens):
    """Which numbers belong to the first half of the responses."""
    if cu_seqlens is not None:
        return torch.arange(logp.shape[0], device=logp.device) < cu_seqlens[(cu_seqlens.shape[0] - 1) // 2]
    first = torch.arange(logp.shape[0], device=logp.device) < logp.shape[0] // 2
    return first if logp.dim() == 1 else first.unsqueeze(-1)


def _constant(name: str, x):
    if isinstance(x, torch.Tensor) and x.requires_grad:
        validate.fail(name, "a tensor that needs no gradient", "requires_grad=True")
    return x


def _lengths(name: str, x, logp):
    validate.tensor(name, x, validate.MASKS)
    if x.shape != logp.shape:
        validate.fail(name, f"shape {validate.shape(logp)}, one a response", validate.shape(x))
    validate.same_device(name, x, "the log-probs", logp)
    return x.to(torch.float64 if logp.dtype == torch.float64 else torch.float32).contiguous()


def _field(name: str, x, logp, pairs: int):
    if x is None:
        return None
    validate.tensor(name, _constant(name, x))
    if tuple(x.shape) != (pairs,):
        validate.fail(name, f"shape ({pairs},), one a pair", validate.shape(x))
    validate.same_device(name, x, "the log-probs", logp)
    if (x.dtype == torch.float64) != (logp.dtype == torch.float64):
        x = x.to(torch.float64 if logp.dtype == torch.float64 else torch.float32)
    return x


def is_tokens(side: Side) -> bool:
    """Whether a side has tokens, and not their sums."""
    return side.logp.dim() == 2 or side.cu_seqlens is not None


def rows_of(side: Side) -> int:
    """How many responses there are."""
    return side.logp.shape[0] if side.cu_seqlens is None else side.cu_seqlens.shape[0] - 1


def mean_length(first: Side, pairs: int):
    """The mean length of the chosen responses."""
    if not is_tokens(first):
        return first.lengths[:pairs].mean()
    if first.cu_seqlens is None:
        mask = first.mask
        n = torch.full((), pairs * first.logp.shape[1]) if mask is None else mask[:pairs].sum()
    else:
        ends = first.cu_seqlens
        inside = torch.arange(first.logp.shape[0], device=ends.device)
        inside = (inside >= ends[0]) & (inside < ends[pairs])
        n = (inside if first.mask is None else inside & first.mask).sum()
    return n.to(first.logp.device, torch.float32).clamp(min=1) / max(pairs, 1)


def summed(side: Side, shared_length=None, tail: float = 1.0) -> Side:
    """A side with its sums in place of its tokens, by torch, with gradient; in the compute dtype."""
    if not is_tokens(side):
        return side._replace(logp=wide(side.logp), ref_logp=wide(side.ref_logp))
    side = sequences.within(side)
    mask, weight = sequences.weights_of(side, shared_length, tail)
    sums = [x if x is None else sequences.total(side, x, mask, weight).to(compute_dtype(x)) for x in side[:2]]
    return Side(*sums, None, None, sequences.lengths_of(side).to(sums[0].dtype))


def likelihoods(given: Given, names: Names, together: bool, reduce: str):
    """−S of each chosen response, by torch; ÷ n, 1 at least, of a "mean", ÷ the mean of n of a "batch"."""
    side = side_of(given, names, "its likelihood", reduce != "sum", False)
    side = summed(halves(side)[0] if together else side)
    if reduce == "sum":
        return -side.logp
    n = side.lengths.mean() if reduce == "batch" else side.lengths
    return -side.logp / n.clamp(min=1)


def sorted_sides(first: Side, second: Side, how: str, tail: float) -> tuple[Side, Side]:
    """Sums whose differences are the sorted ones of optimal transport: in ascending order, ties as they came.

    "pairs": sort(S_w − S_l) against sort(S_w^ref − S_l^ref); "responses": sort(D_w) against sort(D_l).
    """
    sides = halves(first) if second.logp is None else (first, second)
    shared = sequences.shared_lengths(*(sequences.within(side) for side in sides), tail)
    first, second = (summed(side, shared, tail) for side in sides)
    zero = torch.zeros_like(first.logp)
    ref = [zero if x.ref_logp is None else x.ref_logp for x in (first, second)]
    if how == "pairs":
        ours, theirs = (first.logp - second.logp), (ref[0] - ref[1])
        sort = [x.sort(stable=True).values for x in (ours, theirs)]
        return Side(sort[0], sort[1], None, None, first.lengths), Side(zero, zero, None, None, second.lengths)
    sort = [(x.logp - r).sort(stable=True).values for x, r in zip((first, second), ref, strict=True)]
    return tuple(Side(x, zero, None, None, side.lengths) for x, side in zip(sort, (first, second), strict=True))
