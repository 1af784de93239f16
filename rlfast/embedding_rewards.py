"""Reward models on embeddings that a frozen language model gave once: small, and many at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from rlfast import limits, validate

POOLS = ("mean", "min", "uncertainty")


class EmbeddingRewards(torch.nn.Module):
    """An ensemble of reward models on cached embeddings, E small networks whose layers are one batched product each.

        h_0 = x;  h_k = relu(W_k·h_{k−1} + b_k);  r_e(x) = w_e·h_K + c_e

    Args:
        width: of the embeddings.
        hidden: widths of the hidden layers.
        members: E. Each has weights of its own, and learns from its own column of pairs or of their weights.
        seed: of the initial weights, uniform within ±1/√(inputs) as ``torch.nn.Linear`` has them.

    Raises:
        ValueError, TypeError: a size is no int ≥ 1; the message names it.

    Reference:
        arXiv 2502.04357: the embeddings are made once, so that a reward model trains in seconds on a CPU.

    Example:
        >>> model = rlfast.EmbeddingRewards(8, hidden=(16,), members=3)
        >>> chosen, rejected = model(torch.randn(5, 8)), model(torch.randn(5, 8))  # [3, 5] each
        >>> out = rlfast.reward_loss("bradley_terry", reduce="sum")(chosen.flatten(), rejected.flatten())
        >>> (out.loss / 5).backward()  # each member has the gradient of its own mean
    """

    def __init__(self, width: int, *, hidden: Sequence[int] = (256, 256), members: int = 1, seed: int = 0):
        super().__init__()
        sizes = [width, *hidden, 1]
        for name, x in (*(("width, hidden", x) for x in sizes), ("members", members)):
            if isinstance(x, bool) or not isinstance(x, int) or x < 1:
                validate.fail(name, "an int ≥ 1", repr(x), ValueError if isinstance(x, int) else TypeError)
        rng = torch.Generator().manual_seed(seed)
        self.weights, self.biases = torch.nn.ParameterList(), torch.nn.ParameterList()
        for inputs, outputs in itertools.pairwise(sizes):
            bound = 1 / math.sqrt(inputs)
            for to, shape in ((self.weights, (members, inputs, outputs)), (self.biases, (members, 1, outputs))):
                to.append(torch.empty(shape).uniform_(-bound, bound, generator=rng))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Rewards [E, B] of embeddings [B, width], or [E, B, width] where each member has its own."""
        validate.tensor("embeddings", embeddings)
        members, width = self.weights[0].shape[:2]
        shape = tuple(embeddings.shape)
        if len(shape) not in (2, 3) or shape[-1] != width or (len(shape) == 3 and shape[0] != members):
            validate.fail("embeddings", f"shape [B, {width}] or [{members}, B, {width}]", shape)
        x = embeddings.expand(members, *shape[-2:])
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, torch.relu(x) if k else x, weight)
        return x.squeeze(-1)


def pooled_rewards(rewards, *, kind: str = "mean", coef: float = 1.0) -> torch.Tensor:
    """One reward of an ensemble's, more careful where its members disagree.

        mean:          1/E·Σ_e r_e
        min:           min_e r_e
        uncertainty:   mean − coef·1/E·Σ_e (r_e − mean)²

    Args:
        rewards: [E, *] float.
        kind: "mean", "min" or "uncertainty".
        coef: of the variance.

    Returns:
        [*], float32 (float64 where rewards are).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or name; the message names it.

    Reference:
        arXiv 2310.02743, the ensembles that 2502.04357 reproduces on embeddings.

    Example:
        >>> rlfast.pooled_rewards(torch.tensor([[1.0], [3.0]]), kind="uncertainty", coef=0.5)
        tensor([1.5000])
    """
    validate.tensor("rewards", rewards)
    validate.one_of("kind", kind, POOLS)
    coef = validate.number("coef", coef, limits.NOT_NEGATIVE)
    if not rewards.dim() or not rewards.shape[0]:
        validate.fail("rewards", "shape [E, *], of one member at least", validate.shape(rewards))
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    if kind == "min":
        return rewards.amin(0)
    mean = rewards.mean(0)
    return mean if kind == "mean" else mean - coef * (rewards - mean).square().mean(0)
