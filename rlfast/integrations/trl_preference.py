"""The losses of TRL's DPOTrainer, KTOTrainer and RewardTrainer, by rlfast's kernels.

TRL has no seam between log-probs and loss: one method calls the models, computes the loss and writes the metrics. That
method runs as it is, and what its models return is looked at as it passes; the loss it returns, arithmetic on a few
numbers, is replaced by rlfast's, and with it everything that is differentiated. The metrics stay TRL's own.

    watched        the outputs of the policy and of the reference, in the order of the calls
    replaced_loss  the seam: TRL's method, then ``unsupported`` or the loss
    dpo, kto, reward

DPO's loss can be made by the policy's head, with its log-probs and its gradients in one (``PreferenceLoss.linear``),
if the reference's log-probs are there by then: the reference is called first, and answers TRL when TRL calls it.

    dpo_fused      that, or why not
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from rlfast import preference_linear
from rlfast.heads import MEMORY_BUDGET, Head
from rlfast.integrations.patching import Swap, reads, runs_as_it_is, say_once, takes, tensor_unsupported
from rlfast.integrations.trl_head import Fusion, fusing
from rlfast.ops.records import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS
from rlfast.preference import Part, PreferenceLoss
from rlfast.preference_inputs import PairGiven
from rlfast.preference_table import preference_loss
from rlfast.reward_losses import reward_loss
from rlfast.statistics import wpo_weights
from rlfast.unpaired import unpaired_loss

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
KTO_ROWS = {"kto": "kto", "apo_zero_unpaired": "apo_zero"}
MOST_PARTS = 6  # of one PreferenceLoss
# What TRL's head is asked for beside log-probs, in its order.
OUTPUTS = {"entropy": ENTROPY, "log_sum_sq_probs": LOG_SUM_SQ_PROBS, "mean_logits": MEAN_LOGITS, "is_top1": IS_TOP1}
NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")  # of a batch


class Seen(NamedTuple):
    """What the models returned within one call of a trainer's loss, in the order of the calls."""

    policy: list
    reference: list


@contextlib.contextmanager
def watched(trainer, model):
    """Within it, ``Seen``. A PEFT model is its own reference, and adds to both."""
    seen = Seen([], [])
    reference = getattr(trainer, "ref_model", None)
    if reference is None and not getattr(trainer, "precompute_ref_logps", True):
        reference = trainer.model
    modules = ((model, seen.policy), (reference, seen.reference))
    hooks = [
        module.register_forward_hook(lambda _, __, out, to=outputs: to.append(out))
        for module, outputs in modules
        if module is not None
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def replaced_loss(original, ours: Callable, unsupported: Callable, fused: Callable):
    """A trainer's loss method whose loss is ``ours(trainer, seen, inputs)``, unless ``unsupported`` has a reason.

    Within ``fused(trainer, inputs)`` the head may make the loss.
    """

    @functools.wraps(original)
    def compute_loss(self, model, inputs, return_outputs=False, *args, **kwargs):
        with watched(self, model) as seen, fused(self, inputs) as fusion:
            theirs = original(self, model, inputs, return_outputs, *args, **kwargs)
        reason = unsupported(self, seen)
        if reason is not None:
            runs_as_it_is(original, reason)
            return theirs
        if fusion is not None and fusion.loss is not None:
            loss = _with_router(self, fusion.loss, _scored(seen.policy)[0])
        else:
            loss = ours(self, seen, inputs)
        return (loss, theirs[1]) if return_outputs else loss

    return compute_loss


def _scored(outputs: list) -> list:
    """Those of the fused head; the deprecated ``return_outputs`` adds one with logits alone."""
    return [out for out in outputs if getattr(out, "log_probs", None) is not None]


def _scores_unsupported(trainer, seen: Seen, calls: int) -> str | None:
    """Of a trainer that calls the policy ``calls`` times, the reference too unless its log-probs are precomputed."""
    policy, reference = _scored(seen.policy), _scored(seen.reference)
    if len(policy) < calls or not (trainer.precompute_ref_logps or reference):
        return "its models were not called as rlfast knows"
    return tensor_unsupported(log_probs=policy[calls - 1].log_probs)


def _with_router(trainer, loss, out):
    """And the load-balancing loss of a mixture of experts."""
    return loss + trainer.router_aux_loss_coef * out.aux_loss if trainer.aux_loss_enabled else loss


def _tokens(out, mask):
    """Log-probs [B, T] of tokens 1 to T; prompt-learning PEFT puts virtual tokens before them."""
    return out.log_probs[:, 1 - mask.shape[1] :]


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
    return _scores_unsupported(trainer, seen, 1)


def dpo(trainer, seen: Seen, inputs):
    """The loss of a batch whose first half are the chosen responses."""
    options, out, mask = DpoOptions.of(trainer), _scored(seen.policy)[0], inputs["completion_mask"]
    objectives, likelihood = dpo_objectives(options)
    logps, counted = _tokens(out, mask), mask[:, 1:]
    if trainer.precompute_ref_logps:
        ref = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
    else:
        ref = _tokens(_scored(seen.reference)[-1], mask)
    weights = None
    if trainer.use_weighting:
        of = wpo_weights(logps, out.log_sum_sq_probs[:, -counted.shape[1] :], counted)
        weights = torch.mul(*of.chunk(2))
    if ref.dim() == 1 or any(objective.sort or _divides(objective) for objective in objectives):
        # TRL divides by a length that counts a first token too, and by 1 where a completion was cut off
        given = {"logps": _sums(logps, counted, options.tail), "lengths": mask.sum(1).clamp(min=1)}
        given["ref_logps"] = ref if ref.dim() == 1 else _sums(ref, counted, options.tail)
        objectives, _ = dpo_objectives(options._replace(tail=None))  # the sums have it
    else:
        given = {"logps": logps, "ref_logps": ref, "mask": counted}
    loss = sum(objective.rows(**given, weights=weights).loss for objective in objectives)
    if likelihood is not None:
        loss = loss - likelihood * logps.chunk(2)[0].sum() / counted.chunk(2)[0].sum()
    return _with_router(trainer, loss, out)


def _divides(objective: PreferenceLoss) -> bool:
    return any(part.mean for part in objective.parts)


def _sums(logps, counted=None, tail: float | None = None):
    """Σ over each response, its tokens beyond the length of the pair's shorter one times ``tail``; as the kernels do
    it, in float64 and then float32.
    """
    if tail is not None:
        shorter = torch.minimum(*counted.sum(1).chunk(2)).repeat(2)
        logps = torch.where(counted.cumsum(1) > shorter[:, None], tail * logps, logps)
    return logps.sum(1, dtype=torch.float64).float()


class DpoFusion(Fusion):
    """The loss of a batch whose first half are the chosen responses."""

    def __init__(self, trainer, inputs, objective: PreferenceLoss, ref):
        super().__init__(inputs["completion_mask"][:, 1:] != 0)
        self.objective, self.ref = objective, self.packed(ref)

    def head(self, hidden, weight, bias, targets, outputs, **options) -> tuple:
        """See ``Fusion.head``."""
        head = Head(weight, bias, *(options[k] for k in ("temperature", "softcap", "logit_scale")), MEMORY_BUDGET)
        tokens = preference_linear.Tokens(hidden, targets, self.ref, None, self.cu_seqlens)
        bits = sum(OUTPUTS[name] for name in outputs)
        nothing = PairGiven(None, None, None, None, None)
        out, found = preference_linear.run(self.objective, head, (tokens,), nothing, None, 1.0, False, bits)
        self.loss = out.loss
        return found.logp, found.entropy, found.log_sum_sq_probs, found.mean_logits, found.is_top1


def dpo_not_fused(trainer) -> str | None:
    """Why the loss is not made from hidden states."""
    options = DpoOptions.of(trainer)
    if trainer.use_weighting:
        return "use_weighting weighs pairs by their log-probs"
    objectives, likelihood = dpo_objectives(options)
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
    return None


@contextlib.contextmanager
def dpo_fused(trainer, inputs):
    """Within it, the policy's head makes the loss; the fusion, or None where TRL's call gives the log-probs."""
    known = not any(x not in DPO_ROWS and x != "sft" for x in trainer.loss_types)
    known = known and trainer.f_divergence_type in DIVERGENCES
    if not (known and trainer.model.training and torch.is_grad_enabled()):
        yield None
        return
    reason = dpo_not_fused(trainer)
    if reason is not None:
        say_once(f"the gradients of TRL's DPO are not made with its log-probs: {reason}", logging.INFO)
        yield None
        return
    reference = trainer.ref_model
    if trainer.precompute_ref_logps:
        ref = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
    else:
        answer = _answer(trainer, inputs)
        ref, trainer.ref_model = _tokens(answer, inputs["completion_mask"]), lambda **_: answer
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


@contextlib.contextmanager
def not_fused(trainer, inputs):
    """Within it, the loss is made from log-probs."""
    yield None


def kto_unsupported(trainer, seen: Seen) -> str | None:
    """Why TRL's own loss stands."""
    if trainer.loss_type not in KTO_ROWS:
        return f"rlfast has no loss_type {trainer.loss_type!r}"
    return _scores_unsupported(trainer, seen, 1 + bool(trainer.calculate_KL))


def kto(trainer, seen: Seen, inputs):
    """The loss of a batch of single responses. The policy has scored the mismatched ones before, if they are needed."""
    out = _scored(seen.policy)[int(bool(trainer.calculate_KL))]
    mask = inputs["completion_mask"].to(out.log_probs.device)
    logps = _tokens(out, mask)
    desirable = torch.as_tensor(inputs["label"], dtype=torch.bool, device=logps.device)
    row = unpaired_loss(KTO_ROWS[trainer.loss_type], like="trl", beta=float(trainer.beta))
    weights = torch.where(desirable, float(trainer.desirable_weight), float(trainer.undesirable_weight))
    given = {"weights": weights}
    if "shared" in row.needs:  # z over all ranks, which TRL has just written down
        given["shared"] = trainer._metrics["train" if trainer.model.training else "eval"]["kl"][-1]
    if trainer.precompute_ref_logps:
        given |= {"logps": _sums(logps), "ref_logps": inputs["ref_logps"].to(logps.device)}
    else:
        given |= {"logps": logps, "ref_logps": _tokens(_scored(seen.reference)[-1], mask), "mask": mask[:, 1:]}
    logps = given.pop("logps")
    return _with_router(trainer, row(logps, desirable, **given).loss, out)


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
        original = vars(owner).get(seam.method) if owner is not None else None
        if not takes(original, seam.parameters, name, strange):
            continue
        missing = [what for what in seam.knows if not reads(original.__code__, what)]
        if missing:
            strange.append(f"{name} does not read {', '.join(missing)}")
            continue
        ours = replaced_loss(original, seam.ours, seam.unsupported, seam.fused)
        found.append(Swap(original, ours, owner=owner, name=seam.method))
    return found
