"""DPOTrainer's loss under ``rlfast.patch("trl")`` where the policy's head makes it: TRL's method, a tiny model."""

from __future__ import annotations

import logging
import types
from collections import defaultdict

import pytest
import torch

import rlfast
from rlfast import preference_linear
from rlfast.integrations import patching, trl_dpo

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from trl.trainer import utils  # noqa: E402

from rlfast.compare.tiny import VOCAB, tiny  # noqa: E402
from tests.trl_trainers import OneProcess, assert_same_loss  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_chunks")
PAIRS, LENGTH = 5, 13
FUSED = [t for t in trl_dpo.DPO_ROWS if not t.startswith("aot") and t not in ("ipo", "sigmoid_norm")]
WAYS = {"keep": 1 << 20, "pairs": 16 * VOCAB * 4, "recompute": 0}  # bytes of logits; a pair has up to seven rows


def trainer_of(**settings):
    """A DPOTrainer that has what its loss reads, with the defaults of TRL's configuration."""
    given = {
        "beta": 0.3, "label_smoothing": 0.1, "ld_alpha": None, "precompute_ref_logps": False, "use_weighting": False,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "discopop_tau": 0.2,
        "loss_types": ["sigmoid"], "aux_loss_enabled": False, "router_aux_loss_coef": 0.25, "family": "Qwen2",
        "gradient_checkpointing_kwargs": None, "model": {},
    } | settings  # fmt: skip
    given.setdefault("loss_weights", [1.0] * len(given["loss_types"]))
    trainer, options = object.__new__(trl.DPOTrainer), given.pop("model")
    policy, reference = tiny(given["family"], **options), tiny(given["family"], **options)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    utils.add_fused_lm_head(policy, outputs=outputs + (("log_sum_sq_probs",) if given["use_weighting"] else ()))
    utils.add_fused_lm_head(reference)
    trainer.__dict__.update(
        given, args=types.SimpleNamespace(**given), model=policy, ref_model=reference, accelerator=OneProcess(),
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    policy.train()
    return trainer


def batch(trainer, lengths=None) -> dict:
    """Prompts of one to five tokens, and completions of different lengths, one of them of no token."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (2 * PAIRS, LENGTH), generator=draw)
    start = torch.randint(1, 6, (2 * PAIRS, 1), generator=draw)
    end = start + torch.randint(1, LENGTH - 5, (2 * PAIRS, 1), generator=draw)
    end[PAIRS] = start[PAIRS]
    end = end if lengths is None else start + torch.tensor(lengths).unsqueeze(1)
    place = torch.arange(LENGTH)
    mask = ((place >= start) & (place < end)).long()
    inputs = {"input_ids": ids, "attention_mask": (place < end).long(), "completion_mask": mask}
    if trainer.precompute_ref_logps:
        labels = ids.masked_fill(mask == 0, -100)
        with torch.no_grad():
            out = trainer.ref_model(
                input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True
            )
        inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = out.log_probs.sum(1).chunk(2)
        trainer.ref_model = None
    return inputs


def taken(lengths=None, **settings) -> tuple:
    """(loss, {name: gradient}, metrics, calls of the reference) of the method as it is now."""
    trainer = trainer_of(**settings)
    inputs, calls = batch(trainer, lengths), []
    if trainer.ref_model is not None:
        trainer.ref_model.register_forward_hook(lambda *_: calls.append(1))
    before = trainer.ref_model
    loss = trainer._compute_loss(trainer.model, inputs, False)
    assert trainer.ref_model is before
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, trainer._metrics["train"], len(calls)


def count(monkeypatch) -> list:
    calls = []
    run = preference_linear.run
    monkeypatch.setattr(preference_linear, "run", lambda *args: calls.append(args) or run(*args))
    return calls


def assert_same(monkeypatch, caplog, budget: int = 1 << 20, fused: bool = True, **settings) -> None:
    """The number, every parameter's gradient and the metrics; the reference is called as often."""
    stock = taken(**settings)
    calls = count(monkeypatch)
    monkeypatch.setattr(trl_dpo, "MEMORY_BUDGET", budget)
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        mine = taken(**settings)
    assert len(calls) == fused and not caplog.records
    assert mine[3] == stock[3]
    assert_same_loss(mine, stock)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_type", FUSED)
def test_every_loss_type(loss_type, way, monkeypatch, caplog):
    groups, by_chunks = [], preference_linear.by_chunks
    monkeypatch.setattr(preference_linear, "by_chunks", lambda *args: groups.append(args[3]) or by_chunks(*args))
    assert_same(monkeypatch, caplog, WAYS[way], loss_types=[loss_type])
    assert groups == ([[(0, 2), (2, 4), (4, 5)]] if way == "pairs" else [])


@pytest.mark.parametrize("options", ({"ld_alpha": 0.4}, {"precompute_ref_logps": True}), ids=str)
@pytest.mark.parametrize("loss_type", ("sigmoid", "nca_pair", "hinge"))
def test_options(loss_type, options, monkeypatch, caplog):
    assert_same(monkeypatch, caplog, WAYS["pairs"], loss_types=[loss_type], **options)


def test_as_many_tokens_as_responses(monkeypatch, caplog):
    """Sums of the reference are not taken for tokens."""
    lengths = (2, 1, 0, 1, 1, 1, 1, 1, 1, 1)
    assert_same(monkeypatch, caplog, WAYS["pairs"], precompute_ref_logps=True, lengths=lengths)


@pytest.mark.parametrize("divergence", trl_dpo.DIVERGENCES)
def test_divergences(divergence, monkeypatch, caplog):
    assert_same(monkeypatch, caplog, WAYS["pairs"], f_divergence_type=divergence)


def test_a_mixture(monkeypatch, caplog):
    mixture = {"loss_types": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}
    assert_same(monkeypatch, caplog, WAYS["pairs"], **mixture)


def test_a_mixture_of_experts(monkeypatch, caplog):
    """The router's loss is differentiated too."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert_same(monkeypatch, caplog, WAYS["pairs"], family="Mixtral", model=experts, aux_loss_enabled=True)


WHY = {
    "weights": ({"use_weighting": True}, "use_weighting weighs pairs"),
    "likelihood": ({"loss_types": ["sigmoid", "sft"]}, "the likelihood of the chosen responses"),
    "sorted": ({"loss_types": ["aot"]}, "it sorts the whole batch"),
    "mean": ({"loss_types": ["ipo"]}, "it divides by lengths"),
    "tail": ({"ld_alpha": 0.4, "precompute_ref_logps": True}, "the reference's sums have ld_alpha"),
}


@pytest.mark.parametrize("why", WHY)
def test_log_probs_first_where_the_loss_needs_them_and_says_so_once(why, monkeypatch, caplog):
    settings, words = WHY[why]
    patching.say_once.cache_clear()
    if why != "tail":
        assert_same(monkeypatch, caplog, fused=False, **settings)
    patching.say_once.cache_clear()
    with rlfast.patch("trl"), caplog.at_level(logging.INFO, "rlfast.integrations"):
        for _ in range(2):
            taken(**settings)
    assert sum(words in record.getMessage() for record in caplog.records) == 1


def test_an_error_of_the_model_leaves_the_reference(monkeypatch):
    with rlfast.patch("trl"):
        trainer = trainer_of()
        reference = trainer.ref_model
        inputs = batch(trainer)
        monkeypatch.setattr(preference_linear, "run", None)
        with pytest.raises(TypeError):
            trainer._compute_loss(trainer.model, inputs, False)
        assert trainer.ref_model is reference


def test_an_evaluation_has_no_fusion(monkeypatch):
    calls = count(monkeypatch)
    with rlfast.patch("trl"), torch.no_grad():
        trainer = trainer_of()
        trainer._compute_loss(trainer.model, batch(trainer), False)
    assert not calls
