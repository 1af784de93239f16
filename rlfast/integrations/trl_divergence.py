"""The divergences of TRL's distillation trainers, under TRL's names and signatures, on rlfast's kernels.

chunked_divergence     ``ChunkedDivergenceFunction.apply``, which DistillationTrainer calls, from hidden states
generalized_jsd_loss   of GKDTrainer, from logits; GOLDTrainer's and IWOPDTrainer's have two more arguments
swaps, loaded          what ``rlfast.patch("trl")`` puts in place
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys

import torch

from rlfast import validate
from rlfast.divergences import divergence, linear_divergence
from rlfast.integrations.patching import (
    Swap,
    or_original,
    original_of,
    static_swap,
    takes,
    tensor_unsupported,
)
from rlfast.integrations.trl_head import compute_dtype, counted_rows_only, whole

REDUCTIONS = ("batchmean", "sum", "mean")


def chunked_divergence(
    student_hidden,
    student_weight,
    student_bias,
    teacher_hidden,
    teacher_weight,
    teacher_bias,
    beta,
    temperature=1.0,
    student_logit_scale=1.0,
    student_final_logit_softcapping=None,
    teacher_logit_scale=1.0,
    teacher_final_logit_softcapping=None,
):
    """``ChunkedDivergenceFunction.apply``: the divergence of two heads' distributions, logits never in full.

        beta = 0  KL(T‖S);   beta = 1  KL(S‖T);   else the JSD of M = (1 − beta)·S + beta·T

    Args:
        student_hidden: [N, D] float. student_weight: [V, D]. student_bias: [V] or None.
        teacher_hidden: [N, E] float. teacher_weight: [V, E]. teacher_bias: [V] or None. Without gradient.
        beta: a float in [0, 1].

    Returns:
        (divergence, entropy of the student), each [N] float32; the first is differentiable in the student's tensors.
        Each projection runs in autocast's dtype if that is on, else in its hidden's, with float32 sums.
    """
    heads = (student_weight, student_bias), (teacher_weight, teacher_bias)
    with whole(*heads) as group:
        student = _in_its_dtype(student_hidden, *heads[0])
        teacher = _in_its_dtype(teacher_hidden, *heads[1])
        common = torch.promote_types(student[0].dtype, teacher[0].dtype)
        hidden, weight, bias = (None if x is None else x.to(common) for x in student)
        # a frozen parameter as it is: whoever keeps another tensor for the backward keeps it whole
        teacher = (x.detach() if x is not None and x.requires_grad else x for x in teacher)
        ref_hidden, ref_weight, ref_bias = (None if x is None else x.to(common) for x in teacher)
        with torch.autocast(student_hidden.device.type, enabled=False):
            out = linear_divergence(
                hidden, weight, ref_hidden, ref_weight, bias, ref_bias, kind="jsd", beta=beta, temperature=temperature,
                softcap=student_final_logit_softcapping, ref_softcap=teacher_final_logit_softcapping,
                logit_scale=student_logit_scale, ref_logit_scale=teacher_logit_scale, outputs=("entropy",),
                process_group=group,
            )  # fmt: skip
    return out.value.float(), out.entropy.detach().float()


class ChunkedDivergenceFunction:
    """TRL's name of ``chunked_divergence``."""

    apply = staticmethod(chunked_divergence)


def generalized_jsd_loss(
    student_logits,
    teacher_logits,
    labels=None,
    beta=0.5,
    temperature=1.0,
    reduction="batchmean",
    num_items_in_batch=None,
):
    """``GKDTrainer.generalized_jsd_loss``: the divergence of ``chunked_divergence`` from logits, as one number.

    Args:
        student_logits, teacher_logits: [B, T, V] float, any strides; differentiable.
        labels: [B, T] int, −100 where a token does not count, or None.
        reduction: "batchmean" (Σ over the counted tokens ÷ how many; without labels ÷ B), "sum", or "mean" (÷ V too).
        num_items_in_batch: what to divide by in place of ``reduction``.

    Returns:
        Scalar, float32.

    Raises:
        ValueError: ``reduction`` is "none": the terms of each outcome are nowhere in memory.
    """
    return _loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)


def gold_jsd_loss(
    student_logits,
    teacher_logits,
    labels=None,
    beta=0.5,
    temperature=1.0,
    reduction="batchmean",
    logits_are_probs=False,
    num_items_in_batch=None,
):
    """``GOLDTrainer.generalized_jsd_loss``: of logits; probabilities that do not add up to 1 are TRL's own."""
    if logits_are_probs:
        validate.fail("logits_are_probs", "False", repr(logits_are_probs))
    return _loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)


def iw_opd_jsd_loss(
    student_logits,
    teacher_logits,
    labels=None,
    beta=0.5,
    temperature=1.0,
    reduction="batchmean",
    top_k=0,
    add_tail=True,
    num_items_in_batch=None,
):
    """``IWOPDTrainer.generalized_jsd_loss``: over all outcomes, or over the largest ``top_k`` and what is left."""
    if not 0 < top_k < student_logits.shape[-1]:
        return _loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch)
    if beta not in (0, 1):
        validate.fail("beta", "0 or 1 with top_k: the support of one model", repr(beta))
    selection = {"top_k": top_k, "tail": "bucket" if add_tail else "renormalize"}
    return _loss(student_logits, teacher_logits, labels, beta, temperature, reduction, num_items_in_batch, **selection)


def _in_its_dtype(hidden, weight, bias) -> list:
    dtype = compute_dtype(hidden)
    return [None if x is None else x.to(dtype) for x in (hidden, weight, bias)]


def _loss(student, teacher, labels, beta, temperature, reduction, num_items, **selection):
    """The sum over the counted tokens, and what it is divided by."""
    if num_items is None:
        validate.one_of("reduction", reduction, REDUCTIONS)
    counted = None if labels is None else labels != -100
    options = {"kind": "jsd", "beta": beta, "temperature": temperature, "mask": counted, "reduce": "sum"}
    total = divergence(student, teacher, **options, **selection).value
    if num_items is not None:
        return total / (num_items.to(total.device) if isinstance(num_items, torch.Tensor) else num_items)
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / (max(student.shape[0], 1) if counted is None else counted.sum().clamp(min=1))
    outcomes = student.shape[-1]
    if selection:
        outcomes = selection["top_k"] + (selection["tail"] == "bucket")
    return total / (outcomes * (student[..., 0].numel() if counted is None else counted.sum()))


def _heads_unsupported(*heads, **_) -> str | None:
    names = inspect.signature(chunked_divergence).parameters
    return tensor_unsupported(**dict(zip(names, heads[:6], strict=False)))


@functools.cache
def _why_not(ours):
    """Why TRL's own loss runs, of the arguments of one of the three."""
    signature = inspect.signature(ours)

    def why_not(*args, **kwargs) -> str | None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        student, teacher = given["student_logits"], given["teacher_logits"]
        reason = tensor_unsupported(student_logits=student, teacher_logits=teacher)
        if reason is not None:
            return reason
        if given["num_items_in_batch"] is None and given["reduction"] not in REDUCTIONS:
            return f"reduction {given['reduction']!r} keeps a term for each outcome"
        if student.shape != teacher.shape or student.dtype != teacher.dtype or student.device != teacher.device:
            return "student_logits and teacher_logits differ in shape, dtype or device"
        if given.get("logits_are_probs"):
            return "logits_are_probs: such probabilities need not add up to 1"
        if 0 < given.get("top_k", 0) < student.shape[-1] and given["beta"] not in (0, 1):
            return "top_k of a JSD has the support of both models"
        return None

    return why_not


# module of trl.experimental → (trainer, ours)
LOSSES = {
    "trl.experimental.gkd.gkd_trainer": ("GKDTrainer", generalized_jsd_loss),
    "trl.experimental.gold.gold_trainer": ("GOLDTrainer", gold_jsd_loss),
    "trl.experimental.iw_opd.iw_opd_trainer": ("IWOPDTrainer", iw_opd_jsd_loss),
}
DISTILLATION = "trl.trainer.distillation_trainer"


def swaps(strange: list[str]) -> list[Swap]:
    """The swap by identity in every TRL module; ``strange`` gets the reason where TRL's own is not as known."""
    kernel = importlib.import_module("trl.kernels.chunked_divergence")
    function = getattr(kernel, "ChunkedDivergenceFunction", None)
    wanted = inspect.signature(chunked_divergence).parameters
    name = "trl.kernels.chunked_divergence.ChunkedDivergenceFunction.forward"
    if not takes(getattr(function, "forward", None), wanted, name, strange, skip="ctx"):
        return []
    apply = or_original(chunked_divergence, function.apply, _heads_unsupported)
    ours = type(function.__name__, (function,), {"apply": staticmethod(apply), "__doc__": function.__doc__})
    return [Swap(function, ours, prefix="trl")]


def loaded() -> list[Swap]:
    """Those of the trainers that are loaded."""
    found = []
    distillation = sys.modules.get(DISTILLATION)
    if hasattr(distillation, "ChunkedDivergenceFunction") and hasattr(distillation, "_use_triton"):
        original = original_of(distillation, "_use_triton")
        found.append(Swap(original, counted_rows_only, owner=distillation, name="_use_triton"))
    for module, (trainer, ours) in LOSSES.items():
        owner = getattr(sys.modules.get(module), trainer, None)
        found.append(static_swap(owner, "generalized_jsd_loss", ours, _why_not(ours)))
    return [swap for swap in found if swap is not None]
