"""``linear_divergence`` on every backend: the options, its two backwards, heads of different widths, its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.ops import linear_divergence as linear_op
from tests.cases import DTYPES, few, interpreted, targets_of
from tests.divergence_cases import (
    ALL,
    KINDS,
    PROJECTED,
    Pair,
    as_heads,
    check,
    combination_label,
    combinations,
    heads_of,
    logits_pair,
    pair_of,
    row_of,
    run,
    same_run,
)
from tests.numerics import assert_same_bits, assert_zero

COMBINATIONS = combinations(linear=True)
KERNELS = ("cpu", "triton")
RECOMPUTE, KEEP = 0, 2 << 30
BUDGETS = pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))


@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_label)
def test_options_pairwise(backend, device, combination):
    check(pair_of(combination, linear=True), backend, device)


@pytest.mark.parametrize("isa", [name for name in backends.isas() if name != "baseline"][:-1])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_label)
@pytest.mark.backends("cpu")
def test_options_on_every_isa(backend, device, combination, isa):
    with backends.use_isa(isa):
        check(pair_of(combination, linear=True), backend, device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", PROJECTED)
def test_row(backend, device, row, kind):
    check(row_of(row, kind, linear=True), backend, device)


@BUDGETS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_and_kept_logits(backend, device, dtype, kind, budget):
    n = few(37, 12)
    options = {"kind": kind, "softcap": 8.0, "targets": targets_of(n, 2100)}
    pair = Pair(
        heads_of(n, (65, 40), 2100, DTYPES[dtype], bias=True), options, ALL[1:], ("value", "logp", "entropy", "ref_lse")
    )
    check(replace(pair, call={"memory_budget": budget}), backend, device)


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_does_not_depend_on_the_budget(backend, device, kind):
    pair = Pair(heads_of(few(30, 12), (33, 20), 1100), {"kind": kind})
    outs = [run(replace(pair, call={"memory_budget": b}), backend, device)[0] for b in (RECOMPUTE, KEEP)]
    same_run((outs[0], {}), (outs[1], {}))


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_divergence(backend, device, kind):
    """Given the same logits, the two ops give the same values."""
    logits, options = (
        logits_pair(24, 2600),
        {"kind": kind, "temperature": 0.75, "targets": targets_of(24, 2600)},
    )
    direct, _ = run(Pair(logits, options, ALL[1:], ()), backend, device)
    linear, _ = run(Pair(as_heads(logits), options, ALL[1:], ()), backend, device)
    same_run((linear, {}), (direct, {}))


@BUDGETS
@pytest.mark.parametrize("needs", (("hidden",), ("weight",), ("ref_hidden",), ("ref_weight", "ref_bias")), ids="+".join)
def test_only_what_is_needed_comes_back(backend, device, needs, budget):
    pair = Pair(heads_of(19, (33, 21), 1100, bias=True), {"kind": "jsd"}, needs=needs)
    check(replace(pair, call={"memory_budget": budget}), backend, device)


@BUDGETS
def test_equal_heads(backend, device, budget):
    """p = q: a divergence of exactly 0, and no gradient on either side."""
    head = heads_of(20, (33, 21), 1100, bias=True)
    same = {name: head[name.removeprefix("ref_")].clone() for name in head}
    for kind in KINDS:
        out, gradients = run(Pair(same, {"kind": kind}, call={"memory_budget": budget}), backend, device)
        if backend != "reference":
            assert_zero("value", out.value)
            for name, g in gradients.items():
                assert_zero(f"gradient of {name}", g)


@BUDGETS
@pytest.mark.parametrize("kind", KINDS)
def test_masked_rows_are_as_if_absent(backend, device, kind, budget):
    n = few(60, 24)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(2)) < 0.5
    inputs = heads_of(n, (33, 20), 700, torch.bfloat16)
    inputs["hidden"][~mask] = inputs["ref_hidden"][~mask] = torch.nan
    check(Pair(inputs, {"kind": kind, "mask": mask}, call={"memory_budget": budget}), backend, device)


@BUDGETS
@pytest.mark.parametrize("lead", ((0,), (0, 3), (2, 0), (), (1, 1), (2, 1, 3)), ids=str)
def test_shapes(backend, device, lead, budget):
    options, call = {"targets": targets_of(lead, 50)}, {"memory_budget": budget}
    pair = Pair(heads_of(lead, (12, 7), 50, bias=True), options, ALL[1:], ("value", "logp"), call=call)
    out, gradients = run(pair, backend, device)
    assert out.value.shape == lead and gradients["hidden"].shape == (*lead, 12)
    if 0 in lead:
        assert_zero("gradient of weight", gradients["weight"])
        assert_zero("gradient of ref_bias", gradients["ref_bias"])
    else:
        check(pair, backend, device)


@pytest.mark.parametrize("rows", (1, 13, 14, 15, 113))
@pytest.mark.parametrize("dims", ((1, 2), (16, 33), (257, 100)), ids=str)
def test_sizes_around_a_tile(backend, device, rows, dims):
    check(Pair(heads_of(min(rows, few(rows, 17)), dims, 1030), {"kind": "reverse_kl"}), backend, device)


@BUDGETS
def test_strided_inputs(backend, device, budget):
    heads = heads_of((3, few(17, 9)), (40, 24), 600)
    wide = heads_of(1, (64, 24), 1200, seed=3)["weight"]
    for view in (lambda x: x[:, :-1], lambda x: x.transpose(0, 1)):
        hidden, ref = view(heads["hidden"]), view(heads["ref_hidden"])
        for weight in (wide[::2, :40], heads["weight"].T.contiguous().T):
            inputs = heads | {"hidden": hidden, "ref_hidden": ref, "weight": weight}
            check(Pair(inputs, {}, call={"memory_budget": budget}), backend, device)


@pytest.mark.parametrize("tail", ("renormalize", "bucket"))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.backends("torch", *KERNELS)
def test_top_k(backend, device, kind, tail):
    n = few(24, 9)
    check(Pair(heads_of(n, (33, 20), 700), {"kind": kind, "top_k": 12, "tail": tail}), backend, device)


@BUDGETS
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_runs_equal_bits_at_any_thread_count(backend, device, kind, budget, threads):
    n = few(65, 4)
    pair = Pair(heads_of(n, (40, 24), 1500, torch.bfloat16, bias=True), {"kind": kind}, call={"memory_budget": budget})
    threads(2)
    first = run(pair, backend, device)
    for i in range(2 if interpreted() else 19):
        threads(1 + i % 3 if backend in KERNELS else 2)  # a GEMM of torch may change its bits with the threads
        same_run(run(pair, backend, device), first)


@BUDGETS
def test_second_backward(backend, device, budget):
    leaves = {k: x.to(device).requires_grad_() for k, x in heads_of(9, (20, 12), 300, bias=True).items()}
    with rlfast.use_backend(backend):
        value = rlfast.linear_divergence(**leaves, kind="jsd", memory_budget=budget).value.sum()
    one = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    for a, b in zip(one, torch.autograd.grad(value, list(leaves.values())), strict=True):
        assert_same_bits("two backwards", a, b)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "f16"))
def test_autocast(backend, device, dtype):
    inputs = heads_of(9, (20, 12), 300, bias=True)
    with torch.autocast(device, dtype):
        out, gradients = run(Pair(inputs), backend, device)
    rounded, expected = run(Pair({k: x.to(dtype) for k, x in inputs.items()}), backend, device)
    assert_same_bits("value", out.value.detach(), rounded.value.detach())
    for name, g in gradients.items():
        assert_same_bits(f"gradient of {name}", g, expected[name].float())


def samples(backend: str):
    """(op, arguments): plain and with every option, kept and not, forward and backward."""
    heads = heads_of(6, (8, 5), 40, bias=True)
    order = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    mask, t = torch.tensor([True, True, False, True, True, True]), torch.linspace(0.5, 1.5, 6)
    plain = (None, None, None, None, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0, 0.5, 0)
    full = (targets_of(6, 40, 2), mask, t, t.flip(0), 1.0, 1.0, 20.0, 30.0, 0.5, 1.5, 2, 0.3, 1 | 16 | 32)
    for options, keep in ((plain, True), (full, False)):
        args = (*(heads[name].clone().requires_grad_() for name in order), *options, keep, backend)
        yield linear_op.op, args
        out = [x.detach().clone() for x in linear_op.op(*args)]
        many, aux = options[0] is not None, out[1]
        s = 5 if many else 2
        saved = (aux[:s].clone(), aux[s : s + 2].clone(), aux[s + 2 : s + 4].clone())
        grads = (torch.ones(6), *((torch.ones(6, 2), torch.ones(6), torch.ones(6)) if many else (None,) * 3))
        rest = (*options[:12], *saved, *grads, out[-2], out[-1], [True, keep, True], keep, backend)
        yield linear_op.op_backward, (*(heads[name].clone() for name in order), *rest)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_opcheck(backend, device):
    for op, args in samples(backend):
        torch.library.opcheck(op, args)


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    inputs = {k: x.double() for k, x in heads_of(7, (20, 12), 300, bias=True).items()}
    for kind in KINDS:
        check(Pair(inputs, {"kind": kind, "softcap": 5.0}, ALL[1:]), backend, device)


@pytest.mark.backends("torch")
def test_many_chunks_of_rows(backend, device, monkeypatch):
    monkeypatch.setattr("rlfast.fallback.linear_token_logps.CHUNK_ELEMENTS", 200)
    check(Pair(heads_of(50, (20, 12), 300, bias=True), {"kind": "jsd"}, call={"memory_budget": 0}), backend, device)


H, W = torch.randn(4, 6), torch.randn(11, 6)
BAD = {
    "ref-rows": ({"ref_hidden": torch.randn(5, 6)}, ValueError, "ref_hidden: expected shape (4, 'E') like"),
    "ref-width": ({"ref_weight": torch.randn(11, 7)}, ValueError, "ref_weight: expected shape (V, 6) to match"),
    "ref-vocab": ({"ref_weight": torch.randn(12, 6)}, ValueError, "ref_weight: expected shape (11, 6) for"),
    "ref-bias": ({"ref_bias": torch.ones(3)}, ValueError, "ref_bias: expected shape (11,) like the rows of ref_weight"),
    "ref-dtype": (
        {"ref_hidden": H.bfloat16(), "ref_weight": W.bfloat16()}, TypeError, "ref_hidden: expected dtype torch.float32",
    ),
    "budget": ({"memory_budget": -1}, ValueError, "memory_budget: expected a float ≥ 0, got -1"),
    "mask": ({"mask": torch.ones(5)}, ValueError, "mask: expected shape (4,) like the rows of hidden, got (5,)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    with pytest.raises(error) as caught:
        rlfast.linear_divergence(**({"hidden": H, "weight": W, "ref_hidden": H, "ref_weight": W} | change))
    assert message in str(caught.value)
