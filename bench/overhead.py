"""What the public call costs on a tiny input, above the raw kernel: checks, the op, autograd's record."""

from __future__ import annotations

import time

import torch

import rlfast
from rlfast import backends
from rlfast.native import token_logps as native
from rlfast.ops.records import Transform, Wanted

ROWS, VOCAB = 1, 64
CALLS, ROUNDS = 200, 15
TARGETS = {"no_grad": 25.0, "recording": 45.0}  # µs


def _raw_kernel(forward, *arguments):
    """The bound C++ function as ``forward`` calls it: buffers allocated and addresses taken beforehand."""
    extension, seen = backends.extension("cpu"), []
    original = extension.token_logps_forward
    extension.token_logps_forward = lambda *given: (seen.append(given), original(*given))
    try:
        buffers = forward(*arguments)
    finally:
        extension.token_logps_forward = original

    def raw(given=seen[0], keep=(buffers, arguments)):  # the addresses point into what is kept
        original(*given)

    return raw


def _microseconds(function) -> float:
    before = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - before) / CALLS * 1e6


def measure() -> dict | None:
    """The least µs of each over interleaved blocks of calls, as timeit takes it; None without the C++ kernels."""
    if backends.why_not("cpu"):
        return None
    logits, targets = torch.randn(ROWS, VOCAB), torch.zeros(ROWS, dtype=torch.int64)
    recorded = logits.clone().requires_grad_()
    transform, wanted = Transform(1.0, 0.0, 1.0), Wanted(0, 0)

    arms = {
        "raw kernel": _raw_kernel(native.forward, logits, targets, None, transform, wanted),
        "backend": lambda: native.forward(logits, targets, None, transform, wanted),
        "no_grad": lambda: rlfast.token_logps(logits, targets),
        "recording": lambda: rlfast.token_logps(recorded, targets),
    }
    times = {name: [] for name in arms}
    for function in arms.values():
        _microseconds(function)
    for _ in range(ROUNDS):
        for name, function in arms.items():
            with torch.set_grad_enabled(name == "recording"):
                times[name].append(_microseconds(function))
    found = {name: min(samples) for name, samples in times.items()}
    above = {name: found[name] - found["raw kernel"] for name in TARGETS}
    return {
        "microseconds": found,
        "above_raw": above,
        "targets": TARGETS,
        "met": {name: above[name] <= TARGETS[name] for name in TARGETS},
    }
