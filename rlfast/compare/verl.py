"""verl's functions beside ours, on batches of a training step's kind."""

from __future__ import annotations

import torch

from rlfast.compare.functions import Case

OURS = "rlfast.integrations.verl"
TORCH, CORE = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
ROWS, LENGTH, VOCAB = 32, 96, 8192


def _normal(draw, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=draw)


def _mask(draw):
    """int64, as the driver has it: responses of 1 token to all."""
    return (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=draw)).long()


def _logits(draw) -> dict:
    return {"logits": _normal(draw, LENGTH, VOCAB, scale=3.0)}


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


POLICIES = ("vanilla", "gspo", "sapo", "geo_mean", "cispo", "dppo_tv", "dppo_kl", "gpg", "dro")
MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
ESTIMATORS = ("grpo_outcome", "rloo_outcome", "reinforce_plus_plus_baseline_outcome")

CASES = (
    Case(TORCH, "logprobs_from_logits", _labelled, ("logits",)),
    Case(TORCH, "logprobs_from_logits_v2", _labelled, ("logits",)),
    Case(TORCH, "entropy_from_logits", _logits, ("logits",)),
    Case(TORCH, "entropy_from_logits_with_chunking", _logits, ("logits",)),
    Case(TORCH, "calculate_sum_pi_squared_from_logits", _logits),
    Case(TORCH, "masked_sum", _values, ("values",)),
    Case(TORCH, "masked_mean", _values, ("values",)),
    Case(TORCH, "masked_var", _values, ("values",)),
    Case(TORCH, "masked_whiten", _values, ("values",)),
    *(Case(CORE, "agg_loss", _losses(loss_agg_mode=mode), ("loss_mat",), note=mode) for mode in MODES),
    Case(CORE, "compute_value_loss", _critic, ("vpreds",)),
    *(Case(CORE, "kl_penalty", _kl(kind), ("logprob",), note=kind) for kind in ("k1", "abs", "k2", "k3", "k3+")),
    Case(CORE, "compute_gae_advantage_return", _gae),
    *(Case(CORE, f"compute_{name}_advantage", _outcomes) for name in ESTIMATORS),
    *(Case(CORE, f"compute_policy_loss_{name}", _policy, ("log_prob",)) for name in POLICIES),
)
