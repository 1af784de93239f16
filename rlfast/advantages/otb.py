"""The optimal token baseline: a baseline for each token, from the answers to one prompt."""

from __future__ import annotations

import torch

from rlfast import validate
from rlfast.advantages.group import _groups, _of_all_ranks
from rlfast.advantages.scan import affine_scan, reward_to_go


def optimal_token_baseline(
    rewards, logp, log_sum_sq_probs, mask=None, *, group_size=None, group_ids=None, ratio=None, zero_tail=True,
    eps=1e-8, process_group=None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Advantages over a baseline for each token, weighted by how much of the policy's gradient each answer has by then.

    W_t = Σ_{j≤t} ρ_j²·(1 − 2π_j + Σπ²);  B_t = Σ_i G_t W_t ÷ (Σ_i W_t + eps);  A_t = G_t − B_t

    Args:
        rewards: [R, T] float, one a token.
        logp: [R, T], log π of the tokens; ``token_logps(...).logp``.
        log_sum_sq_probs: [R, T], log Σπ² over the vocabulary; ``token_logps(..., outputs=("log_sum_sq_probs",))``.
        mask: [R, T], 0 where a token does not count; padding on the right.
        group_size, group_ids: as in ``group_advantage``, of the R rows.
        ratio: [R, T], importance weights ρ; None: 1.
        zero_tail: tokens that only one answer of the group is long enough for have no baseline.
        eps: a float ≥ 0.
        process_group: as in ``group_advantage``, of the R rows, which have one T on all ranks.

    Returns:
        (advantages, returns), [R, T] float32 (float64 as rewards): constants. An answer alone in its group has no
        baseline.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.

    Example:
        >>> one = torch.zeros(2, 1)
        >>> adv, _ = rlfast.optimal_token_baseline(torch.tensor([[1.0], [0.0]]), one - 1, one - 1, group_size=2)
        >>> adv
        tensor([[ 0.5000], [-0.5000]])
    """
    if process_group is not None:
        named = {"rewards": rewards, "logp": logp, "log_sum_sq_probs": log_sum_sq_probs, "mask": mask, "ratio": ratio}
        named, own = _of_all_ranks(process_group, group_ids, **named)
        options = {"group_size": group_size, "zero_tail": zero_tail, "eps": eps}
        return tuple(x[own] for x in optimal_token_baseline(**named, **options))
    validate.tensor("rewards", rewards)
    if rewards.dim() != 2:
        validate.fail("rewards", "shape (R, T)", validate.shape(rewards))
    for name, x in (("logp", logp), ("log_sum_sq_probs", log_sum_sq_probs), ("ratio", ratio)):
        if x is not None or name != "ratio":
            validate.tensor(name, x)
            if x.shape != rewards.shape:
                validate.fail(name, f"shape {validate.shape(rewards)} like rewards", validate.shape(x))
            validate.same_device(name, x, "rewards", rewards)
    eps = validate.at_least("eps", eps, 0.0)
    ids, size = _groups(rewards, group_size, group_ids)
    rows = rewards.shape[0]
    group = torch.arange(rows, device=rewards.device) // size
    if ids is not None:
        group = torch.searchsorted(torch.sort(ids).values, ids)
    mask = validate.mask_like(mask, "rewards", rewards)
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        energy = 1.0 - 2.0 * logp.double().exp() + log_sum_sq_probs.double().exp()
        energy = energy if ratio is None else energy * ratio.double().square()
        energy = torch.where(valid, energy, 0.0).to(torch.promote_types(rewards.dtype, torch.float32))
        returns = reward_to_go(rewards, mask)
        weight = torch.where(valid, affine_scan(torch.ones_like(energy), energy, reverse=False), 0.0).double()

        def over_group(x):
            return torch.zeros(rows, x.shape[1], dtype=torch.float64, device=x.device).index_add(0, group, x)[group]

        baseline = over_group(returns.double() * weight) / (over_group(weight) + eps)
        members = torch.zeros(rows, device=group.device).index_add(0, group, torch.ones(rows, device=group.device))[
            group
        ]
        baseline = torch.where(members.unsqueeze(-1) > 1, baseline, 0.0)
        if zero_tail:
            baseline = torch.where(over_group(valid.double()) > 1, baseline, 0.0)
        advantages = torch.where(valid, returns.double() - baseline, 0.0)
    return advantages.to(returns.dtype), returns
