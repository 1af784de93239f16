"""What runs in a case: rlfast at each instruction set, eager, torch.compile, plain torch, peers, and the bare ceilings.

An arm is a function of no arguments that returns ``{"logp": ..., "entropy": ..., "grad_hidden": ...}``: everything it
computed, so that it can be checked before it is timed.
"""

from __future__ import annotations

import torch

import rlfast
from bench import baselines, gemms, peers
from bench.suite import Case
from rlfast import backends


def leaves(case: Case, data: dict) -> dict:
    """The tensors that gradients are asked of."""
    names = ("hidden", "weight") if case.width else ("logits",)
    return {name: data[name].detach().requires_grad_(case.backward) for name in names}


def _arm(case: Case, data: dict, function):
    """``function(*leaves, targets)`` → logp or a tuple of outputs; with its backward if the case has one."""
    inputs = leaves(case, data)

    def run():
        with torch.set_grad_enabled(case.backward):
            out = function(*inputs.values(), data["targets"])
        out = out if isinstance(out, tuple) else (out,)
        found = dict(zip(("logp", "entropy", "log_sum_sq_probs"), out, strict=False))
        if case.backward:
            grads = torch.autograd.grad(
                out[0], list(inputs.values()), data["g_logp"][: out[0].numel()].to(out[0].dtype)
            )
            found |= {f"grad_{name}": g for name, g in zip(inputs, grads, strict=True)}
        return found

    return run


def _at_isa(run, isa: str):
    def forced():
        with backends.use_isa(isa):
            return run()

    return forced


def _on_backend(run, backend: str):
    def forced():
        with backends.use_backend(backend):
            return run()

    return forced


def _ours(case: Case, data: dict) -> dict:
    """rlfast's arms at the best instruction set."""
    outputs = ("logp", "entropy", "log_sum_sq_probs") if case.entropy else ("logp",)

    def from_logits(names):
        def run(logits, targets):
            out = rlfast.token_logps(logits, targets, outputs=names)
            return tuple(getattr(out, name) for name in names)

        return run

    def from_hidden(budget):
        return lambda hidden, weight, targets: (
            rlfast.linear_token_logps(hidden, weight, targets, memory_budget=budget).logp
        )

    if case.width:
        return {
            "rlfast keep": _arm(case, data, from_hidden(1 << 40)),
            "rlfast recompute": _arm(case, data, from_hidden(0)),
        }
    arms = {"rlfast": _arm(case, data, from_logits(outputs))}
    if case.entropy:
        arms["rlfast logp"] = _arm(case, data, from_logits(("logp",)))
    return arms


def _plain(case: Case) -> dict:
    """name → function: eager, torch.compile of eager, and the strongest plain torch."""
    compile_ = torch.compile(dynamic=False)
    if case.width:
        linear = baselines.LinearLogps.apply
        found = {
            "eager": baselines.linear_eager,
            "compile": compile_(baselines.linear_eager),
            "plain in place": lambda h, w, t: linear(h, w, t, baselines.mm),
        }
        if case.dtype == "float32" and gemms.onednn_works():
            found["plain in place, oneDNN"] = lambda h, w, t: linear(h, w, t, baselines.onednn)
        return found
    eager = baselines.eager_statistics if case.entropy else baselines.eager
    found = {"eager": eager, "compile": compile_(eager)}
    if case.backward:
        return found | {"plain chunked": baselines.ChunkedLogps.apply}
    part = baselines.chunk_statistics if case.entropy else baselines.chunk_logps
    return found | {
        "plain chunked": baselines.chunked(part),
        "plain chunked, compiled": baselines.chunked(compile_(part)),
    }


def build(case: Case, data: dict, device: str = "cpu") -> dict:
    """Every arm of a case that can run here, by name."""
    ours = _ours(case, data)
    arms = dict(ours)
    if case.isas and device == "cpu":
        for isa in ("avx2", "baseline"):
            if isa in backends.isas()[:-1]:
                arms |= {f"{name} {isa}": _at_isa(run, isa) for name, run in ours.items() if name != "rlfast logp"}
    if device == "cuda":
        for backend in ("triton", "cuda"):  # one of them is what "rlfast" runs on
            if backend in backends.IMPLEMENTED[case.op] and not backends.why_not(backend):
                arms |= {f"{name} {backend}": _on_backend(run, backend) for name, run in ours.items()}
    arms |= {name: _arm(case, data, function) for name, function in _plain(case).items()}
    theirs = peers.from_hidden(device) if case.width else peers.from_logits(case.entropy, device)
    return arms | {name: _arm(case, data, function) for name, function in theirs.items()}


def ceilings(case: Case, data: dict, device: str = "cpu") -> dict:
    """name → function: the least that the hardware can do for this case, timed in the same loop."""
    if case.width:
        return gemms.ceilings(case, data)
    logits = data["logits"]
    if device == "cuda":
        target = torch.empty_like(logits)
        return {"copy": lambda: target.copy_(logits)}
    if backends.why_not("cpu"):
        return {}
    extension = backends.extension("cpu")
    threads = torch.get_num_threads()
    return {
        "read": lambda: extension.read_bandwidth(logits.data_ptr(), logits.numel() * logits.element_size(), threads)
    }
