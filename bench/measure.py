"""Checked first, then timed: every arm of a case in one interleaved loop."""

from __future__ import annotations

import statistics
import time

import torch

from bench.suite import Case
from rlfast.reference import token_logps as reference

SAMPLES = 64  # rows and vocabulary columns that are compared with float64
MAX_ROUNDS = 15
# A gate against wrong answers, not the numerics contract (that is for the tests): |got − truth| ÷ max|truth|. An arm
# that rounds its logits to bfloat16 is off by some 1e-2 and is still timed; its error stands beside its time.
GATES = {"float32": 1e-3, "bfloat16": 0.1}


def _even(n: int, count: int = SAMPLES) -> torch.Tensor:
    return torch.linspace(0, n - 1, min(n, count)).long()


def _row_truth(case: Case, data: dict, rows: torch.Tensor) -> dict:
    """Outputs and row-local gradients of some rows, in float64."""
    targets, g = data["targets"][rows], data["g_logp"][rows].double()
    if case.width:
        leaf = data["hidden"][rows].double().requires_grad_()
        logits = leaf @ data["weight"].double().T
    else:
        leaf = logits = data["logits"][rows].double().requires_grad_()
    found = reference.token_logps(logits, targets, dtype=torch.float64)
    truth = {name: (rows, found[name].detach()) for name in ("logp", "entropy", "log_sum_sq_probs")}
    grad = torch.autograd.grad((found["logp"] * g).sum(), leaf)[0]
    return truth | {"grad_hidden" if case.width else "grad_logits": (rows, grad)}


def _weight_truth(case: Case, data: dict, columns: torch.Tensor) -> tuple:
    """dWeight of some vocabulary rows: needs every row's log-sum-exp, taken from float32 logits a chunk at a time."""
    hidden, weight = data["hidden"], data["weight"]
    some = weight[columns].double()
    total = torch.zeros_like(some)
    for h, t, g in zip(hidden.split(256), data["targets"].split(256), data["g_logp"].split(256), strict=True):
        lse = torch.logsumexp(h.float() @ weight.float().T, -1).double()
        p = torch.exp(h.double() @ some.T - lse.unsqueeze(-1))
        total += (((t.unsqueeze(-1) == columns).double() - p) * g.double().unsqueeze(-1)).T @ h.double()
    return columns, total


def truth(case: Case, data: dict) -> dict:
    """{output: (indices, float64 values there)}."""
    with torch.enable_grad():
        found = _row_truth(case, data, _even(case.rows).to(data["targets"].device))
    if case.width and case.backward:
        columns = torch.cat((_even(case.vocab).to(data["targets"].device), data["targets"][:SAMPLES])).unique()
        with torch.no_grad():
            found["grad_weight"] = _weight_truth(case, data, columns)
    return found


def error(found: dict, truth_: dict) -> float:
    """The worst |got − truth| ÷ max|truth| over what an arm returned."""
    worst = 0.0
    for name, x in found.items():
        at, wanted = truth_[name]
        at, wanted = at[at < x.shape[0]], wanted[: int((at < x.shape[0]).sum())]
        off = ((x.detach()[at].double() - wanted).abs().max() / wanted.abs().max()).item()
        worst = max(worst, off if off == off else float("inf"))
    return worst


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(arms: dict, budget_s: float, device: str = "cpu", say=None) -> dict[str, list[float]]:
    """Seconds of each arm, round after round, the order rotated; at least two rounds, whatever the budget."""
    names, times = list(arms), {name: [] for name in arms}
    started = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronize(device)
            before = time.perf_counter()
            result = arms[name]()
            _synchronize(device)
            times[name].append(time.perf_counter() - before)
            del result  # freed off the clock
        spent = time.perf_counter() - started
        if say:
            say(f"round {round_ + 1}, {spent:.0f} s")
        if round_ >= 1 and spent * (round_ + 2) / (round_ + 1) > budget_s:
            break
    return times


def checked(arms: dict, truth_: dict, dtype: str, say=None) -> tuple[dict, dict]:
    """(errors, failures): every arm run once. A failure is the reason why an arm is not timed."""
    errors, failures = {}, {}
    for name, run in arms.items():
        if say:
            say(f"checking {name}")
        try:
            errors[name] = error(run(), truth_)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            ImportError,
        ) as caught:  # a peer that cannot run here is a row that says so
            if name.startswith("rlfast"):
                raise
            failures[name] = f"does not run here: {str(caught).strip().splitlines()[0]}"
            continue
        if not errors[name] <= GATES[dtype]:
            failures[name] = f"wrong answer: error {errors[name]:.2g} of the largest value"
    return errors, failures


def summary(samples: list[float]) -> dict:
    """Median and spread (interquartile range ÷ median) of seconds, in ms."""
    middle = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 3 else [min(samples), middle, max(samples)]
    rounds = [float(f"{s * 1e3:.5g}") for s in samples]
    return {"ms": middle * 1e3, "spread": (quartiles[2] - quartiles[0]) / middle, "rounds": rounds}
