"""The losses of pairs of ``openrlhf.models.loss``, as those of tokens are in ``openrlhf_losses.py``."""

from __future__ import annotations

import functools
import math

import torch

from rlfast.integrations.patching import refused, tensor_unsupported
from rlfast.preference_table import preference_loss
from rlfast.reward_losses import reward_loss


def _mean_of(loss, pairs) -> torch.Tensor:
    """The loss, NaN where there is no pair; rlfast has 0 there."""
    return loss if len(pairs) else loss + math.nan


def _bradley_terry(chosen_reward, reject_reward, margin=None) -> torch.Tensor:
    chosen, rejected = chosen_reward.reshape(-1), reject_reward.reshape(-1)
    margin = None if margin is None else margin.reshape(-1)
    return _mean_of(reward_loss("bradley_terry")(chosen, rejected, margin=margin).loss, chosen)


class PairWiseLoss(torch.nn.Module):
    """−log σ(r_chosen − r_rejected − margin), a mean over pairs."""

    def forward(self, chosen_reward, reject_reward, margin=None) -> torch.Tensor:
        """Tensors of one shape → []."""
        return _bradley_terry(chosen_reward, reject_reward, margin)


class LogExpLoss(torch.nn.Module):
    """log(1 + e^(r_rejected − r_chosen)), a mean over pairs, of any difference; the margin is not read."""

    def forward(self, chosen_reward, reject_reward, margin=None) -> torch.Tensor:
        """Tensors of one shape → []."""
        return _bradley_terry(chosen_reward, reject_reward)


@functools.cache
def _preference(row: str, **options):
    return preference_loss(row, like="openrlhf", **options)


def _objective(loss):
    """That of a ``DPOLoss``, by its attributes.

    Raises:
        ValueError: one of them is a number that rlfast does not take.
    """
    smoothing = {} if loss.ipo else {"label_smoothing": float(loss.label_smoothing)}
    return _preference("ipo" if loss.ipo else "cdpo", beta=float(loss.beta), **smoothing)


class DPOLoss(torch.nn.Module):
    """DPO, conservative DPO with ``label_smoothing``, or IPO of the summed log-probs."""

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo

    def forward(
        self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
    ) -> tuple:
        """[B] each → (loss [], chosen rewards [B], rejected rewards [B])."""
        out = _objective(self)(
            policy_chosen_logps, policy_rejected_logps, ref_chosen_logps=reference_chosen_logps,
            ref_rejected_logps=reference_rejected_logps, per_pair=True,
        )  # fmt: skip
        return _mean_of(out.loss, policy_chosen_logps), out.chosen_rewards, out.rejected_rewards


def pairs_unsupported(self, chosen_reward, reject_reward, margin=None):
    """Why its own loss of a reward model runs."""
    given = {"chosen_reward": chosen_reward, "reject_reward": reject_reward}
    if margin is not None:
        if not isinstance(margin, torch.Tensor) or margin.requires_grad:
            return "margin is no constant tensor"
        given["margin"] = margin
    return _one_shape(given) or tensor_unsupported(**given)


def dpo_unsupported(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
    """Why its own ``DPOLoss`` runs."""
    given = {
        "policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps, "reference_rejected_logps": reference_rejected_logps,
    }  # fmt: skip
    if policy_chosen_logps.dim() != 1:
        return f"log-probs are of shape {tuple(policy_chosen_logps.shape)}, not [B]"
    if reference_chosen_logps.requires_grad or reference_rejected_logps.requires_grad:
        return "the reference needs a gradient"
    return refused(_objective, self) or _one_shape(given) or tensor_unsupported(**given)


def _one_shape(given: dict) -> str | None:
    shapes = {name: tuple(x.shape) for name, x in given.items()}
    return f"shapes differ: {shapes}" if len(set(shapes.values())) > 1 else None
