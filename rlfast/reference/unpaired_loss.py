"""A loss of single responses: the definition, by autograd alone.

loss = factor/n · Σ_i w_i·Σ_k c_k·ℓ_k(s_k(response_i), whether it is desirable)
"""

from types import SimpleNamespace

import torch

from . import preferences
from .pair_loss import score


def unpaired_loss(
    sums,  # (S, S_ref, n) of the responses, [B] each
    desirable,  # bool [B]
    *,
    terms,  # as in pair_loss
    reward,
    extra=None,
    shared=None,
    weights=None,
    n=None,
    factor=1.0,
):
    """(loss, metrics)."""
    zero = torch.zeros_like(sums[0])
    weights = torch.ones_like(zero) if weights is None else weights
    used = weights != 0
    total = zero
    for c, name, hyper, mean, link, link_hyper in terms:
        single = SimpleNamespace(
            score=score(name, hyper, mean, *sums), desirable=desirable.to(zero.dtype),
            extra=zero if extra is None else extra, shared=zero if shared is None else shared,
        )  # fmt: skip
        total = total + c * getattr(preferences, link)(single, **link_hyper)
    losses = torch.where(used, weights * total, zero)
    loss = factor * losses.sum() / (n if n is not None else zero.numel() or 1)
    c, name, hyper, mean = reward
    rewards = c * score(name, hyper, mean, *sums)

    def mean_of(x, kind):
        return torch.where(used & kind, x, zero).sum() / (used & kind).sum().clamp(min=1)

    metrics = {
        "loss": loss, "desirable": (used & desirable).sum(), "undesirable": (used & ~desirable).sum(),
        "desirable_reward": mean_of(rewards, desirable), "undesirable_reward": mean_of(rewards, ~desirable),
        "desirable_logp": mean_of(sums[0], desirable), "undesirable_logp": mean_of(sums[0], ~desirable),
    }  # fmt: skip
    sizes = {  # Σ|terms| of what is one sum
        "loss": factor * losses.abs().sum() / (n if n is not None else zero.numel() or 1),
        "desirable_reward": mean_of(rewards.abs(), desirable), "undesirable_reward": mean_of(rewards.abs(), ~desirable),
        "desirable_logp": mean_of(sums[0].abs(), desirable), "undesirable_logp": mean_of(sums[0].abs(), ~desirable),
    }  # fmt: skip
    found = {k: x.detach().to(zero.dtype) for k, x in metrics.items()}
    return loss, found | {
        "losses": losses.detach(),
        "rewards": (rewards,),
        "sizes": {k: x.detach() for k, x in sizes.items()},
    }
