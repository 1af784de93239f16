"""Checked first, then timed: every arm of a case in one interleaved loop."""

from __future__ import annotations

import statistics
import time

import torch

MAX_ROUNDS = 15
SAMPLE_S = 1e-3  # a shorter call is repeated until its sample has taken this long


def error(found: dict, truth_: dict) -> float:
    """The worst |got − truth| ÷ max|truth| over what an arm returned."""
    worst = 0.0
    for name, x in found.items():
        at, wanted = truth_[name]
        x = x.detach()
        if at is not None:
            at, wanted = at[at < x.shape[0]], wanted[: int((at < x.shape[0]).sum())]
            x = x[at]
        off = ((x.double() - wanted).abs().max() / wanted.abs().max()).item()
        worst = max(worst, off if off == off else float("inf"))
    return worst


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _sample(run, device: str) -> float:
    """Seconds of one call."""
    _synchronize(device)
    calls, started = 0, time.perf_counter()
    while True:
        result = run()
        _synchronize(device)
        calls, spent = calls + 1, time.perf_counter() - started
        if spent >= SAMPLE_S:
            del result  # freed off the clock
            return spent / calls


def interleaved(arms: dict, budget_s: float, device: str = "cpu", say=None) -> dict[str, list[float]]:
    """Seconds of each arm, round after round, the order rotated; at least two rounds, whatever the budget."""
    names, times = list(arms), {name: [] for name in arms}
    started = time.perf_counter()
    for round_ in range(MAX_ROUNDS):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_sample(arms[name], device))
        spent = time.perf_counter() - started
        if say:
            say(f"round {round_ + 1}, {spent:.0f} s")
        if round_ >= 1 and spent * (round_ + 2) / (round_ + 1) > budget_s:
            break
    return times


def checked(arms: dict, truth_: dict, gate: float, say=None) -> tuple[dict, dict]:
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
        if not errors[name] <= gate:
            failures[name] = f"wrong answer: error {errors[name]:.2g} of the largest value"
    return errors, failures


def summary(samples: list[float]) -> dict:
    """Median and spread (interquartile range ÷ median) of seconds, in ms."""
    middle = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 3 else [min(samples), middle, max(samples)]
    rounds = [float(f"{s * 1e3:.5g}") for s in samples]
    return {"ms": middle * 1e3, "spread": (quartiles[2] - quartiles[0]) / middle, "rounds": rounds}
