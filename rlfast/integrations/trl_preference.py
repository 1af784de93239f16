"""The losses of TRL's DPOTrainer, KTOTrainer and RewardTrainer, by rlfast's kernels.

TRL has no seam between log-probs and loss: one method calls the models, computes the loss and writes the metrics. That
method runs as it is, and what its models return is looked at as it passes; the loss it returns, arithmetic on a few
numbers, is replaced by rlfast's, and with it everything that is differentiated. The metrics stay TRL's own.

    watched        the outputs of the policy and of the reference, in the order of the calls
    replaced_loss  the seam: TRL's method, then ``unsupported`` or the loss
    kto, reward    their losses; DPO's is in ``trl_dpo.py``
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlfast.integrations.patching import Swap, original_of, reads, refused, runs_as_it_is, takes, tensor_unsupported
from rlfast.integrations.trl_dpo import dpo, dpo_fused, dpo_unsupported
from rlfast.integrations.trl_outputs import Seen, scored, scores_unsupported, sums, tokens, watched, with_router
from rlfast.reward_losses import reward_loss
from rlfast.unpaired import unpaired_loss

KTO_ROWS = {"kto": "kto", "apo_zero_unpaired": "apo_zero"}


def replaced_loss(original, ours: Callable, unsupported: Callable, fused: Callable):
    """A trainer's loss method whose loss is ``ours(trainer, seen, inputs)``, unless ``unsupported`` has a reason.

    Within ``fused(trainer, model, inputs)`` the head may make the loss.
    """

    @functools.wraps(original)
    def compute_loss(self, model, inputs, return_outputs=False, *args, **kwargs):
        with watched(self, model) as seen, fused(self, model, inputs) as fusion:
            theirs = original(self, model, inputs, return_outputs, *args, **kwargs)
        reason = unsupported(self, seen)
        if reason is not None:
            runs_as_it_is(original, reason)
            return theirs
        if fusion is not None and fusion.loss is not None:
            loss = fusion.in_place_of(theirs[0] if return_outputs else theirs)
        else:
            loss = ours(self, seen, inputs)
        return (loss, theirs[1]) if return_outputs else loss

    return compute_loss


@contextlib.contextmanager
def not_fused(trainer, model, inputs):
    """Within it, the loss is made from log-probs."""
    yield None


def _kto_row(trainer):
    return unpaired_loss(KTO_ROWS[trainer.loss_type], like="trl", beta=float(trainer.beta))


def kto_unsupported(trainer, seen: Seen) -> str | None:
    """Why TRL's own loss stands."""
    if trainer.loss_type not in KTO_ROWS:
        return f"rlfast has no loss_type {trainer.loss_type!r}"
    return refused(_kto_row, trainer) or scores_unsupported(trainer, seen, 1 + bool(trainer.calculate_KL))


def kto(trainer, seen: Seen, inputs):
    """The loss of a batch of single responses. The policy has scored the mismatched ones before, if they are needed."""
    out = scored(seen.policy)[int(bool(trainer.calculate_KL))]
    mask = inputs["completion_mask"].to(out.log_probs.device)
    logps = tokens(out, mask)
    desirable = torch.as_tensor(inputs["label"], dtype=torch.bool, device=logps.device)
    row = _kto_row(trainer)
    weights = torch.where(desirable, float(trainer.desirable_weight), float(trainer.undesirable_weight))
    given = {"weights": weights}
    if "shared" in row.needs:  # z over all ranks, which TRL has just written down
        given["shared"] = trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1]
    if trainer.precompute_ref_logps:
        given |= {"logps": sums(logps), "ref_logps": inputs["ref_logps"].to(logps.device)}
    else:
        given |= {"logps": logps, "ref_logps": tokens(scored(seen.reference)[-1], mask), "mask": mask[:, 1:]}
    logps = given.pop("logps")
    return with_router(trainer, row(logps, desirable, **given).loss, out)


def reward_unsupported(trainer, seen: Seen) -> str | None:
    """Why TRL's own loss stands."""
    if len(seen.policy) != 1:
        return "its model was not called as rlfast knows"
    return tensor_unsupported(logits=seen.policy[0].logits)


def reward(trainer, seen: Seen, inputs):
    """The loss of a batch of rewards whose first half are of the chosen responses."""
    chosen, rejected = seen.policy[0].logits.squeeze(-1).chunk(2)
    row = reward_loss("bradley_terry", centring=float(trainer.args.center_rewards_coefficient or 0.0))
    return row(chosen, rejected, margin=inputs.get("margin")).loss


class Seam(NamedTuple):
    """A method of a TRL trainer whose loss is replaced."""

    module: str
    trainer: str
    method: str
    parameters: tuple[str, ...]
    knows: tuple[str, ...]  # names that TRL's method must read, or its loss is another one than rlfast's
    ours: Callable
    unsupported: Callable
    fused: Callable = not_fused


_FORWARD = ("log_probs", "precompute_ref_logps", "ref_model", "aux_loss_enabled", "router_aux_loss_coef", "beta")
SEAMS = (
    Seam(
        "dpo_trainer", "DPOTrainer", "_compute_loss", ("self", "model", "inputs", "return_outputs"),
        (*_FORWARD, "loss_types", "loss_weights", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef",
         "discopop_tau", "ld_alpha", "use_weighting", "log_sum_sq_probs"),
        dpo, dpo_unsupported, dpo_fused,
    ),
    Seam(
        "kto_trainer", "KTOTrainer", "_compute_loss", ("self", "model", "inputs", "return_outputs"),
        (*_FORWARD, "loss_type", "calculate_KL", "desirable_weight", "undesirable_weight", "_metrics"),
        kto, kto_unsupported,
    ),
    Seam(
        "reward_trainer", "RewardTrainer", "compute_loss",
        ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
        ("logits", "center_rewards_coefficient", "logsigmoid"),
        reward, reward_unsupported,
    ),
)  # fmt: skip


def swaps(strange: list[str]) -> list[Swap]:
    """The methods to swap; ``strange`` gets the reason where TRL's own is not as known."""
    found = []
    for seam in SEAMS:
        name = f"trl.trainer.{seam.module}.{seam.trainer}.{seam.method}"
        owner = getattr(importlib.import_module(f"trl.trainer.{seam.module}"), seam.trainer, None)
        original = original_of(owner, seam.method) if owner is not None else None
        if not takes(original, seam.parameters, name, strange):
            continue
        missing = [what for what in seam.knows if not reads(original.__code__, what)]
        if missing:
            strange.append(f"{name} does not read {', '.join(missing)}")
            continue
        ours = replaced_loss(original, seam.ours, seam.unsupported, seam.fused)
        found.append(Swap(original, ours, owner=owner, name=seam.method))
    return found
