"""What runs in a case, and how a family makes an arm of a function."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch

from bench.case import Case
from rlfast import backends


def arm(function, leaves: dict, rest: tuple, outputs: tuple[str, ...], upstream: torch.Tensor | None = None):
    """``function(*leaves, *rest)`` → a tensor or a tuple of them, named by ``outputs``; with an ``upstream`` gradient
    of the first, the gradients ``grad_<leaf>`` too. Of rows that it leaves out at the end, the upstream is left out.
    """
    backward = upstream is not None
    tensors = {name: x.detach().requires_grad_(backward) for name, x in leaves.items()}

    def run():
        with torch.set_grad_enabled(backward):
            out = function(*tensors.values(), *rest)
        out = out if isinstance(out, tuple) else (out,)
        found = dict(zip(outputs, out, strict=False))
        if backward:
            g = (upstream[: len(out[0])] if upstream.dim() else upstream).to(out[0].dtype)
            grads = torch.autograd.grad(out[0], list(tensors.values()), g)
            found |= {f"grad_{name}": x for name, x in zip(tensors, grads, strict=True)}
        return found

    return run


def has(module: str) -> bool:
    """Whether a peer is installed."""
    return importlib.util.find_spec(module) is not None


def bandwidth(x: torch.Tensor) -> dict:
    """The ceilings of an op that streams ``x``: "read", by the same threads; on a GPU "copy"."""
    if x.device.type == "cuda":
        target = torch.empty_like(x)
        return {"copy": lambda: target.copy_(x)}
    if backends.why_not("cpu"):
        return {}
    extension, threads = backends.extension("cpu"), torch.get_num_threads()
    return {"read": lambda: extension.read_bandwidth(x.data_ptr(), x.numel() * x.element_size(), threads)}


def _within(scope, run):
    def forced():
        with scope():
            return run()

    return forced


def build(case: Case, data: dict, device: str = "cpu") -> dict:
    """Every arm of a case that can run here, by name: ours, also at lower instruction sets or on each backend of a GPU,
    plain torch, and peers."""
    ours = case.ours(data)
    arms = dict(ours)
    if case.isas and device == "cpu":
        for isa in ("avx2", "baseline"):
            if isa in backends.isas()[:-1]:
                forced = partial(backends.use_isa, isa)
                arms |= {f"{name} {isa}": _within(forced, run) for name, run in ours.items() if name in case.OURS}
    if device == "cuda":
        for backend in ("triton", "cuda"):  # one of them is what "rlfast" runs on
            if backend in backends.IMPLEMENTED.get(case.op, ()) and not backends.why_not(backend):
                forced = partial(backends.use_backend, backend)
                arms |= {f"{name} {backend}": _within(forced, run) for name, run in ours.items()}
    return arms | case.plain(data) | case.peers(data, device)
