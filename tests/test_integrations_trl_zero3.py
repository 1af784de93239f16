"""Heads that ZeRO-3 has partitioned, under ``rlfast.patch("trl")``: a stand-in for what TRL takes of DeepSpeed."""

from __future__ import annotations

import enum
import importlib.machinery
import logging
import sys
import types

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import rlfast
from rlfast.integrations import patching, trl_dpo, trl_head
from rlfast.rollout import training

pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from trl.trainer import distillation_trainer, utils

from tests import test_integrations_trl_dpo as dpo
from tests import test_integrations_trl_grpo as grpo
from tests.trl_trainers import CLOSE

ROWS, WIDTH, VOCAB = 40, 24, 151
Status = enum.Enum("ZeroParamStatus", ("AVAILABLE", "NOT_AVAILABLE"))
gathers = []  # of each, the memory that it filled


def partition(*parameters) -> None:
    """Leave nothing of them here; what adds up their gradients is from before, as DeepSpeed has it."""
    for p in parameters:
        if p.requires_grad and not hasattr(p, "ds_sums"):
            p.ds_sums = p.expand_as(p).grad_fn.next_functions[0][0]
        p.ds_tensor, p.ds_status = getattr(p, "ds_tensor", p.data), Status.NOT_AVAILABLE
        p.data = torch.empty(0, dtype=p.dtype)


class GatheredParameters:
    """``deepspeed.zero.GatheredParameters``, which mishandles what is there already."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for p in self.parameters:
            assert p.ds_status == Status.NOT_AVAILABLE
            p.data, p.ds_status = p.ds_tensor.clone(), Status.AVAILABLE
        gathers.append([StorageWeakRef(p.data.untyped_storage()) for p in self.parameters])

    def __exit__(self, *_):
        partition(*self.parameters)


@pytest.fixture(autouse=True)
def zero3(monkeypatch):
    """DeepSpeed, with its third stage on."""
    held = {
        "deepspeed": {"zero": types.SimpleNamespace(GatheredParameters=GatheredParameters)},
        "deepspeed.runtime": {},
        "deepspeed.runtime.zero": {},
        "deepspeed.runtime.zero.partition_parameters": {"ZeroParamStatus": Status},
    }
    for name, attributes in held.items():
        module = types.ModuleType(name)
        vars(module).update(attributes, __spec__=importlib.machinery.ModuleSpec(name, None))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True)
    gathers.clear()


def nothing_is_kept() -> bool:
    """Whether what was gathered has been given up."""
    return all(memory.expired() for gather in gathers for memory in gather)


def drawn(width: int = WIDTH, seed: int = 0, frozen: bool = False) -> tuple:
    """(hidden, a head's weight and bias, which are partitioned)."""
    draw = torch.Generator().manual_seed(seed)
    hidden, *head = (torch.randn(shape, generator=draw) for shape in ((ROWS, width), (VOCAB, width), (VOCAB,)))
    weight, bias = (torch.nn.Parameter(0.4 * x, requires_grad=not frozen) for x in head)
    partition(weight, bias)
    return hidden.requires_grad_(not frozen), weight, bias


def log_probs(targets, autocast: bool) -> tuple:
    """Log-probs and gradients of TRL's head, called as TRL calls it."""
    head = drawn()
    with utils.maybe_gather_lm_head_ctx(*head[1:]), torch.autocast("cpu", enabled=autocast):
        out = utils._ChunkedLogProbFunction.apply(*head, targets, 0.7, 64)
    assert nothing_is_kept()
    return out[0].detach(), out[1].detach(), *torch.autograd.grad(out[0].sum() + out[1].sum(), head)


def divergences(beta: float, autocast: bool) -> tuple:
    """The same of two heads, which TRL's kernel gathers itself."""
    student, teacher = drawn(), drawn(2 * WIDTH, 1, frozen=True)
    apply = distillation_trainer.ChunkedDivergenceFunction.apply
    with torch.autocast("cpu", enabled=autocast):
        value, entropy = apply(*student, *teacher, beta, 0.7)
    assert nothing_is_kept()
    return value.detach(), entropy.detach(), *torch.autograd.grad(value.sum(), student)


def steps_of_grpo(**settings) -> tuple:
    """Loss and gradients of a GRPOTrainer's batch."""
    trainer = grpo.trainer_of(model={"tie_word_embeddings": False}, **settings)
    head = trainer.model.lm_head.weight
    partition(head)
    inputs = grpo.batch(trainer)
    trainer.model.train()
    gathers.clear()
    loss = trainer._compute_loss(trainer.model, inputs)
    assert nothing_is_kept()
    return loss.detach(), *torch.autograd.grad(0.3 * loss, list(trainer.model.parameters()))


def steps_of_dpo(**settings) -> tuple:
    """Loss and gradients of a DPOTrainer's batch, whose reference is partitioned too."""
    trainer = dpo.trainer_of(model={"tie_word_embeddings": False}, **settings)
    inputs, heads = dpo.batch(trainer), [model.lm_head.weight for model in (trainer.model, trainer.ref_model)]
    partition(*heads)
    loss = trainer._compute_loss(trainer.model, inputs, False)
    assert nothing_is_kept()
    return loss.detach(), *torch.autograd.grad(0.3 * loss, list(trainer.model.parameters()))


def assert_same(caplog, call, uses: int, rtol: float = CLOSE) -> None:
    """TRL's own and ours; ours has gathered heads so many times, and TRL's has not run in its place."""
    patching.say_once.cache_clear()
    stock = call()
    gathers.clear()
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        mine = call()
    assert not caplog.records and len(gathers) == uses
    for ours, theirs in zip(mine, stock, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= rtol * theirs.abs().max()


@pytest.mark.parametrize("autocast", (False, True))
def test_heads(autocast, caplog):
    """Once by TRL, around the head, and once in the backward."""
    targets = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))
    assert_same(caplog, lambda: log_probs(targets, autocast), 2, 0.02 if autocast else CLOSE)


@pytest.mark.parametrize(("beta", "autocast"), ((0.0, False), (0.3, False), (1.0, False), (0.3, True)))
def test_divergences(beta, autocast, caplog):
    """Those of two models, forward and backward."""
    assert_same(caplog, lambda: divergences(beta, autocast), 4, 0.02 if autocast else CLOSE)


@pytest.mark.parametrize("options", ({}, {"entropy_coef": 0.2, "beta": 0.1}), ids=str)
def test_grpo(options, caplog, monkeypatch):
    """A loss whose gradients are made with it has the head once."""
    calls = grpo.count(monkeypatch)
    assert_same(caplog, lambda: steps_of_grpo(loss_type="grpo", **options), 1)
    assert len(calls) == 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("way", "uses"), (("keep", 3), ("pairs", 2), ("recompute", 3)))
def test_dpo(way, uses, caplog, monkeypatch):
    """The reference's and the policy's; and the policy's again where its backward reads it."""
    calls = dpo.count(monkeypatch)
    monkeypatch.setattr(trl_dpo, "MEMORY_BUDGET", dpo.WAYS[way])
    assert_same(caplog, steps_of_dpo, uses)
    assert len(calls) == 1


def test_a_bitwise_step_has_trls_head(caplog, monkeypatch):
    """Its backward makes the logits again without a group to gather by."""
    monkeypatch.setattr(training, "active", lambda: True)
    patching.say_once.cache_clear()
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        log_probs(torch.zeros(ROWS, dtype=torch.int64), False)
    assert "ZeRO-3 has partitioned the head" in caplog.text


def test_without_zero3_nothing_is_gathered(monkeypatch):
    monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: False)
    _, weight, bias = drawn()
    with trl_head.whole((weight, bias)) as group:
        assert group is None and not gathers and not len(weight)
