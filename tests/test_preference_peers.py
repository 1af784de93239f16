"""Presets against the trainers' own functions: the truth is theirs in float64, the yardstick theirs in float32."""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace

import pytest
import torch

import rlfast
from rlfast.preference_presets import PRESETS
from tests.numerics import assert_gradient, assert_value

PAIRS = 16
SIDES = ("chosen", "rejected")
TYPES = {"dpo": "sigmoid"}  # Liger's loss_type of DPO, where it has another name
EXO = {"label_smoothing": 1e-3}  # without it EXO is an error in Liger and TRL
FUSED = {"cpo": "CPO", "simpo": "SimPO", "orpo": "ORPO"}  # Liger's modules with a likelihood


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


@pytest.mark.parametrize("name", [name for name in PRESETS["liger"] if name not in FUSED])
def test_dpo_of_liger(name):
    """Its defaults too."""
    module = importlib.import_module("liger_kernel.chunked_loss.dpo_loss")

    def theirs(data, dtype):
        leaves = [data[side].to(dtype).requires_grad_() for side in SIDES]
        ref = {f"ref_{side}_logps": data[f"ref_{side}"].to(dtype) for side in SIDES}
        options = {"loss_type": TYPES.get(name, name)} | (EXO if name == "exo_pair" else {})
        function = module.LigerFusedLinearDPOFunction.preference_loss_fn
        loss = function(*leaves, torch.zeros(2 * PAIRS, 1), **ref, **options)[0]
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    hold(rlfast.preference_loss(name, like="liger"), theirs)


@pytest.mark.parametrize("name", FUSED)
def test_losses_of_liger_with_their_likelihood(name, monkeypatch):
    """Its modules from hidden states, their defaults and their likelihood too."""
    module = importlib.import_module(f"liger_kernel.chunked_loss.{name}_loss")
    fused = getattr(module, f"LigerFusedLinear{FUSED[name]}Loss")(compiled=False)
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(8, 9, 12, generator=rng), torch.randn(50, 12, generator=rng)
    targets = torch.randint(50, (8, 9), generator=rng)
    targets[torch.arange(9) >= torch.randint(3, 10, (8, 1), generator=rng)] = -100

    def theirs(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "float", lambda x: x)  # which would make the truth float32
            m.setattr(torch, "zeros", functools.partial(torch.zeros, dtype=dtype))  # what the loss is added up in
            loss = fused(leaves[1], leaves[0], targets)[0]
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    loss = rlfast.preference_loss(name, like="liger").linear_rows(*leaves, targets).loss
    truth, own = theirs(torch.float64), theirs(torch.float32)
    assert_value("loss", loss.detach(), truth[0], own[0])
    for what, *of in zip(("hidden", "weight"), torch.autograd.grad(loss, leaves), truth[1:], own[1:], strict=True):
        assert_gradient(f"gradient of {what}", *of)


# TRL's DPOTrainer: what its configuration says beside the defaults.
DPO = {
    "dpo": {},
    "robust": {"loss_type": ["robust"]},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "dpo_norm": {"loss_type": ["sigmoid_norm"]},
    "ld_dpo": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
    "exo_pair": {"loss_type": ["exo_pair"]} | EXO,
    "nca_pair": {"loss_type": ["nca_pair"]},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "f_dpo_reverse_kl": {},
    "f_dpo_forward_kl": {"f_divergence_type": "forward_kl"},
    "f_dpo_js": {"f_divergence_type": "js_divergence"},
    "f_dpo_alpha": {"f_divergence_type": "alpha_divergence"},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "irpo": {"loss_type": ["sigmoid", "sft"]},
}
LENGTH = 12


def tokens() -> dict:
    """Log-probs [2B, T] of policy and reference, log Σp², and which tokens count."""
    rng = torch.Generator().manual_seed(0)
    logps = -2 * torch.rand(2 * PAIRS, LENGTH, generator=rng)
    mask = torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (2 * PAIRS, 1), generator=rng)
    ref = (logps + 0.4 * torch.randn(logps.shape, generator=rng)).clamp(max=0.0)
    return {"logps": logps, "ref": ref, "squares": -logps.abs() - 0.3, "mask": mask}


def dpo_of_trl(args, dtype) -> tuple:
    """(loss, gradient by the log-probs of the tokens that count) by its method, in a trainer that has ``args``."""
    from tests.test_integrations_trl_preference import Model, trainer_of, trl

    data = tokens()
    leaf, kept = data["logps"].to(dtype).requires_grad_(), data["mask"]
    policy, reference = (
        SimpleNamespace(
            log_probs=x.to(dtype).masked_fill(~kept, 0.0), entropy=-data["logps"], mean_logits=data["logps"],
            log_sum_sq_probs=data["squares"].to(dtype), is_top1=kept,
        )
        for x in (leaf, data["ref"])
    )  # fmt: skip
    read = (
        "beta", "label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type", "f_alpha_divergence_coef",
        "discopop_tau",
    )  # fmt: skip
    settings = {k: getattr(args, k) for k in read} | {"loss_types": args.loss_type}
    if args.loss_weights is not None:
        settings["loss_weights"] = args.loss_weights
    trainer = trainer_of(Model(policy), Model(reference), **settings)
    mask = torch.nn.functional.pad(kept.long(), (1, 0))  # the first token is of the prompt
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    loss = trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", DPO)
def test_dpo_of_trl(name, tmp_path):
    """Its defaults too."""
    trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
    args = trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True, **DPO[name])
    row, data = rlfast.preference_loss(name, like="trl"), tokens()
    leaf = data["logps"].clone().requires_grad_()
    given = {"ref_logps": data["ref"], "mask": data["mask"]}
    if "weights" in row.needs:
        given["weights"] = torch.mul(*rlfast.wpo_weights(leaf, data["squares"], data["mask"]).chunk(2))
    loss = row.rows(leaf, **given).loss
    own = dpo_of_trl(args, torch.float32)
    if name == "f_dpo_alpha":  # TRL's own has no float64
        assert args.f_alpha_divergence_coef == 0.5
        ratio = (torch.where(data["mask"], data["logps"].double() - data["ref"].double(), 0.0)).requires_grad_()
        x = -0.1 * torch.sub(*(torch.expm1(-0.5 * ratio.sum(1)) / -0.5).chunk(2))
        true = torch.nn.functional.softplus(x).mean()
        truth = true.detach(), torch.where(data["mask"], torch.autograd.grad(true, ratio)[0], 0.0)
    else:
        truth = dpo_of_trl(args, torch.float64)
    assert_value("loss", loss.detach(), truth[0], own[0])
    assert_gradient("gradient", torch.autograd.grad(loss, leaf)[0], truth[1], own[1])


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

    hold(rlfast.preference_loss(name.split()[0], like="trl", **ours), cpo)


@pytest.mark.parametrize("beta", (None, 0.25))
def test_orpo_of_trl(beta, monkeypatch, tmp_path):
    """Its odds and rewards, beside a likelihood that is the caller's. What TRL calls the losses is their negative."""
    module = importlib.import_module("trl.experimental.orpo")
    options = {} if beta is None else {"beta": beta}
    args = module.ORPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=args.beta)
    rewards = {}

    def orpo(data, dtype):
        leaves = [data[side].to(dtype).requires_grad_() for side in SIDES]
        means = [x / data[f"{side}_lengths"].to(dtype) for x, side in zip(leaves, SIDES, strict=True)]
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "float", lambda x: x)  # which would make the truth float32
            losses, *rewards[dtype] = module.ORPOTrainer.odds_ratio_loss(trainer, *means)[:3]
        loss = -losses.mean()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    out = hold(rlfast.preference_loss("orpo", like="trl", **options), orpo, nll=torch.zeros(()))
    for i, got in enumerate((out.chosen_rewards, out.rejected_rewards)):
        assert_value("rewards", got, rewards[torch.float64][i], rewards[torch.float32][i])


def hold(objective, peer, **rest) -> rlfast.preference.PreferenceOutput:
    """Ours against ``peer(data, dtype)``: (loss, gradients by both sides' sums)."""
    data = drawn()
    leaves = [data[side].clone().requires_grad_() for side in SIDES]
    rest |= {f"ref_{side}_logps": data[f"ref_{side}"] for side in SIDES}
    rest |= {f"{side}_lengths": data[f"{side}_lengths"] for side in SIDES}
    out = objective(*leaves, per_pair=True, **rest)
    truth, own = peer(data, torch.float64), peer(data, torch.float32)
    assert_value("loss", out.loss.detach(), truth[0], own[0])
    gradients = torch.autograd.grad(out.loss, leaves)
    for side, got, wanted, plain in zip(SIDES, gradients, truth[1:], own[1:], strict=True):
        assert_gradient(f"gradient of {side}", got, wanted, plain)
    return out


def test_no_preset_is_left_out():
    """Each is held to its trainer; those of OpenRLHF and HALOs are in test_preference_values.py."""
    assert set(PRESETS["trl"]) == set(DPO) | {name.split()[0] for name in CPO} | {"orpo"}


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
