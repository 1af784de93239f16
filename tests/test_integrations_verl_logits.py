"""verl's functions of logits, heads and masks, patched and not: the same values and gradients."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

pytest.importorskip("verl", reason='the verl package is missing: pip install --no-deps "verl==0.9.*"')
import rlfast
from rlfast.integrations import megatron, patching, verl_functional
from rlfast.integrations import verl as ours
from tests.numerics import assert_gradient, assert_value
from tests.verl_parity import LENGTH, MASKS, ROWS, VERL, close, mask_of, same, stock

VOCAB = 50257
functional = VERL.functional


@pytest.fixture(scope="module", autouse=True)
def patched():
    with rlfast.patch("verl"):
        yield


@pytest.fixture
def as_they_are(monkeypatch):
    """Why a call went to verl."""
    said = []
    monkeypatch.setattr(patching, "runs_as_it_is", lambda original, reason: said.append(reason))
    return said


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((5, VOCAB), (2, 3, 97), (0, 11)))
def test_functions_of_logits(as_they_are, shape, dtype):
    torch.manual_seed(0)
    logits, labels = torch.randn(shape) * 3, torch.randint(shape[-1], shape[:-1])
    names = ("logprobs_from_logits", "logprobs_from_logits_v2") if shape[0] else ()  # verl cannot stack no rows
    calls = [lambda verl, logits, name=name: getattr(verl.functional, name)(logits, labels) for name in names]
    calls.append(lambda verl, logits: verl.functional.entropy_from_logits(logits))
    if len(shape) == 2 and shape[0]:
        calls.append(lambda verl, logits: verl.functional.entropy_from_logits_with_chunking(logits, chunk_size=2))
    for call in calls:
        same(call, {"logits": logits}, dtype)
    with torch.no_grad():
        squares = (x.functional.calculate_sum_pi_squared_from_logits(logits) for x in (VERL, stock()))
        close("squares", *squares)
    assert not as_they_are


def test_slices_of_logits_and_labels_are_taken_as_they_are():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 9, 40), torch.randint(20, (3, 9))

    def call(verl, logits):
        return verl.functional.logprobs_from_logits(logits[:, :-1, ::2], labels[:, 1:], inplace_backward=False)

    same(call, {"logits": logits})


def test_inplace_backward_is_honoured_and_the_log_probs_may_be_changed():
    torch.manual_seed(0)
    labels = torch.randint(97, (4,))
    for inplace in (True, False):
        leaf = torch.randn(4, 97, requires_grad=True)
        logits, before = leaf * 1.0, leaf.detach().clone()
        logp = functional.logprobs_from_logits(logits, labels, inplace_backward=inplace)
        with torch.no_grad():
            logp.mul_(2.0)
        logp.sum().backward()
        expected = torch.nn.functional.one_hot(labels, 97) - before.softmax(-1)
        close("gradient", leaf.grad, expected)
        assert torch.equal(logits.detach(), before) != inplace


def test_entropy_compiles_without_a_break():
    compiled = torch.compile(functional.entropy_from_logits, dynamic=True, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        logits = torch.randn(rows, 97, requires_grad=True)
        close("entropy", compiled(logits), stock().functional.entropy_from_logits(logits))
        compiled(logits).sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((50,), (3, 17)))
def test_fused_linear(as_they_are, shape, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(*shape, 24).to(dtype), torch.randn(301, 24).to(dtype)
    ids, pull = torch.randint(301, shape), torch.randn(2, *shape).to(dtype)

    def run(function, compute):
        leaves = [x.to(compute).requires_grad_() for x in (hidden, weight)]
        logp, entropy = function(*leaves)
        total = (logp * pull[0].to(logp.dtype)).sum() + (entropy * pull[1].to(entropy.dtype)).sum()
        return (logp.detach(), entropy.detach()), torch.autograd.grad(total, leaves)

    def plain(h, w):
        logp = (h @ w.T / 0.7).log_softmax(-1)
        return logp.gather(-1, ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    truth, yardstick = run(plain, torch.float64), run(plain, torch.float32)
    for module in (VERL.fused.FusedLinearForPPO(), ours.FusedLinearForPPO()):
        got = run(lambda h, w, module=module: module(h, w, ids.int(), temperature=0.7), dtype)
        assert [x.dtype for x in got[0]] == [torch.float32, dtype]
        assert_value("logp", got[0][0], truth[0][0], yardstick[0][0])
        if dtype == torch.float32:
            assert_value("entropy", got[0][1], truth[0][1], yardstick[0][1])
        else:
            close("entropy", got[0][1], truth[0][1], dtype)
        for i in range(2):
            assert_gradient("gradient", got[1][i], truth[1][i], yardstick[1][i])
    assert not as_they_are


def test_fused_linear_gives_what_verl_gives():
    torch.manual_seed(0)
    leaves = {"hidden": torch.randn(40, 24), "weight": torch.randn(301, 24)}
    ids = torch.randint(301, (40,))
    same(lambda verl, hidden, weight: verl.fused.FusedLinearForPPO(chunk_size=7)(hidden, weight, ids, 1.3), leaves)
    same(lambda verl, hidden, weight: verl.fused.FusedLinearForPPOFunction.apply(hidden, weight, ids), leaves)


def test_linear_cross_entropy():
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 30, 24), torch.randn(301, 24)
    labels = torch.randint(301, (2, 30))

    def plain(dtype):
        logp = (hidden.to(dtype) @ weight.to(dtype).T / 0.7).log_softmax(-1).flatten(0, 1)
        return logp.gather(-1, labels.flatten()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    got = kernel.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    for name, *x in zip(("logp", "entropy"), got, plain(torch.float64), plain(torch.float32), strict=True):
        assert_value(name, *x)
    for reduction in ("sum", "mean"):
        total, entropy = kernel.linear_cross_entropy(hidden, weight, labels, 0.7, reduction)
        close(reduction, total, getattr(got[0], reduction)())
        close("entropy", entropy, got[1])
    with pytest.raises(ValueError, match="reduction: expected one of 'none', 'sum', 'mean'"):
        ours.linear_cross_entropy(hidden, weight, labels, 0.7, "max")


def test_a_sharded_vocabulary_is_ours(as_they_are):
    """It is the function that ``tests/test_vocab_layouts.py`` runs on ranks; here it says that there is no group."""
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    assert ours.linear_cross_entropy is verl_functional.linear_cross_entropy is megatron.linear_cross_entropy
    with pytest.raises(ValueError, match=r"process_group: expected None: torch\.distributed is not initialised"):
        kernel.linear_cross_entropy(torch.randn(2, 4), torch.randn(9, 4), torch.zeros(2).long(), 1.0, "none", object())
    assert not as_they_are


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MASKS)
def test_functions_of_masks(as_they_are, kind, dtype):
    torch.manual_seed(0)
    leaves, mask = {"values": torch.randn(ROWS, LENGTH) + 3.0}, mask_of(kind)
    empty = torch.zeros_like(mask)
    for axis in (None, 0, -1):
        for name in ("masked_sum", "masked_mean"):
            for m in (mask, empty):
                same(lambda verl, values, f=name, m=m, a=axis: getattr(verl.functional, f)(values, m, a), leaves, dtype)
    if dtype == torch.float32:
        for options in ({}, {"unbiased": False}):
            same(lambda verl, values, o=options: verl.functional.masked_var(values, mask, **o), leaves)
        for options in ({}, {"shift_mean": False}):
            same(lambda verl, values, o=options: verl.functional.masked_whiten(values, mask, **o), leaves)
    assert not as_they_are


def test_nan_outside_the_mask():
    mask, values = mask_of(), torch.randn(ROWS, LENGTH)
    dirty = torch.where(mask, values, torch.nan)
    for name in ("masked_sum", "masked_mean", "masked_var"):
        close(name, getattr(functional, name)(dirty, mask), getattr(stock().functional, name)(dirty, mask))
    close("whitened", *(x.functional.masked_whiten(dirty, mask) for x in (VERL, stock())))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_a_mean_of_a_narrow_type_is_float32(dtype):
    values, mask = torch.randn(ROWS, LENGTH).to(dtype), mask_of(torch.float32)  # in which verl's sum is one too
    for axis in (None, 1):
        got, theirs = (x.functional.masked_mean(values, mask, axis) for x in (VERL, stock()))
        assert got.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ("stock", "patched"))
def test_too_few_to_have_a_variance(which):
    module = {"stock": stock(), "patched": VERL}[which].functional
    for count, wanted in enumerate(("At least one element", "The sum of the mask is one")):
        mask = torch.zeros(4)
        mask[:count] = 1
        with pytest.raises(ValueError, match=wanted):
            module.masked_whiten(torch.randn(4), mask)


class Wrapped(torch.Tensor):
    """Stands for the tensor subclasses that sharding and quantisation bring."""


UNSUPPORTED = {
    "a subclass": lambda x: x.logprobs_from_logits_v2(torch.ones(2, 5).as_subclass(Wrapped), torch.zeros(2).long()),
    "a device": lambda x: x.entropy_from_logits(torch.ones(2, 5, device="meta")),
    "weights": lambda x: x.masked_mean(torch.arange(4.0), torch.tensor([0.5, 1.0, 0.0, 1.0])),
    "a broadcast mask": lambda x: x.masked_mean(torch.ones(2, 4), torch.ones(4)),
    "whole numbers": lambda x: x.masked_sum(torch.arange(-3, 5).view(2, 4), torch.ones(2, 4)),
    "a temperature below 0": lambda x: (VERL if x is functional else stock()).fused.FusedLinearForPPO()(
        torch.eye(3), torch.ones(5, 3), torch.zeros(3).long(), -1.0
    )[0],
    "a gradient of Σp²": lambda x: x.calculate_sum_pi_squared_from_logits(torch.ones(2, 5, requires_grad=True)),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
def test_what_rlfast_does_not_take_goes_to_verl_and_is_said_once(caplog, why):
    patching.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "rlfast.integrations"):
        got, _ = (UNSUPPORTED[why](functional) for _ in range(2))
    expected = UNSUPPORTED[why](stock().functional)
    assert got.shape == expected.shape and got.requires_grad == expected.requires_grad
    assert got.device.type == "meta" or torch.equal(got, expected)
    assert len(caplog.records) == 1 and "runs as it is" in caplog.text


def test_an_error_of_a_hundredth_is_noticed(monkeypatch):
    kernel = verl_functional.token_logps

    def off(*args, **kw):
        out = kernel(*args, **kw)
        return out._replace(logp=out.logp * 1.01, entropy=None if out.entropy is None else out.entropy * 1.01)

    monkeypatch.setattr(verl_functional, "token_logps", off)
    for name, args in (("logprobs_from_logits_v2", (torch.zeros(4).long(),)), ("entropy_from_logits", ())):
        with pytest.raises(AssertionError, match="off by"):
            same(lambda verl, logits, f=name, a=args: getattr(verl.functional, f)(logits, *a),
                 {"logits": torch.randn(4, 97)})  # fmt: skip
