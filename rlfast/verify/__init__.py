"""Parity of every op and backend on this machine: error ÷ PyTorch's own error, for values and gradients.

The truth is ``rlfast/reference`` in float64 from the same inputs, the yardstick is the same code in float32 in several
orders of summation, the bound is the numerics contract (``rlfast/parity.py``). As in the tests, and nothing looser.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import NamedTuple

import torch

from rlfast import backends, parity
from rlfast.verify import (
    advantages,
    attention,
    divergences,
    linear,
    log_probs,
    preferences,
    ranked_loss,
    sampling,
    token_loss,
)
from rlfast.verify.subject import Problem, Subject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# op → the ways to call it, each family of ops in a module of its own.
SUBJECTS: dict[str, tuple[Subject, ...]] = {
    **log_probs.SUBJECTS,
    **divergences.SUBJECTS,
    **token_loss.SUBJECTS,
    **preferences.SUBJECTS,
    **ranked_loss.SUBJECTS,
    **advantages.SUBJECTS,
    **linear.SUBJECTS,
    **sampling.SUBJECTS,
    **attention.SUBJECTS,
}


class Cell(NamedTuple):
    """One op on one backend at one dtype. The ratios are error ÷ PyTorch's own error, at their worst."""

    op: str
    backend: str
    dtype: str
    device: str
    status: str  # "ok", "interpreted", "FAILED", or "not here"
    value_ratio: float | None = None
    gradient_ratio: float | None = None
    detail: str = ""
    isa: str = ""  # the instruction set of the cpu backend


def _run(function, problem: Problem, cast: torch.dtype | None) -> tuple[dict, dict]:
    """(values, gradients) of one implementation, with the leaves cast first if ``cast`` is given."""
    leaves = {
        k: x.detach().to(cast or x.dtype).requires_grad_(bool(problem.upstream)) for k, x in problem.leaves.items()
    }
    values = function(leaves, problem.rest)
    if not problem.upstream:
        return values, {}
    loss = sum((values[k] * g.to(values[k].dtype)).sum() for k, g in problem.upstream.items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return values, dict(zip(leaves, grads, strict=True))


def _reference(subject: Subject, problem: Problem, dtype: torch.dtype) -> tuple[dict, dict]:
    return _run(lambda leaves, rest: subject.reference(leaves, rest, dtype), problem, dtype)


def _yardsticks(subject: Subject, problem: Problem) -> tuple[dict, dict]:
    """(values, gradients) by PyTorch in float32, each as a list: one per order of its sums."""
    runs = [_reference(subject, problem, torch.float32)]
    for seed in range(1, parity.ORDERS) if subject.reordered else ():
        moved, back = subject.reordered(problem, seed)
        found = _reference(subject, moved, torch.float32)
        runs.append(tuple({k: back[k](x) if k in back else x for k, x in part.items()} for part in found))
    return tuple({name: [run[i][name] for run in runs] for name in runs[0][i]} for i in (0, 1))


def small(backend: str) -> bool:
    """Whether ``backend`` gets inputs that its interpreter can manage."""
    return backend == "triton" and backends.interpreting()


def cell(op: str, backend: str, dtype: str, device: str) -> Cell:
    """Measure one op on one backend that is here: the worst of the ways to call it."""
    values, gradients, wrong = [], [], []
    for subject in SUBJECTS[op]:
        value, gradient = _measure(subject, backend, DTYPES[dtype], device)
        values.append(value.ratio)
        gradients += [] if gradient is None else [gradient.ratio]
        failed = value.wrong + (gradient.wrong if gradient else [])
        wrong += [f"{subject.name} {what}".lstrip() for what in failed]
    interpreted = backend == "triton" and backends.interpreting()
    status = "FAILED" if wrong else ("interpreted" if interpreted else "ok")
    isa = backends.isa() if backend == "cpu" else ""
    return Cell(op, backend, dtype, device, status, max(values), max(gradients, default=None), "; ".join(wrong), isa)


def _measure(subject: Subject, backend: str, dtype: torch.dtype, device: str) -> tuple[_Compared, _Compared | None]:
    problem = subject.inputs(dtype, device, small(backend))
    truth, truth_grads = _reference(subject, problem, torch.float64)
    own, own_grads = _yardsticks(subject, problem)
    with backends.use_backend(backend):
        got, got_grads = _run(subject.public, problem, None)
    value = _compare(got, truth, own, subject.outputs, "value")
    return value, _compare(got_grads, truth_grads, own_grads, truth_grads, "gradient") if problem.upstream else None


class _Compared(NamedTuple):
    ratio: float
    wrong: list[str]


def _compare(got: dict, truth: dict, own: dict, names, kind: str) -> _Compared:
    """The verdict is the contract's. The ratio shown divides by the yardstick's error after rounding to the
    result's dtype: a gradient handed back in bfloat16 cannot be nearer than that.
    """
    sizes = truth.get("sizes", {})
    results = {k: parity.measure(got[k], truth[k], own[k], kind, size=sizes.get(k)) for k in names}
    rounded = {k: [x.to(got[k].dtype) for x in own[k]] for k in names}
    ratios = [parity.measure(got[k], truth[k], rounded[k], kind).ratio for k in names]
    return _Compared(max(ratios), [f"{k}: {result}" for k, result in results.items() if not result.ok])


def verify(ops=None, only=None, every_isa: bool = False) -> list[Cell]:
    """Every op × backend × dtype that this machine can run; what it cannot run says why.

    Args:
        ops: names of ops; all of them if None.
        only: names of backends; all of them if None.
        every_isa: run the C++ CPU kernels at each instruction set that this processor has, not at the best alone.

    Returns:
        One ``Cell`` each. Triton without a GPU runs in Triton's interpreter, in a process of its own.
    """
    cells = []
    for op in ops or tuple(backends.IMPLEMENTED):
        if op not in backends.IMPLEMENTED:
            raise ValueError(f"op: expected one of {tuple(backends.IMPLEMENTED)}, got {op!r}")
        for backend in backends.IMPLEMENTED[op]:
            if only and backend not in only:
                continue
            if every_isa and backend == "cpu":
                for isa in backends.isas()[:-1]:
                    with backends.use_isa(isa):
                        cells += _backend(op, backend)
            cells += _backend(op, backend)
    return cells


def _backend(op: str, backend: str) -> list[Cell]:
    reason = backends.why_not(backend)
    if backend == "triton" and reason and not torch.cuda.is_available() and "not installed" not in reason:
        return _interpreted(op)
    gpu = backend == "cuda" or (backend == "triton" and not backends.interpreting())
    device = "cuda" if gpu else "cpu"
    if reason:
        return [Cell(op, backend, dtype, device, "not here", detail=reason) for dtype in DTYPES]
    return [cell(op, backend, dtype, device) for dtype in DTYPES]


def _interpreted(op: str) -> list[Cell]:
    """Triton reads TRITON_INTERPRET when a kernel is decorated: its interpreter needs a process that starts with it."""
    command = [sys.executable, "-m", "rlfast.cli", "verify", "--op", op, "--backend", "triton", "--json"]
    done = subprocess.run(command, env=backends.interpreter_environment(), capture_output=True, text=True)
    try:
        return [Cell(**row) for row in json.loads(done.stdout)]
    except json.JSONDecodeError:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing was said"]
        return [Cell(op, "triton", dtype, "cpu", "FAILED", detail=said[-1]) for dtype in DTYPES]
