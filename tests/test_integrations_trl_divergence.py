"""The divergences of TRL's distillation under ``rlfast.patch("trl")``: its own functions in float64 are the truth."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys

import pytest
import torch

import rlfast
from rlfast.integrations import patching
from rlfast.integrations import trl as ours
from tests.numerics import assert_gradient, assert_same_bits, assert_value

pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from trl.trainer import distillation_trainer

VOCAB, ROWS, WIDTHS = 151, 60, (24, 40)  # of student and teacher
BETAS = (0.0, 0.3, 1.0)


def heads(dtype, bias: bool = True):
    """Hidden states, weight and bias of a student and a teacher."""
    draw = torch.Generator().manual_seed(0)
    make = lambda *shape, scale=1.0: (scale * torch.randn(shape, generator=draw)).to(dtype)  # noqa: E731
    found = []
    for width in WIDTHS:
        found += [make(ROWS, width), make(VOCAB, width, scale=0.4), make(VOCAB) if bias else None]
    return found


def plain(given, beta, temperature, options, dtype):
    """Divergence, entropy and the gradients of the student's tensors, term by term."""
    given = [None if x is None else x.to(dtype) for x in given]
    leaves = [x.requires_grad_() for x in given[:3] if x is not None]

    def logp(hidden, weight, bias, scale, cap):
        z = hidden @ weight.T * scale if bias is None else (hidden @ weight.T + bias) * scale
        z = z if cap is None else cap * torch.tanh(z / cap)
        return (z / temperature).log_softmax(-1)

    s, t = logp(*given[:3], *options[:2]), logp(*given[3:], *options[2:])
    if beta in (0.0, 1.0):
        p, q = (t, s) if beta == 0.0 else (s, t)
        out = (p.exp() * (p - q)).sum(-1)
    else:
        m = ((1 - beta) * s.exp() + beta * t.exp()).log()
        out = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
    return out.detach(), -(s.exp() * s).sum(-1).detach(), torch.autograd.grad((out * pull(dtype)).sum(), leaves)


def pull(dtype):
    return torch.linspace(0.5, 1.5, ROWS).to(dtype)


OPTIONS = {"plain": (1.0, None, 1.0, None), "soft-cap and scale": (0.5, 3.0, 2.0, 5.0)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("beta", BETAS)
def test_chunked_divergence(beta, option, dtype):
    given, options = heads(dtype, bias=option != "plain"), OPTIONS[option]
    truth, yardstick = (plain(given, beta, 0.7, options, d) for d in (torch.float64, torch.float32))
    leaves = [x.requires_grad_() for x in given[:3] if x is not None]
    with rlfast.patch("trl"):
        value, entropy = distillation_trainer.ChunkedDivergenceFunction.apply(*given, beta, 0.7, *options)
    assert value.dtype == entropy.dtype == torch.float32 and not entropy.requires_grad
    grads = torch.autograd.grad((value * pull(torch.float32)).sum(), leaves)
    assert_value("divergence", value.detach(), truth[0], yardstick[0])
    assert_value("entropy", entropy, truth[1], yardstick[1])
    for got, true, near in zip(grads, truth[2], yardstick[2], strict=True):
        assert got.dtype == dtype
        assert_gradient("gradient", got, true, near)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("beta", BETAS)
def test_trls_own_kernel(beta, option):
    """The same numbers as TRL's, where both are float32."""
    given, options = heads(torch.float32, bias=option != "plain"), OPTIONS[option]
    found = []
    for context in (contextlib.nullcontext(), rlfast.patch("trl")):
        leaves = [x.detach().requires_grad_() if x is not None else None for x in given[:3]]
        with context:
            out = distillation_trainer.ChunkedDivergenceFunction.apply(*leaves, *given[3:], beta, 0.7, *options)
        grads = torch.autograd.grad((out[0] * pull(torch.float32)).sum(), [x for x in leaves if x is not None])
        found.append([out[0].detach(), out[1], *grads])
    for theirs, mine in zip(*found, strict=True):
        assert (mine - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_a_teacher_of_another_dtype_and_autocast():
    given = heads(torch.float32, bias=False)
    given[3:5] = [x.bfloat16() for x in given[3:5]]
    wide = [x.float() if x is not None else None for x in given]
    got = ours.chunked_divergence(*given, 0.5)[0]
    assert_same_bits("a teacher in bfloat16", got, ours.chunked_divergence(*wide, 0.5)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ours.chunked_divergence(*wide, 0.5)[0]
    rounded = [x.bfloat16() if x is not None else None for x in wide]
    assert_same_bits("autocast", got, ours.chunked_divergence(*rounded, 0.5)[0])


def test_no_rows_and_a_frozen_head():
    given = heads(torch.float32, bias=False)
    hidden = given[0][:0].requires_grad_()
    value, _ = ours.chunked_divergence(hidden, given[1], None, given[3][:0], given[4], None, 0.5)
    value.sum().backward()
    assert hidden.grad.shape == hidden.shape and given[1].grad is None


@pytest.mark.parametrize("items", (None, 17, torch.tensor(17)))
def test_the_trainers_loss_projects_the_counted_rows_alone(items, monkeypatch):
    hidden, weight, _, ref_hidden, ref_weight, _ = heads(torch.float32, bias=False)
    mask, rows = torch.arange(ROWS).reshape(4, -1) % 3 == 0, []
    args = hidden.reshape(4, -1, WIDTHS[0]), ref_hidden.reshape(4, -1, WIDTHS[1]), weight, ref_weight, mask, 0.5, items
    stock = distillation_trainer._chunked_divergence_loss(*args)
    kernel = ours.trl_divergence.linear_divergence
    monkeypatch.setattr(
        ours.trl_divergence, "linear_divergence", lambda h, *a, **k: rows.append(len(h)) or kernel(h, *a, **k)
    )
    with rlfast.patch("trl"):
        mine = distillation_trainer._chunked_divergence_loss(*args)
    assert rows == [int(mask.sum())]
    for a, b in zip(mine, stock, strict=True):
        assert abs(a - b) <= 1e-5 * abs(b)


TRAINERS = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}


def trainer(name: str):
    return getattr(importlib.import_module(f"trl.experimental.{name}.{name}_trainer"), TRAINERS[name])


def logits(dtype, seed=0):
    """[4, 13, V] of both, sliced: not contiguous."""
    draw = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(4, 13, VOCAB + 1, generator=draw)).to(dtype)[..., :-1] for _ in range(2)]


def labels():
    found = torch.ones(4, 13, dtype=torch.int64)
    found[:, :5] = -100
    found[1] = -100
    return found


def jsd(name, dtype, **options):
    """(losses, gradients of the student's logits) of twelve batches as the trainer's method is now.

    The largest error of one number is an accident.
    """
    losses, gradients = [], []
    for seed in range(12):
        student, teacher = logits(dtype, seed)
        student.requires_grad_()
        loss = trainer(name).generalized_jsd_loss(student, teacher, **options)
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, student)[0])
    return torch.stack(losses), torch.stack(gradients)


def assert_jsd(name, caplog, **options):
    truth, yardstick = (jsd(name, dtype, **options) for dtype in (torch.float64, torch.float32))
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        got = jsd(name, torch.float32, **options)
    assert not caplog.records
    assert_value("loss", got[0], truth[0], yardstick[0])
    assert_gradient("gradient", got[1], truth[1], yardstick[1])


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("beta", BETAS)
def test_generalized_jsd_loss(name, beta, caplog):
    assert_jsd(name, caplog, labels=labels(), beta=beta, temperature=0.8)


@pytest.mark.parametrize("reduction", ("batchmean", "sum", "mean"))
@pytest.mark.parametrize("labelled", (False, True))
def test_reductions(reduction, labelled, caplog):
    assert_jsd("gkd", caplog, labels=labels() if labelled else None, reduction=reduction)


@pytest.mark.parametrize("items", (11, torch.tensor(11)))
def test_items_of_the_global_batch(items, caplog):
    assert_jsd("gkd", caplog, labels=labels(), num_items_in_batch=items, reduction="none")


@pytest.mark.parametrize("beta", (0, 1))
@pytest.mark.parametrize("add_tail", (False, True))
@pytest.mark.parametrize("reduction", ("batchmean", "mean"))
def test_top_k(beta, add_tail, reduction, caplog):
    options = {"labels": labels(), "beta": beta, "top_k": 5, "add_tail": add_tail, "reduction": reduction}
    assert_jsd("iw_opd", caplog, **options)


WHY = {
    "terms": ("gkd", {"reduction": "none"}, "keeps a term for each outcome"),
    "probabilities": ("gold", {"logits_are_probs": True}, "need not add up to 1"),
    "two supports": ("iw_opd", {"top_k": 5, "beta": 0.5}, "the support of both models"),
}


@pytest.mark.parametrize("why", WHY)
def test_trls_own_loss_runs_where_rlfast_cannot_and_says_so_once(why, caplog):
    name, options, words = WHY[why]
    given = [x.softmax(-1) for x in logits(torch.float32)]
    stock = trainer(name).generalized_jsd_loss(*given, **options)
    patching.say_once.cache_clear()
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        for _ in range(2):
            mine = trainer(name).generalized_jsd_loss(*given, **options)
    assert_same_bits("loss", mine, stock)
    assert [words in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize(
    "call, words",
    (
        (lambda s, t: ours.generalized_jsd_loss(s, t, reduction="none"), "reduction: expected one of"),
        (lambda s, t: ours.gold_jsd_loss(s, t, logits_are_probs=True), "logits_are_probs: expected False"),
        (lambda s, t: ours.iw_opd_jsd_loss(s, t, top_k=3), "beta: expected 0 or 1 with top_k"),
    ),
)
def test_called_directly_it_says_what_it_cannot(call, words):
    with pytest.raises(ValueError, match=words):
        call(*logits(torch.float32))


def test_trainers_imported_while_the_patch_is_on_are_reached_and_left():
    modules = {name: f"trl.experimental.{name}.{name}_trainer" for name in ("gkd", "cpo")}
    kept = {module: sys.modules.pop(module, None) for module in modules.values()}
    try:
        with rlfast.patch("trl") as patch:
            gkd, cpo = (importlib.import_module(module) for module in modules.values())
            assert f"{modules['gkd']}.GKDTrainer.generalized_jsd_loss" in patch.replaced
            assert gkd.GKDTrainer.generalized_jsd_loss.__wrapped__ and cpo.CPOTrainer.get_batch_logps.__wrapped__
        assert not hasattr(gkd.GKDTrainer.generalized_jsd_loss, "__wrapped__")
        assert not hasattr(cpo.CPOTrainer.get_batch_logps, "__wrapped__")
        assert not any(isinstance(finder, patching.AfterImport) for finder in sys.meta_path)
    finally:
        sys.modules.update({module: was for module, was in kept.items() if was is not None})
