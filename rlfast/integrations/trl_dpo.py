"""The loss of TRL's DPOTrainer.

dpo            from what its models returned
dpo_fused      made by the policy's head, with its log-probs and its gradients in one (``PreferenceLoss.linear``), if
               the reference's log-probs are there by then: it is called first, and answers TRL when TRL calls it
"""

from __future__ import annotations

import contextlib
import functools
import logging
from dataclasses import replace
from typing import NamedTuple

import torch

from rlfast import preference_linear
from rlfast.heads import Head
from rlfast.integrations.patching import refused, say_once
from rlfast.integrations.trl_head import Fusion, fusing
from rlfast.integrations.trl_outputs import Seen, scored, scores_unsupported, sums, tokens, with_router
from rlfast.ops.records import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS
from rlfast.preference import Part, PreferenceLoss
from rlfast.preference_inputs import PairGiven
from rlfast.preference_table import preference_loss
from rlfast.statistics import wpo_weights

# TRL's loss_type -> our row. "sft" is the likelihood beside it.
DPO_ROWS = {
    "sigmoid": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo_pair",
    "nca_pair": "nca_pair",
    "robust": "robust",
    "bco_pair": "bco_pair",
    "sppo_hard": "sppo_hard",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "discopop": "discopop",
    "sigmoid_norm": "dpo_norm",
}
# The options that a loss_type reads; TRL's sigmoid does not read label_smoothing.
READS = dict.fromkeys(("exo_pair", "robust", "aot", "aot_unpaired"), ("label_smoothing",)) | {"discopop": ("tau",)}
DIVERGENCES = {
    "reverse_kl": "log_ratio",
    "forward_kl": "forward_kl",
    "js_divergence": "jensen_shannon",
    "alpha_divergence": "alpha_divergence",
}
MEMORY_BUDGET = None  # of the logits: that of ``PreferenceLoss.linear``
MOST_PARTS = 6  # of one PreferenceLoss
# What TRL's head is asked for beside log-probs, in its order.
OUTPUTS = {"entropy": ENTROPY, "log_sum_sq_probs": LOG_SUM_SQ_PROBS, "mean_logits": MEAN_LOGITS, "is_top1": IS_TOP1}
NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")  # of a batch


class DpoOptions(NamedTuple):
    """What a DPOTrainer's loss depends on, beside tensors."""

    types: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    label_smoothing: float
    divergence: str
    alpha: float
    tau: float
    tail: float | None

    @classmethod
    def of(cls, trainer) -> DpoOptions:
        return cls(
            tuple(trainer.loss_types), tuple(map(float, trainer.loss_weights)), float(trainer.beta),
            float(trainer.label_smoothing), trainer.f_divergence_type, float(trainer.f_alpha_divergence_coef),
            float(trainer.args.discopop_tau), trainer.ld_alpha,
        )  # fmt: skip

    def row(self, loss_type: str, weight: float) -> PreferenceLoss:
        """One of the losses, as TRL has it."""
        options = {"beta": self.beta, "tail": 1.0 if self.tail is None else self.tail}
        options |= {name: getattr(self, name) for name in READS.get(loss_type, ())}
        row = preference_loss(DPO_ROWS[loss_type], like="trl", **options)
        return replace(row, parts=tuple(self._part(part, weight) for part in row.parts))

    def _part(self, part: Part, weight: float) -> Part:
        score, hyper = DIVERGENCES[self.divergence], {}
        if score == "alpha_divergence":  # at α = 1 it is the reverse KL, and TRL takes what is near for it
            score, hyper = ("log_ratio", {}) if abs(self.alpha - 1) < 1e-6 else (score, {"alpha": self.alpha})
        return replace(part, score=score, score_hyper=hyper, weight=weight)


@functools.lru_cache(maxsize=64)
def dpo_objectives(options: DpoOptions) -> tuple[tuple[PreferenceLoss, ...], float | None]:
    """(losses to add up, one for each way of sorting; the weight of the chosen responses' likelihood, if any)."""
    pairs = list(zip(options.types, options.weights, strict=True))
    rows = [options.row(loss_type, weight) for loss_type, weight in pairs if loss_type != "sft"]
    objectives = []
    for sort in dict.fromkeys(row.sort for row in rows):
        alike = [row for row in rows if row.sort == sort]
        parts = [part for row in alike for part in row.parts]
        for start in range(0, len(parts), MOST_PARTS):
            objectives.append(replace(alike[0], parts=tuple(parts[start : start + MOST_PARTS]), name="TRL's DPO"))
    likelihoods = [weight for loss_type, weight in pairs if loss_type == "sft"]
    return tuple(objectives), sum(likelihoods) if likelihoods else None


def dpo_unsupported(trainer, seen: Seen) -> str | None:
    """Why TRL's own loss stands."""
    unknown = [x for x in trainer.loss_types if x not in DPO_ROWS and x != "sft"]
    if unknown:
        return f"rlfast has no loss_type {', '.join(map(repr, unknown))}"
    if trainer.f_divergence_type not in DIVERGENCES:
        return f"rlfast has no f_divergence_type {trainer.f_divergence_type!r}"
    return refused(dpo_objectives, DpoOptions.of(trainer)) or scores_unsupported(trainer, seen, 1)


def dpo(trainer, seen: Seen, inputs):
    """The loss of a batch whose first half are the chosen responses."""
    options, out, mask = DpoOptions.of(trainer), scored(seen.policy)[0], inputs["completion_mask"]
    objectives, likelihood = dpo_objectives(options)
    logps, counted = tokens(out, mask), mask[:, 1:]
    if trainer.precompute_ref_logps:
        ref = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
    else:
        ref = tokens(scored(seen.reference)[-1], mask)
    weights = None
    if trainer.use_weighting:
        of = wpo_weights(logps, out.log_sum_sq_probs[:, -counted.shape[1] :], counted)
        weights = torch.mul(*of.chunk(2))
    if ref.dim() == 1 or any(objective.sort or _divides(objective) for objective in objectives):
        # TRL divides by a length that counts a first token too, and by 1 where a completion was cut off
        given = {"logps": sums(logps, counted, options.tail), "lengths": mask.sum(1).clamp(min=1)}
        given["ref_logps"] = ref if ref.dim() == 1 else sums(ref, counted, options.tail)
        objectives, _ = dpo_objectives(options._replace(tail=None))  # the sums have it
    else:
        given = {"logps": logps, "ref_logps": ref, "mask": counted}
    loss = sum(objective.rows(**given, weights=weights).loss for objective in objectives)
    if likelihood is not None:
        loss = loss - likelihood * logps.chunk(2)[0].sum() / counted.chunk(2)[0].sum()
    return with_router(trainer, loss, out)


def _divides(objective: PreferenceLoss) -> bool:
    return any(part.mean for part in objective.parts)


class DpoFusion(Fusion):
    """The loss of a batch whose first half are the chosen responses."""

    def __init__(self, trainer, inputs, objective: PreferenceLoss, ref):
        super().__init__(inputs["completion_mask"][:, 1:] != 0)
        self.objective, self.ref = objective, self._first(ref) if ref.dim() == 1 else self.packed(ref)

    def _first(self, sums):
        """Sums [B] as those of each response's first token."""
        at = torch.zeros_like(self.scored, dtype=sums.dtype)
        return at.scatter(1, self.scored.int().argmax(1, keepdim=True), sums.unsqueeze(1))[self.scored]

    def head(self, hidden, weight, bias, targets, outputs, **options) -> tuple:
        """See ``Fusion.head``."""
        said = (options[k] for k in ("temperature", "softcap", "logit_scale"))
        head = Head(weight, bias, *said, MEMORY_BUDGET, process_group=options["process_group"])
        tokens = preference_linear.Tokens(hidden, targets, self.ref, None, self.cu_seqlens)
        bits = sum(OUTPUTS[name] for name in outputs)
        nothing = PairGiven(None, None, None, None, None)
        out, found = preference_linear.run(self.objective, head, (tokens,), nothing, None, 1.0, False, bits)
        return self.made(out.loss, found.logp), found.entropy, found.log_sum_sq_probs, found.mean_logits, found.is_top1


def dpo_not_fused(trainer, model) -> str | None:
    """Why the loss is not made from hidden states."""
    options = DpoOptions.of(trainer)
    if any(x not in DPO_ROWS and x != "sft" for x in trainer.loss_types) or options.divergence not in DIVERGENCES:
        return "rlfast has not got it"
    if trainer.use_weighting:
        return "use_weighting weighs pairs by their log-probs"
    try:
        objectives, likelihood = dpo_objectives(options)
    except ValueError as error:
        return str(error)
    if likelihood is not None:
        return "the likelihood of the chosen responses is TRL's own"
    if len(objectives) > 1 or objectives[0].sort:
        return "it sorts the whole batch"
    if _divides(objectives[0]):
        return "it divides by lengths that count a first token"
    if trainer.precompute_ref_logps and options.tail is not None:
        return "the reference's sums have ld_alpha in them"
    if trainer.ref_model is None and not trainer.precompute_ref_logps:
        return "the model is its own reference"
    if isinstance(model, torch._dynamo.OptimizedModule):
        return "the model is compiled, its head with it"
    return None


@contextlib.contextmanager
def dpo_fused(trainer, model, inputs):
    """Within it, the policy's head makes the loss; the fusion, or None where TRL's call gives the log-probs."""
    if not (trainer.model.training and torch.is_grad_enabled()):
        yield None
        return
    reason = dpo_not_fused(trainer, model)
    if reason is not None:
        say_once(f"the gradients of TRL's DPO are not made with its log-probs: {reason}", logging.INFO)
        yield None
        return
    reference = trainer.ref_model
    if trainer.precompute_ref_logps:
        ref = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
    else:
        answer = _answer(trainer, inputs)
        ref, trainer.ref_model = tokens(answer, inputs["completion_mask"]), lambda **_: answer
    try:
        with fusing(DpoFusion(trainer, inputs, dpo_objectives(DpoOptions.of(trainer))[0][0], ref)) as fusion:
            yield fusion
    finally:
        trainer.ref_model = reference


def _answer(trainer, inputs):
    """What the reference says of a batch, as TRL asks it."""
    given = {k: x for k, x in inputs.items() if k not in NOT_OF_THE_MODEL} | {"use_cache": False}
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    with torch.no_grad():
        return trainer.ref_model(**given, labels=labels, fused_lm_head=True)
