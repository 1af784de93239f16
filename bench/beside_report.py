"""The lines of ``bench/trainers.py``'s and ``bench/parallel.py``'s results."""

from __future__ import annotations

import statistics
from typing import NamedTuple


class Line(NamedTuple):
    """A target and what was reached."""

    case: str
    text: str
    value: float
    passed: bool


def measured(found: list[dict]) -> list[dict]:
    """The results of functions of trainers, and of heads that processes share."""
    return [result for result in found if "parallel" in result or _of_trainers(result)]


def _of_trainers(result: dict) -> bool:
    return any("trainer" in row for row in result.get("rows", ()))


def outcomes(result: dict) -> list[Line]:
    """Of each row."""
    if _of_trainers(result):
        wanted = "≥ {:g}× the trainer's own"
        return [
            Line(f"{r['trainer']} {r['name']}", wanted.format(r["least"]), r["ratio"], r["ratio"] >= r["least"])
            for r in result["rows"]
        ]
    one = result["parallel"]
    shared, alone = (one["rounds"][f"rlfast, {arm}"] for arm in ("shared", "alone"))
    ratio = statistics.median(a / b for a, b in zip(shared, alone, strict=True))
    what = f"a head of {one['vocab']} × {one['depth']} shared by {one['ranks']} processes, {one['rows']} rows"
    return [Line(f"{what}, {one['dtype']}", "≤ 0.6× the time of one process", ratio, ratio <= 0.6)]
