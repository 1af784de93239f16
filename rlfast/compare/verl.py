"""verl's functions stock and patched, on batches of a training step's kind."""

from __future__ import annotations

import importlib

import torch

import rlfast
from rlfast.compare.functions import Case

LIBRARY, OURS = "verl", "rlfast.integrations.verl"
TORCH, CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
FUSED, KERNEL = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
ROWS, LENGTH, VOCAB, WIDTH = 32, 96, 8192, 128


class Foreign(torch.Tensor):
    """Not a plain tensor: rlfast gives it to verl's own function."""


def load() -> list[str]:
    """Import what is compared."""
    for name in (TORCH, CORE, FUSED, KERNEL):
        importlib.import_module(name)
    return []


def patch():
    """rlfast's functions in their place."""
    return rlfast.patch("verl")


def _normal(draw, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=draw)


def _mask(draw):
    """int64, as the driver has it: responses of 1 token to all."""
    return (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=draw)).long()


def _logits(draw) -> dict:
    return {"logits": _normal(draw, LENGTH, VOCAB, scale=3.0)}


def _foreign(draw) -> dict:
    return {name: x.as_subclass(Foreign) for name, x in _logits(draw).items()}


def _head(hidden: str, weight: str, labels: str, **options):
    def given(draw):
        made = {hidden: _normal(draw, 1, LENGTH, WIDTH), weight: _normal(draw, VOCAB, WIDTH, scale=0.1)}
        return made | {labels: torch.randint(VOCAB, (1, LENGTH), generator=draw)} | options

    return given


def _labelled(draw) -> dict:
    return _logits(draw) | {"labels": torch.randint(VOCAB, (LENGTH,), generator=draw)}


def _values(draw) -> dict:
    return {"values": _normal(draw, ROWS, LENGTH), "mask": _mask(draw)}


def _losses(**options):
    return lambda draw: {"loss_mat": _normal(draw, ROWS, LENGTH), "loss_mask": _mask(draw)} | options


def _critic(draw) -> dict:
    values = _normal(draw, ROWS, LENGTH)
    return {
        "vpreds": values + _normal(draw, ROWS, LENGTH, scale=0.5), "returns": values + _normal(draw, ROWS, LENGTH),
        "values": values, "response_mask": _mask(draw), "cliprange_value": 0.5,
    }  # fmt: skip


def _kl(kind):
    def given(draw):
        logp = -_normal(draw, ROWS, LENGTH).abs()
        return {"logprob": logp, "ref_logprob": logp + _normal(draw, ROWS, LENGTH, scale=0.3), "kl_penalty": kind}

    return given


def _gae(draw) -> dict:
    mask = _mask(draw)
    given = {"token_level_rewards": _normal(draw, ROWS, LENGTH) * mask, "values": _normal(draw, ROWS, LENGTH)}
    return given | {"response_mask": mask, "gamma": 0.99, "lam": 0.95}


def _outcomes(draw) -> dict:
    import numpy as np

    mask = _mask(draw)
    last = mask.cumsum(1) == mask.sum(1, keepdim=True)
    index = np.array([f"uid-{i // 4}" for i in range(ROWS)], dtype=object)
    return {
        "token_level_rewards": _normal(draw, ROWS, LENGTH) * last * mask, "response_mask": mask, "index": index,
    }  # fmt: skip


def _discounted(draw) -> dict:
    from verl.trainer.config import AlgoConfig

    given = _outcomes(draw)
    del given["index"]
    return given | {"config": AlgoConfig(gamma=0.99)}


def _best(draw) -> dict:
    from verl.trainer.config import AlgoConfig

    return _outcomes(draw) | {"config": AlgoConfig()}


def _greedy(draw) -> dict:
    given = _outcomes(draw)
    del given["index"]
    return given | {"reward_baselines": _normal(draw, ROWS)}


def _token_baselines(draw) -> dict:
    """p² ≤ Σπ² ≤ p² + (1 − p)², as of every distribution."""
    logp, share = -_normal(draw, ROWS, LENGTH).abs(), torch.rand(ROWS, LENGTH, generator=draw)
    p = logp.exp()
    return _outcomes(draw) | {"old_log_probs": logp, "sum_pi_squared": p**2 + share * (1 - p) ** 2}


def _reinforce(draw) -> dict:
    given = _policy(draw)
    return given | {
        "rollout_log_prob": given.pop("old_log_prob"),
        "rollout_is_weights": _normal(draw, ROWS, LENGTH).exp(),
    }


def _policy(draw) -> dict:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    old = -_normal(draw, ROWS, LENGTH).abs()
    return {
        "old_log_prob": old, "log_prob": old + _normal(draw, ROWS, LENGTH, scale=0.3),
        "advantages": _normal(draw, ROWS, LENGTH), "response_mask": _mask(draw).bool(),
        "config": ActorConfig(
            strategy="fsdp", rollout_n=4, use_dynamic_bsz=True, policy_loss=PolicyLossConfig(dro_beta=0.1)
        ),
    }  # fmt: skip


def _drawing(draw) -> dict:
    torch.manual_seed(0)  # which tokens are dropped
    return _policy(draw)


POLICIES = ("vanilla", "gspo", "sapo", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "gpg", "dro", "kl_cov")
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("grpo", "grpo_vectorized", "gdpo", "rloo", "rloo_vectorized", "opo", "gpg",
              "reinforce_plus_plus_baseline")  # fmt: skip

CASES = (
    Case(TORCH, "logprobs_from_logits", _labelled, ("logits",)),
    Case(TORCH, "logprobs_from_logits_v2", _labelled, ("logits",)),
    Case(TORCH, "entropy_from_logits", _logits, ("logits",)),
    Case(TORCH, "entropy_from_logits", _foreign, ("logits",), note="of a tensor's subclass"),
    Case(TORCH, "entropy_from_logits_with_chunking", _logits, ("logits",)),
    Case(TORCH, "calculate_sum_pi_squared_from_logits", _logits),
    Case(FUSED, "FusedLinearForPPO", _head("hidden_states", "vocab_weights", "input_ids", temperature=0.7),
         ("hidden_states", "vocab_weights"), {}, swapped="FusedLinearForPPOFunction"),
    Case(KERNEL, "linear_cross_entropy", _head("hidden", "weight", "labels"), ("hidden", "weight"), gpu=True,
         positional=True),
    Case(TORCH, "masked_sum", _values, ("values",)),
    Case(TORCH, "masked_mean", _values, ("values",)),
    Case(TORCH, "masked_var", _values, ("values",)),
    Case(TORCH, "masked_whiten", _values, ("values",)),
    *(Case(CORE, "agg_loss", _losses(loss_agg_mode=mode), ("loss_mat",), note=mode) for mode in MODES),
    Case(CORE, "compute_value_loss", _critic, ("vpreds",)),
    *(Case(CORE, "kl_penalty", _kl(kind), ("logprob",), note=kind) for kind in ("k1", "abs", "k2", "k3", "k3+")),
    Case(CORE, "compute_gae_advantage_return", _gae),
    *(Case(CORE, f"compute_{name}_outcome_advantage", _outcomes) for name in ESTIMATORS),
    Case(CORE, "compute_grpo_passk_outcome_advantage", _best),
    Case(CORE, "compute_remax_outcome_advantage", _greedy),
    Case(CORE, "compute_optimal_token_baseline_advantage", _token_baselines),
    Case(CORE, "compute_multi_turn_optimal_token_baseline_advantage", _token_baselines),
    Case(CORE, "compute_reinforce_plus_plus_outcome_advantage", _discounted),
    *(Case(CORE, f"compute_policy_loss_{name}", _policy, ("log_prob",)) for name in POLICIES),
    Case(CORE, "compute_policy_loss_clip_cov", _drawing, ("log_prob",)),
    Case(CORE, "compute_policy_loss_reinforce", _reinforce, ("log_prob",)),
)  # fmt: skip
