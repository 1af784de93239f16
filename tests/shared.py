"""Checks that both log-prob ops share."""

from __future__ import annotations

import functools
import math
import os
from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.ops import linear_token_logps as linear_op
from rlfast.ops import token_logps as logits_op
from tests.adversarial import ROWS
from tests.cases import (
    DIFFERENTIABLE,
    DTYPES,
    PRODUCT_AXES,
    Problem,
    call,
    check,
    cotangents,
    few,
    hold,
    label,
    moved,
    oracle,
    problem_of,
    product,
    run,
    solution_of,
    yardsticks,
)
from tests.numerics import assert_same_bits, assert_value, assert_zero

MARGINS = (10.0, 16.6, 17.0, 20.0, 40.0)  # from float32's last whole digit of 1 − p to far beyond it
CERTAIN = torch.tensor([3, 700, 1023, 1499])  # the near-certain token of each of four rows, in both leaves of 1500


@functools.cache
def solved(op: str, row: str):
    """A row's problem, its truth and its yardsticks, once for all backends."""
    problem = ROWS[row](op)
    return problem, oracle(problem, torch.float64), yardsticks(problem)


def check_row(op: str, row: str, backend: str, device: str) -> None:
    """One adversarial problem."""
    problem, truth, yardstick = solved(op, row)
    out, gradients = run(problem, backend, device)
    hold(problem, out, gradients, truth, yardstick)


COMBINATIONS = product(PRODUCT_AXES)[:: few(1, 8)]  # every eighth under the interpreter, which is 50 times slower


# The backends of one of these go to one worker, which makes its oracles once.
PRODUCTS = [
    pytest.param(dtype, vocab, marks=pytest.mark.xdist_group(f"product {dtype} {vocab}"))
    for dtype in DTYPES
    for vocab in (1000, 1025)
]


@functools.lru_cache(maxsize=len(COMBINATIONS))
def solved_of_product(op: str, dtype: str, vocab: int, number: int):
    """A combination's problem and its solution, for the backends that are tested one after another."""
    problem = problem_of(op, COMBINATIONS[number] | {"dtype": dtype, "vocab": vocab})
    return problem, solution_of(problem)


def check_product(op: str, backend: str, device: str, dtype: str, vocab: int) -> None:
    """Every combination of the axes that can interact."""
    failures = []
    for number, combination in enumerate(COMBINATIONS):
        problem, solution = solved_of_product(op, dtype, vocab, number)
        try:
            check(problem, backend, device, solution)
        except AssertionError as error:
            failures.append(f"{label(combination)}: {error}")
    assert not failures, f"{len(failures)} of {len(COMBINATIONS)} fail:\n" + "\n".join(failures[:10])


def hold_relative(logp, at_target, problem: Problem) -> None:
    """log p and the gradient 1 − p at the target to the last digits, however small they are.

    Through log(−log p): 4 ulps of float32 there are the relative error that a logit's own rounding makes.
    """
    vocab = problem.inputs.get("logits", problem.inputs.get("weight")).shape[-1 if "logits" in problem.inputs else 0]
    row = problem.inputs["logits"] if "logits" in problem.inputs else problem.inputs["weight"].T
    margin = row.double().amax(-1).reshape(-1, 1)
    log_odds = math.log(vocab - 1) - margin  # log((1 − p) / p) of one logit above the zeros
    truth_logp = torch.nn.functional.softplus(log_odds)
    truth_rest = torch.sigmoid(log_odds)
    for name, got, truth in (("log(−log p)", -logp, truth_logp), ("log(1 − p)", at_target, truth_rest)):
        assert bool((got > 0).all()), f"{name}: nothing is left of it"
        assert_value(name, got.detach().cpu().double().reshape(-1, 1).log(), truth.log(), truth.log())


def check_relative_precision(backend: str, device: str, inputs: dict) -> None:
    """Four rows of one logit above 1499 zeros."""
    problem = Problem(inputs, CERTAIN, {}, DIFFERENTIABLE, ("logp",), upstream="ones")
    out, gradients = run(problem, backend, device)
    if "logits" in inputs:
        at_target = gradients["logits"].cpu().gather(1, CERTAIN.unsqueeze(1))
    else:
        at_target = gradients["weight"].cpu()[CERTAIN].diagonal().unsqueeze(1)  # hidden states are one-hot
    hold_relative(out.logp, at_target, problem)


def _pull_sum(logp, weight):
    logp.sum().backward()


def _pull_expand(logp, weight):
    logp.backward(weight[:1, :1].T.expand_as(logp))


def _pull_transposed(logp, weight):
    logp.backward(weight.T)


def _pull_select(logp, weight):
    logp[:, 2].backward(weight[2])


def _pull_every_other(logp, weight):
    logp.backward(weight.repeat(2, 1).T[:, ::2])


PULLS = (_pull_sum, _pull_expand, _pull_transposed, _pull_select, _pull_every_other)


def cotangents_of(problem: Problem, chosen: list) -> list:
    """The upstream gradients that ``run`` sends, on the device of the outputs."""
    return [g.to(device=v.device, dtype=v.dtype) for g, v in zip(cotangents(problem, chosen), chosen, strict=True)]


def assert_same_run(got, expected) -> None:
    """Outputs and gradients of two runs, to the bit."""
    for name in rlfast.TokenLogps._fields:
        a, b = getattr(got[0], name), getattr(expected[0], name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_same_bits(name, a.detach(), b.detach())
    for name, gradient in got[1].items():
        assert_same_bits(f"gradient of {name}", gradient, expected[1][name])


def rows_of(result, rows: slice):
    """Some rows of a run whose gradients are by row."""
    out = rlfast.TokenLogps(*(None if x is None else x[rows] for x in result[0]))
    return out, {name: g[rows] for name, g in result[1].items()}


def check_determinism(problem: Problem, backend: str, device: str) -> None:
    """20 runs, equal bits."""
    first = run(problem, backend, device)
    for _ in range(2 if backends.interpreting() else 19):
        assert_same_run(run(problem, backend, device), first)


def check_cuda_graph(inputs: dict, targets, backend: str, options: dict | None = None) -> None:
    """Forward and backward are captured, and a replay reads the new inputs."""
    problem = Problem(inputs, targets.cuda(), {}, DIFFERENTIABLE, DIFFERENTIABLE, call=options or {})
    leaves = moved(problem, "cuda")
    first = next(iter(leaves))
    fresh = leaves[first].detach().flip(0).clone()

    def step():
        out = call(problem, leaves, "cuda")
        total = sum(getattr(out, name).sum() for name in DIFFERENTIABLE)
        return out, torch.autograd.grad(total, [x for x in leaves.values() if x is not None])

    with rlfast.use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, gradients = step()
        with torch.no_grad():
            leaves[first].copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_gradients = step()
    assert_same_bits("logp", out.logp.detach(), expected.logp.detach())
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert_same_bits("gradient", got, wanted)


def check_replay(step, leaf) -> None:
    """(loss, gradient) of ``step``, captured once and replayed on another ``leaf``; nothing synchronises."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.sub_(0.1)
    graph.replay()
    torch.cuda.synchronize()
    for what, a, b in zip(("loss", "gradient"), captured, step(), strict=True):
        assert_same_bits(what, a.detach(), b.detach())


def check_out_of_range(inputs: dict, target: int, backend: str, device: str) -> None:
    """The op itself, which a compiled function or a GPU hands an unchecked target."""
    targets = torch.tensor([5, target, 7, 9], device=device)
    x = {name: t.to(device) for name, t in inputs.items()}
    options = (None, None, 1.0, 0.0, 1.0, 0, 0)
    with torch.no_grad():
        if "logits" in x:
            logp = logits_op.op(x["logits"], targets, *options, False, backend)[0]
        else:
            logp = linear_op.op(x["hidden"], x["weight"], None, targets, *options, False, backend)[0]
        with rlfast.use_backend(backend):
            right = call(Problem(inputs, torch.tensor([5, 5, 7, 9]), {}, ("logp",), ()), x, device).logp
    assert logp.isnan().tolist() == [False, True, False, False]
    keep = torch.tensor([0, 2, 3], device=device)
    assert_value("the other rows", logp[keep], right[keep].double().cpu(), right[keep])


def check_by_rows(problem: Problem, backend: str, device: str, rows: int = 64, calls=()) -> None:
    """``check`` for sizes whose oracle does not fit: the truth a few rows at a time, the head's gradients summed up.

    Only rows that the loss reads (``Problem.every``) are compared; the gradients of the others are zeros.
    ``calls`` are ways of making the call that have one truth, which takes longer than all of them.
    """
    read = slice(None, None, problem.every)
    part = replace(problem, inputs=_of_rows(problem.inputs, read), targets=problem.targets[read],
                   options=_of_rows(problem.options, read))  # fmt: skip
    upstream = [g[read] for g in cotangents(problem, [torch.empty(problem.targets.shape)] * len(problem.grads))]
    truths, own = (_oracle_by_rows(part, dtype, upstream, rows) for dtype in (torch.float64, torch.float32))
    for way in calls or (problem.call,):
        out, gradients = run(replace(problem, call=way), backend, device)
        assert bool(out.logp.isfinite().all()), "logp is not finite"
        for name in set(gradients) & {"logits", "hidden"}:
            others = torch.ones(problem.lead, dtype=torch.bool)
            others[read] = False
            assert_zero(f"gradient of unread {name}", gradients[name][others.to(device)])
            gradients[name] = gradients[name][read]
        out = rlfast.TokenLogps(*(x if x is None else x[read] for x in out))
        hold(part, out, gradients, truths, own)


def _of_rows(named: dict, rows: slice) -> dict:
    """Of hidden states, logits and options the rows; the head as it is."""
    return {k: x[rows] if isinstance(x, torch.Tensor) and k not in ("weight", "bias") else x for k, x in named.items()}


def _oracle_by_rows(problem: Problem, dtype, upstream: list, rows: int):
    (n,) = problem.lead
    values, gradients = {}, {}
    for start in range(0, n, rows):
        at = slice(start, min(start + rows, n))
        few = Problem(_of_rows(problem.inputs, at), problem.targets[at], _of_rows(problem.options, at),
                      problem.outputs, problem.grads, problem.needs)  # fmt: skip
        some, some_gradients = oracle(few, dtype, [g[at] for g in upstream])
        for name, x in some.items():
            values.setdefault(name, []).append(x)
        for name, g in some_gradients.items():
            if name in ("logits", "hidden"):
                gradients.setdefault(name, []).append(g)
            else:
                gradients[name] = g if name not in gradients else gradients[name].add_(g)
    values = {name: torch.cat(parts) for name, parts in values.items()}
    return values, {name: torch.cat(g) if isinstance(g, list) else g for name, g in gradients.items()}


def skip_unless_memory(device: str, gib: int) -> None:
    """Skip a test that needs more memory than is free."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    if free < gib << 30:
        pytest.skip(f"fewer than {gib} GiB of memory are free")


def skip_unless_cores(n: int) -> None:
    """Skip a test of threads on a machine with too few cores."""
    if (os.cpu_count() or 1) < n:
        pytest.skip(f"fewer than {n} processor cores")


def far_apart(*tensors):
    """Copies [2, n] whose rows lie 2³¹ elements apart, in one storage a dtype; nothing between them is touched."""
    found, places = [], {}
    for x in tensors:
        storage, used = places.get(x.dtype, (None, 0))
        if storage is None:
            storage = torch.empty(2**31 + 1024, dtype=x.dtype, device=x.device)
        found.append(storage.as_strided(x.shape, (2**31, 1), used).copy_(x.detach()))
        places[x.dtype] = storage, used + x.shape[1]
    return found
