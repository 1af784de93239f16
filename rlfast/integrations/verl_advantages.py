"""verl's estimators of ``verl.trainer.ppo.core_algos``, under verl's names and signatures.

They run in verl's driver, on the CPU; ``index`` is an array of the prompts' uid strings. What verl leaves at masked
tokens (GAE: the advantage of the token after, and what whitening makes of it) is there too.
"""

from __future__ import annotations

import numpy as np
import torch

from rlfast.advantages import affine_scan, discounted_returns, gae, group_advantage, optimal_token_baseline
from rlfast.advantages import reward_to_go as to_go
from rlfast.integrations.patching import tensor_unsupported
from rlfast.integrations.verl_functional import enough, mask_unsupported, masked_whiten, moments, whitened


@torch.no_grad()
def compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam):
    """GAE over the tokens that count, whitened over the batch: (advantages, returns), [B, T].

    Args:
        token_level_rewards, values: [B, T] float. response_mask: [B, T], 0 where a token does not count.
        gamma, lam: floats in [0, 1].

    Raises:
        ValueError: fewer than two tokens count.
    """
    kind = torch.promote_types(torch.result_type(token_level_rewards, values), response_mask.dtype)
    mask = response_mask if response_mask.dtype == torch.bool else response_mask != 0
    advantages, returns = gae(token_level_rewards, values, mask, gamma=float(gamma), lam=float(lam))
    count = mask.count_nonzero()
    mean, var = moments(advantages, count)
    if count < mask.numel():
        if not bool((mask[:, 1:] <= mask[:, :-1]).all()):  # else 0 is what comes after
            advantages = affine_scan((~mask).to(advantages.dtype), advantages)
        returns = advantages + values
    return whitened(advantages, mean, var).to(kind), returns.to(kind)


def _scores(token_level_rewards):
    return token_level_rewards.sum(dim=-1)


def _names(index):
    """Group ids as ``group_advantage`` takes them."""
    return index.tolist() if isinstance(index, np.ndarray) else index  # elements of an array come one by one, slowly


def _spread(advantages, dtype, response_mask):
    """One number a row on its tokens, twice, as verl returns it."""
    spread = advantages.to(dtype).unsqueeze(-1) * response_mask
    return spread, spread


def _wide(token_level_rewards) -> torch.dtype:
    """What verl's vectorised estimators return: their means are no bfloat16."""
    return torch.promote_types(token_level_rewards.dtype, torch.float32)


@torch.no_grad()
def _outcome(token_level_rewards, response_mask, index, method, dtype=None, **options):
    advantages = group_advantage(
        _scores(token_level_rewards), group_ids=_names(index), method=method, like="verl", **options
    )
    return _spread(advantages, dtype or token_level_rewards.dtype, response_mask)


def _grpo(epsilon, by_std: bool) -> dict:
    return {"method": "grpo", "eps": epsilon} if by_std else {"method": "dr_grpo"}


def compute_grpo_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None
):
    """(r − mean) ÷ (std + ε) over the prompt's answers, or r − mean."""
    options = _grpo(epsilon, norm_adv_by_std_in_grpo)
    return _outcome(token_level_rewards, response_mask, index, **options)


def compute_grpo_vectorized_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None
):
    """``compute_grpo_outcome_advantage``, in float32 at least."""
    options = _grpo(epsilon, norm_adv_by_std_in_grpo)
    return _outcome(token_level_rewards, response_mask, index, dtype=_wide(token_level_rewards), **options)


@torch.no_grad()
def compute_gdpo_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None,
    non_tensor_batch=None, batch=None, **kwargs,
):  # fmt: skip
    """GRPO of each of several rewards, their weighted sum whitened over the tokens."""
    weights, columns = None, [_scores(token_level_rewards)]
    if config is not None and non_tensor_batch is not None and batch is not None:
        keys = config.get("gdpo_reward_keys", None)
        assert keys, "GDPO requires 'algorithm.gdpo_reward_keys', the keys of the rewards that compute_score returns."
        for key in keys:
            assert key in non_tensor_batch, (
                f"GDPO reward key '{key}' not found in non_tensor_batch. Available keys: {list(non_tensor_batch)}."
            )
        columns = [
            torch.tensor(np.asarray(non_tensor_batch[key], dtype=np.float32), device=token_level_rewards.device)
            for key in keys
        ]
        given = config.get("gdpo_reward_weights", None)
        weights = None if given is None else tuple(float(w) for w in given)
    scale = {"eps": epsilon} if norm_adv_by_std_in_grpo else {"scale": "none"}
    enough(response_mask.sum())
    advantages = group_advantage(
        torch.stack(columns, dim=1), group_ids=_names(index), method="gdpo", like="verl", weights=weights,
        lengths=response_mask.sum(-1), **scale,
    )  # fmt: skip
    return _spread(advantages, columns[0].dtype, response_mask)


def compute_grpo_passk_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, norm_adv_by_std_in_grpo=True, config=None, **kwargs
):
    """The best answer's lead over the second, over the group's deviation; the others have 0."""
    assert config is not None
    counts = {}
    for name in _names(index):
        counts[name] = counts.get(name, 0) + 1
    for name, count in counts.items():
        if count < 2:
            raise ValueError(f"Pass@k requires at least 2 samples per group. Got {count} for group {name}.")
    by_std = config.get("norm_adv_by_std_in_grpo", True)
    scale = {"eps": epsilon} if by_std else {"scale": "none"}
    return _outcome(token_level_rewards, response_mask, index, "pass@k", **scale)


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    """r − mean of the prompt's answers, whitened over the tokens of the batch."""
    enough(response_mask.sum())
    lengths = response_mask.sum(-1)
    return _outcome(token_level_rewards, response_mask, index, "reinforce++_baseline", lengths=lengths)


def compute_rloo_outcome_advantage(token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs):
    """r − mean of the prompt's other answers; one alone keeps its reward."""
    return _outcome(token_level_rewards, response_mask, index, "rloo")


@torch.no_grad()
def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs
):
    """r − mean of the prompt's other answers; one alone has 0. In float32 at least."""
    advantages = group_advantage(_scores(token_level_rewards), group_ids=_names(index), method="rloo")
    return _spread(advantages, _wide(token_level_rewards), response_mask)


def compute_opo_outcome_advantage(token_level_rewards, response_mask, index, epsilon=1e-6, config=None, **kwargs):
    """r − the mean of the prompt's answers, weighted by their lengths."""
    return _outcome(token_level_rewards, response_mask, index, "opo", lengths=response_mask.sum(-1))


@torch.no_grad()
def compute_reinforce_plus_plus_outcome_advantage(token_level_rewards, response_mask, config=None, **kwargs):
    """Discounted returns over the tokens that count, and the same whitened."""
    assert config is not None
    returns = discounted_returns(token_level_rewards, response_mask, gamma=float(config.gamma))
    returns = returns.to(token_level_rewards.dtype)
    return masked_whiten(returns, response_mask) * response_mask, returns


@torch.no_grad()
def compute_remax_outcome_advantage(token_level_rewards, reward_baselines, response_mask, config=None, **kwargs):
    """Rewards to come, less the greedy answer's reward."""
    returns = to_go(token_level_rewards * response_mask).to(token_level_rewards.dtype)
    return returns - reward_baselines.unsqueeze(-1) * response_mask, returns


def compute_gpg_outcome_advantage(
    token_level_rewards, response_mask, index, epsilon=1e-6, f_norm=1.0, alpha=1.0, config=None, **kwargs
):
    """(r − mean) · answers ÷ answers with a reward, ÷ ``f_norm``; ``alpha`` is not read, as verl does not."""
    advantages, _ = _outcome(token_level_rewards, response_mask, index, "gpg")
    return (advantages, advantages) if f_norm == 1.0 else (advantages / f_norm,) * 2


@torch.no_grad()
def compute_optimal_token_baseline_advantage(
    token_level_rewards, response_mask, index, old_log_probs, sum_pi_squared, rollout_is_weights=None,
    handle_zero_tail=True, epsilon=1e-8, **kwargs,
):  # fmt: skip
    """A baseline for each token, weighted by how much of the gradient each answer has by then. Padding on the right."""
    advantages, returns = optimal_token_baseline(
        token_level_rewards, old_log_probs, sum_pi_squared.double().log(), response_mask, group_ids=_names(index),
        ratio=rollout_is_weights, zero_tail=handle_zero_tail, eps=epsilon,
    )  # fmt: skip
    return advantages.to(token_level_rewards.dtype), returns.to(token_level_rewards.dtype)


@torch.no_grad()
def compute_multi_turn_optimal_token_baseline_advantage(
    token_level_rewards, response_mask, index, old_log_probs, sum_pi_squared, rollout_is_weights=None,
    handle_zero_tail=True, epsilon=1e-8, **kwargs,
):  # fmt: skip
    """The same where the tokens that count have others between them: of two answers, the n-th that count are beside."""
    mask = response_mask.bool()
    order = (~mask).to(torch.int8).argsort(dim=-1, stable=True)  # the tokens that count first, in their order

    def packed(x):
        return x if x is None else x.gather(-1, order)

    names = list(_names(index))
    for row in (mask.sum(-1) == 0).nonzero()[:, 0].tolist():  # an answer without a token is in no group
        names[row] = ("empty", row)
    advantages, _ = compute_optimal_token_baseline_advantage(
        packed(token_level_rewards), packed(mask), names, packed(old_log_probs), packed(sum_pi_squared),
        packed(rollout_is_weights), handle_zero_tail, epsilon,
    )  # fmt: skip
    returns = to_go(token_level_rewards * response_mask).to(token_level_rewards.dtype)
    return torch.zeros_like(advantages).scatter(-1, order, advantages) * response_mask, returns


def rows_unsupported(token_level_rewards, response_mask, index=None, epsilon=1e-6, *_, **__) -> str | None:
    """Why rlfast cannot take a call of an estimator of whole answers."""
    if isinstance(epsilon, torch.Tensor) or not epsilon >= 0:
        return f"epsilon is {epsilon}, rlfast takes a number ≥ 0"
    fields = {"token_level_rewards": token_level_rewards, "response_mask": response_mask}
    reason = tensor_unsupported(**fields)
    if reason is None and (token_level_rewards.dim() != 2 or response_mask.shape != token_level_rewards.shape):
        return (
            f"response_mask of shape {tuple(response_mask.shape)} beside token_level_rewards of "
            f"{tuple(token_level_rewards.shape)}"
        )
    if reason is None and response_mask.device != token_level_rewards.device:
        return f"response_mask is on {response_mask.device} and token_level_rewards on {token_level_rewards.device}"
    return reason


def tokens_unsupported(token_level_rewards, response_mask, *more, **named) -> str | None:
    """The same where the mask is more than a factor of the result."""
    return rows_unsupported(token_level_rewards, response_mask, *more, **named) or mask_unsupported(response_mask)


def gae_unsupported(token_level_rewards, values, response_mask, gamma, lam) -> str | None:
    """Why rlfast cannot take a call of GAE."""
    for name, x in (("gamma", gamma), ("lam", lam)):
        if isinstance(x, torch.Tensor) and x.dim() > 0:
            return f"{name} is a tensor of shape {tuple(x.shape)}"
        if not 0.0 <= float(x) <= 1.0:
            return f"{name} is {float(x)}, rlfast takes 0 to 1"
    reason = tensor_unsupported(values=values) or tokens_unsupported(token_level_rewards, response_mask)
    if reason is None and values.shape != token_level_rewards.shape:
        return f"values of shape {tuple(values.shape)} beside token_level_rewards of {tuple(token_level_rewards.shape)}"
    return reason


def returns_unsupported(token_level_rewards, response_mask, config=None, **_) -> str | None:
    """Why rlfast cannot take a call of REINFORCE++."""
    if config is not None and not 0.0 <= float(config.gamma) <= 1.0:
        return f"config.gamma is {config.gamma}, rlfast takes 0 to 1"
    return tokens_unsupported(token_level_rewards, response_mask)


def remax_unsupported(token_level_rewards, reward_baselines, response_mask, config=None, **_) -> str | None:
    """Why rlfast cannot take a call of ReMax."""
    return tensor_unsupported(reward_baselines=reward_baselines) or tokens_unsupported(
        token_level_rewards, response_mask
    )


def turns_unsupported(
    token_level_rewards, response_mask, index, old_log_probs, sum_pi_squared, rollout_is_weights=None,
    handle_zero_tail=True, epsilon=1e-8, **_,
) -> str | None:  # fmt: skip
    """Why rlfast cannot take a call of the baseline of several turns."""
    if not epsilon > 0:
        return f"epsilon is {epsilon}, rlfast takes a number > 0"
    reason = tensor_unsupported(old_log_probs=old_log_probs, sum_pi_squared=sum_pi_squared)
    return reason or tokens_unsupported(token_level_rewards, response_mask)


def baseline_unsupported(token_level_rewards, response_mask, *fields, **named) -> str | None:
    """Why rlfast cannot take a call of the optimal token baseline; verl has returns in a hole too."""
    reason = turns_unsupported(token_level_rewards, response_mask, *fields, **named)
    if reason is None and bool((response_mask[:, 1:] > response_mask[:, :-1]).any()):
        return "the tokens that count do not come first"
    return reason
