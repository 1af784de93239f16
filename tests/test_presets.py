"""``like=<trainer>`` gives what the trainer's own function gives: tests/data/trainers.json, by tools/golden_losses.py."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch

import rlfast
from rlfast.parity import ORDERS
from rlfast.presets import PRESETS
from tests import golden_inputs
from tests.numerics import assert_gradient, assert_value

OP = "token_loss"
GOLDEN = json.loads((Path(__file__).parent / "data" / "trainers.json").read_text(encoding="utf-8"))
CASES = GOLDEN["losses"]
# Rows of these trainers whose function is another row's, or which have no function that can be run without a trainer.
SAME_FUNCTION = {
    "trl": set(),
    "verl": {"rloo", "remax", "opo", "reinforce++"},
    "openrlhf": {"dr_grpo", "rloo", "reinforce++"},
    "liger": set(),
}


def name_of(case: dict) -> str:
    """An id that says what is different about a case."""
    parts = [case["trainer"], case["loss"], case.get("inputs", "near")]
    parts += [str(x) for x in case["settings"].items()] + list(case.get("options", {}))
    return "-".join(parts).replace(" ", "")


def correction(given):
    """A correction from its JSON: bounds of the gate may be given as those of a ratio."""
    if not isinstance(given, dict):
        return given
    given = dict(given)
    low, high = given.pop("gate_ratio", (None, None))
    bounds = {} if low is None else {"gate_low": math.log(low), "gate_high": math.log(high)}
    return rlfast.Correction(**given, **bounds)


def objective(case: dict) -> rlfast.Loss:
    """The preset with the options of a case."""
    options = dict(case.get("options", {}))
    if "correction" in options:
        options["correction"] = correction(options["correction"])
    return rlfast.loss(case["loss"], like=case["trainer"], **options)


@functools.cache
def batch(kind: str) -> dict:
    """The fields of the trainers' batch."""
    return golden_inputs.batch(kind)


def call(case: dict, dtype, device="cpu", order=None):
    """(out, gradient by logp, gradient by entropy or None), with NaN wherever the mask is 0.

    ``order`` [B] puts the sequences into another order; the gradients come back in the first.
    """
    order = torch.arange(golden_inputs.ROWS) if order is None else order
    fields = {name: x[order] for name, x in batch(case.get("inputs", "near")).items()}
    mask = fields["mask"]

    def token(name):
        return torch.where(mask, fields[name], torch.nan).to(device, dtype)

    logp = token("logp").requires_grad_()
    names = [name.partition("=") for name in case.get("fields", ())]
    given = {ours: token(theirs or ours) for ours, _, theirs in names}
    if "entropy" in given:
        given["entropy"].requires_grad_()
    per_token = case["settings"].get("token_adv")
    given["adv"] = token("token_adv") if per_token else fields["adv"].to(device, dtype)
    given |= selected(case, fields, device, dtype)
    out = objective(case)(logp, mask=mask.to(device), **given, **case.get("call", {}))
    out.loss.backward()
    entropy = given["entropy"].grad if "entropy" in given else None
    return out, *(None if x is None else x.cpu()[order.argsort()] for x in (logp.grad, entropy))


@functools.cache
def yardsticks(index: int) -> list:
    """A case in float32 on the torch backend, by several orders of summation."""
    orders = [torch.randperm(golden_inputs.ROWS, generator=torch.Generator().manual_seed(i)) for i in range(ORDERS)]
    with rlfast.use_backend("torch"):
        return [call(CASES[index], torch.float32, order=order) for order in orders]


def selected(case: dict, fields: dict, device, dtype) -> dict:
    """``keep`` or ``extra`` as a case chooses it, in float64 from the rounded inputs."""
    options = dict(case.get("select", {}))
    logp, old, adv, mask = (fields[name] for name in ("logp", "old_logp", "adv", "mask"))
    match options.pop("name", None):
        case "clip_cov_keep":
            return {"keep": rlfast.clip_cov_keep(logp, old, adv, mask, **options).to(device)}
        case "kl_cov_extra":
            return {"extra": rlfast.kl_cov_extra(logp, adv, mask, **options).to(device, dtype)}
        case "top_entropy_keep":
            return {"keep": rlfast.top_entropy_keep(fields["entropy"], mask, **options).to(device)}
    return {}


def compare(index: int, got):
    """Loss, gradients and metrics against the trainer's. In float64 the gradients' yardstick is the truth itself."""
    case, own, (out, *gradients) = CASES[index], yardsticks(index), got
    exact = out.loss.dtype == torch.float64

    def truth(x):
        return torch.tensor(x, dtype=torch.float64)

    assert_value("loss", out.loss.detach().cpu(), truth(case["value"]), [x.loss.detach() for x, *_ in own])
    for place, name in enumerate(("gradient", "entropy_gradient")):
        if name in case:
            wanted = truth(case[name])
            assert_gradient(name, gradients[place], wanted, wanted if exact else [x[1 + place] for x in own])
    for name, value in case["metrics"].items():
        assert_value(name, metric(out, name), truth(value), [metric(x, name) for x, *_ in own])


def metric(out, name: str) -> torch.Tensor:
    """One of ours; "clip" is both sides of it."""
    names = ("clip_low", "clip_high") if name == "clip" else (name,)
    return sum(out.metrics[name] for name in names).detach().cpu()


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: name_of(CASES[i]))
def test_the_loss_is_the_trainers(index, backend, device):
    with rlfast.use_backend(backend):
        compare(index, call(CASES[index], torch.float32, device))


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: name_of(CASES[i]))
def test_the_loss_is_the_trainers_in_float64(index):
    with rlfast.use_backend("torch"):
        compare(index, call(CASES[index], torch.float64))


def test_the_batch_is_the_one_that_the_trainers_were_given():
    found = {name: float(x.double().sum()) for name, x in golden_inputs.batch().items()}
    assert found == pytest.approx(GOLDEN["inputs"], rel=1e-12)


@pytest.mark.parametrize("like", SAME_FUNCTION)
def test_every_preset_is_held_to_its_trainer(like):
    covered = {case["loss"] for case in CASES if case["trainer"] == like}
    assert covered | SAME_FUNCTION[like] == set(PRESETS[like])
    for name in SAME_FUNCTION[like]:
        twin = "ppo"
        assert PRESETS[like][name] == PRESETS[like][twin]
