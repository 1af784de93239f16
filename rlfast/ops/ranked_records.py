"""What ``ranked_loss`` passes to its backends: groups of candidates, numbers, outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Groups(NamedTuple):
    """Candidates: [P, K] of any strides, or packed [N]; float32, bfloat16 or float16, float64 beside float64."""

    scores: torch.Tensor
    ref_scores: torch.Tensor | None
    rewards: torch.Tensor | None  # the larger the better; None: in the order that they are in, the best first
    divisor: torch.Tensor | None  # of the scores
    mask: torch.Tensor | None  # bool: those that count
    cu_seqlens: torch.Tensor | None  # int64 [P + 1] of packed groups
    weights: torch.Tensor | None  # [P]: multiply the loss of a group; 0 takes it out
    num_items: torch.Tensor | None  # float32 []: in place of the number of groups


class Settings(NamedTuple):
    """The numbers of a call."""

    beta: float  # x = beta·(score − ref_score)/divisor is what the forms compare
    tau: float  # temperature of the rewards
    top: float  # ranks of a sequential form that count
    nll: float  # weight of −score of the best candidate
    nll_by_size: float  # 1: the weight is multiplied by (K − 1)²
    factor: float  # world size ÷ gradient accumulation


class Metrics(NamedTuple):
    """Names of the float32 ``metrics``; over the groups of two candidates or more whose weight is not 0."""

    loss: object
    groups: object  # how many
    candidates: object  # how many are in them
    accuracy: object  # of the pairs whose rewards differ, those where the better candidate has the larger score
    best_reward: object  # mean reward of the best candidate of each group, the first of equal ones
    best_score: object  # mean of its x


METRICS = Metrics._fields


class Output(NamedTuple):
    """What a backend fills; those that are not needed have no elements. The gradient is final: times upstream alone."""

    loss: torch.Tensor  # []
    metrics: torch.Tensor
    d_scores: torch.Tensor  # like scores, in the compute dtype
    losses: torch.Tensor  # [P]: of each group


def rows_of(groups: Groups) -> int:
    """How many groups there are."""
    return groups.scores.shape[0] if groups.cu_seqlens is None else groups.cu_seqlens.shape[0] - 1


def allocate(groups: Groups, needs) -> Output:
    """Uninitialised outputs, float32 or float64. The gradient is contiguous."""
    x = groups.scores
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    gradient = x.new_empty(x.shape if needs[0] else 0, dtype=acc)
    losses = x.new_empty(rows_of(groups) if needs[1] else 0, dtype=acc)
    return Output(x.new_empty((), dtype=acc), x.new_empty(len(METRICS), dtype=acc), gradient, losses)


def most_of(groups: Groups, most: int, limit: int) -> int:
    """A bound on the candidates of a group: of packed groups on a GPU the caller's, or else ``limit``."""
    if groups.cu_seqlens is None:
        return groups.scores.shape[1]
    if groups.scores.device.type != "cpu":
        return most or limit
    lengths = groups.cu_seqlens.diff()
    return int(lengths.max()) if lengths.numel() else 0
