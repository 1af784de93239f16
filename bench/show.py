"""One measured case as a table on the terminal."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from bench.outcome import case_of, ceiling_share, outcomes, plain

RATES = {"gb_s": "GB/s", "gflop_s": "GFLOP/s"}


def _rate(row: dict) -> str:
    return next((f"{row[key]:.1f} {unit}" for key, unit in RATES.items() if key in row), "")


def print_case(result: dict) -> None:
    """Arms, fastest first, then the targets."""
    console = Console() if sys.stdout.isatty() else Console(width=120)
    case, arms = case_of(result), result["arms"]
    table = Table("arm", "ms", "spread", "rate", "of ceiling", "error", "extra MiB", "× plain torch", title=case.name)
    baseline = arms[plain(arms)]["ms"] if plain(arms) else None
    for name, row in sorted(arms.items(), key=lambda item: item[1]["ms"]):
        share = ceiling_share(result, name) if "error" in row else None
        table.add_row(
            name, f"{row['ms']:.4g}", f"{row['spread']:.0%}", _rate(row),
            "" if share is None else f"{share:.0%}", f"{row['error']:.1e}" if "error" in row else "",
            f"{row['extra_bytes'] / 2**20:.1f}" if row.get("extra_bytes") is not None else "",
            f"{baseline / row['ms']:.2f}" if baseline else "",
        )  # fmt: skip
    console.print(table)
    for name, why in result["failures"].items():
        console.print(f"  {name}: no time, {why}", soft_wrap=True)
    for o in outcomes(result):
        state = "not measured" if o.passed is None else "met" if o.passed else "MISSED"
        value = "" if o.value is None else f" reached {o.value:.3g}"
        console.print(f"  {state:<7} {o.text}{value} {o.note}", soft_wrap=True, highlight=False)
