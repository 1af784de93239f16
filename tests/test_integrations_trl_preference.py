"""The losses of TRL's preference trainers under ``rlfast.patch("trl")``: TRL's own methods, on given log-probs."""

from __future__ import annotations

import contextlib
import logging
import types
from collections import defaultdict

import pytest
import torch

import rlfast
from rlfast.integrations import patching, trl_dpo, trl_outputs, trl_preference
from tests.numerics import assert_gradient, assert_same_bits, assert_value

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from rlfast.compare.tiny import word_tokenizer  # noqa: E402
from tests.trl_trainers import KINDS, OneProcess, assert_same_steps, steps_of  # noqa: E402

PAIRS, LENGTH, BATCHES = 6, 24, 4
UNSORTED = [name for name in trl_dpo.DPO_ROWS if not name.startswith("aot")]
COMPARED = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"]  # by their difference alone


class Model(torch.nn.Module):
    """A model that returns what it is told; ``outputs`` are one a call."""

    is_gradient_checkpointing = False

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = outputs
        self.calls = 0

    def forward(self, labels=None, **_):
        self.calls += 1
        given = self.outputs[(self.calls - 1) % len(self.outputs)]
        return given if labels is not None or "logits" in vars(given) else types.SimpleNamespace(logits="all of them")


def trainer_of(model, reference, **settings):
    """What the loss methods read of their trainer, with the defaults of TRL's configurations."""
    given = {
        "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "precompute_ref_logps": False, "use_weighting": False,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.05,
        "loss_types": ["sigmoid"], "aux_loss_enabled": False, "router_aux_loss_coef": 0.25,
        "loss_type": "kto", "calculate_KL": True, "desirable_weight": 1.0, "undesirable_weight": 1.0,
        "center_rewards_coefficient": None, "gradient_checkpointing_kwargs": None,
    } | settings  # fmt: skip
    given.setdefault("loss_weights", [1.0] * len(given["loss_types"]))
    trainer = types.SimpleNamespace(
        **given, args=types.SimpleNamespace(**given), model=model, ref_model=reference, accelerator=OneProcess(),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer._compute_kl_logps = types.MethodType(trl.KTOTrainer._compute_kl_logps, trainer)
    return trainer


def masks(generator):
    """Of completions: one starts with the first token, one is cut off before its first."""
    start = torch.randint(1, 8, (2 * PAIRS, 1), generator=generator)
    end = start + torch.randint(1, LENGTH - 8, (2 * PAIRS, 1), generator=generator)
    start[1], end[PAIRS] = 0, start[PAIRS]
    place = torch.arange(LENGTH + 1)
    return ((place >= start) & (place < end)).long()


def fields(dtype, seed=0):
    """Log-probs of policy and reference in nats, float32 numbers in any dtype, and what else a model returns."""
    draw = torch.Generator().manual_seed(seed)
    mask = masks(draw)
    shape = (2 * PAIRS, LENGTH)
    policy = -2 * torch.rand(shape, generator=draw)
    reference = policy + 0.4 * torch.randn(shape, generator=draw)
    mismatched = [-2 * torch.rand(shape, generator=draw) for _ in range(2)]
    mismatched[1] -= 0.4 * torch.rand(shape, generator=draw)  # z is above 0
    leaf = policy.to(dtype).requires_grad_()
    kept = mask[:, 1:] != 0

    def out(logp):
        return types.SimpleNamespace(
            log_probs=logp.to(dtype).masked_fill(~kept, 0.0), entropy=-policy, mean_logits=policy,
            log_sum_sq_probs=(policy.abs().neg() - 0.3).to(dtype), is_top1=policy > -0.3,
            aux_loss=leaf.square().mean(),
        )  # fmt: skip

    return leaf, mask, out(leaf), out(reference.detach()), [out(x) for x in mismatched]


def preferences(dtype, seed=0, **settings):
    """(loss, gradient, metrics) of a DPOTrainer's method as it is now."""
    leaf, mask, policy, reference, _ = fields(dtype, seed)
    trainer = trainer_of(Model(policy), Model(reference), **settings)
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    if trainer.precompute_ref_logps:
        sums = reference.log_probs.sum(1)
        if trainer.ld_alpha is not None:
            sums = trl_outputs.sums(reference.log_probs, mask[:, 1:], trainer.ld_alpha)
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = sums.chunk(2)
    loss = trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, trainer._metrics["train"]


def responses(dtype, seed=0, desirable=None, **settings):
    """The same of a KTOTrainer's, whose responses are all of one kind or of both."""
    leaf, mask, policy, reference, mismatched = fields(dtype, seed)
    settings["calculate_KL"] = settings.get("loss_type", "kto") == "kto"
    of = [[mismatched[i], out] if settings["calculate_KL"] else [out] for i, out in enumerate((policy, reference))]
    trainer = trainer_of(*(Model(*outputs) for outputs in of), **settings)
    same, label = torch.ones_like(mask), torch.arange(2 * PAIRS) % 3 != 1
    inputs = {
        "input_ids": same, "attention_mask": same, "completion_mask": mask, "KL_input_ids": same,
        "KL_attention_mask": same, "KL_completion_mask": mask, "ref_logps": reference.log_probs.sum(1),
        "label": label if desirable is None else torch.full_like(label, desirable),
        "ref_KL_logps": mismatched[1].log_probs.sum(1),
    }  # fmt: skip
    loss = trl.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, trainer._metrics["train"]


def rewards(dtype, seed=0, margin=False, **settings):
    """The same of a RewardTrainer's."""
    draw = torch.Generator().manual_seed(seed)
    leaf = torch.randn(2 * PAIRS, 1, generator=draw).to(dtype).requires_grad_()
    trainer = trainer_of(Model(types.SimpleNamespace(logits=leaf)), None, **settings)
    del trainer.ref_model, trainer.precompute_ref_logps  # a RewardTrainer has neither
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 5)}
    if margin:
        inputs["margin"] = torch.rand(PAIRS, generator=draw)
    loss = trl.RewardTrainer.compute_loss(trainer, trainer.model, inputs)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient, trainer._metrics["train"]


def over_batches(method, dtype, **settings):
    """Losses, gradients and metrics of several batches: the largest error of one is an accident."""
    losses, gradients, metrics = zip(*(method(dtype, seed, **settings) for seed in range(BATCHES)), strict=True)
    return torch.stack(losses), torch.stack(gradients), metrics


def assert_same(method, monkeypatch, caplog, **settings):
    """TRL's in float64 is the truth, TRL's in float32 the yardstick; and the loss is ours."""
    truth, yardstick = (over_batches(method, dtype, **settings) for dtype in (torch.float64, torch.float32))
    calls = count_losses(monkeypatch)
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        got = over_batches(method, torch.float32, **settings)
    assert not caplog.records and calls
    assert_value("loss", got[0], truth[0], yardstick[0])
    assert_gradient("gradient", got[1], truth[1], yardstick[1])
    assert got[2] == yardstick[2], "metrics"
    assert all(got[2]), "no metrics, nothing was compared"


def count_losses(monkeypatch) -> list:
    calls = []
    for module in (rlfast.preference, rlfast.unpaired):
        kernel = module.op.call
        monkeypatch.setattr(module.op, "call", lambda *args, call=kernel: calls.append(args) or call(*args))
    return calls


@pytest.mark.parametrize("how", ("plain", "ld", "precomputed", "precomputed ld"))
@pytest.mark.parametrize("loss_type", trl_dpo.DPO_ROWS)
def test_dpo(loss_type, how, monkeypatch, caplog):
    options = {"loss_types": [loss_type], "label_smoothing": 0.1, "discopop_tau": 0.2, "beta": 0.3}
    options |= {"ld_alpha": 0.4} if "ld" in how else {}
    assert_same(preferences, monkeypatch, caplog, **options, precompute_ref_logps="precomputed" in how)


MIXTURES = {
    "mpo": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
    "by length": (["ipo", "sft", "sigmoid"], [0.5, 0.3, 2.0]),
    "sorted": (["aot", "sigmoid", "aot_unpaired"], [1.0, 0.5, 0.25]),
    "twice": (["hinge", "hinge"], [1.0, 0.5]),
    "likelihood": (["sft"], [0.7]),
    "many": (UNSORTED, [1.0 / (i + 1) for i in range(len(UNSORTED))]),
}


@pytest.mark.parametrize("ld_alpha", (None, 0.4))
@pytest.mark.parametrize("mixture", MIXTURES)
def test_dpo_mixtures(mixture, ld_alpha, monkeypatch, caplog):
    types_, weights = MIXTURES[mixture]
    if mixture == "likelihood":
        monkeypatch.setattr(f"{__name__}.count_losses", lambda _: ["a likelihood alone is no pair loss"])
    options = {"loss_types": types_, "loss_weights": weights, "label_smoothing": 0.1, "ld_alpha": ld_alpha}
    assert_same(preferences, monkeypatch, caplog, **options)


def test_a_mixture_is_one_launch(monkeypatch):
    calls = count_losses(monkeypatch)
    with rlfast.patch("trl"):
        preferences(torch.float32, loss_types=["sigmoid", "hinge", "apo_zero", "sft"])
    assert len(calls) == 1


@pytest.mark.parametrize("loss_type", COMPARED)
@pytest.mark.parametrize("divergence", ("forward_kl", "js_divergence"))
def test_dpo_divergences(loss_type, divergence, monkeypatch, caplog):
    options = {"loss_types": [loss_type], "f_divergence_type": divergence, "label_smoothing": 0.1}
    assert_same(preferences, monkeypatch, caplog, **options)


@pytest.mark.parametrize("alpha", (0.3, 1.0, 1.0 - 1e-7, 2.0))
def test_dpo_alpha_divergence(alpha, monkeypatch):
    """TRL's own has no float64; its score in float64 is given to it as the log-ratio of one token."""
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    yardstick = preferences(torch.float32, **options)
    with rlfast.patch("trl"):
        got = preferences(torch.float32, **options)
    leaf, _, policy, reference, _ = fields(torch.float64)
    ratio, rate = (policy.log_probs - reference.log_probs).sum(1), alpha - 1
    score = ratio if abs(rate) < 1e-6 else torch.expm1(rate * ratio) / rate
    loss = torch.nn.functional.softplus(-0.1 * torch.sub(*score.chunk(2))).mean()
    assert_value("loss", got[0], loss.detach(), yardstick[0])
    assert_gradient("gradient", got[1], torch.autograd.grad(loss, leaf)[0], yardstick[1])


# TRL's own hinge cannot be weighted: it changes in place what its backward reads
@pytest.mark.parametrize("loss_type", [name for name in UNSORTED if name != "hinge"])
def test_dpo_weights_of_wpo(loss_type, monkeypatch, caplog):
    options = {"loss_types": [loss_type], "use_weighting": True, "label_smoothing": 0.1}
    assert_same(preferences, monkeypatch, caplog, **options)


def test_dpo_weights_of_wpo_with_hinge():
    got = patched(preferences, loss_types=["hinge"], use_weighting=True)

    def plain(dtype):
        leaf, mask, policy, reference, _ = fields(dtype)
        x = 0.1 * torch.sub(*(policy.log_probs - reference.log_probs).sum(1).chunk(2))
        kept = mask[:, 1:]
        aligned = ((policy.log_probs - policy.log_sum_sq_probs).detach() * kept).sum(1) / kept.sum(1).clamp(min=1)
        loss = (torch.relu(1 - x) * torch.mul(*aligned.exp().chunk(2))).mean()
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    truth, yardstick = plain(torch.float64), plain(torch.float32)
    assert_value("loss", got[0], truth[0], yardstick[0])
    assert_gradient("gradient", got[1], truth[1], yardstick[1])


@pytest.mark.parametrize("loss_type", trl_preference.KTO_ROWS)
@pytest.mark.parametrize("precomputed", (False, True))
def test_kto(loss_type, precomputed, monkeypatch, caplog):
    options = {"loss_type": loss_type, "desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.2}
    assert_same(responses, monkeypatch, caplog, **options, precompute_ref_logps=precomputed)


@pytest.mark.parametrize("desirable", (False, True))
def test_kto_of_one_kind_alone(desirable, monkeypatch, caplog):
    assert_same(responses, monkeypatch, caplog, desirable=desirable)


@pytest.mark.parametrize("margin", (False, True))
@pytest.mark.parametrize("centring", (None, 0.05))
def test_reward(margin, centring, monkeypatch, caplog):
    assert_same(rewards, monkeypatch, caplog, margin=margin, center_rewards_coefficient=centring)


@pytest.mark.parametrize("method", (preferences, responses))
def test_the_router_of_a_mixture_of_experts(method, monkeypatch, caplog):
    assert_same(method, monkeypatch, caplog, aux_loss_enabled=True)


def test_virtual_tokens_before_the_prompt():
    """Prompt-learning PEFT has them; a model that puts any before changes nothing."""
    with rlfast.patch("trl"):
        wanted = preferences(torch.float32)[0]
        original = fields

        def longer(*args):
            leaf, mask, *outputs, rest = original(*args)
            for out in outputs:
                for name, x in vars(out).items():
                    if x.dim() == 2:
                        setattr(out, name, torch.nn.functional.pad(x, (3, 0), value=1))
            return leaf, mask, *outputs, rest

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.fields", longer)
            assert_same_bits("loss", preferences(torch.float32)[0], wanted)


def test_a_model_that_is_its_own_reference():
    """PEFT switches its adapter off for the second call."""
    _, mask, policy, reference, _ = fields(torch.float32)
    model = Model(policy, reference)
    trainer = trainer_of(model, None)
    with trl_outputs.watched(trainer, model) as seen:
        for _ in range(2):
            model(labels=mask)
    loss = trl_dpo.dpo(trainer, seen, {"completion_mask": mask})
    assert_same_bits("loss", loss.detach(), patched(preferences)[0])
    assert not model._forward_hooks


def patched(method, **settings):
    with rlfast.patch("trl"):
        return method(torch.float32, **settings)


@pytest.mark.parametrize("on", (False, True))
def test_outputs_are_returned_where_they_are_asked_for(on):
    _, mask, policy, reference, _ = fields(torch.float32)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    trainer = trainer_of(Model(policy), Model(reference))
    with rlfast.patch("trl") if on else contextlib.nullcontext(), pytest.warns(FutureWarning):
        loss, outputs = trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, True)
    assert loss.requires_grad and outputs.logits == "all of them"


class Wrapped(torch.Tensor):
    """Stands for the tensor subclasses that sharding brings."""


REASONS = {
    "type": (preferences, {"loss_types": ["hinge"]}, "has no loss_type 'hinge'"),
    "divergence": (preferences, {"f_divergence_type": "forward_kl"}, "has no f_divergence_type 'forward_kl'"),
    "subclass": (preferences, {}, "log_probs is a Wrapped"),
    "kto": (responses, {"loss_type": "apo_zero_unpaired"}, "has no loss_type 'apo_zero_unpaired'"),
    "beta": (responses, {"beta": 0.0}, "beta: expected a float > 0"),
    "calls": (rewards, {}, "its model was not called as rlfast knows"),
}


@pytest.mark.parametrize("why", REASONS)
def test_trls_own_loss_stands_where_rlfast_cannot_and_says_so_once(why, monkeypatch, caplog):
    patching.say_once.cache_clear()
    method, options, words = REASONS[why]
    wanted = method(torch.float32, **options)
    monkeypatch.delitem(trl_dpo.DPO_ROWS, "hinge")
    monkeypatch.delitem(trl_dpo.DIVERGENCES, "forward_kl")
    monkeypatch.delitem(trl_preference.KTO_ROWS, "apo_zero_unpaired")
    if why == "subclass":
        monkeypatch.setattr(trl_outputs, "scored", lambda outputs, scored=trl_outputs.scored: [
            types.SimpleNamespace(log_probs=out.log_probs.as_subclass(Wrapped)) for out in scored(outputs)
        ])  # fmt: skip
    if why == "calls":
        monkeypatch.setattr(Model, "register_forward_hook", lambda self, hook: types.SimpleNamespace(remove=str))
    calls = count_losses(monkeypatch)
    with caplog.at_level(logging.WARNING, "rlfast.integrations"):
        got = [patched(method, **options) for _ in range(2)]
    assert not calls and len(caplog.records) == 1
    assert "_loss runs as it is: " in caplog.text and words in caplog.text
    for name, x, y in zip(("loss", "gradient"), got[0], wanted, strict=False):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("kind", [kind for kind, (name, *_) in KINDS.items() if name in ("DPO", "KTO", "Reward")])
def test_trainers_take_the_same_steps(kind, tmp_path, monkeypatch):
    stock = steps_of(kind, word_tokenizer(), tmp_path / "stock", contextlib.nullcontext())
    calls = count_losses(monkeypatch)
    mine = steps_of(kind, word_tokenizer(), tmp_path / "rlfast", rlfast.patch("trl"))
    assert calls
    assert_same_steps(mine, stock)
    assert any(name.startswith("eval_") for logs in mine.metrics for name in logs)


def test_undo_restores_the_methods():
    owners = [(getattr(trl, seam.trainer), seam.method) for seam in trl_preference.SEAMS]
    before = [vars(owner)[method] for owner, method in owners]
    with rlfast.patch("trl") as patch:
        names = {f"trl.trainer.{s.module}.{s.trainer}.{s.method}" for s in trl_preference.SEAMS}
        assert names <= set(patch.replaced)
        assert all(vars(o)[m] is not b for (o, m), b in zip(owners, before, strict=True))
        once = [vars(owner)[method] for owner, method in owners]
        rlfast.patch("trl")
        assert [vars(owner)[method] for owner, method in owners] == once
    assert [vars(owner)[method] for owner, method in owners] == before


def test_a_method_that_changed_is_left_alone(monkeypatch, caplog):
    def reads_less(self, model, inputs, return_outputs):
        return self.beta

    def takes_more(self, model, inputs, return_outputs, scale):
        return scale

    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", reads_less)
    monkeypatch.setattr(trl.KTOTrainer, "_compute_loss", takes_more)
    with pytest.raises(RuntimeError, match=r"DPOTrainer\._compute_loss does not read log_probs.*KTOTrainer.*takes \("):
        rlfast.patch("trl")
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("trl", untested=True) as patch:
        assert vars(trl.DPOTrainer)["_compute_loss"] is reads_less
        assert "trl.trainer.reward_trainer.RewardTrainer.compute_loss" in patch.replaced
    assert caplog.text.count("it is left alone") == 2
