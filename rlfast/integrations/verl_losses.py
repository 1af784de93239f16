"""verl's losses of ``verl.trainer.ppo.core_algos``, under verl's names and signatures, each one launch.

A policy loss takes ``(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)``,
reads verl's configuration of the actor, and returns the loss and verl's metrics as floats.

    POLICIES   what each reads of the configuration, and the row of ``rlfast.LOSSES`` it becomes
    policy     one such call
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlfast.integrations import verl_metrics as metrics
from rlfast.integrations.patching import tensor_unsupported
from rlfast.integrations.verl_functional import mask_unsupported
from rlfast.kl import kl_penalty as estimate
from rlfast.loss_table import loss
from rlfast.losses import Loss
from rlfast.selections import covariance, kl_cov_extra
from rlfast.values import value_loss

REDUCTIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-sum-norm": "seq_sum_over_max_len",
    "seq-mean-token-mean": "seq_mean_token_mean",
}
KL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
ESTIMATES = ("k1", "k2", "k3", "abs")

objective = functools.lru_cache(maxsize=256)(loss)


class Policy(NamedTuple):
    """A registered policy loss."""

    row: str  # of ``rlfast.LOSSES``
    options: Callable  # config → options of the row
    said: Callable  # (Call, metrics of the launch) → verl's metrics
    fields: Callable | None = None  # Call → more fields of the loss
    reduce: str | None = None  # whatever the call says


class Call(NamedTuple):
    """The arguments of a policy loss."""

    old: torch.Tensor
    logp: torch.Tensor
    adv: torch.Tensor
    mask: torch.Tensor
    config: object
    weights: torch.Tensor | None
    options: dict  # of the row
    row: str
    keep: torch.Tensor | None = None  # of Clip-Cov


def reduction(mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None) -> dict:
    """What of a loss's call a mode and verl's counts of the global batch are.

    Raises:
        ValueError: the mode is unknown, or its count is missing and there are several ranks.
    """
    if mode not in REDUCTIONS:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    if mode == "token-sum":
        return {"world_size": dp_size}
    by_token = mode == "token-mean"
    count = batch_num_tokens if by_token else global_batch_size
    if count is None and dp_size > 1:
        name = "(global) batch_num_tokens" if by_token else "global_batch_size"
        raise ValueError(f"{name} is required when dp_size > 1")
    norm = {"max_len": loss_scale_factor} if mode == "seq-mean-token-sum-norm" else {}
    return {"num_items": count, "world_size": dp_size} | norm


def _as_verl(out, call: dict, mode: str):
    """The loss; NaN where verl divides 0 by 0, in a batch without a token whose count is its own."""
    if mode == "token-sum" or call.get("num_items") is not None:
        return out.loss
    n = out.metrics["tokens"]
    return out.loss + (n / n - 1.0)


def agg_loss(
    loss_mat, loss_mask, loss_agg_mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None
):
    """A batch's losses [B, T] as one number, by one of ``REDUCTIONS`` and verl's counts of the global batch."""
    call = reduction(loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    out = _plain(REDUCTIONS[loss_agg_mode])(loss_mat, mask=loss_mask, **call)
    return -_as_verl(out, call, loss_agg_mode)


@functools.cache
def _plain(reduce: str) -> Loss:
    return Loss("nll", reduce=reduce, name="agg_loss")  # −x of each token


def compute_value_loss(
    vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode="token-mean", dp_size=1,
    batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None,
):  # fmt: skip
    """The critic's loss, and the part of the tokens whose clipped loss is the larger."""
    call = reduction(loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    reduce = REDUCTIONS[loss_agg_mode]
    out = value_loss(vpreds, values, returns, response_mask, clip=cliprange_value, reduce=reduce, like="verl", **call)
    return _as_verl(out, call, loss_agg_mode), out.metrics["clip_high"]


def kl_penalty(logprob, ref_logprob, kl_penalty):
    """An estimate of the KL a token: "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3"; "+" has k2's gradient.

    Raises:
        NotImplementedError: the estimate is another one.
    """
    base = kl_penalty.removesuffix("+")
    name = KL_NAMES.get(base, base)
    if name not in ESTIMATES:
        raise NotImplementedError(kl_penalty)
    through = "+" if kl_penalty.endswith("+") and name != "k2" else ""
    return estimate(logprob, ref_logprob, kind=name + through, like="verl")


def policy(kind: Policy, old, logp, adv, mask, mode, config, weights):
    """(loss, verl's metrics) of a policy loss."""
    assert config is not None
    given = Call(old, logp, adv, mask, config, weights, kind.options(config), kind.row)
    own_mean = kind.row == "gmpo"  # over all sequences of this batch, whatever the mode
    mode = kind.reduce or mode
    call = {} if own_mean else reduction(mode, **config.global_batch_info)
    reduce = {} if own_mean else {"reduce": REDUCTIONS[mode]}
    fields = {"weights": weights} | (kind.fields(given) if kind.fields else {})
    row = objective(kind.row, like="verl", **given.options, **reduce)
    old = None if kind.row == "gpg" else old  # which nothing of it reads
    out = row(logp, adv=adv, old_logp=old, mask=mask, **fields, **call)
    total = out.loss if own_mean else _as_verl(out, call, mode)
    if own_mean and not len(logp):  # a mean over no sequence
        total = total + math.nan
    return total, kind.said(given._replace(keep=fields.get("keep")), out.metrics)


def _clip_range(config) -> dict:
    """ε below and above: ``clip_ratio`` unless the side has its own."""
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    return {"eps_low": float(low), "eps_high": float(high)}


def _ppo(config) -> dict:
    c = config.get("clip_ratio_c", 3.0)
    assert c > 1.0, (
        f"The lower bound of the clip_ratio_c for dual-clip PPO should be greater than 1.0, but get the value: {c}."
    )
    return _clip_range(config) | {"dual_clip": float(c)}


def _dppo(config) -> dict:
    return _clip_range(config) | {"cap": float(config.get("clip_ratio_c", 20.0))}


def _geo_mean(config) -> dict:
    ends = _clip_range(config)
    return {"log_ratio_low": -ends["eps_low"], "log_ratio_high": ends["eps_high"]}


def _sapo(config) -> dict:
    return {"tau_pos": float(config.tau_pos), "tau_neg": float(config.tau_neg)}


def _dro(config) -> dict:
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError("policy_loss.dro_beta must be a positive value when using DRO")
    return {"tau": float(beta)}


def _kl_cov(config) -> dict:
    coef = config.policy_loss.ppo_kl_coef
    assert _or(config.policy_loss.kl_cov_ratio, 2e-4) > 0, "kl_cov_ratio should be larger than 0."
    return {"coef": 1.0 if coef is None else float(coef)}


def _clip_cov(config) -> dict:
    assert _or(config.policy_loss.clip_cov_ratio, 2e-4) > 0, "clip_ratio should be larger than 0."
    return _clip_range(config)


def _or(x, default):
    return default if x is None else x


def _chosen_by_kl_cov(given: Call) -> dict:
    ratio = _or(given.config.policy_loss.kl_cov_ratio, 2e-4)
    return {"extra": kl_cov_extra(given.logp, given.adv, given.mask, ratio=min(float(ratio), 1.0))}


def _kept_by_clip_cov(given: Call) -> dict:
    """The draw is verl's, from torch's generator; ``rlfast.clip_cov_keep`` has a seed of its own."""
    chosen = given.config.policy_loss
    defaults = {"ratio": 2e-4, "lb": 1.0, "ub": 5.0}
    ratio, low, high = (_or(getattr(chosen, f"clip_cov_{x}"), default) for x, default in defaults.items())
    cov, adv, mask, count = covariance(given.logp, given.adv, given.mask)
    at = ((cov < high) & (cov > low) & mask).flatten().nonzero()[:, 0]
    logp, old, adv = (x.flatten()[at] for x in (given.logp.detach(), given.old, adv))
    at = at[~metrics.clipped((logp - old).exp(), adv, given.options)]
    keep = torch.ones(mask.shape, dtype=torch.bool, device=mask.device)
    drawn = torch.randperm(len(at))[: max(int(ratio * count.item()), 1)] if len(at) else at  # verl draws of none not
    keep.view(-1)[at[drawn.to(at.device)]] = False
    return {"keep": keep}


def _geometric_weights(given: Call) -> dict:
    """A sequence's weight is the geometric mean of its tokens'."""
    if given.weights is None:
        return {}
    logs = torch.where(given.mask.bool(), (given.weights + 1e-10).log(), 0.0).sum(-1)
    return {"weights": (logs / (given.mask.sum(-1) + 1e-8)).exp()}


POLICIES = {
    "vanilla": Policy("ppo", _ppo, metrics.ppo),
    "dppo_tv": Policy("dppo_tv", _dppo, metrics.dppo),
    "dppo_kl": Policy("dppo_kl", _dppo, metrics.dppo),
    "gspo": Policy("gspo", _clip_range, metrics.gspo),
    "sapo": Policy("sapo", _sapo, metrics.sapo, reduce="seq-mean-token-mean"),
    "gpg": Policy("gpg", lambda config: {}, lambda given, said: {}),
    "clip_cov": Policy("clip_cov", _clip_cov, metrics.clip_cov, _kept_by_clip_cov),
    "kl_cov": Policy("kl_cov", _kl_cov, metrics.kl_cov, _chosen_by_kl_cov),
    "geo_mean": Policy("gmpo", _geo_mean, metrics.geo_mean, _geometric_weights),
    "dro": Policy("dro", _dro, metrics.kl_alone),
    "cispo": Policy("cispo", _clip_range, metrics.cispo),
    "reinforce": Policy("reinforce", lambda config: {}, metrics.kl_alone),
}


def _named(name: str, default: str = "token-mean"):
    """A policy loss under verl's name and signature."""
    kind = POLICIES[name]

    def compute(
        old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=default, config=None, rollout_is_weights=None
    ):
        return policy(
            kind, old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
        )

    compute.__name__ = compute.__qualname__ = f"compute_policy_loss_{name}"
    compute.__doc__ = f"""verl's policy loss {name!r}: ``rlfast.loss({kind.row!r}, like="verl")``.

    Args:
        old_log_prob, log_prob, advantages: [B, T] float. response_mask: [B, T], 0 where a token does not count.
        loss_agg_mode: one of ``REDUCTIONS``.
        config: verl's of the actor.
        rollout_is_weights: [B, T] or None; multiply the tokens' losses.

    Returns:
        (loss, metrics): a 0-dim tensor with gradient by log_prob, and floats by verl's names.
    """
    return compute


compute_policy_loss_vanilla = _named("vanilla")
compute_policy_loss_dppo_tv = _named("dppo_tv")
compute_policy_loss_dppo_kl = _named("dppo_kl")
compute_policy_loss_gspo = _named("gspo", "seq-mean-token-mean")
compute_policy_loss_sapo = _named("sapo", "seq-mean-token-mean")
compute_policy_loss_gpg = _named("gpg")
compute_policy_loss_clip_cov = _named("clip_cov")
compute_policy_loss_kl_cov = _named("kl_cov")
compute_policy_loss_geo_mean = _named("geo_mean")
compute_policy_loss_dro = _named("dro")
compute_policy_loss_cispo = _named("cispo")


def compute_policy_loss_reinforce(
    rollout_log_prob, log_prob, advantages, response_mask, loss_agg_mode="seq-mean-token-sum", config=None,
    rollout_is_weights=None,
):  # fmt: skip
    """verl's REINFORCE of its bypass mode: −A·log π, weighed; its KL is to the rollout."""
    assert config is not None, "ActorConfig must be provided for REINFORCE loss"
    return policy(
        POLICIES["reinforce"], rollout_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
        rollout_is_weights,
    )  # fmt: skip


def policy_unsupported(name: str):
    """Why rlfast cannot take a call of a policy loss, as a function of the call."""
    kind = POLICIES[name]

    def why_not(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode=None, config=None, weights=None):
        fields = {"old_log_prob": old_log_prob, "advantages": advantages, "response_mask": response_mask,
                  "rollout_is_weights": weights}  # fmt: skip
        reason = tensor_unsupported(log_prob=log_prob, **fields) or _laid_out(log_prob, fields)
        reason = reason or mask_unsupported(response_mask)
        if reason is None and kind.row == "gmpo":
            reason = _mixed(advantages, response_mask)
        if reason is not None or config is None:
            return reason
        try:
            options = kind.options(config)
        except (AssertionError, ValueError):
            return None  # verl's own complaint
        try:
            objective(kind.row, like="verl", **options)
        except (TypeError, ValueError) as error:
            return str(error)
        return None if kind.row == "gmpo" else counts_unsupported(**config.global_batch_info)

    def call(*args, **kwargs):
        if "rollout_log_prob" in kwargs:
            kwargs["old_log_prob"] = kwargs.pop("rollout_log_prob")
        if "rollout_is_weights" in kwargs:
            kwargs["weights"] = kwargs.pop("rollout_is_weights")
        return why_not(*args, **kwargs)

    return call


def _laid_out(first, fields: dict) -> str | None:
    for name, x in fields.items():
        if x is None:
            continue
        if x.shape != first.shape or x.dim() != 2 or x.device != first.device:
            return f"{name} of shape {tuple(x.shape)} on {x.device} beside {tuple(first.shape)} on {first.device}"
        if x.requires_grad and torch.is_grad_enabled():
            return f"{name} needs a gradient"
    return None


def _mixed(adv, mask) -> str | None:
    """verl leaves a token without an advantage out of the geometric mean, rlfast a sequence's tokens never."""
    mask = mask if mask.dtype == torch.bool else mask != 0
    some = ((adv != 0) & mask).count_nonzero(-1)
    if bool(((some > 0) & (some < mask.count_nonzero(-1))).any()):
        return "the advantage is 0 at some tokens of a sequence and not at others"
    return None


def counts_unsupported(
    dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None, **_
) -> str | None:
    """Why rlfast cannot divide by these counts."""
    given = {"dp_size": dp_size, "batch_num_tokens": batch_num_tokens, "global_batch_size": global_batch_size,
             "loss_scale_factor": loss_scale_factor}  # fmt: skip
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and (x.dim() > 0 or name in ("dp_size", "loss_scale_factor")):
            return f"{name} is a tensor of shape {tuple(x.shape)}"
        if x is not None and not isinstance(x, torch.Tensor) and not 0 < x < math.inf:
            return f"{name} is {x!r}, rlfast divides by a number > 0"
    return None


def agg_unsupported(loss_mat, loss_mask, loss_agg_mode, *counts, **named) -> str | None:
    """Why rlfast cannot take a call of ``agg_loss``."""
    reason = tensor_unsupported(loss_mat=loss_mat, loss_mask=loss_mask) or _laid_out(loss_mat, {"loss_mask": loss_mask})
    return reason or mask_unsupported(loss_mask) or counts_unsupported(*counts, **named)


def value_unsupported(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode=None, *counts, **named):
    """Why rlfast cannot take a call of ``compute_value_loss``."""
    fields = {"returns": returns, "values": values, "response_mask": response_mask}
    reason = tensor_unsupported(vpreds=vpreds, **fields) or _laid_out(vpreds, fields) or mask_unsupported(response_mask)
    if reason is None and isinstance(cliprange_value, torch.Tensor):
        return "cliprange_value is a tensor, rlfast clips by a number"
    if reason is None and not 1e-30 < cliprange_value < math.inf:
        return f"cliprange_value is {cliprange_value!r}, rlfast clips by a number > 0"
    return reason or counts_unsupported(*counts, **named)


def kl_unsupported(logprob, ref_logprob, kl_penalty) -> str | None:
    """Why rlfast cannot take a call of ``kl_penalty``."""
    reason = tensor_unsupported(logprob=logprob, ref_logprob=ref_logprob)
    if reason is None and (logprob.shape != ref_logprob.shape or logprob.device != ref_logprob.device):
        return f"ref_logprob of shape {tuple(ref_logprob.shape)} beside logprob of {tuple(logprob.shape)}"
    if reason is None and ref_logprob.requires_grad and torch.is_grad_enabled():
        return "ref_logprob needs a gradient"
    return reason
