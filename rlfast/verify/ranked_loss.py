"""Losses of ranked groups: one of each form, with a mask and weights, padded and packed."""

from __future__ import annotations

import torch

from rlfast.ops.oracle_ranked import words
from rlfast.ops.ranked_records import METRICS, Settings
from rlfast.ranked import RANKED, RankedLoss
from rlfast.reference.ranked_loss import ranked_loss as reference
from rlfast.verify.subject import Problem, Subject

SIZES = {True: (5, 6), False: (128, 9)}  # groups and candidates, few where the interpreter runs
CALLS = ("plackett_luce", "all_pairs", "exo", "info_nca", "nca", "rrhf", "pro")


def _inputs(objective: RankedLoss):
    def problem(dtype: torch.dtype, device: str, small: bool) -> Problem:
        shape, draw = SIZES[small], torch.Generator().manual_seed(0)
        scores = -8 + torch.randn(shape, generator=draw)
        rest = {
            "rewards": torch.randn(shape, generator=draw).to(device, dtype),
            "mask": (torch.rand(shape, generator=draw) < 0.8).to(device),
            "weights": torch.rand(shape[0], generator=draw).to(device),
        }
        if objective.alpha:
            rest["lengths"] = torch.randint(1, 20, shape, generator=draw).to(device)
        if objective.referenced:
            rest["ref_scores"] = (scores + torch.randn(shape, generator=draw)).to(device, dtype)
        return Problem({"scores": scores.to(device, dtype)}, rest, {"loss": torch.ones((), device=device)})

    return problem


def _public(objective: RankedLoss):
    def call(leaves, rest):
        out = objective(**leaves, **rest)
        return {name: out.metrics[name] for name in METRICS} | {"loss": out.loss}

    return call


def _reference(objective: RankedLoss):
    settings = Settings(objective.beta, objective.tau, float("inf"), objective.nll, objective.nll_by_size, 1.0)

    def call(leaves, rest, dtype):
        given = {k: x if k == "mask" else x.to(dtype) for k, x in rest.items()}
        lengths = given.pop("lengths", None)
        loss, metrics = reference(
            leaves["scores"].to(dtype), divisor=lengths, **given, **words(objective.form, settings)
        )
        return metrics | {"loss": loss}

    return call


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The groups in another order."""
    scores = problem.leaves["scores"]
    order = torch.randperm(scores.shape[0], generator=torch.Generator().manual_seed(seed)).to(scores.device)
    moved = problem._replace(
        leaves={"scores": scores[order]}, rest={name: x[order] for name, x in problem.rest.items()}
    )
    return moved, {"scores": lambda x: x[order.argsort()]}


SUBJECTS = {
    "ranked_loss": tuple(
        Subject(_inputs(RANKED[name]), _public(RANKED[name]), _reference(RANKED[name]), METRICS, _reordered, name)
        for name in CALLS
    )
}
