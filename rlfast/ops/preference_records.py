"""What ``pair_loss`` and ``unpaired_loss`` pass to their backends: responses, terms, numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

# What the sum over pairs is divided by: their number, or nothing; num_items replaces the first.
MEAN, SUM = 0, 1
REDUCTIONS = ("mean", "sum")
WIDTH = 7  # numbers of a term: its weight, 2 of its score, 4 of its link


class Side(NamedTuple):
    """One response of each pair: its sums [B], or its tokens, [B, T] of any row stride or packed [N]."""

    logp: torch.Tensor
    ref_logp: torch.Tensor | None  # like logp
    mask: torch.Tensor | None  # bool, like tokens: those that count
    cu_seqlens: torch.Tensor | None  # int64 [B + 1] of packed tokens
    lengths: torch.Tensor | None  # float32 [B], of sums; None: 1


class Rest(NamedTuple):
    """What belongs to the pair. Of any stride; float32, bfloat16 or float16, float64 beside float64."""

    margin: torch.Tensor | None  # [B]
    extra: torch.Tensor | None  # [B]: what the link calls ``extra``
    shared: torch.Tensor | None  # [1]: what it calls ``shared``
    weights: torch.Tensor | None  # [B]: multiply the loss of a pair; 0 takes it out
    num_items: torch.Tensor | None  # float32 []: in place of the number of pairs


class Term(NamedTuple):
    """One of the losses that are added up. The first of a call has no link: its score · weight is the reward."""

    score: str
    mean: bool  # the score is divided by the length
    link: str
    weight: float
    score_hyper: tuple
    link_hyper: tuple

    def numbers(self) -> list[float]:
        """As the op's schema has them."""
        return [self.weight, *_padded(self.score_hyper, 2), *_padded(self.link_hyper, 4)]


class Settings(NamedTuple):
    """The numbers of a call."""

    tail: float = 1.0  # weight of the tokens beyond the length of the shorter response (LD-DPO)
    factor: float = 1.0  # world size ÷ gradient accumulation


class Metrics(NamedTuple):
    """Names of the float32 ``metrics``; means are over the pairs whose weight is not 0."""

    loss: object
    pairs: object  # how many
    chosen_reward: object  # the implicit reward of the chosen, β·D for most losses
    rejected_reward: object
    accuracy: object  # pairs whose chosen response has the larger reward
    reward_margin: object
    chosen_logp: object  # S
    rejected_logp: object
    chosen_length: object
    rejected_length: object


class SingleMetrics(NamedTuple):
    """The same of ``unpaired_loss``, over the responses whose weight is not 0."""

    loss: object
    desirable: object  # how many are desirable
    undesirable: object
    desirable_reward: object
    undesirable_reward: object
    desirable_logp: object
    undesirable_logp: object


METRICS, SINGLE_METRICS = Metrics._fields, SingleMetrics._fields


class Output(NamedTuple):
    """What a backend fills; those that are not needed have no elements. Gradients are final: times upstream alone."""

    loss: torch.Tensor  # []
    metrics: torch.Tensor
    d_first: torch.Tensor  # ∂loss/∂logp of the chosen responses, like their logp, in the compute dtype
    d_second: torch.Tensor  # and of the rejected
    losses: torch.Tensor  # [B]: of each pair
    rewards: torch.Tensor  # [2, B]: chosen, rejected; [1, B] of single responses


def _padded(numbers, width: int) -> list[float]:
    return [*map(float, numbers), *[0.0] * (width - len(numbers))]


def terms_of(scores, means, links, numbers) -> list[Term]:
    """The terms of an op's flat arguments."""
    rows = [numbers[i : i + WIDTH] for i in range(0, len(numbers), WIDTH)]
    return [
        Term(s, bool(m), k, x[0], tuple(x[1:3]), tuple(x[3:]))
        for s, m, k, x in zip(scores, means, links, rows, strict=True)
    ]


def rows_of(side: Side) -> int:
    """How many responses there are."""
    return side.logp.shape[0] if side.cu_seqlens is None else side.cu_seqlens.shape[0] - 1


def halves(side: Side) -> tuple[Side, Side]:
    """Chosen and rejected responses of one batch, the chosen first."""
    pairs = rows_of(side) // 2
    if side.cu_seqlens is not None:  # its boundaries are absolute
        ends = side.cu_seqlens
        return side._replace(cu_seqlens=ends[: pairs + 1]), side._replace(cu_seqlens=ends[pairs:])
    first, second = (
        Side(*(x if x is None else x[part] for x in side)) for part in (slice(None, pairs), slice(pairs, None))
    )
    return first, second


def allocate(logp: torch.Tensor, other: torch.Tensor | None, rows: int, metrics: int, needs, sides: int = 2) -> Output:
    """Uninitialised outputs, float32 or float64. Gradients of packed tokens are 0 outside of the responses."""
    acc = torch.float64 if logp.dtype == torch.float64 else torch.float32

    def like(x, need):  # never one tensor twice: outputs of an op may not alias one another
        return torch.empty(x.shape if need and x is not None else 0, dtype=acc, device=logp.device)

    return Output(
        logp.new_empty((), dtype=acc), logp.new_empty(metrics, dtype=acc), like(logp, needs[0]),
        like(other, needs[1]), logp.new_empty(rows if needs[2] else 0, dtype=acc),
        logp.new_empty((sides, rows if needs[2] else 0), dtype=acc),
    )  # fmt: skip
