"""The bare GEMMs of a linear op, each at the best rate found for its own shape: the ceiling of its forward and
backward.

forward  [N, D] · [D, V] → logits,   dHidden  [N, V] · [V, D],   dWeight  [V, N] · [N, D]
"""

from __future__ import annotations

import functools
import time

import torch


def onednn(x, weight):
    """x · weightᵀ by oneDNN, which beats MKL's float32 mm where torch would pick that."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def mm(x, weight):
    """x · weightᵀ by whatever torch picks."""
    return x @ weight.T


@functools.cache
def onednn_works() -> bool:
    """Whether the private oneDNN linear is there and takes float32."""
    x = torch.ones(2, 4)
    try:
        return bool(torch.equal(onednn(x, x), x @ x.T))
    except (AttributeError, RuntimeError):
        return False


def candidates(hidden, weight) -> dict:
    """The ways to run each of the three GEMMs, as {gemm: {way: function}}. Operands are laid out beforehand, unpaid."""
    logits = hidden.new_empty(len(hidden), len(weight)).normal_()
    out_w, out_h, out_z = torch.empty_like(weight), torch.empty_like(hidden), torch.empty_like(logits)
    logits_t, hidden_t, weight_t = (lambda x: x.T)(logits), hidden.T.contiguous(), weight.T.contiguous()
    ways = {
        "forward": {
            "mm": lambda: torch.mm(hidden, weight.T, out=out_z),
            "mm, copied": lambda: torch.mm(hidden, weight_t, out=out_z),
        },
        "dHidden": {"mm": lambda: torch.mm(logits, weight, out=out_h)},
        "dWeight": {
            "mm": lambda: torch.mm(logits_t, hidden, out=out_w),
            "mm, transposed": lambda: torch.mm(hidden_t, logits),
        },
    }
    if hidden.device.type == "cpu" and hidden.dtype == torch.float32 and onednn_works():
        ways["forward"]["oneDNN"] = lambda: onednn(hidden, weight)
        ways["dHidden"]["oneDNN"] = lambda: onednn(logits, weight_t)
        ways["dWeight"]["oneDNN"] = lambda: onednn(logits_t, hidden_t)
    return ways


def _seconds(function) -> float:
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def best(hidden, weight, repeats: int = 2) -> dict:
    """{gemm: (way, function)}: the fastest of ``repeats`` runs after a first one."""
    found = {}
    for gemm, ways in candidates(hidden, weight).items():
        rated = {way: (_seconds(f), min(_seconds(f) for _ in range(repeats)))[1] for way, f in ways.items()}
        way = min(rated, key=rated.get)
        found[gemm] = (way, ways[way])
    return found


def ceilings(hidden, weight) -> dict:
    """One arm a GEMM. Keeping is forward + dHidden + dWeight, recomputing is one forward more."""
    with torch.no_grad():
        chosen = best(hidden, weight)
    return {f"gemm {gemm} ({way})": function for gemm, (way, function) in chosen.items()}
