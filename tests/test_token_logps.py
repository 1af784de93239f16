"""``token_logps`` on every backend: the options, the inputs that broke others, strides, determinism, sizes."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import backends
from tests import shared
from tests.adversarial import ROWS
from tests.cases import (
    ALL,
    DIFFERENTIABLE,
    DTYPES,
    KERNELS,
    LEADS,
    LOGITS_AXES,
    Problem,
    check,
    few,
    interpreted,
    label,
    logits_of,
    pairwise,
    problem_of,
    run,
    strided,
    targets_of,
)
from tests.numerics import assert_same_bits, assert_value, assert_zero

OP = "token_logps"
COMBINATIONS = pairwise(LOGITS_AXES)


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
    shared.check_relative_precision(backend, device, {"logits": logits})


@pytest.mark.parametrize("layout", [name for name in LEADS if name != "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.backends(*KERNELS)
def test_row_10_strides_do_not_change_bits(backend, device, dtype, layout):
    x = strided(layout, LEADS[layout], 1500, DTYPES[dtype], 2.0)
    problem = Problem({"logits": x}, targets_of(LEADS[layout], 1500), {}, ALL, DIFFERENTIABLE)
    dense = Problem({"logits": x.contiguous()}, problem.targets, {}, ALL, DIFFERENTIABLE)
    shared.assert_same_run(run(problem, backend, device), run(dense, backend, device))


def test_row_10_gradients_of_any_stride(backend, device):
    logits, targets = logits_of((4, 6), 300), targets_of((4, 6), 300)
    weight = logits_of((6, 4), 1, seed=9)[..., 0]
    for pull in shared.PULLS:
        grads = []
        for _ in range(2):
            x = logits.to(device).requires_grad_()
            with rlfast.use_backend(backend):
                logp = rlfast.token_logps(x, targets.to(device)).logp
            pull(logp if not grads else logp.contiguous() * 1.0, weight.to(device))
            grads.append(x.grad)
        assert_same_bits(pull.__name__, *grads)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.backends("cpu")
def test_row_on_every_isa(backend, device, row, isa):
    with backends.use_isa(isa):
        shared.check_row(OP, row, backend, device)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("combination", COMBINATIONS, ids=label)
@pytest.mark.backends("cpu")
def test_options_on_every_isa(backend, device, combination, isa):
    with backends.use_isa(isa):
        check(problem_of(OP, combination), backend, device)


def test_row_11_seventy_thousand_rows(backend, device):
    rows = few(70_000, 300)
    problem = Problem({"logits": logits_of(rows, 7)}, targets_of(rows, 7), {}, ("logp", "entropy"), ("logp",))
    check(problem, backend, device)


@pytest.mark.unpoisoned
def test_row_11_more_than_2_31_elements(backend, device):
    """Row offsets beyond 2³¹ elements, in a storage whose untouched pages are never mapped."""
    shared.skip_unless_memory(device, 7)
    stride = (1 << 30) + 4096
    storage = torch.empty(2 * stride + 1500, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 1500), (stride, 1))
    near = logits_of(3, 1500, torch.bfloat16)
    far.copy_(near)
    problem = Problem({"logits": near}, targets_of(3, 1500), {}, ALL, DIFFERENTIABLE)
    expected, expected_grads = run(problem, backend, device)
    x = far.detach().requires_grad_()
    with rlfast.use_backend(backend):
        out = rlfast.token_logps(x, problem.targets.to(device), outputs=ALL)
        chosen = [getattr(out, name) for name in DIFFERENTIABLE]
        (gradient,) = torch.autograd.grad(chosen, x, shared.cotangents_of(problem, chosen))
        shared.assert_same_run((out, {"logits": gradient}), (expected, expected_grads))
        inplace = rlfast.token_logps(x * 1 if device == "cuda" else far.view_as(far), problem.targets.to(device))
    assert_same_bits("logp", inplace.logp, out.logp.detach())


@pytest.mark.parametrize("inplace", (False, True), ids=("copy", "inplace"))
def test_row_14_second_backward(backend, device, inplace):
    leaf = logits_of(5, 300).to(device).requires_grad_()
    logits = leaf * 1.0
    with rlfast.use_backend(backend):
        out = rlfast.token_logps(logits, targets_of(5, 300).to(device), inplace_backward=inplace)
    loss = out.logp.sum()
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    if inplace:
        with pytest.raises(RuntimeError, match="inplace_backward"):
            loss.backward()
    else:
        loss.backward()
        assert_same_bits("two backwards", leaf.grad, first + first)


def test_row_14_inplace_writes_over_the_logits(backend, device):
    leaf = logits_of(5, 300).to(device).requires_grad_()
    logits = leaf * 1.0
    targets = targets_of(5, 300).to(device)
    with rlfast.use_backend(backend):
        rlfast.token_logps(logits, targets, inplace_backward=True).logp.sum().backward()
        other = leaf.detach().clone().requires_grad_()
        rlfast.token_logps(other, targets).logp.sum().backward()
    assert_same_bits("gradient", leaf.grad, other.grad)
    assert_same_bits("what the logits hold", logits.detach(), other.grad)


@pytest.mark.parametrize("second", ("another call", "another use"))
def test_row_14_inplace_with_logits_that_are_used_twice(backend, device, second):
    """Autograd is told that the logits were changed: an error, not the gradient of something else."""
    logits = logits_of(5, 300).to(device).requires_grad_() * 1.0
    targets = targets_of(5, 300).to(device)
    with rlfast.use_backend(backend):
        # autograd goes backwards from the last: what was first finds the logits changed
        first = rlfast.token_logps(logits, targets).logp if second == "another call" else logits * logits
        loss = first.sum() + rlfast.token_logps(logits, targets, inplace_backward=True).logp.sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("strides", ((0, 1), (10, 1)), ids=str)
def test_row_10_inplace_where_rows_share_memory(backend, device, strides):
    """Their gradient gets memory of its own."""
    base = logits_of(1, 2000)[0].to(device)
    shared_rows = base.as_strided((4, 300), strides).requires_grad_()
    dense = shared_rows.detach().contiguous().requires_grad_()
    targets = targets_of(4, 300).to(device)
    with rlfast.use_backend(backend):
        rlfast.token_logps(shared_rows, targets, inplace_backward=True).logp.sum().backward()
        rlfast.token_logps(dense, targets).logp.sum().backward()
    assert_same_bits("gradient", shared_rows.grad, dense.grad)


def test_changed_outputs_do_not_change_the_gradient(backend, device):
    """Callers change the returned log-probs in place; the backward must not have saved them."""
    gradients = []
    for change in (False, True):
        x = logits_of(5, 300).to(device).requires_grad_()
        with rlfast.use_backend(backend):
            out = rlfast.token_logps(x, targets_of(5, 300).to(device), outputs=DIFFERENTIABLE)
        if change:
            for name in DIFFERENTIABLE:
                getattr(out, name).detach().fill_(123.0)
        sum(getattr(out, name).sum() for name in DIFFERENTIABLE).backward()
        gradients.append(x.grad)
    assert_same_bits("gradient", *gradients)


def test_row_17_twenty_runs_equal_bits(backend, device):
    logits = logits_of(few(33, 3), 5000, torch.bfloat16)
    problem = Problem({"logits": logits}, targets_of(few(33, 3), 5000), {"top_k": 3}, ALL, DIFFERENTIABLE)
    shared.check_determinism(problem, backend, device)


@pytest.mark.backends("cpu", "torch", "reference")
def test_row_17_threads_do_not_change_bits(backend, device, threads):
    shared.skip_unless_cores(2)
    problem = Problem({"logits": logits_of(33, 5000)}, targets_of(33, 5000), {"top_k": 3}, ALL, DIFFERENTIABLE)
    runs = []
    for n in (1, 2, 3):
        threads(n)
        runs.append(run(problem, backend, device))
    shared.assert_same_run(runs[1], runs[0])
    shared.assert_same_run(runs[2], runs[0])


@pytest.mark.parametrize("vocab", (17, 1024, 5000))
@pytest.mark.backends(*KERNELS)
def test_row_17_a_row_alone_and_in_a_batch(backend, device, vocab):
    n = few(70, 6)
    logits, targets = logits_of(n, vocab), targets_of(n, vocab)
    out, grads = run(Problem({"logits": logits}, targets, {}, ALL, DIFFERENTIABLE, upstream="ones"), backend, device)
    for rows in (slice(0, 1), slice(n // 2, n // 2 + 1), slice(n - 3, n)):
        some = Problem({"logits": logits[rows]}, targets[rows], {}, ALL, DIFFERENTIABLE, upstream="ones")
        shared.assert_same_run(run(some, backend, device), shared.rows_of((out, grads), rows))


@pytest.mark.backends(*KERNELS)
def test_row_17_outputs_do_not_change_bits(backend, device):
    """log p is the same to the bit whatever else is asked for."""
    logits, targets = logits_of(few(9, 3), 3000), targets_of(few(9, 3), 3000)
    every, _ = run(Problem({"logits": logits}, targets, {"top_k": 4}, ALL, ()), backend, device)
    for name in ALL:
        alone, _ = run(Problem({"logits": logits}, targets, {}, (name,), ()), backend, device)
        assert_same_bits(name, getattr(alone, name), getattr(every, name))
    pairs = torch.stack([targets, targets.flip(0)], -1)
    many, _ = run(Problem({"logits": logits}, pairs, {}, ("logp",), ()), backend, device)
    assert_same_bits("the first of two candidates", many.logp[:, 0], every.logp)


@pytest.mark.gpu
@pytest.mark.backends("triton", "cuda")
def test_row_19_cuda_graph(backend, device):
    shared.check_cuda_graph({"logits": logits_of(16, 3000, torch.bfloat16)}, targets_of(16, 3000), backend)


@pytest.mark.parametrize("target", (-1, 300, -101, 1 << 40))
def test_row_20_out_of_range_in_a_kernel_is_nan_for_that_row(backend, device, target):
    """The public function refuses it on the CPU; a GPU's kernel, or a compiled one, sees it."""
    shared.check_out_of_range({"logits": logits_of(4, 300)}, target, backend, device)


def test_row_22_the_shifted_layout(backend, device):
    """logits[:, :-1] against targets[:, 1:]: the last position gets no gradient, the others the right one."""
    whole, ids = logits_of((2, 6), 400), targets_of((2, 6), 400)
    x = whole.clone().to(device).requires_grad_()
    with rlfast.use_backend(backend):
        rlfast.token_logps(x[:, :-1], ids[:, 1:].to(device)).logp.sum().backward()
        assert_zero("gradient of the last position", x.grad[:, -1])
        y = whole[:, :-1].contiguous().to(device).requires_grad_()
        rlfast.token_logps(y, ids[:, 1:].to(device)).logp.sum().backward()
    if backend in KERNELS:
        assert_same_bits("gradient", x.grad[:, :-1], y.grad)
    problem = Problem({"logits": whole[:, :-1]}, ids[:, 1:], upstream="ones")
    check(problem, backend, device)


@pytest.mark.parametrize("shape", ((0, 50), (0, 3, 50), (2, 0, 50), (50,), (1, 1, 50), (2, 1, 1, 3, 50)), ids=str)
def test_shapes(backend, device, shape):
    """No rows, one row, a single vector, many leading dimensions."""
    lead = shape[:-1]
    grads = DIFFERENTIABLE
    problem = Problem({"logits": logits_of(lead, 50)}, targets_of(lead, 50), {"top_k": 2}, ALL, grads)
    out, gradients = run(problem, backend, device)
    assert out.logp.shape == lead and out.topk_ids.shape == (*lead, 2) and gradients["logits"].shape == shape
    if 0 not in shape:
        check(problem, backend, device)


@pytest.mark.backends("torch", *KERNELS)
def test_candidates_with_ignored_ones(backend, device):
    """Candidates padded with −100, a duplicate, and a near-certain one: its gradient keeps its digits among others."""
    logits = torch.zeros(4, 1500)
    logits[torch.arange(4), shared.CERTAIN] = 17.0
    targets = torch.full((4, 3), -100)
    targets[:, 1] = shared.CERTAIN
    problem = Problem({"logits": logits}, targets, upstream="ones")
    out, gradients = run(problem, backend, device)
    shared.hold_relative(out.logp[:, 1], gradients["logits"].gather(1, shared.CERTAIN.to(device).unsqueeze(1)), problem)


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    """float64 in is float64 out."""
    problem = Problem({"logits": logits_of(5, 300).double()}, targets_of(5, 300), {"softcap": 5.0}, ALL, DIFFERENTIABLE)
    check(problem, backend, device)


@pytest.mark.large
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("shape", ((1024, 49152), (2048, 151936), (16384, 32003)), ids=str)
@pytest.mark.backends(*KERNELS)
def test_full_size(backend, device, shape, dtype):
    rows = 3 if interpreted() else shape[0]
    shared.skip_unless_memory(device, 8)
    logits = logits_of(rows, shape[1], DTYPES[dtype])
    problem = Problem({"logits": logits}, targets_of(rows, shape[1]), {}, ALL, DIFFERENTIABLE, every=few(17, 1))
    shared.check_by_rows(problem, backend, device)


@pytest.mark.large
@pytest.mark.backends("cpu", "cuda", *(() if interpreted() else ("triton",)))  # 2³¹ interpreted elements take days
def test_row_11_a_gradient_of_more_than_2_31_elements(backend, device):
    """A dense gradient whose last rows lie beyond 2³¹ elements; its rows but the last are masked, and must be zeros."""
    shared.skip_unless_memory(device, 12)
    vocab, rows = 151_936, 14_200
    assert rows * vocab > 1 << 31
    row = logits_of(1, vocab, torch.bfloat16)
    logits = row.to(device).expand(rows, vocab).detach().requires_grad_()
    mask = torch.zeros(rows, dtype=torch.bool, device=device)
    mask[-2:] = True
    targets = torch.full((rows,), 7, device=device)
    with rlfast.use_backend(backend):
        out = rlfast.token_logps(logits, targets, mask=mask)
        (gradient,) = torch.autograd.grad(out.logp.sum(), logits)
        one = row.to(device).requires_grad_()
        rlfast.token_logps(one, targets[:1]).logp.sum().backward()
    assert_same_bits("last row", gradient[-1], one.grad[0])
    assert int(sum(torch.count_nonzero(part) for part in gradient[:-2].split(500))) == 0


@pytest.mark.parametrize("lead", ((50,), (5, 10)), ids=str)
@pytest.mark.backends("torch")
def test_many_chunks_of_rows(backend, device, lead, monkeypatch):
    """The torch backend's chunks, a few rows each."""
    monkeypatch.setattr("rlfast.fallback.token_logps.CHUNK_ELEMENTS", 900)
    check(Problem({"logits": logits_of(lead, 300)}, targets_of(lead, 300), {}, ALL, DIFFERENTIABLE), backend, device)


def test_entropy_of_known_distributions(backend, device):
    """log V for a uniform row, log 2 for two equal tokens, 0 for a certain one."""
    logits = torch.full((3, 1200), -torch.inf)
    logits[0] = 4.0
    logits[1, [5, 1100]] = -7.0
    logits[2, 3] = 1.0
    with rlfast.use_backend(backend):
        targets = torch.tensor([0, 5, 3]).to(device)
        out = rlfast.token_logps(logits.to(device), targets, outputs=("entropy", "log_sum_sq_probs"))
    truth = torch.tensor([1200.0, 2.0, 1.0]).double().log()
    assert_value("entropy", out.entropy, truth, truth)
    assert_value("log Σp²", out.log_sum_sq_probs, -truth, -truth)
