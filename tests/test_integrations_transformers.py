"""transformers' loss on rlfast equals ``ForCausalLMLoss``, and can be set on a model and taken back."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.loss.loss_utils import ForCausalLMLoss

from rlfast.integrations import patching
from rlfast.integrations import transformers as ours
from tests.numerics import assert_gradient, assert_value

B, T, V = 3, 20, 211


def draws(dtype=torch.float32):
    torch.manual_seed(0)
    logits, labels = torch.randn(B, T, V).mul(3).to(dtype), torch.randint(V, (B, T))
    labels[:, :4], labels[1] = -100, -100
    return logits, labels


def outcome(function, logits, labels, **options):
    leaf = logits.clone().requires_grad_()
    loss = function(leaf, labels, V, **options)
    loss.backward()
    return loss.detach(), leaf.grad


class Float64:
    """``ForCausalLMLoss`` of float64 logits, whose ``float()`` keeps them."""

    @staticmethod
    def loss(logits, labels, vocab_size, **options):
        cast = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double
        try:
            return ForCausalLMLoss(logits, labels, vocab_size, **options)
        finally:
            torch.Tensor.float = cast


OPTIONS = [
    {"num_items_in_batch": n} | shifted | ignored
    for n, shifted, ignored in itertools.product(
        (None, 17, torch.tensor(17)), ({}, {"shift_labels": True}), ({}, {"ignore_index": 7}, {"use_cache": False})
    )
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()))
def test_equals_transformers(options, dtype):
    logits, labels = draws(dtype)
    options = dict(options)
    if "ignore_index" in options:
        labels = labels.masked_fill(labels == -100, options["ignore_index"])
    if options.pop("shift_labels", False):
        options["shift_labels"], labels = labels, None
    got = outcome(ours.loss_function, logits, labels, **options)
    truth = outcome(Float64.loss, logits.double(), labels, **options)
    yardstick = outcome(ForCausalLMLoss, logits.float(), labels, **options)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    terms = B * T * 5.0 / (options.get("num_items_in_batch") or 17)
    assert_value("loss", got[0], truth[0], yardstick[0], size=torch.as_tensor(terms, dtype=torch.float64))
    assert_gradient("gradient", got[1], truth[1], yardstick[1])
    with pytest.raises(AssertionError):
        assert_value("loss", 1.01 * got[0], truth[0], yardstick[0], size=torch.as_tensor(terms, dtype=torch.float64))
    with pytest.raises(AssertionError):
        assert_gradient("gradient", 1.01 * got[1], truth[1], yardstick[1])


def test_no_label_at_all():
    logits, labels = draws()
    labels[:] = -100
    for function in (ours.loss_function, ForCausalLMLoss):
        assert outcome(function, logits, labels)[0].isnan()
        loss, gradient = outcome(function, logits, labels, num_items_in_batch=3)
        assert loss == 0.0 and not gradient.any()


def test_errors_name_the_argument():
    logits, labels = draws()
    with pytest.raises(ValueError, match=r"logits: expected shape \[\*, 100\]"):
        ours.loss_function(logits, labels, 100)
    with pytest.raises(ValueError, match="targets: expected values"):
        ours.loss_function(logits, labels, V, ignore_index=3)  # −100 is no label then


def tiny():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()


def gradients(model, **inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_install_on_a_model_and_undo(monkeypatch):
    model, ids = tiny(), torch.randint(V, (2, 12))
    labels, calls, kernel = ids.clone(), [], ours.token_logps
    labels[:, :5] = -100
    monkeypatch.setattr(ours, "token_logps", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    for more in ({}, {"num_items_in_batch": torch.tensor(9)}):
        stock = gradients(model, input_ids=ids, labels=labels, **more)
        assert not calls
        with ours.install(model):
            mine = gradients(model, input_ids=ids, labels=labels, **more)
            assert calls.pop() and not calls
            with ours.install(model):
                pass
            assert model.loss_function is not ForCausalLMLoss  # the first to come takes it back
        assert mine[0] == pytest.approx(stock[0], rel=1e-6)
        torch.testing.assert_close(mine[1], stock[1], rtol=1e-4, atol=1e-7)
        assert model.loss_function is ForCausalLMLoss and "_loss_function" not in vars(model)
    model.loss_function = ours.loss_function  # the function alone does too
    assert gradients(model, input_ids=ids, labels=labels)[0] == pytest.approx(
        gradients(tiny(), input_ids=ids, labels=labels)[0]
    )


def test_install_puts_back_what_was_set():
    model = tiny()
    model.loss_function = ForCausalLMLoss
    undo = ours.install(model)
    assert model.loss_function is not ForCausalLMLoss
    undo()
    undo()
    assert vars(model)["_loss_function"] is ForCausalLMLoss
    undo = ours.install(model)
    mine = model.loss_function = lambda *_, **__: 0.0
    undo()
    assert model.loss_function is mine


def test_install_refuses_a_model_with_another_loss():
    model = tiny()
    model.loss_function = lambda **_: None
    with pytest.raises(ValueError, match="model: expected one whose loss_function is ForCausalLMLoss"):
        ours.install(model)
    with pytest.raises(ValueError, match="model: expected one"):
        ours.install(torch.nn.Linear(2, 2))


class Wrapped(torch.Tensor):
    """Stands for the tensor subclasses that sharding and quantisation bring."""


def test_the_original_runs_where_rlfast_cannot_and_says_so_once(caplog):
    patching.say_once.cache_clear()
    model, (logits, labels) = tiny(), draws()
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), ours.install(model):
        for _ in range(2):
            loss = model.loss_function(logits.as_subclass(Wrapped), labels, V)
    assert float(loss) == pytest.approx(float(ForCausalLMLoss(logits, labels, V)))
    assert len(caplog.records) == 1 and "ForCausalLMLoss runs as it is: logits is a Wrapped" in caplog.text
