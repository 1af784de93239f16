"""A preference loss: the definition, by autograd alone.

loss = factor/n · Σ_i w_i·Σ_k c_k·ℓ_k(s_k(chosen_i), s_k(rejected_i)), s_k divided by the length if it is a mean
"""

from types import SimpleNamespace

import torch

from . import preferences


def score(name, hyper, mean, logp, ref_logp, length):
    """A score of responses, from their sums."""
    length = length.clamp(min=1)  # the mean of no tokens is 0
    seen = SimpleNamespace(logp=logp, log_ratio=logp - ref_logp, length=length)
    s = getattr(preferences, name)(seen, **hyper)
    return s / length if mean else s


def pair_loss(
    chosen,  # (S, S_ref, n) of the chosen responses, [B] each
    rejected,
    *,
    terms,  # of (c, score, its hyper-parameters, whether it is a mean, link, its hyper-parameters)
    reward,  # the same without a link: c·s is what the metrics call the reward
    margin=None,  # [B]
    extra=None,
    shared=None,  # []
    weights=None,
    n=None,
    factor=1.0,
):
    """(loss, metrics): the sum over the pairs of weight ≠ 0."""
    zero = torch.zeros_like(chosen[0])
    fill = {name: zero if x is None else x for name, x in (("margin", margin), ("extra", extra), ("shared", shared))}
    weights = torch.ones_like(zero) if weights is None else weights
    used = weights != 0
    total = zero
    for c, name, hyper, mean, link, link_hyper in terms:
        pair = SimpleNamespace(
            chosen=score(name, hyper, mean, *chosen), rejected=score(name, hyper, mean, *rejected),
            chosen_length=chosen[2], rejected_length=rejected[2], **fill,
        )  # fmt: skip
        total = total + c * getattr(preferences, link)(pair, **link_hyper)
    losses = torch.where(used, weights * total, zero)
    pairs = used.sum().to(zero.dtype)
    loss = factor * losses.sum() / (n if n is not None else zero.numel() or 1)

    def mean_of(x):
        return torch.where(used, x, zero).sum() / pairs.clamp(min=1)

    c, name, hyper, mean = reward
    w, l_ = (c * score(name, hyper, mean, *side) for side in (chosen, rejected))
    metrics = {
        "loss": loss, "pairs": pairs, "chosen_reward": mean_of(w), "rejected_reward": mean_of(l_),
        "accuracy": mean_of((w > l_).to(zero.dtype)), "reward_margin": mean_of(w - l_),
        "chosen_logp": mean_of(chosen[0]), "rejected_logp": mean_of(rejected[0]),
        "chosen_length": mean_of(chosen[2]), "rejected_length": mean_of(rejected[2]),
    }  # fmt: skip
    sizes = {  # Σ|terms| of what is one sum
        "loss": factor * losses.abs().sum() / (n if n is not None else zero.numel() or 1),
        "chosen_reward": mean_of(w.abs()), "rejected_reward": mean_of(l_.abs()),
        "reward_margin": mean_of(w.abs() + l_.abs()),
        "chosen_logp": mean_of(chosen[0].abs()), "rejected_logp": mean_of(rejected[0].abs()),
    }  # fmt: skip
    found = {k: x.detach() for k, x in metrics.items()}
    return loss, found | {
        "losses": losses.detach(),
        "rewards": (w, l_),
        "sizes": {k: x.detach() for k, x in sizes.items()},
    }
