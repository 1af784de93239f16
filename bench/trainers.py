"""Trainers' own functions beside what ``rlfast.patch`` puts in their place.

    python -m bench.trainers [--case WORD] [--small] [--json PATH]

Forward and backward where a function has one, on the same inputs, in one interleaved loop; what rlfast gives is first
held to what the trainer gives. The replacement is the patch's, with its checks, and is called without patching.

To add a trainer: a function of ``TRAINERS`` that returns its rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import measure, report
from bench.run import RESULTS, label, machine, stamp

STOCK, OURS = "stock", "rlfast"
METHOD = (
    "A trainer's function, from its package, and what rlfast puts in its place are checked against each other and then "
    "timed in one interleaved loop, rotated: forward, and backward where gradients are wanted. Times are medians, "
    "ratios medians over rounds."
)


@dataclass(frozen=True)
class Row:
    """A function, or several that are called together."""

    trainer: str
    name: str
    least: float  # how many times as fast ours must be
    build: Callable  # small → (stock, ours), functions of no arguments that return {output: tensor}
    gate: float = 1e-4  # |ours − stock| ÷ max|stock|
    budget_s: float = 5.0


def pulled(function, leaves: dict, weights: dict | None = None):
    """A function of no arguments: what ``function(**leaves)`` returns by name, and its gradients by the leaves.

    Outputs are pulled by ``weights``, of their names; all ones if there are none.
    """
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}

    def run():
        out = function(**leaves)
        total = sum((x if weights is None else x * weights[name]).sum() for name, x in out.items())
        gradients = torch.autograd.grad(total, list(leaves.values()))
        return {name: x.detach() for name, x in out.items()} | dict(
            zip((f"∂{name}" for name in leaves), gradients, strict=True)
        )

    return run


def run_row(row: Row, small: bool) -> dict:
    """Times of both, after one was held to the other."""
    todo = dict(zip((STOCK, OURS), row.build(small), strict=True))
    truth = {name: (None, x.double()) for name, x in todo[STOCK]().items()}
    off = measure.error(todo[OURS](), truth)
    if not off <= row.gate:
        raise RuntimeError(f"{row.trainer} {row.name}: rlfast is off by {off:.2g} of the largest value")
    times = measure.interleaved(todo, row.budget_s)
    arms = {name: measure.summary(samples) for name, samples in times.items()}
    ratio = statistics.median(a / b for a, b in zip(arms[STOCK]["rounds"], arms[OURS]["rounds"], strict=True))
    return {
        "trainer": row.trainer, "name": row.name, "least": row.least, "ratio": ratio, "error": off, "arms": arms,
    }  # fmt: skip


def rows() -> list[Row]:
    """Every row of the trainers that are installed."""
    return [row for make in TRAINERS for row in make()]


def verl_rows() -> list[Row]:
    """Those of verl."""
    from bench.trainers_verl import rows as of_verl

    return of_verl()


def openrlhf_rows() -> list[Row]:
    """Those of OpenRLHF."""
    from bench.trainers_openrlhf import rows as of_openrlhf

    return of_openrlhf()


TRAINERS = (verl_rows, openrlhf_rows)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help="rows whose trainer or name contains this")
    parser.add_argument("--small", action="store_true", help="sizes that take milliseconds")
    parser.add_argument("--json", type=Path, default=RESULTS / "trainers.json")
    args = parser.parse_args()
    chosen = [row for row in rows() if not args.case or args.case in f"{row.trainer} {row.name}"]
    command = "python -m bench.trainers" + (f" --case {args.case!r}" if args.case else "") + " --small" * args.small
    names = {(row.trainer, row.name) for row in chosen}
    result = stamp("cpu", command) | {"method": METHOD, "rows": _others(args.json, names)}
    started = time.perf_counter()
    for row in chosen:
        found = run_row(row, args.small)
        result["rows"].append(found | {"stamp": report.stamp(result)})
        stock, ours = (found["arms"][arm]["ms"] for arm in (STOCK, OURS))
        met = "" if found["ratio"] >= row.least else "   below its target"
        print(
            f"{time.perf_counter() - started:5.0f} s  {row.trainer} {row.name}: {stock:.3g} ms, ours {ours:.3g} ms, "
            f"{found['ratio']:.1f}× (≥ {row.least:g}×){met}",
            flush=True,
        )
        if not args.small:
            args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return 0 if chosen else 1


def _others(path: Path, names: set) -> list[dict]:
    """What an earlier run on such a machine has measured of other rows; each has its own stamp."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    same = before["device"] == label(machine("cpu"))
    return [row for row in before["rows"] if same and (row["trainer"], row["name"]) not in names]


if __name__ == "__main__":
    sys.exit(main())
