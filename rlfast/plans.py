"""What a loss over a head will do, said before it does it."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch

from rlfast import heads, policy_linear, preference_linear, validate
from rlfast.loss_inputs import Given
from rlfast.losses import Loss
from rlfast.preference import PreferenceLoss

WAYS = {
    "forward": "no gradient is needed",
    "chunks": "each chunk's gradients are made while its logits are there",
    "keep": "the logits are kept for the backward",
    "again": "the backward makes the logits again, in tiles",
    "twice": "the logits are made twice, the second time a chunk at a time",
}


class LinearPlan(NamedTuple):
    """How ``linear`` goes about a call."""

    way: str  # of ``WAYS``
    rows: int  # of logits: the tokens; on the CPU those that count
    chunks: tuple[int, ...]  # rows of each; empty where there are none
    products: int  # with the head or the reference's, of 2·rows·D·V FLOP each
    flop: int
    logits_bytes: int  # that are there at once; 0 for tiles
    gradient_bytes: int  # kept from the forward to the backward

    def __str__(self) -> str:
        chunks = f" in {len(self.chunks)} chunks of at most {max(self.chunks)}" if len(self.chunks) > 1 else ""
        logits, gradients = (f"{n / 2**20:.1f} MiB" for n in (self.logits_bytes, self.gradient_bytes))
        return (
            f"{self.rows} rows of logits{chunks}: {WAYS[self.way]}\n"
            f"{self.products} products with the head, {self.flop / 1e12:.3g} TFLOP\n"
            f"{logits} of logits at once, {gradients} of gradients kept"
        )


def plan(loss: Loss | PreferenceLoss, *args, **given) -> LinearPlan:
    """How ``loss.linear`` takes a call: its chunks, FLOP and bytes. Nothing is computed.

    Args:
        loss: a ``Loss`` or a ``PreferenceLoss``.
        args, given: what ``loss.linear`` gets.

    Returns:
        LinearPlan; as text it says what it is.

    Raises:
        ValueError, TypeError: as ``loss.linear`` does.

    Example:
        >>> hidden, head = torch.randn(4, 128, 16), torch.randn(1000, 16, requires_grad=True)
        >>> targets, adv = torch.randint(1000, (4, 128)), torch.randn(4)
        >>> print(rlfast.plan(rlfast.loss("dapo"), hidden, head, targets, adv=adv))
        512 rows of logits: each chunk's gradients are made while its logits are there
        2 products with the head, 3.28e-05 TFLOP
        2.0 MiB of logits at once, 0.1 MiB of gradients kept
    """
    if not isinstance(loss, Loss | PreferenceLoss):
        validate.fail("loss", "a rlfast.Loss or a rlfast.PreferenceLoss", type(loss).__name__, TypeError)
    bound = inspect.signature(loss.linear).bind(*args, **given)
    bound.apply_defaults()
    said = bound.arguments
    head = heads.Head(**{name: said[name] for name in heads.Head._fields if name in said})
    if isinstance(loss, PreferenceLoss):
        return _of_pairs(loss, head, said)
    fields = {name: said[name] for name in Given._fields if name not in ("logp", "entropy", "full_kl")}
    call = tuple(said[name] for name in ("max_len", "world_size", "accumulation"))
    ref = tuple(said[name] for name in ("ref_hidden", "ref_weight", "ref_bias"))
    hidden, targets = said["hidden"], said["targets"]
    tokens = policy_linear.checked(loss, head, hidden, targets, fields, call, ref, said["lora"], said["sync"])
    return _of_tokens(loss, tokens, head.budget())


def _of_tokens(loss: Loss, tokens, budget: float | None) -> LinearPlan:
    rows, needs, budget = tokens.rows, policy_linear.needed(tokens.rows), policy_linear.room(loss, tokens, budget)
    chunks = policy_linear.chunks_of(loss, tokens, budget) if any(needs) else None
    live = _live(rows)
    taken = tuple(live[last] - live[first] for first, last in chunks or ())
    again = "twice" if rows.lora is not None or tokens.into is not None else "again"
    return _made(rows, needs, taken, again, budget)


def _of_pairs(loss: PreferenceLoss, head: heads.Head, said: dict) -> LinearPlan:
    sides = (preference_linear.Tokens(*(said[name] for name in names)) for names in preference_linear.SIDES)
    _, joined, needs, places, groups, budget = preference_linear.prepared(loss, head, tuple(sides))
    live = _live(joined.rows)
    taken = tuple(
        sum(live[at.stop] - live[at.start] for at in (place.rows(*group) for place in places)) for group in groups or ()
    )
    return _made(joined.rows, needs, taken, "again", budget)


def _live(rows):
    """How many of the rows before each one are projected."""
    return heads.live_before(rows) or range(rows.mask.shape[0] + 1)


def _made(rows, needs: list[bool], taken: tuple[int, ...], again: str, budget: float) -> LinearPlan:
    """The plan of chunks of so many rows, or, if there are none, of a backward that comes later."""
    n = _live(rows)[-1]
    if not taken and again == "again" and n * heads.logits_bytes(rows) <= budget:
        again = "keep"
    way = "forward" if not any(needs) else "chunks" if taken else again
    products, elements = _products(rows, needs, way in ("again", "twice"))
    most = {"chunks": max(taken, default=0), "keep": n, "twice": policy_linear.second_pass(rows, budget)}
    acc = torch.float64 if rows.hidden.dtype == torch.float64 else torch.float32
    kept = sum(x.numel() for x, need in zip(rows.leaves(), needs, strict=True) if need) * acc.itemsize
    return LinearPlan(
        way, n, taken, products, 2 * n * elements, heads.logits_bytes(rows) * min(most.get(way, 0), n),
        kept if way in ("chunks", "twice") else 0,
    )  # fmt: skip


def _products(rows, needs: list[bool], again: bool) -> tuple[int, int]:
    """(how many, the elements of weights that a row meets in them)."""
    weight, factors = rows.weight.numel(), needs[3:] or [False, False]
    low = 0 if rows.lora is None else rows.lora.b.numel() * rows.lora.pieces()
    products = 1 + again + (needs[0] or factors[0]) + needs[1]
    elements = products * (weight + low) + factors[1] * low
    if rows.reference is None:
        return products, elements
    return products + 1 + again, elements + (1 + again) * rows.reference.weight.numel()
