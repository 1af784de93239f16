"""The losses of tokens of ``openrlhf.models.loss`` under OpenRLHF's names and signatures, on rlfast's kernels.

Each ``forward`` reads only the attributes that OpenRLHF's class has, so that it serves an instance of that class too:
``rlfast.patch("openrlhf")`` swaps the methods and leaves the classes as they are. A mask is 0 or 1. Losses are float32
(float64 for float64), and what stands at masked tokens is not looked at.
"""

from __future__ import annotations

import functools
import math

import torch

from rlfast import validate
from rlfast.corrections import Correction, geometric_mask, icepop
from rlfast.integrations.patching import refused, tensor_unsupported
from rlfast.integrations.transformers import loss_function
from rlfast.loss_table import loss as policy_loss
from rlfast.losses import Loss
from rlfast.selections import rollout_keep
from rlfast.values import value_loss


def _reduce(token_level: bool) -> str:
    return "token_mean" if token_level else "seq_mean_token_mean"


def _counts(token_level: bool, dp_size, batch_num_tokens, global_batch_size) -> dict:
    """What the sum is divided by; ``dp_size`` has a part in it only where a global count has."""
    count = batch_num_tokens if token_level else global_batch_size
    return {} if count is None else {"num_items": count, "world_size": dp_size}


def _of_something(out, token_level: bool, counts: dict) -> torch.Tensor:
    """The loss, NaN where the batch's own count divides and is 0; rlfast has 0 there."""
    if counts:
        return out.loss
    return torch.where(out.metrics["tokens" if token_level else "sequences"] > 0, out.loss, math.nan)


@functools.cache
def _plain(reduce: str) -> Loss:
    return Loss("nll", reduce=reduce, name="aggregate_loss")


def aggregate_loss(
    loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None
) -> torch.Tensor:
    """A matrix of the tokens' losses as one number.

        token level: Σ m·ℓ / Σ m;   else a mean over the sequences with a token of Σ_t m·ℓ / Σ_t m

    Args:
        loss: [B, T] float, with gradient. loss_mask: [B, T].
        batch_num_tokens, global_batch_size: the count of the whole batch, of tokens or of sequences, that the sum is
            divided by instead; it is then multiplied by ``dp_size``.

    Returns:
        [] float32; NaN for an empty mask without a global count.
    """
    counts = _counts(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    out = _plain(_reduce(token_level_loss))(-loss, mask=loss_mask, **counts)
    return _of_something(out, token_level_loss, counts)


class SFTLoss(torch.nn.Module):
    """−log p of the tokens that count: ``aggregate_loss`` of −``per_token_logps``."""

    def __init__(self, token_level_loss: bool = True):
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self, per_token_logps, loss_mask, dp_size=1, batch_num_tokens=None, global_batch_size=None
    ) -> torch.Tensor:
        """[B, T] each → []."""
        counts = _counts(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        out = _plain(_reduce(self.token_level_loss))(per_token_logps, mask=loss_mask, **counts)
        return _of_something(out, self.token_level_loss, counts)


class GPTLMLoss(torch.nn.Module):
    """The mean of −log p of the next token over the labels that are not −100; without ring attention."""

    def __init__(self, ring_attn_group=None):
        super().__init__()
        if ring_attn_group is not None:
            validate.fail("ring_attn_group", "None: the sequence is not divided among processes", repr(ring_attn_group))
        self.IGNORE_INDEX = validate.IGNORE_INDEX
        self.ring_attn_group = None

    def forward(self, logits, labels) -> torch.Tensor:
        """Logits [B, T, V] and labels [B, T] → []."""
        return loss_function(logits, labels, logits.shape[-1], ignore_index=self.IGNORE_INDEX)


@functools.cache
def _policy(kind: str, clips: tuple, dual_clip, token_level: bool, correction: Correction | None) -> Loss:
    """The objective of a ``PolicyLoss``; made once."""
    dual = {} if dual_clip is None else {"dual_clip": float(dual_clip)}
    return policy_loss(
        kind, like="openrlhf", kl=None, eps_low=float(clips[0]), eps_high=float(clips[1]), **dual,
        reduce=_reduce(token_level), correction=correction,
    )  # fmt: skip


def _objective(loss) -> Loss:
    """That of a ``PolicyLoss``, by its attributes.

    Raises:
        ValueError: one of them is a number that rlfast does not take.
    """
    clips = loss.clip_eps_low, loss.clip_eps_high
    return _policy(loss.policy_loss_type, clips, loss.dual_clip, loss.token_level_loss, _correction(loss))


def _correction(loss) -> Correction | None:
    """ρ = π_old/π_rollout on the surrogate, as the attributes ask for it."""
    if loss.is_correction_level == "off" or loss.policy_loss_type != "ppo":
        return None
    if loss.is_correction_gating != "ratio":
        return Correction(weight="token")  # and ``keep`` gates
    low, high = max(loss.is_correction_threshold[0], 0.0), loss.is_correction_threshold[1]
    if loss.is_correction_mode == "clip":
        return Correction(weight="token", low=low, high=high)
    return icepop(low, high) if loss.is_correction_level == "token" else geometric_mask(low, high)


def _mean(x, mask, rows=False) -> torch.Tensor:
    """Σ m·x / Σ m of what is logged, over all or of each row [B, 1]; NaN for an empty mask."""
    dim, keep = ((-1,), True) if rows else (None, False)
    if mask is None:
        return x.mean(dim, keep, dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.where(mask, x, 0).sum(dim, keep) / mask.sum(dim, keep)


def _clip_ratio(loss, log_ratio, advantages, mask) -> torch.Tensor:
    """The part of the tokens whose clipped surrogate is the smaller."""
    if loss.policy_loss_type == "gspo":
        log_ratio = _mean(log_ratio, mask, rows=True)
    low = math.log1p(-loss.clip_eps_low) if loss.clip_eps_low < 1 else -math.inf
    above, below = log_ratio > math.log1p(loss.clip_eps_high), log_ratio < low
    return _mean((above & (advantages > 0)) | (below & (advantages < 0)), mask)


def _gated(loss, old, rollout, mask) -> tuple:
    """(keep or None, the part of the units that the gate drops or the clip bounds)."""
    low, high = loss.is_correction_threshold
    by_row = loss.is_correction_level == "seq"
    if loss.is_correction_gating == "ratio":
        drift = old - rollout
        drift = _mean(drift, mask, rows=True) if by_row else drift
        inside = (drift >= (math.log(low) if low > 0 else -math.inf)) & (drift <= math.log(high))
        return None, (~inside).float().mean() if by_row else _mean(~inside, mask)
    level = "seq_mean" if by_row else "token"
    keep = rollout_keep(old, rollout, mask, kind=loss.is_correction_gating, level=level, low=low, high=high)
    # a sequence without a token has no statistic, and is dropped
    return keep, (~keep.any(-1)).float().mean() if by_row else _mean(~keep, mask)


class PolicyLoss(torch.nn.Module):
    """PPO's clipped surrogate, or GSPO's, with OpenRLHF's corrections for a rollout by another engine.

    Args:
        clip_eps_low, clip_eps_high: bounds of the ratio, 1 − low and 1 + high.
        dual_clip: c > 1 of dual-clip PPO, or None.
        token_level_loss: a mean over tokens, or over sequences; GSPO's is always over sequences.
        policy_loss_type: "ppo" or "gspo".
        is_correction_level: "off", "token" or "seq": what the gate looks at.
        is_correction_mode: "mask" drops what is outside of the threshold, "clip" bounds the weight.
        is_correction_gating: "ratio", "binary_kl" or "tv".
        is_correction_threshold: (low, high).

    Raises:
        ValueError, AssertionError: as OpenRLHF's.
    """

    def __init__(
        self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True, policy_loss_type="ppo",
        is_correction_level="off", is_correction_mode="mask", is_correction_gating="ratio",
        is_correction_threshold=(0.5, 5.0),
    ) -> None:  # fmt: skip
        super().__init__()
        validate.one_of("policy_loss_type", policy_loss_type, ("ppo", "gspo"))
        validate.one_of("is_correction_level", is_correction_level, ("off", "token", "seq"))
        validate.one_of("is_correction_mode", is_correction_mode, ("mask", "clip"))
        validate.one_of("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv"))
        assert dual_clip is None or dual_clip > 1.0, f"dual_clip must be > 1.0, got {dual_clip}"
        divergence = is_correction_gating != "ratio"
        if is_correction_mode == "clip" and (is_correction_level == "seq" or divergence):
            validate.fail("is_correction_mode", 'mask, unless level is "token" and gating is "ratio"', "clip")
        if divergence and is_correction_level != "off" and is_correction_threshold[0] > 0:
            validate.fail("is_correction_threshold", "an upper bound only, low <= 0", repr(is_correction_threshold))
        self.clip_eps_low, self.clip_eps_high, self.dual_clip = clip_eps_low, clip_eps_high, dual_clip
        self.policy_loss_type = policy_loss_type
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.is_correction_level, self.is_correction_mode = is_correction_level, is_correction_mode
        self.is_correction_gating, self.is_correction_threshold = is_correction_gating, is_correction_threshold

    def forward(
        self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
        batch_num_tokens=None, global_batch_size=None,
    ) -> tuple:  # fmt: skip
        """The loss of a batch and what OpenRLHF logs of it.

        Args:
            log_probs: [B, T] float, with gradient. old_log_probs, advantages, rollout_log_probs: [B, T], without.
            action_mask: [B, T].

        Returns:
            (loss, clip_ratio, ppo_kl, vllm_kl or None, the part that the correction filters or None), each [].

        Raises:
            TypeError: a correction is on, and ``rollout_log_probs`` is None.
        """
        if self.is_correction_level != "off" and rollout_log_probs is None:
            wanted = f"a tensor with is_correction_level={self.is_correction_level!r}"
            validate.fail("rollout_log_probs", wanted, "None", TypeError)
        counts = _counts(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        mask = action_mask if action_mask is None or action_mask.dtype == torch.bool else action_mask != 0
        objective, old = _objective(self), old_log_probs
        correction = objective.correction
        keep = vllm_kl = filtered = None
        if correction is not None:
            keep, filtered = _gated(self, old_log_probs, rollout_log_probs, mask)
            vllm_kl = _mean(rollout_log_probs - old_log_probs, mask)
        elif self.is_correction_level != "off":
            old = rollout_log_probs  # GSPO's ratio is to the rollout
        out = objective(
            log_probs, old_logp=old, adv=advantages, mask=mask, keep=keep,
            rollout_logp=None if correction is None else rollout_log_probs, **counts,
        )  # fmt: skip
        now = log_probs.detach()
        if correction is None and self.dual_clip is None:
            clip_ratio = _or_nan(out.metrics["clip_low"] + out.metrics["clip_high"], out)
        else:  # those of the launch are of what it did, not of PPO's own clip
            clip_ratio = _clip_ratio(self, now - old, advantages, mask)
        ppo_kl = _mean(old_log_probs - now, mask)
        return _of_something(out, self.token_level_loss, counts), clip_ratio, ppo_kl, vllm_kl, filtered


def _or_nan(metric, out):
    return torch.where(out.metrics["tokens"] > 0, metric, math.nan)


class ValueLoss(torch.nn.Module):
    """The critic's loss, ½·max((V − R)², (V_clipped − R)²); ``clip_eps`` None: ½·(V − R)²."""

    def __init__(self, clip_eps=None, token_level_loss=True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self, values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None, global_batch_size=None
    ) -> torch.Tensor:
        """[B, T] each → []."""
        counts = _counts(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        out = value_loss(
            values, old_values, returns, action_mask, clip=self.clip_eps, reduce=_reduce(self.token_level_loss),
            like="openrlhf", **counts,
        )  # fmt: skip
        return _of_something(out, self.token_level_loss, counts)


def mask_unsupported(mask) -> str | None:
    """Why a mask is none of rlfast's, or None."""
    if mask is None or not mask.is_floating_point():
        return None
    if not validate.looked_at(mask):
        return "a float mask on a GPU may hold weights, and looking at it would synchronise"
    return None if bool(((mask == 0) | (mask == 1)).all()) else "the mask holds other numbers than 0 and 1"


def _tokens_unsupported(tokens: dict, constants: dict, mask, counts: tuple) -> str | None:
    """Why a loss over [B, T] runs as it is."""
    given = {name: x for name, x in (tokens | constants).items() if x is not None}
    reason = tensor_unsupported(**given, mask=mask)
    if reason is not None:
        return reason
    shapes = {name: tuple(x.shape) for name, x in given.items()} | ({} if mask is None else {"mask": tuple(mask.shape)})
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 2:
        return f"shapes are not one [B, T]: {shapes}"
    for name, x in constants.items():
        if x is not None and x.requires_grad:
            return f"{name} needs a gradient"
    for count in counts:
        if count is not None and not (isinstance(count, torch.Tensor) and not validate.looked_at(count)) and count <= 0:
            return f"a global count is {float(count):g}"
    return mask_unsupported(mask)


def aggregate_unsupported(
    loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None
):
    """Why OpenRLHF's own ``aggregate_loss`` runs."""
    return _tokens_unsupported({"loss": loss}, {}, loss_mask, (batch_num_tokens, global_batch_size))


def sft_unsupported(self, per_token_logps, loss_mask, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    """Why its own ``SFTLoss`` runs."""
    return _tokens_unsupported({"logps": per_token_logps}, {}, loss_mask, (batch_num_tokens, global_batch_size))


def gpt_unsupported(self, logits, labels):
    """Why its own ``GPTLMLoss`` runs."""
    if self.ring_attn_group is not None:
        return "the sequence is divided among the processes of ring attention"
    return tensor_unsupported(logits=logits, labels=labels)


def policy_unsupported(
    self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
    batch_num_tokens=None, global_batch_size=None,
):  # fmt: skip
    """Why its own ``PolicyLoss`` runs."""
    if self.policy_loss_type not in ("ppo", "gspo"):
        return f"rlfast has no policy_loss_type {self.policy_loss_type!r}"
    if self.is_correction_level != "off" and rollout_log_probs is None:
        return "a correction needs the log-probs of the rollout"
    constants = {"old_log_probs": old_log_probs, "advantages": advantages, "rollout_log_probs": rollout_log_probs}
    counts = batch_num_tokens, global_batch_size
    return refused(_objective, self) or _tokens_unsupported({"log_probs": log_probs}, constants, action_mask, counts)


def value_unsupported(
    self, values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None, global_batch_size=None
):
    """Why its own ``ValueLoss`` runs."""
    if self.clip_eps is not None and not 0 < self.clip_eps < math.inf:
        return f"clip_eps is {self.clip_eps}"
    constants = {"old_values": old_values, "returns": returns}
    return _tokens_unsupported({"values": values}, constants, action_mask, (batch_num_tokens, global_batch_size))
