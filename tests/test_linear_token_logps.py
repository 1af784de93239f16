"""``linear_token_logps`` on every backend: the options, the inputs that broke others, its two backwards, its memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import backends
from tests import shared
from tests.adversarial import PROJECTED, ROWS
from tests.cases import (
    ALL,
    DIFFERENTIABLE,
    DTYPES,
    KERNELS,
    LINEAR_AXES,
    Problem,
    as_head,
    check,
    cotangents,
    few,
    head_of,
    hold,
    interpreted,
    label,
    logits_of,
    pairwise,
    problem_of,
    run,
    targets_of,
)
from tests.numerics import assert_same_bits, assert_zero

OP = "linear_token_logps"
COMBINATIONS = pairwise(LINEAR_AXES)
RECOMPUTE, KEEP = 0, 2 << 30  # memory budgets: three GEMMs in the backward, or two


@pytest.mark.parametrize("combination", COMBINATIONS, ids=label)
def test_options_pairwise(backend, device, combination):
    check(problem_of(OP, combination), backend, device)


# Not the reference, which is the oracle itself: a third of the time.
@pytest.mark.backends("torch", *KERNELS)
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "vocab"), shared.PRODUCTS)
def test_options_product(backend, device, dtype, vocab):
    shared.check_product(OP, backend, device, dtype, vocab)


@pytest.mark.parametrize("row", ROWS)
def test_row(backend, device, row):
    shared.check_row(OP, row, backend, device)


@pytest.mark.parametrize("margin", shared.MARGINS)
@pytest.mark.backends("torch", *KERNELS)
def test_row_05_relative_precision_as_p_nears_one(backend, device, margin):
    logits = torch.zeros(4, 1500)
    logits[torch.arange(4), shared.CERTAIN] = margin
    shared.check_relative_precision(backend, device, as_head(logits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", (("hidden",), ("weight",), ("bias",), ("hidden", "bias")), ids="+".join)
def test_only_what_is_needed_comes_back(backend, device, dtype, needs):
    """A frozen head gets no gradient, and the others are the ones of a head that trains."""
    inputs = head_of(few(19, 3), 33, 1100, DTYPES[dtype], bias=True)
    problem = Problem(inputs, targets_of(few(19, 3), 1100), {}, ("logp",), ("logp",), needs)
    check(problem, backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recomputed_and_kept_logits(backend, device, dtype):
    """The two backwards are one function: each within the contract, and the forward's bits do not depend on it."""
    n = few(37, 3)
    inputs = head_of(n, 65, 2100, DTYPES[dtype], bias=True)
    problem = Problem(inputs, targets_of(n, 2100), {"softcap": 8.0}, ALL, DIFFERENTIABLE)
    outs = []
    for budget in (RECOMPUTE, KEEP):
        one = replace(problem, call={"memory_budget": budget})
        check(one, backend, device)
        outs.append(run(one, backend, device)[0])
    shared.assert_same_run((outs[0], {}), (outs[1], {}))


@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
def test_row_10_strided_inputs(backend, device, budget):
    """Rows of any stride of hidden states and head, columns that are not contiguous, and `.sum()` upstream."""
    head = head_of((3, few(33, 3)), 40, 1100)
    wide = head_of(1, 64, 2200, seed=3)["weight"]
    for hidden in (head["hidden"][:, :-1], head["hidden"].transpose(0, 1), head["hidden"][:1].expand(3, -1, 40)):
        for weight in (wide[::2, :40], wide[:1100, 3:43], head["weight"].T.contiguous().T):
            targets = targets_of(tuple(hidden.shape[:-1]), 1100)
            inputs = {"hidden": hidden, "weight": weight}
            check(Problem(inputs, targets, upstream="ones", call={"memory_budget": budget}), backend, device)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.backends("cpu")
def test_row_on_every_isa(backend, device, row, isa):
    """The baseline only where logits are exact: with no fused multiply-add a GEMM rounds once more than torch's."""
    if isa != "baseline" or ROWS[row] not in PROJECTED:
        with backends.use_isa(isa):
            shared.check_row(OP, row, backend, device)


@pytest.mark.parametrize("isa", [name for name in backends.isas() if name != "baseline"])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=label)
@pytest.mark.backends("cpu")
def test_options_on_every_isa(backend, device, combination, isa):
    with backends.use_isa(isa):
        check(problem_of(OP, combination), backend, device)


def test_row_11_seventy_thousand_rows(backend, device):
    rows = few(70_000, 300)
    check(Problem(head_of(rows, 3, 7), targets_of(rows, 7), {}, ("logp", "entropy"), ("logp",)), backend, device)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("hidden", "weight"))
def test_row_11_more_than_2_31_elements(backend, device, name):
    """Row offsets beyond 2³¹ elements, in a storage whose untouched pages are never mapped."""
    shared.skip_unless_memory(device, 7)
    problem = Problem(head_of(3, 40, 3, torch.bfloat16), targets_of(3, 3), {}, ALL, DIFFERENTIABLE)
    expected = run(problem, backend, device)
    near = problem.inputs[name]
    stride = (1 << 30) + 4096
    storage = torch.empty(2 * stride + 40, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 40), (stride, 1)).copy_(near)
    leaves = {k: x.detach().to(device).requires_grad_() for k, x in (problem.inputs | {name: far}).items()}
    with rlfast.use_backend(backend):
        out = rlfast.linear_token_logps(leaves["hidden"], leaves["weight"], problem.targets.to(device), outputs=ALL)
    chosen = [getattr(out, n) for n in DIFFERENTIABLE]
    gradients = torch.autograd.grad(chosen, list(leaves.values()), shared.cotangents_of(problem, chosen))
    shared.assert_same_run((out, dict(zip(leaves, gradients, strict=True))), expected)


@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
def test_row_14_second_backward(backend, device, budget):
    inputs = {k: x.to(device).requires_grad_() for k, x in head_of(9, 20, 300, bias=True).items()}
    with rlfast.use_backend(backend):
        out = rlfast.linear_token_logps(
            inputs["hidden"], inputs["weight"], targets_of(9, 300).to(device), inputs["bias"],
            outputs=DIFFERENTIABLE, memory_budget=budget,
        )  # fmt: skip
    loss = sum(getattr(out, name).sum() for name in DIFFERENTIABLE)
    loss.backward(retain_graph=True)
    first = {k: x.grad.clone() for k, x in inputs.items()}
    loss.backward()
    for name, x in inputs.items():
        assert_same_bits(f"two backwards of {name}", x.grad, first[name] + first[name])


def test_changed_outputs_do_not_change_the_gradient(backend, device):
    gradients = []
    for change in (False, True):
        inputs = {k: x.to(device).requires_grad_() for k, x in head_of(9, 20, 300).items()}
        with rlfast.use_backend(backend):
            out = rlfast.linear_token_logps(**inputs, targets=targets_of(9, 300).to(device), outputs=DIFFERENTIABLE)
        if change:
            for name in DIFFERENTIABLE:
                getattr(out, name).detach().fill_(123.0)
        sum(getattr(out, name).sum() for name in DIFFERENTIABLE).backward()
        gradients.append([x.grad for x in inputs.values()])
    for one, other in zip(*gradients, strict=True):
        assert_same_bits("gradient", one, other)


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
def test_row_17_twenty_runs_equal_bits(backend, device, dtype, budget):
    n, call = few(65, 4), {"memory_budget": budget}
    inputs = head_of(n, 70, 1500, DTYPES[dtype], bias=True)
    problem = Problem(inputs, targets_of(n, 1500), {"top_k": 3}, ALL, DIFFERENTIABLE, call=call)
    shared.check_determinism(problem, backend, device)


@pytest.mark.backends(*KERNELS)
def test_row_17_the_same_bits_as_token_logps(backend, device):
    """Given the same logits, the two ops give the same row statistics."""
    logits, targets, options = (
        logits_of(few(24, 4), 2600),
        targets_of(few(24, 4), 2600),
        {"temperature": 0.75, "top_k": 4},
    )
    direct, _ = run(Problem({"logits": logits}, targets, options, ALL, ()), backend, device)
    linear, _ = run(Problem(as_head(logits), targets, options, ALL, ()), backend, device)
    shared.assert_same_run((linear, {}), (direct, {}))


@pytest.mark.gpu
@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
def test_row_19_cuda_graph(backend, device, budget):
    inputs = head_of(16, 64, 3000, torch.bfloat16)
    shared.check_cuda_graph(inputs, targets_of(16, 3000), backend, {"memory_budget": budget})


@pytest.mark.parametrize("target", (-1, 300, -101, 1 << 40))
def test_row_20_out_of_range_in_a_kernel_is_nan_for_that_row(backend, device, target):
    shared.check_out_of_range(head_of(4, 20, 300), target, backend, device)


def test_row_22_the_shifted_layout(backend, device):
    """hidden[:, :-1] against targets[:, 1:]: the last position gets no gradient, the others the right one."""
    head, ids = head_of((2, 6), 20, 400), targets_of((2, 6), 400)
    x = head["hidden"].clone().to(device).requires_grad_()
    with rlfast.use_backend(backend):
        rlfast.linear_token_logps(x[:, :-1], head["weight"].to(device), ids[:, 1:].to(device)).logp.sum().backward()
    assert_zero("gradient of the last position", x.grad[:, -1])
    check(Problem(head | {"hidden": head["hidden"][:, :-1]}, ids[:, 1:], upstream="ones"), backend, device)


@pytest.mark.parametrize("lead", ((0,), (0, 3), (2, 0), (), (1, 1), (2, 1, 3)), ids=str)
@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
def test_shapes(backend, device, lead, budget):
    """No rows (still differentiable), one vector, many leading dimensions."""
    call = {"memory_budget": budget}
    inputs = head_of(lead, 12, 50, bias=True)
    problem = Problem(inputs, targets_of(lead, 50), {"top_k": 2}, ALL, DIFFERENTIABLE, call=call)
    out, gradients = run(problem, backend, device)
    assert out.logp.shape == lead and gradients["hidden"].shape == (*lead, 12)
    if 0 in lead:
        assert_zero("gradient of weight", gradients["weight"])
        assert_zero("gradient of bias", gradients["bias"])
    else:
        check(problem, backend, device)


@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
@pytest.mark.backends("torch")
def test_many_chunks_of_rows(backend, device, budget, monkeypatch):
    """The torch backend's chunks, a few rows each: every one adds to the head's gradients."""
    monkeypatch.setattr("rlfast.fallback.linear_token_logps.CHUNK_ELEMENTS", 200)
    inputs = head_of(50, 20, 300, bias=True)
    check(Problem(inputs, targets_of(50, 300), upstream="ones", call={"memory_budget": budget}), backend, device)


@pytest.mark.parametrize("rows", (1, 2, 15, 16, 17, 31, 33, 64, 65, 130))
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_row_counts_around_a_tile(backend, device, rows, dtype):
    rows = min(rows, few(rows, 17))
    inputs = head_of(rows, 66, 1030, DTYPES[dtype], bias=rows % 2 == 0)
    check(Problem(inputs, targets_of(rows, 1030), {}, ("logp", "entropy"), ("logp", "entropy")), backend, device)


@pytest.mark.parametrize("dim", (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 65, 100, 257, 576))
@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_sizes_around_a_tile(backend, device, dim, dtype):
    inputs = head_of(few(21, 3), dim, 300, DTYPES[dtype])
    check(Problem(inputs, targets_of(few(21, 3), 300), {}, ("logp",), ("logp",)), backend, device)


@pytest.mark.parametrize("keep", (0.1, 0.5, 0.95))
@pytest.mark.parametrize("budget", (RECOMPUTE, KEEP), ids=("recompute", "keep"))
def test_masked_rows_are_as_if_absent(backend, device, keep, budget):
    """Skipped rows anywhere in the batch change nothing for the others; their hidden states may be NaN."""
    n = few(90, 8)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(2)) < keep
    inputs, targets = head_of(n, 33, 700, torch.bfloat16), targets_of(n, 700)
    inputs["hidden"][~mask] = torch.nan
    call = {"memory_budget": budget}
    problem = Problem(inputs, targets, {"mask": mask}, ("logp", "entropy"), ("logp", "entropy"), call=call)
    check(problem, backend, device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "f16"))
def test_autocast(backend, device, dtype):
    """Under autocast the head is cast as F.linear would cast it, and the gradients come back in its own dtype."""
    inputs, targets = head_of(9, 20, 300, bias=True), targets_of(9, 300)
    leaves = {k: x.to(device).requires_grad_() for k, x in inputs.items()}
    with rlfast.use_backend(backend), torch.autocast(device, dtype):
        out = rlfast.linear_token_logps(leaves["hidden"], leaves["weight"], targets.to(device), leaves["bias"])
    out.logp.sum().backward()
    rounded = {k: x.to(dtype) for k, x in inputs.items()}
    expected, gradients = run(Problem(rounded, targets, upstream="ones"), backend, device)
    assert_same_bits("logp", out.logp.detach(), expected.logp.detach())
    for name, x in leaves.items():
        assert x.grad.dtype == torch.float32
        assert_same_bits(f"gradient of {name}", x.grad, gradients[name].float())


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    inputs = {k: x.double() for k, x in head_of(7, 20, 300, bias=True).items()}
    check(Problem(inputs, targets_of(7, 300), {"softcap": 5.0}, ALL, DIFFERENTIABLE), backend, device)


FULL = ((512, 576, 49152), (2048, 896, 151936))


@pytest.mark.large
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("shape", FULL, ids=str)
@pytest.mark.backends(*KERNELS)
def test_full_size(backend, device, shape, dtype):
    rows, dim, vocab = (2, shape[1], shape[2] // 4 + 1) if interpreted() else shape
    shared.skip_unless_memory(device, 10)
    problem = Problem(
        head_of(rows, dim, vocab, DTYPES[dtype]), targets_of(rows, vocab), {}, ALL, DIFFERENTIABLE, every=few(17, 1)
    )
    calls = [{"memory_budget": budget and 4 * rows * vocab} for budget in (RECOMPUTE, KEEP)]
    shared.check_by_rows(problem, backend, device, rows=128, calls=calls)


@pytest.mark.large
@pytest.mark.backends(*KERNELS)
def test_row_08_gradients_accumulate_in_float32(backend, device):
    """V = 152064, M = 32768 against float64: a sum in bf16 across chunks or splits would be off by percents."""
    rows, dim, vocab = (64, 16, 2100) if interpreted() else (32768, 32, 152_064)
    shared.skip_unless_memory(device, 10)
    inputs = head_of(rows, dim, vocab, torch.bfloat16)
    problem = Problem(inputs, targets_of(rows, vocab), {}, ("logp",), ("logp",), call={"memory_budget": RECOMPUTE})
    truths, own = (in_closed_form(problem, dtype) for dtype in (torch.float64, torch.float32))
    hold(problem, *run(problem, backend, device), truths, own)


def in_closed_form(problem: Problem, dtype: torch.dtype, rows: int = 512) -> tuple[dict, dict]:
    """log-probs and their gradients, by rows: ∂/∂z = u·(1{target} − p). Autograd would keep several logits a row."""
    hidden, weight = (problem.inputs[name].to(dtype) for name in ("hidden", "weight"))
    (upstream,) = cotangents(problem, [torch.empty(problem.targets.shape)])
    logp, g_hidden, g_weight = torch.empty(len(hidden), dtype=dtype), torch.empty_like(hidden), torch.zeros_like(weight)
    for at in range(0, len(hidden), rows):
        part = slice(at, at + rows)
        h, ids, u = hidden[part], problem.targets[part].long().unsqueeze(1), upstream[part].to(dtype).unsqueeze(1)
        z = h @ weight.T
        peak = z.amax(1, keepdim=True)
        z -= peak
        mine = z.gather(1, ids)
        total = z.exp_().sum(1, keepdim=True)
        logp[part] = (mine - total.log()).squeeze(1)
        g = z.mul_(-u / total).scatter_add_(1, ids, u)
        g_hidden[part] = g @ weight
        g_weight.addmm_(g.T, h)
    return {"logp": logp}, {"hidden": g_hidden, "weight": g_weight}
