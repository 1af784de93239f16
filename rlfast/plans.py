"""What a loss over a head will do, said before it does it."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch

from rlfast import heads, policy_linear, validate
from rlfast.loss_inputs import Given
from rlfast.losses import Loss

WAYS = {
    "forward": "no gradient is needed",
    "chunks": "each chunk's gradients are made while its logits are there",
    "keep": "the logits are kept for the backward",
    "again": "the backward makes the logits again, in tiles",
    "twice": "the logits are made twice, the second time a chunk at a time",
}


class LinearPlan(NamedTuple):
    """How ``Loss.linear`` goes about a call."""

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


def plan(loss: Loss, hidden, weight, targets, bias=None, **given) -> LinearPlan:
    """How ``loss.linear`` takes a call: its chunks, FLOP and bytes. Nothing is computed.

    Args:
        loss: a ``Loss``.
        hidden, weight, targets, bias, given: what ``loss.linear`` gets.

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
    if not isinstance(loss, Loss):
        validate.fail("loss", "a rlfast.Loss", type(loss).__name__, TypeError)
    bound = inspect.signature(loss.linear).bind(hidden, weight, targets, bias, **given)
    bound.apply_defaults()
    said = bound.arguments
    head = heads.Head(*(said[name] for name in heads.Head._fields))
    fields = {name: said[name] for name in Given._fields if name not in ("logp", "entropy", "full_kl")}
    call = tuple(said[name] for name in ("max_len", "world_size", "accumulation"))
    ref = tuple(said[name] for name in ("ref_hidden", "ref_weight", "ref_bias"))
    tokens = policy_linear.checked(loss, head, hidden, targets, fields, call, ref, said["lora"], said["sync"])
    return _plan_of(loss, tokens, head.budget())


def _plan_of(loss: Loss, tokens, budget: float) -> LinearPlan:
    rows, needs = tokens.rows, policy_linear.needed(tokens.rows)
    live = policy_linear.live_before(rows) or range(rows.mask.shape[0] + 1)
    chunks = policy_linear.chunks_of(loss, tokens, budget) if any(needs) else None
    taken = tuple(live[last] - live[first] for first, last in chunks or ())
    fits = live[-1] * heads.logits_bytes(rows) <= budget
    again = "twice" if rows.lora is not None or tokens.into is not None else "keep" if fits else "again"
    way = "forward" if not any(needs) else "chunks" if chunks else again
    products, elements = _products(rows, needs, way in ("again", "twice"))
    most = {"chunks": max(taken, default=0), "keep": live[-1], "twice": policy_linear.second_pass(rows, budget)}
    acc = torch.float64 if rows.hidden.dtype == torch.float64 else torch.float32
    kept = sum(x.numel() for x, need in zip(rows.leaves(), needs, strict=True) if need) * acc.itemsize
    return LinearPlan(
        way, live[-1], taken, products, 2 * live[-1] * elements,
        heads.logits_bytes(rows) * min(most.get(way, 0), live[-1]), kept if way in ("chunks", "twice") else 0,
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
