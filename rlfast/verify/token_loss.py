"""The policy losses: the five that trainers use most, with a mask, a KL and a correction among them."""

from __future__ import annotations

import torch

from rlfast.loss_table import LOSSES
from rlfast.losses import Loss
from rlfast.ops.loss_records import METRICS
from rlfast.ops.oracle_loss import named, options
from rlfast.reference.token_loss import token_loss as reference
from rlfast.verify.subject import Problem, Subject

SIZES = {True: (4, 40), False: (64, 700)}  # sequences and tokens, few where the interpreter runs
CALLS = {
    "ppo": LOSSES["ppo"],
    "grpo": LOSSES["grpo"],
    "gspo": LOSSES["gspo"],
    "cispo": LOSSES["cispo"].with_options(correction="icepop"),
    "sapo": LOSSES["sapo"].with_options(entropy_coef=0.01),
}
OUTPUTS = tuple(name for name in METRICS if name not in ("scale", "entropy_scale"))
FIELDS = ("old_logp", "ref_logp", "rollout_logp")


def _problem(dtype: torch.dtype, device: str, small: bool) -> Problem:
    rows, length = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    old = -torch.rand(rows, length, generator=draw) * 4

    def near(scale):
        return (old + scale * torch.randn(rows, length, generator=draw)).to(device, dtype)

    leaves = {"logp": near(0.2), "entropy": torch.rand(rows, length, generator=draw).to(device, dtype)}
    rest = {"old_logp": old.to(device, dtype), "ref_logp": near(0.3), "rollout_logp": near(0.1)}
    rest |= {
        "adv": torch.randn(rows, generator=draw).to(device),
        "mask": torch.rand(rows, length, generator=draw) < 0.8,
    }
    rest["mask"] = rest["mask"].to(device)
    return Problem(leaves, rest, {"loss": torch.ones((), device=device)})


def _named(loss, metrics) -> dict:
    return {name: metrics[name] for name in OUTPUTS} | {"loss": loss}


def _public(objective: Loss):
    def call(leaves, rest):
        out = objective(**leaves, **{k: x for k, x in rest.items() if k not in objective.prepared.idle})
        return _named(out.loss, out.metrics)

    return call


def _reference(objective: Loss):
    surrogate, kl, plan, settings, hyper, bounds, *_ = objective.prepared
    words = options(plan, settings, kl, bounds) | {"surrogate": surrogate, "hyper": named(surrogate, hyper)}

    def call(leaves, rest, dtype):
        adv = rest["adv"].unsqueeze(1).expand(leaves["logp"].shape)
        loss, metrics = reference(**leaves, **rest | {"adv": adv}, dtype=dtype, **words)
        return _named(loss, metrics) | {"sizes": metrics["sizes"]}

    return call


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The tokens of every sequence in another order."""
    draw = torch.Generator().manual_seed(seed)
    mask = problem.rest["mask"]
    order = torch.randperm(mask.shape[1], generator=draw).to(mask.device)
    back = order.argsort()
    leaves = {name: x[:, order] for name, x in problem.leaves.items()}
    rest = problem.rest | {name: problem.rest[name][:, order] for name in (*FIELDS, "mask")}

    def in_order(x):  # a metric may have the name of a leaf
        return x[:, back] if x.dim() else x

    return problem._replace(leaves=leaves, rest=rest), dict.fromkeys(leaves, in_order)


SUBJECTS = {
    "token_loss": tuple(
        Subject(_problem, _public(objective), _reference(objective), OUTPUTS, _reordered, name)
        for name, objective in CALLS.items()
    )
}
