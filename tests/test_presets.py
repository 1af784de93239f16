"""``like=<trainer>`` gives what the trainer's own function gives.

tests/data/trainers.json is written by tools/golden_losses.py.
"""

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

    ``order``, of the sequences [B] and of their places [T], puts both into another order; the gradients come back in
    the first.
    """
    rows, places = (torch.arange(golden_inputs.ROWS), torch.arange(golden_inputs.LENGTH)) if order is None else order
    fields = {name: x[rows] for name, x in batch(case.get("inputs", "near")).items()}
    fields = {name: x[:, places] if x.dim() == 2 else x for name, x in fields.items()}
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
    given |= {"mask": mask.to(device)} | selected(case, fields, device, dtype)
    out = objective(case)(logp, **given, **case.get("call", {}))
    out.loss.backward()
    entropy = given["entropy"].grad if "entropy" in given else None
    back = rows.argsort()[:, None], places.argsort()
    return out, *(None if x is None else x.cpu()[back] for x in (logp.grad, entropy))


@functools.cache
def yardsticks(index: int) -> list:
    """A case in float32 by the oracle, in several orders of summation."""
    orders = [None]
    for seed in range(1, ORDERS):
        draw = torch.Generator().manual_seed(seed)
        sizes = golden_inputs.ROWS, golden_inputs.LENGTH
        orders.append(tuple(torch.randperm(n, generator=draw) for n in sizes))
    with rlfast.use_backend("reference"):
        return [call(CASES[index], torch.float32, order=order) for order in orders]


def selected(case: dict, fields: dict, device, dtype) -> dict:
    """``keep``, ``mask`` or ``extra`` as a case chooses it, in float64 from the rounded inputs."""
    options = dict(case.get("select", {}))
    logp, old, adv, mask = (fields[name] for name in ("logp", "old_logp", "adv", "mask"))
    match options.pop("name", None):
        case "clip_cov_keep":
            return {"keep": rlfast.clip_cov_keep(logp, old, adv, mask, **options).to(device)}
        case "kl_cov_extra":
            return {"extra": rlfast.kl_cov_extra(logp, adv, mask, **options).to(device, dtype)}
        case "top_entropy_keep":
            return {"keep": rlfast.top_entropy_keep(fields["entropy"], mask, **options).to(device)}
        case "rollout_keep":
            field, keep = options.pop("field"), mask
            for gate in options["gates"]:
                keep = keep & rlfast.rollout_keep(old, fields["rollout_logp"], mask, **gate)
            return {field: keep.to(device)}
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


# NeMo-RL's package on PyPI is empty: its loss in our own words, by autograd. The row, its settings, our options.
NEMO = [
    ("ppo", {}, {}),
    ("dual_clip_ppo", {"dual_clip": 3.0}, {}),
    ("grpo", {}, {}),
    ("grpo", {"level": "sequence"}, {"reduce": "seq_mean_token_mean"}),
    ("dapo", {"high": 0.28, "dual_clip": 10.0, "beta": 0.0}, {}),
    ("reinforce++", {"beta": 0.0}, {}),
    ("reinforce", {"ratio": False}, {}),
    ("rloo", {"ratio": False}, {}),
    ("gspo", {"unit": "sequence", "level": "sequence"}, {}),
    ("cispo", {"cispo": True}, {}),
    *(("grpo", {"kl": kind}, {"kl": kind}) for kind in ("k1", "k2", "k3")),
    *(("ppo", {"weight": kind}, {"correction": given}) for kind, given in (
        ("tis", rlfast.Correction("token", high=1.1)),
        ("icepop", rlfast.Correction("token", gate="token", gate_low=math.log(0.9), gate_high=math.log(1.2))),
        ("seq-mask-tis", rlfast.Correction("token", gate="seq_mean", gate_low=math.log(0.97),
                                           gate_high=math.log(1.02))),
    )),
]  # fmt: skip


def nemo_estimate(logp, ref_logp, kind: str):
    """The KL with its score-function gradient: the difference within ±20, the estimate within ±10."""
    raw = ref_logp - logp
    d = raw.clamp(-20.0, 20.0)
    score = (logp - logp.detach()).exp()
    score = torch.where(raw == d, score, score.detach())
    estimate = {"k1": -d, "k2": 0.5 * d.square(), "k3": d.exp() - 1.0 - d}[kind]
    return (score * estimate).clamp(-10.0, 10.0)


def nemo_weight(drift, mask, kind: str | None):
    """ρ as each type of truncation leaves it."""
    ratio = drift.exp()
    mean = ((drift * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)).exp()
    return {
        None: torch.ones_like(ratio),
        "tis": ratio.clamp(0.0, 1.1),
        "icepop": torch.where((ratio >= 0.9) & (ratio <= 1.2), ratio, 0.0),
        "seq-mask-tis": torch.where((mean >= 0.97) & (mean <= 1.02), ratio, 0.0),
    }[kind]


def nemo_loss(fields: dict, *, level="token", unit="token", high=0.2, dual_clip=None, beta=0.01, ratio=True,
              cispo=False, kl="k3", weight=None):  # fmt: skip
    """The loss of NeMo-RL's ClippedPGLossFn."""
    logp, old, mask = fields["logp"], fields["old_logp"], fields["mask"].double()
    adv = fields["adv"][:, None]
    lengths = mask.sum(-1, keepdim=True)

    def mean(x):
        if level == "token":
            return (x * mask).sum() / mask.sum()
        by_sequence = (x * mask).sum(-1, keepdim=True) / lengths.clamp(min=1)
        return by_sequence.sum() / (lengths > 0).sum()

    x = logp - old
    if unit == "sequence":
        x = ((x * mask).sum(-1, keepdim=True) / lengths.clamp(min=1)).expand_as(x)
    r = x.exp()
    clipped = r.clamp(0.8, 1.0 + high)
    if not ratio:
        policy = -adv * logp
    elif cispo:
        policy = -adv * clipped.detach() * logp
    else:
        policy = torch.max(-adv * r, -adv * clipped)
    if dual_clip is not None:
        policy = torch.where(adv < 0, torch.min(policy, -adv * dual_clip), policy)
    policy = policy * nemo_weight(old - fields["rollout_logp"], mask, weight)
    return mean(policy) + beta * mean(nemo_estimate(logp, fields["ref_logp"], kl))


@pytest.mark.parametrize("inputs", ["near", "far", "drift"])
@pytest.mark.parametrize("name, settings, options", NEMO, ids=[f"{n}-{s}" for n, s, _ in NEMO])
def test_nemo_rl(name, settings, options, inputs, backend, device):
    fields = golden_inputs.batch(inputs)
    logp = fields["logp"].requires_grad_()
    truth = nemo_loss(fields, **settings)
    (wanted,) = torch.autograd.grad(truth, logp)
    names = ("old_logp", "ref_logp", "adv", "mask", *(("rollout_logp",) if "weight" in settings else ()))
    objective = rlfast.loss(name, like="nemo-rl", **options)

    def ours(on, dtype, where="cpu"):
        leaf = fields["logp"].detach().to(where, dtype).requires_grad_()
        given = {key: fields[key].to(where, torch.bool if key == "mask" else dtype) for key in names}
        with rlfast.use_backend(on):
            out = objective(leaf, **given)
        out.loss.backward()
        return out.loss.detach().cpu(), leaf.grad.cpu()

    own = ours("reference", torch.float32)
    if backend == "torch":
        exact = ours("torch", torch.float64)
        assert_value("loss in float64", exact[0], truth.detach(), own[0])
        assert_gradient("gradient in float64", exact[1], wanted, wanted)
    got = ours(backend, torch.float32, device)
    assert_value("loss", got[0], truth.detach(), own[0])
    assert_gradient("gradient", got[1], wanted, own[1])


def test_the_correction_that_trl_has_on_with_vllm(backend, device):
    """Π ρ of a sequence as its weight, 0 beyond 3: asked for by name, and not done unasked."""
    config = pytest.importorskip("trl").GRPOConfig.__dataclass_fields__
    named = {name: config[f"vllm_importance_sampling_{name}"].default for name in ("correction", "mode", "clip_max")}
    assert named == {"correction": True, "mode": "sequence_mask", "clip_max": 3.0}
    assert config["vllm_importance_sampling_clip_min"].default is None
    old, drift = torch.full((3, 4), -2.0), torch.tensor([0.25, 0.3, -0.5])[:, None]  # Π ρ = e, e^1.2, e^−2
    given = {"old_logp": old, "adv": torch.tensor([1.0, -0.5, 2.0])}
    given = {name: x.to(device) for name, x in given.items()}
    weights = torch.tensor([math.exp(1.0), 0.0, math.exp(-2.0)], dtype=torch.float64)
    with rlfast.use_backend(backend):
        plain = rlfast.loss("grpo", like="trl")(old.to(device), rollout_logp=(old - drift).to(device), **given)
        asked = rlfast.loss("grpo", like="trl", correction="sequence_mask")
        got = asked(old.to(device), rollout_logp=(old - drift).to(device), **given)
    assert plain.loss.item() == pytest.approx(-given["adv"].mean().item())
    assert got.loss.item() == pytest.approx(-(weights * given["adv"].cpu()).mean().item(), rel=1e-6)


@pytest.mark.parametrize("like", PRESETS)
def test_an_unknown_row_lists_the_trainers(like):
    with pytest.raises(ValueError, match=rf"name: expected one of .* for like='{like}', got 'awr'"):
        rlfast.loss("awr", like=like)


def test_an_unknown_trainer_lists_them():
    with pytest.raises(ValueError, match="like: expected one of 'trl', 'verl', 'openrlhf', 'nemo-rl', 'liger', got"):
        rlfast.loss("ppo", like="trlx")


@pytest.mark.parametrize("like", SAME_FUNCTION)
def test_every_preset_is_held_to_its_trainer(like):
    covered = {case["loss"] for case in CASES if case["trainer"] == like}
    assert covered | SAME_FUNCTION[like] == set(PRESETS[like])
    for name in SAME_FUNCTION[like]:
        twin = "ppo"
        assert PRESETS[like][name] == PRESETS[like][twin]
