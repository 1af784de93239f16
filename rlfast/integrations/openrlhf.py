"""OpenRLHF's log-probs, KL, rewards, advantages and losses, under its names and signatures, on rlfast's kernels.

The functions of ``openrlhf.models.utils`` and the estimators of ``RemoteExperienceMaker`` are here, the losses of
``openrlhf.models.loss`` in ``openrlhf_losses.py`` and ``openrlhf_pairs.py``. They need no OpenRLHF and can be called
directly. A mask is 0 or 1.

``rlfast.patch("openrlhf")`` puts them in place, in this process. It imports nothing of OpenRLHF, whose models bring
DeepSpeed: modules that are not there yet are patched as they are imported. So it may run where a Ray worker starts,
before Ray has chosen its GPU and in vLLM's workers too; ``setup_worker`` is the ``worker_process_setup_hook``.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import sys

import torch

from rlfast import validate
from rlfast.advantages import discounted_returns, gae
from rlfast.integrations import openrlhf_losses as losses
from rlfast.integrations import openrlhf_pairs as pairs
from rlfast.integrations import patch
from rlfast.integrations.openrlhf_losses import GPTLMLoss, PolicyLoss, SFTLoss, ValueLoss, aggregate_loss
from rlfast.integrations.openrlhf_pairs import DPOLoss, LogExpLoss, PairWiseLoss
from rlfast.integrations.patching import (
    Swap,
    or_original,
    refuse_strange,
    refuse_untested,
    takes,
    tensor_unsupported,
)
from rlfast.kl import kl_penalty
from rlfast.logps import token_logps
from rlfast.reductions import masked_mean as mean_over
from rlfast.reductions import masked_whiten

__all__ = [
    "DPOLoss",
    "GPTLMLoss",
    "LogExpLoss",
    "PairWiseLoss",
    "PolicyLoss",
    "RemoteExperienceMaker",
    "SFTLoss",
    "ValueLoss",
    "aggregate_loss",
    "compute_approx_kl",
    "compute_entropy",
    "compute_reward",
    "log_probs_from_logits",
    "masked_mean",
    "masked_normalize",
    "setup_worker",
]

TESTED = ("0.11",)
KL_IS_WEIGHT_CLIP = 10.0  # of OpenRLHF: the largest weight π/π_old of its unbiased gradient


def log_probs_from_logits(logits, labels, temperature=1.0) -> torch.Tensor:
    """Log-probs of ``labels`` under softmax(logits / temperature).

    Args:
        logits: [*, V] float, any strides; divided in place by a temperature other than 1, as by OpenRLHF's, since
            callers go on with them. labels: [*] int in [0, V).

    Returns:
        [*] float32 (float64 for float64), also for bfloat16, where OpenRLHF's rounds to bfloat16.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    return token_logps(logits, labels).logp


def compute_entropy(logits) -> torch.Tensor:
    """The entropy, in nats, of each row of logits [*, V]: [*] float32."""
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logps(logits, any_target, outputs=("entropy",)).entropy


def compute_approx_kl(
    log_probs, log_probs_base, log_probs_old=None, kl_estimator="k1", unbiased_gradient=False
) -> torch.Tensor:
    """An estimate of KL(π‖π_ref) at each token, in [−10, 10].

    Args:
        log_probs: any shape, float, with gradient. log_probs_base, log_probs_old: the same, without.
        kl_estimator: "k1", "k2" or "k3".
        unbiased_gradient: the gradient is w·∇k2 with w = min(π/π_old, 10), 1 without ``log_probs_old``.

    Returns:
        Like log_probs, float32.
    """
    validate.one_of("kl_estimator", kl_estimator, ("k1", "k2", "k3"))
    now, base = log_probs.float(), log_probs_base.float()
    if not unbiased_gradient:
        return kl_penalty(now, base, kind=kl_estimator, like="openrlhf")
    value = kl_penalty(now, base, kind=f"{kl_estimator}+", like="openrlhf")
    if log_probs_old is None:
        return value
    weight = (now.detach() - log_probs_old.float()).exp().clamp(max=KL_IS_WEIGHT_CLIP)
    return value.detach() + weight * (value - value.detach())


def compute_reward(r, kl_coef, kl, action_mask=None, reward_clip_range=None) -> torch.Tensor:
    """−kl_coef·KL at every token, masked ones too, and the score more at the last token that counts.

    Args:
        r: [B] float, scores of the responses. kl: [B, T] float. action_mask: [B, T]; an empty row has its score at its
            last place.
        reward_clip_range: (low, high) of the score.

    Returns:
        [B, T] of kl's dtype. ``rlfast.shape_rewards`` does it from the log-probs, with 0 where the mask is.

    Raises:
        ValueError, TypeError: ``action_mask`` is None or of another shape than ``kl``.
    """
    validate.like("action_mask", action_mask, "kl", kl, validate.MASKS)
    if reward_clip_range:
        r = r.clamp(min=reward_clip_range[0], max=reward_clip_range[1])
    from_end = action_mask.long().flip(1).argmax(dim=1, keepdim=True)
    cost = kl * -max(kl_coef, 0.0)
    return cost.scatter_add(1, action_mask.shape[1] - 1 - from_end, r.unsqueeze(1).to(cost.dtype))


def masked_mean(tensor, mask, dim=None) -> torch.Tensor:
    """Σ m·x / Σ m over ``dim``, or over all; NaN where the mask is empty. Mask None: the plain mean."""
    if mask is None:
        return tensor.mean(dim=dim)
    return mean_over(tensor, mask, dim=dim, like="openrlhf")


def masked_normalize(tensor, mask, dim=1, eps=1e-8) -> torch.Tensor:
    """(x − mean)/√max(var, eps) of each row along ``dim``, over what the mask keeps; 0 elsewhere. Biased variance."""
    return masked_whiten(tensor, mask, dim=dim, eps=eps, like="openrlhf")


class RemoteExperienceMaker:
    """The estimators of OpenRLHF's class of this name; what they return is also computed at masked tokens."""

    @torch.no_grad()
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd) -> tuple:
        """GAE in which a masked token has r = V = 0 and is a step like any other: (advantages, returns), [B, T]."""
        if action_mask is not None:
            values, rewards = action_mask * values, action_mask * rewards
        return gae(rewards, values, gamma=gamma, lam=lambd)

    @torch.no_grad()
    def get_cumulative_returns(self, rewards, action_mask, gamma) -> torch.Tensor:
        """Discounted sums of the rewards to come, [B, T]; a masked token earns 0 and is a step."""
        if action_mask is not None:
            rewards = action_mask * rewards
        return discounted_returns(rewards, gamma=gamma)


def setup_worker() -> None:
    """``rlfast.patch("openrlhf")`` for a process of its own: Ray's ``worker_process_setup_hook``.

    Example:
        >>> ray.init(runtime_env={"worker_process_setup_hook": "rlfast.integrations.openrlhf.setup_worker"})
    """
    patch("openrlhf")


def _logits_unsupported(logits, labels=None, temperature=1.0):
    reason = tensor_unsupported(logits=logits)
    if reason is None and labels is not None and labels.shape != logits.shape[:-1]:
        return f"labels of shape {tuple(labels.shape)} beside logits of shape {tuple(logits.shape)}"
    return reason


def _reward_unsupported(r, kl_coef, kl, action_mask=None, reward_clip_range=None):
    if not isinstance(kl, torch.Tensor) or kl.dim() != 2 or action_mask is None or action_mask.shape != kl.shape:
        return "kl and action_mask are not of one shape [B, T]"
    return tensor_unsupported(r=r, kl=kl, action_mask=action_mask)


def _scan_unsupported(shape, rates: dict, **tensors):
    for name, rate in rates.items():
        if isinstance(rate, torch.Tensor) or not 0 <= rate <= 1:
            return f"{name} is {rate}, rlfast takes a number in [0, 1]"
    if any(x is not None and x.shape != shape for x in tensors.values()):
        return "shapes differ"
    return tensor_unsupported(**tensors)


def _gae_unsupported(self, values, rewards, action_mask, gamma, lambd):
    rates = {"gamma": gamma, "lambd": lambd}
    return _scan_unsupported(rewards.shape, rates, values=values, rewards=rewards, action_mask=action_mask)


def _returns_unsupported(self, rewards, action_mask, gamma):
    return _scan_unsupported(rewards.shape, {"gamma": gamma}, rewards=rewards, action_mask=action_mask)


# What is replaced, by the module that has it; a dotted name is a method, which is swapped in its class. Not among them
# are compute_approx_kl, masked_mean and masked_normalize: a few passes over [B, T], which rlfast's do not make shorter.
PLACES = {
    "openrlhf.models.utils": {
        "log_probs_from_logits": (log_probs_from_logits, _logits_unsupported),
        "compute_entropy": (compute_entropy, _logits_unsupported),
        "compute_reward": (compute_reward, _reward_unsupported),
    },
    "openrlhf.models.loss": {
        "aggregate_loss": (aggregate_loss, losses.aggregate_unsupported),
        "GPTLMLoss.forward": (GPTLMLoss.forward, losses.gpt_unsupported),
        "SFTLoss.forward": (SFTLoss.forward, losses.sft_unsupported),
        "PolicyLoss.forward": (PolicyLoss.forward, losses.policy_unsupported),
        "ValueLoss.forward": (ValueLoss.forward, losses.value_unsupported),
        "PairWiseLoss.forward": (PairWiseLoss.forward, pairs.pairs_unsupported),
        "LogExpLoss.forward": (LogExpLoss.forward, pairs.pairs_unsupported),
        "DPOLoss.forward": (DPOLoss.forward, pairs.dpo_unsupported),
    },
    "openrlhf.trainer.ppo_utils.experience_maker": {
        f"RemoteExperienceMaker.{name}": (getattr(RemoteExperienceMaker, name), why_not)
        for name, why_not in (
            ("get_advantages_and_returns", _gae_unsupported),
            ("get_cumulative_returns", _returns_unsupported),
        )
    },
}
# The package re-exports its losses: what it imported by value is there only when it is done.
WATCHED = ("openrlhf.models", "openrlhf.trainer.ppo_utils.experience_maker")


def _swaps(module, place: dict, strange: list[str]) -> list[Swap]:
    """Those of one module; ``strange`` gets the reason where something is not as known."""
    found = []
    for dotted, (ours, why_not) in place.items():
        holder, _, name = dotted.rpartition(".")
        owner = getattr(module, holder, None) if holder else module
        original = None if owner is None else vars(owner).get(name)
        if takes(original, inspect.signature(ours).parameters, f"{module.__name__}.{dotted}", strange):
            swapped = or_original(ours, original, why_not)
            at = {"owner": owner, "name": name} if holder else {"prefix": "openrlhf"}
            found.append(Swap(original, swapped, **at))
    return found


def replacements(untested: bool):
    """(a function that lists the swaps in the modules that are loaded, OpenRLHF's version, the modules to wait for).

    Raises:
        RuntimeError: the version is not one of ``TESTED`` and ``untested`` is False. The function raises it where a
            signature is not as known.
    """
    try:
        version = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    refuse_untested("openrlhf", version, TESTED, untested)
    found: dict[str, list[Swap]] = {}

    def swaps() -> list[Swap]:
        for name, place in PLACES.items():
            module, strange = sys.modules.get(name), []
            if name in found or module is None:
                continue
            made = _swaps(module, place, strange)
            refuse_strange("openrlhf", version, strange, untested)
            found[name] = made
        return [swap for made in found.values() for swap in made]

    return swaps, version, WATCHED
