"""What ``rlfast compare`` prints."""

from __future__ import annotations

import statistics

from rich.table import Table

from rlfast.compare.functions import Measured
from rlfast.compare.steps import Compared
from rlfast.demo.parity import TOLERANCES, Tolerances

# Of two layers. A gradient norm may be that of the KL alone, a thousandth of what its rounding is of.
TINY = Tolerances(logp=2e-5, loss=1e-5)


def steps_table(steps: list[Compared], title: str) -> Table:
    """Loss, gradient norm, distances, time and memory, stock | rlfast."""
    table = Table("step", "loss", "", "gradient norm", "", "log-probs", "update", "weights", "ms", "", "MB", "",
                  title=f"{title}: stock | rlfast, and how far they are apart")  # fmt: skip
    for k, (step, weights, seconds, peak) in enumerate(steps, 1):
        table.add_row(
            str(k), *(f"{x:.6f}" for x in step.loss), *(f"{x:.5f}" for x in step.grad_norm), f"{step.logp:.1e}",
            f"{step.update:.1e}", f"{weights:.1e}", *(f"{s * 1e3:.1f}" for s in seconds),
            *(f"{b / 1e6:.0f}" for b in peak),
        )  # fmt: skip
    return table


def ratio(steps: list[Compared]) -> float:
    """Stock's median time over rlfast's, after a step that warms up."""
    stock, ours = (statistics.median(s.seconds[arm] for s in steps[1:] or steps) for arm in (0, 1))
    return stock / ours


def failures(steps: list[Compared], allowed: Tolerances = TOLERANCES) -> list[str]:
    """What is out of tolerance, in words."""
    found = []
    for k, (step, weights, *_) in enumerate(steps, 1):
        beyond = step.beyond(allowed)
        if not weights <= allowed.weights:
            beyond.append(f"weights {weights:.2g} of their norm apart, allowed {allowed.weights:.0e}")
        found += [f"step {k}: {words}" for words in beyond]
    return found


def as_json(steps: list[Compared], allowed: Tolerances = TOLERANCES) -> dict:
    """The same for a program."""
    rows = [s.step._asdict() | {"weights": s.weights, "seconds": s.seconds, "peak_bytes": s.peak} for s in steps]
    for row in rows:
        del row["flat_groups"]
    return {"steps": rows, "time_ratio": ratio(steps), "failures": failures(steps, allowed)}


def functions_table(done: list[Measured], library: str) -> Table:
    """How far values and gradients are apart, and the time, stock | patched."""
    title = f"{library}'s functions: stock | patched"
    table = Table("function", "values", "gradients", "ms", "", "stock ÷ patched", title=title)
    for one in done:
        apart = "" if one.gradient is None else f"{one.gradient:.1e}"
        theirs, ours = one.seconds
        times = f"{theirs * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{theirs / ours:.1f}×"
        table.add_row(one.label, f"{one.value:.1e}", apart, *times)
    return table


def ran(done: list[Measured]) -> list[str]:
    """Where something else ran in the patched arm than rlfast's function by the library's name."""
    return [f"{one.label}: {one.ran}" for one in done if one.ran]
