"""Reward models on embeddings: an ensemble is its members one by one, how their rewards are pooled, bad input."""

from __future__ import annotations

import pytest
import torch

import rlfast
from tests.numerics import assert_gradient, assert_value


def by_hand(model, x, dtype) -> list[torch.Tensor]:
    """The rewards of each member, by plain linear layers, with their weights as leaves."""
    leaves = [[p[e].detach().to(dtype).requires_grad_() for p in (*model.weights, *model.biases)] for e in range(3)]
    found = []
    for own in leaves:
        h, half = x.to(dtype), len(own) // 2
        for k in range(half):
            h = (h.relu() if k else h) @ own[k] + own[half + k]
        found.append(h[:, 0])
    return found, leaves


def test_a_batched_product_is_every_member_by_itself():
    """Rewards, and the gradients of each member's own mean loss."""
    torch.manual_seed(0)
    model, w, l_ = rlfast.EmbeddingRewards(12, hidden=(9, 7), members=3, seed=4), torch.randn(5, 12), torch.randn(5, 12)
    chosen, rejected = model(w), model(l_)
    out = rlfast.reward_loss("bradley_terry", reduce="sum")(chosen.flatten(), rejected.flatten())
    (out.loss / 5).backward()
    runs = []
    for dtype in (torch.float64, torch.float32):
        (one, leaves), (other, more) = by_hand(model, w, dtype), by_hand(model, l_, dtype)
        losses = [-torch.nn.functional.logsigmoid(a - b).mean() for a, b in zip(one, other, strict=True)]
        torch.stack(losses).sum().backward()
        grads = [[a.grad + b.grad for a, b in zip(x, y, strict=True)] for x, y in zip(leaves, more, strict=True)]
        runs.append((torch.stack(one).detach(), [torch.stack(g) for g in zip(*grads, strict=True)]))
    (truth, wanted), (own, near) = runs
    assert_value("rewards", chosen.detach(), truth, own)
    for k, p in enumerate((*model.weights, *model.biases)):
        assert_gradient(f"parameter {k}", p.grad, wanted[k].reshape(p.shape), near[k].reshape(p.shape))


def test_members_differ_and_a_seed_says_how():
    x = torch.randn(4, 6)
    first, same, other = (rlfast.EmbeddingRewards(6, members=2, seed=s)(x) for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.allclose(first, other) and not torch.allclose(first[0], first[1])
    model = rlfast.EmbeddingRewards(6, members=2)
    torch.testing.assert_close(model(x.expand(2, 4, 6)), model(x))


@pytest.mark.parametrize("kind", ("mean", "min", "uncertainty"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_pooled_rewards(kind, dtype):
    rewards = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)

    def pooled(x):
        if kind == "min":
            return torch.stack(list(x)).min(0).values
        mean = x.sum(0) / 5
        return mean if kind == "mean" else mean - 0.7 * ((x - mean) ** 2).sum(0) / 5

    got = rlfast.pooled_rewards(rewards, kind=kind, coef=0.7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_value(kind, got, pooled(rewards.double()), pooled(rewards.float()))


BAD = {
    "width, hidden: expected an int ≥ 1, got 0": lambda: rlfast.EmbeddingRewards(0),
    "width, hidden: expected an int ≥ 1, got 2.0": lambda: rlfast.EmbeddingRewards(4, hidden=(2.0,)),
    "members: expected an int ≥ 1, got True": lambda: rlfast.EmbeddingRewards(4, members=True),
    "embeddings: expected a torch.Tensor, got list": lambda: rlfast.EmbeddingRewards(4)([1.0]),
    "embeddings: expected shape [B, 4] or [2, B, 4], got (3, 5)": lambda: rlfast.EmbeddingRewards(4, members=2)(
        torch.zeros(3, 5)
    ),
    "embeddings: expected shape [B, 4] or [2, B, 4], got (3, 3, 4)": lambda: rlfast.EmbeddingRewards(4, members=2)(
        torch.zeros(3, 3, 4)
    ),
    "kind: expected one of 'mean', 'min', 'uncertainty'": lambda: rlfast.pooled_rewards(torch.zeros(2), kind="max"),
    "coef: expected a finite float ≥ 0, got -1": lambda: rlfast.pooled_rewards(torch.zeros(2), coef=-1),
    "rewards: expected shape [E, *], of one member at least, got (0, 2)": lambda: rlfast.pooled_rewards(
        torch.zeros(0, 2)
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[said]()
    assert str(caught.value).startswith(said)
