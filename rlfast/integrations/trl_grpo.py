"""The loss of TRL's GRPOTrainer straight from hidden states: its gradients are made with its log-probs.

TRL's method runs as it is. It calls the model once, and within it the fused head, where the hidden states, the head,
the batch and the options are all known. There ``Loss.linear`` gives the log-probs and entropies that TRL goes on with,
without gradient, and a loss whose gradient is that of TRL's. The number that comes back, and the metrics, are TRL's.

    unsupported   why TRL's own gradient stands
    loss_of       the objective that a trainer's options name
    fused_loss    the seam
"""

from __future__ import annotations

import functools
import importlib

import torch

from rlfast.integrations.patching import Swap, original_of, reads, runs_as_it_is, takes
from rlfast.integrations.trl_head import Fusion, fusing
from rlfast.loss_table import loss
from rlfast.losses import Loss
from rlfast.rollout import training

# TRL's loss_type -> the surrogate's own options, by the names of the trainer's and its config's.
CLIPPED = {"eps_low": "epsilon_low", "eps_high": "epsilon_high"}
TYPES = {
    "grpo": CLIPPED, "bnpo": CLIPPED, "dr_grpo": CLIPPED, "dapo": CLIPPED, "luspo": CLIPPED,
    "cispo": {"cap": "epsilon_high"},
    "sapo": {"tau_pos": "sapo_temperature_pos", "tau_neg": "sapo_temperature_neg"},
    "vespo": {"k_pos": "vespo_k_pos", "lambda_pos": "vespo_lambda_pos", "k_neg": "vespo_k_neg",
              "lambda_neg": "vespo_lambda_neg"},
}  # fmt: skip
BY_ITEMS = ("cispo", "dapo", "vespo")  # divided by the tokens of an accumulation window


def unsupported(trainer, model, inputs, forward) -> str | None:
    """Why the loss is not made from hidden states; ``forward`` is TRL's own method that calls the model."""
    if not (trainer.model.training and torch.is_grad_enabled()):
        return "the model is not in training mode"
    if isinstance(model, torch._dynamo.OptimizedModule):
        return "the model is compiled, its head with it"
    if trainer.loss_type not in TYPES:
        return f"rlfast has no loss_type {trainer.loss_type!r}"
    if trainer.importance_sampling_level not in ("token", "sequence"):
        return f"rlfast has no importance_sampling_level {trainer.importance_sampling_level!r}"
    if trainer.top_entropy_quantile < 1.0:
        return "top_entropy_quantile chooses tokens by the entropies of the whole batch"
    if trainer.loss_type == "vespo" and trainer.importance_sampling_level != "token":
        return "rlfast's vespo weighs the KL by the token's ratio"
    if trainer.loss_type == "vespo" and inputs.get("importance_sampling_ratio") is not None:
        return "rlfast's vespo takes log-probs of the sampler, not a ratio"
    if type(trainer)._get_per_token_logps_and_entropies is not forward:
        return "another class calls the model"
    if training.active():
        return "a bitwise step has the rollout's own head"
    return None


def _ratio(trainer, inputs):
    """The sampler's importance ratio that the surrogate is multiplied by; None where there is none."""
    corrected = trainer.use_vllm and trainer.vllm_importance_sampling_correction and trainer.loss_type != "vespo"
    return inputs["importance_sampling_ratio"] if corrected else None


def loss_of(trainer) -> Loss:
    """The objective of a trainer's options."""
    kind, args = trainer.loss_type, trainer.args
    options = {ours: getattr(trainer, theirs, getattr(args, theirs, None)) for ours, theirs in TYPES[kind].items()} | {
        "beta": trainer.beta
    }
    if kind != "vespo":
        options["unit"] = "token" if trainer.importance_sampling_level == "token" else "seq_mean"
    if not args.use_bias_correction_kl:
        options["kl_ratio"] = None
    if kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo") and args.delta is not None:
        options["delta"] = args.delta
    if trainer.off_policy_mask_threshold is not None:
        options["off_policy"] = trainer.off_policy_mask_threshold
    if trainer._entropy_bonus_enabled:
        quiet = trainer.use_adaptive_entropy and trainer._last_world_entropy > args.entropy_target
        options["entropy_coef"] = 0.0 if quiet else trainer.entropy_coef
    return loss(kind, like="trl", **options)


class GrpoFusion(Fusion):
    """The loss of one batch."""

    def __init__(self, trainer, inputs):
        super().__init__(inputs["completion_mask"].bool())
        self.trainer, self.inputs, self.objective = trainer, inputs, loss_of(trainer)

    def head(self, hidden, weight, bias, targets, outputs, **options) -> tuple:
        """See ``Fusion.head``; TRL asks for log-probs and entropies."""
        trainer, inputs = self.trainer, self.inputs
        given = {
            "adv": inputs["advantages"], "old_logp": inputs.get("old_per_token_logps"),
            "ref_logp": inputs["ref_per_token_logps"] if trainer.beta != 0.0 else None,
            "mask": inputs.get("tool_mask"), "weights": _ratio(trainer, inputs),
        }  # fmt: skip
        if trainer.off_policy_mask_threshold is not None:
            given["rollout_logp"] = inputs.get("sampling_per_token_logps")
        given = {k: self.packed(x) for k, x in given.items()}
        call = {"accumulation": trainer.current_gradient_accumulation_steps}
        if trainer.loss_type == "dr_grpo":
            call["max_len"] = trainer.max_completion_length
        if trainer.loss_type in BY_ITEMS:
            items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
            call["num_items"] = items / trainer.args.steps_per_generation
        out = self.objective.linear(
            hidden, weight, targets, bias, cu_seqlens=self.cu_seqlens, entropy=True, **given, **call, **options
        )
        return self.made(out.loss, out.logp), out.entropy, None, None, None


def fused_loss(original, forward):
    """TRL's ``_compute_loss`` with the gradient of ``Loss.linear``."""

    @functools.wraps(original)
    def compute_loss(self, model, inputs):
        reason, fusion = unsupported(self, model, inputs, forward), None
        if reason is None:
            try:
                fusion = GrpoFusion(self, inputs)
            except ValueError as error:  # a number that TRL takes and ``rlfast.limits`` does not
                reason = str(error)
        if fusion is None:
            if torch.is_grad_enabled():
                runs_as_it_is(original, reason)
            return original(self, model, inputs)
        with fusing(fusion):
            theirs = original(self, model, inputs)
        if fusion.loss is None:
            runs_as_it_is(original, "its model has not called the fused head as rlfast knows")
            return theirs
        return fusion.in_place_of(theirs)

    return compute_loss


KNOWS = (
    "loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "delta", "beta", "use_bias_correction_kl",
    "off_policy_mask_threshold", "top_entropy_quantile", "_entropy_bonus_enabled", "use_adaptive_entropy",
    "_last_world_entropy", "entropy_target", "entropy_coef", "max_completion_length", "steps_per_generation",
    "current_gradient_accumulation_steps", "vllm_importance_sampling_correction", "sapo_temperature_pos",
    "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "num_processes",
)  # fmt: skip


def swaps(strange: list[str]) -> list[Swap]:
    """The method to swap; ``strange`` gets the reason where TRL's own is not as known."""
    owner = getattr(importlib.import_module("trl.trainer.grpo_trainer"), "GRPOTrainer", None)
    name = "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss"
    original = original_of(owner, "_compute_loss") if owner is not None else None
    if not takes(original, ("self", "model", "inputs"), name, strange):
        return []
    missing = [what for what in KNOWS if not reads(original.__code__, what)]
    if missing:
        strange.append(f"{name} does not read {', '.join(missing)}")
        return []
    ours = fused_loss(original, vars(owner)["_get_per_token_logps_and_entropies"])
    return [Swap(original, ours, owner=owner, name="_compute_loss")]
