"""Presets against the trainers' own functions: the truth is theirs in float64, the yardstick theirs in float32."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import rlfast
from rlfast.preference_presets import PRESETS
from tests.numerics import assert_gradient, assert_value

PAIRS = 16
SIDES = ("chosen", "rejected")
# Liger's function and its options, where it is not DPO's with a loss_type of the same name; and ours.
OTHERS = {"cpo": {"beta": 0.1}, "simpo": {"beta": 0.1, "gamma": 0.5}, "orpo": {"beta": 0.1}}
TYPES = {"dpo": "sigmoid"}
OPTIONS = {"robust": {"label_smoothing": 0.125}, "exo_pair": {"label_smoothing": 0.125}}


def drawn() -> dict:
    """Sums of log-probs, and the lengths of the responses, by which a division is exact."""
    rng = torch.Generator().manual_seed(0)
    found = {}
    for side in SIDES:
        ref = -torch.rand(PAIRS, generator=rng) * 60 - 5
        found[side] = ref + torch.randn(PAIRS, generator=rng) * 4
        found[f"ref_{side}"] = ref
        found[f"{side}_lengths"] = 2.0 ** torch.randint(2, 6, (PAIRS,), generator=rng)
    return found


def theirs(name: str, data: dict, dtype: torch.dtype) -> tuple:
    """(loss, gradients by both sides' sums) by Liger's function."""
    module = importlib.import_module(f"liger_kernel.chunked_loss.{name if name in OTHERS else 'dpo'}_loss")
    function = getattr(
        module, f"LigerFusedLinear{ {'cpo': 'CPO', 'simpo': 'SimPO', 'orpo': 'ORPO'}.get(name, 'DPO') }Function"
    )
    leaves = [data[side].to(dtype).requires_grad_() for side in SIDES]
    sums, options = leaves, OTHERS.get(name)
    if name in ("simpo", "orpo"):  # averages
        sums = [x / data[f"{side}_lengths"].to(dtype) for x, side in zip(leaves, SIDES, strict=True)]
    if options is None:
        options = {f"ref_{side}_logps": data[f"ref_{side}"].to(dtype) for side in SIDES}
        options |= {"loss_type": TYPES.get(name, name), "beta": 0.1} | OPTIONS.get(name, {})
    loss = function.preference_loss_fn(*sums, torch.zeros(2 * PAIRS, 1), **options)[0]
    return loss.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("name", PRESETS["liger"])
def test_liger(name):
    objective = rlfast.preference_loss(name, like="liger", **OPTIONS.get(name, {}))
    hold(objective, lambda data, dtype: theirs(name, data, dtype))


# TRL's CPOTrainer: its loss_type, its options beside the defaults, and whether it takes means; ours.
CPO = {
    "cpo": ("sigmoid", {}, False, {}),
    "cpo_hinge": ("hinge", {}, False, {}),
    "cpo_ipo": ("ipo", {}, True, {}),
    "simpo": ("simpo", {"cpo_alpha": 0.0}, True, {}),
    "cpo_simpo": ("simpo", {}, True, {}),
    "alpha_po": ("alphapo", {}, True, {}),
    "alpha_po of 0.25": ("alphapo", {"alpha": 0.25}, True, {"alpha": 0.25}),
    "cpo smoothed": ("sigmoid", {"label_smoothing": 0.125}, False, {"label_smoothing": 0.125}),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo_of_trl(name, tmp_path):
    """Its defaults too."""
    module = importlib.import_module("trl.experimental.cpo")
    loss_type, options, mean, ours = CPO[name]
    args = module.CPOConfig(str(tmp_path), loss_type=loss_type, bf16=False, use_cpu=True, **options)
    read = ("alpha", "beta", "label_smoothing", "loss_type", "simpo_gamma")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **{k: getattr(args, k) for k in read})

    def cpo(data, dtype):
        leaves = [data[side].to(dtype).requires_grad_() for side in SIDES]
        lengths = [data[f"{side}_lengths"].to(dtype) for side in SIDES]
        scores = [x / n if mean else x for x, n in zip(leaves, lengths, strict=True)]
        loss = module.CPOTrainer.cpo_loss(trainer, *scores)[0].mean()
        loss = loss - args.cpo_alpha * leaves[0].sum() / lengths[0].sum()  # the mean over all chosen tokens
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    hold(rlfast.preference_loss(name.split()[0], like="trl", **ours), cpo, likelihood=True)


def test_orpo_of_trl(monkeypatch):
    """Its odds, beside a likelihood that is the caller's. What TRL calls the losses is their negative."""
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.1)
    theirs = importlib.import_module("trl.experimental.orpo").ORPOTrainer.odds_ratio_loss

    def orpo(data, dtype):
        leaves = [data[side].to(dtype).requires_grad_() for side in SIDES]
        means = [x / data[f"{side}_lengths"].to(dtype) for x, side in zip(leaves, SIDES, strict=True)]
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "float", lambda x: x)  # which would make the truth float32
            loss = -theirs(trainer, *means)[0].mean()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    hold(rlfast.preference_loss("orpo", like="trl"), orpo)


def hold(objective, peer, likelihood: bool = False) -> None:
    """Ours against ``peer(data, dtype)``: (loss, gradients by both sides' sums)."""
    data = drawn()
    leaves = [data[side].clone().requires_grad_() for side in SIDES]
    rest = {f"ref_{side}_logps": data[f"ref_{side}"] for side in SIDES}
    rest |= {f"{side}_lengths": data[f"{side}_lengths"] for side in SIDES}
    if objective.nll and not likelihood:  # theirs comes from another place
        rest["nll"] = torch.zeros(())
    rest |= {"shared": 0.0} if "shared" in objective.needs else {}  # they have no δ
    out = objective(*leaves, **rest)
    truth, own = peer(data, torch.float64), peer(data, torch.float32)
    assert_value("loss", out.loss.detach(), truth[0], own[0])
    gradients = torch.autograd.grad(out.loss, leaves)
    for side, got, wanted, plain in zip(SIDES, gradients, truth[1:], own[1:], strict=True):
        assert_gradient(f"gradient of {side}", got, wanted, plain)


@pytest.mark.parametrize("z", (None, 0.75))
def test_kto_of_liger(z):
    data = drawn()
    kto = importlib.import_module("liger_kernel.chunked_loss.kto_loss").LigerFusedLinearKTOFunction
    desirable = torch.arange(PAIRS) % 3 != 0

    def run_theirs(dtype):
        leaf = data["chosen"].to(dtype).requires_grad_()
        kl = None if z is None else torch.tensor(z, dtype=dtype)
        target = torch.zeros(PAIRS, 1)
        loss = kto.preference_loss_fn(leaf, desirable, target, data["ref_chosen"].to(dtype), beta=0.1, kl=kl)[0]
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    leaf = data["chosen"].clone().requires_grad_()
    objective = rlfast.unpaired_loss("kto", like="liger")
    out = objective(leaf, desirable, ref_logps=data["ref_chosen"], shared=z or 0.0)
    truth, own = run_theirs(torch.float64), run_theirs(torch.float32)
    assert_value("loss", out.loss.detach(), truth[0], own[0])
    assert_gradient("gradient", torch.autograd.grad(out.loss, leaf)[0], truth[1], own[1])
