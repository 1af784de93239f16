"""What ``rlfast compare`` prints."""

from __future__ import annotations

import statistics

from rich.table import Table

from rlfast.compare.functions import Measured
from rlfast.compare.steps import Compared


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


def failures(steps: list[Compared]) -> list[str]:
    """What is out of tolerance, in words."""
    return [f"step {k}: {words}" for k, compared in enumerate(steps, 1) for words in compared.step.failures]


def as_json(steps: list[Compared]) -> dict:
    """The same for a program."""
    rows = [s.step._asdict() | {"weights": s.weights, "seconds": s.seconds, "peak_bytes": s.peak} for s in steps]
    for row in rows:
        del row["flat_groups"]
    return {"steps": rows, "time_ratio": ratio(steps), "failures": failures(steps)}


def functions_table(done: list[Measured], library: str) -> Table:
    """How far values and gradients are apart, and the time, theirs | ours."""
    table = Table(
        "function", "values", "gradients", "ms", "", "theirs ÷ ours", title=f"{library}'s functions | rlfast's"
    )
    for (
        label,
        value,
        gradient,
        (theirs, ours),
    ) in done:
        apart = "" if gradient is None else f"{gradient:.1e}"
        table.add_row(label, f"{value:.1e}", apart, f"{theirs * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{theirs / ours:.1f}×")
    return table
