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

from rlfast import backends, logps, parity
from rlfast.reference import linear_token_logps as linear_reference
from rlfast.reference import token_logps as logits_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUTS = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logits")
# Rows, hidden width, vocabulary: rows enough that the largest error is no accident, few where the interpreter runs.
SIZES = {True: (64, 24, 2053), False: (65, 160, 50257)}


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


def inputs(op: str, dtype: torch.dtype, device: str, small: bool) -> dict:
    """Leaves, targets and options of one case: soft-cap, a temperature a row, a mask, an ignored target."""
    rows, width, vocab = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    if op == "token_logps":
        leaves = {"logits": torch.randn(rows, vocab, generator=draw) * 4}
    else:
        leaves = {
            "hidden": torch.randn(rows, width, generator=draw),
            "weight": torch.randn(vocab, width, generator=draw) * (4 / width**0.5),
            "bias": torch.randn(vocab, generator=draw),
        }
    targets = torch.randint(vocab, (rows,), generator=draw)
    targets[1] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2] = False
    options = {
        "temperature": (torch.rand(rows, generator=draw) + 0.5).to(device),
        "softcap": 30.0,
        "logit_scale": 1.25,
        "mask": mask.to(device),
    }
    upstream = {name: torch.randn(rows, generator=draw).to(device) for name in ("logp", "lse", "entropy")}
    leaves = {name: x.to(device, dtype) for name, x in leaves.items()}
    return {"leaves": leaves, "targets": targets.to(device), "options": options, "upstream": upstream}


def _run(function, case: dict, cast: torch.dtype | None) -> tuple[dict, dict]:
    """(values, gradients) of one implementation, with the leaves cast first if ``cast`` is given."""
    leaves = {k: x.detach().to(cast or x.dtype).requires_grad_() for k, x in case["leaves"].items()}
    values = function(leaves, case["targets"], case["options"])
    loss = sum((values[k] * g.to(values[k].dtype)).sum() for k, g in case["upstream"].items())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return values, dict(zip(leaves, grads, strict=True))


def _yardsticks(op: str, case: dict) -> tuple[dict, dict]:
    """(values, gradients) by PyTorch in float32, each as a list: one per order of its sums."""
    runs = [_run(_reference(op, torch.float32), case, torch.float32)]
    for seed in range(1, parity.ORDERS):
        leaves, targets, back = parity.reordered(case["leaves"], case["targets"], seed)
        moved = case | {"leaves": leaves, "targets": targets}
        values, grads = _run(_reference(op, torch.float32), moved, torch.float32)
        runs.append((values, {name: back[name](g) for name, g in grads.items()}))
    return tuple({name: [run[i][name] for run in runs] for name in runs[0][i]} for i in (0, 1))


def _ordered(leaves: dict) -> tuple:
    return tuple(leaves[k] for k in ("logits", "hidden", "weight") if k in leaves)


def _ours(op: str):
    public = getattr(logps, op)

    def call(leaves, targets, options):
        bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
        return public(*_ordered(leaves), targets, **bias, **options, outputs=OUTPUTS)._asdict()

    return call


def _reference(op: str, dtype: torch.dtype):
    module = {"token_logps": logits_reference, "linear_token_logps": linear_reference}[op]

    def call(leaves, targets, options):
        bias = {"bias": leaves["bias"]} if "bias" in leaves else {}
        return getattr(module, op)(*_ordered(leaves), targets, **bias, **options, dtype=dtype)

    return call


def cell(op: str, backend: str, dtype: str, device: str) -> Cell:
    """Measure one op on one backend that is here."""
    interpreted = backend == "triton" and backends.interpreting()
    case = inputs(op, DTYPES[dtype], device, small=interpreted)
    truth, truth_grads = _run(_reference(op, torch.float64), case, torch.float64)
    own, own_grads = _yardsticks(op, case)
    with backends.use_backend(backend):
        got, got_grads = _run(_ours(op), case, None)
    value, gradient = (
        _compare(got, truth, own, OUTPUTS, "value"),
        _compare(got_grads, truth_grads, own_grads, truth_grads, "gradient"),
    )
    wrong = value.wrong + gradient.wrong
    status = "FAILED" if wrong else ("interpreted" if interpreted else "ok")
    isa = backends.isa() if backend == "cpu" else ""
    return Cell(op, backend, dtype, device, status, value.ratio, gradient.ratio, "; ".join(wrong), isa)


class _Compared(NamedTuple):
    ratio: float
    wrong: list[str]


def _compare(got: dict, truth: dict, own: dict, names, kind: str) -> _Compared:
    """The verdict is the contract's. The ratio shown divides by the yardstick's error after rounding to the
    result's dtype: a gradient handed back in bfloat16 cannot be nearer than that.
    """
    results = {k: parity.measure(got[k], truth[k], own[k], kind) for k in names}
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
