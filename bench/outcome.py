"""What a measured case says about its targets: ratios, passed or missed, and who was faster than us."""

from __future__ import annotations

import operator
import statistics
from typing import NamedTuple

from bench import suite
from bench.case import Case, Target

NAMES = {"eager": "eager torch", "compile": "torch.compile", "trl": "TRL", "liger": "Liger", "torchrl": "TorchRL"}


class Outcome(NamedTuple):
    """One target of one case."""

    case: str
    text: str
    value: float | None  # the ratio or the µs reached; None if an arm is not there
    passed: bool | None
    note: str = ""


def case_of(result: dict) -> Case:
    """The Case that a result was measured for."""
    return suite.read(result["case"])


def text(case: Case, target: Target) -> str:
    """How the tables name a target."""
    arm, bound = target.arm, target.bound
    name = (NAMES | case.NAMES).get(target.over, target.over)
    if target.kind == "us":
        return f"{arm}: ≤ {bound:g} µs"
    if target.kind == "memory":
        return f"{arm}: extra memory ≤ {bound:g}× {name}"
    if target.kind == "speed" and target.over in case.BANDWIDTHS:
        return f"{arm}: ≥ {bound:.0%} of the {name} bandwidth"
    return f"{arm}: {'≥' if target.kind == 'speed' else '≤'} {bound:g}× {name}"


def plain(arms: dict) -> str | None:
    """The fastest arm of plain torch: the baselines, eager and torch.compile."""
    names = [name for name in arms if _is_plain(name)]
    return min(names, key=lambda name: arms[name]["ms"]) if names else None


def _is_plain(name: str) -> bool:
    return name.startswith("plain") or name in ("eager", "compile")


def peers(arms: dict) -> list[str]:
    """Other libraries: what was checked, and is neither ours nor plain torch."""
    return [n for n, row in arms.items() if "error" in row and not n.startswith("rlfast") and not _is_plain(n)]


def total(arms: dict, parts: dict[str, float]) -> list[float] | None:
    """Milliseconds, round by round, of so many times each of some ceilings; None if one was not timed.

    A ceiling may say in brackets how it was reached: "gemm forward (oneDNN)".
    """
    timed = {name.split(" (")[0]: row["rounds"] for name, row in arms.items()}
    if not parts.keys() <= timed.keys():
        return None
    return [sum(map(operator.mul, parts.values(), ms)) for ms in zip(*(timed[part] for part in parts), strict=True)]


def rounds(case: Case, arms: dict, over: str, arm: str) -> list[float] | None:
    """Milliseconds, round by round, of what ``arm`` is compared with."""
    floors = case.floors(arm)
    if over in floors:
        return total(arms, floors[over])
    name = plain(arms) if over == "plain" else over
    return arms[name]["rounds"] if name in arms else None


def ratio(ours: list[float], other: list[float]) -> float:
    """Median over rounds of time(ours) ÷ time(other): what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def _reached(case: Case, result: dict, target: Target) -> float | str:
    """The ratio, or the µs; or why there is none."""
    if target.arm not in result["arms"]:  # the largest cases have their lower instruction sets in a loop of their own
        result = result.get("lower", result)
    arms, failures = result["arms"], result["failures"]
    arm = arms.get(target.arm)
    if arm is None:
        return failures.get(target.arm, "not measured in this run")
    if target.kind == "us":
        return min(arm["rounds"]) * 1e3  # as timeit takes it: what else runs can only add
    if target.kind == "memory":
        if arm.get("extra_bytes") is None:
            return "memory not measured in this run"
        return max(0, arm["extra_bytes"] - case.allowed_bytes()) / case.sizes()[target.over]
    other = rounds(case, arms, target.over, target.arm)
    if other is None:
        return failures.get(target.over, f"{target.over}: not here")
    cost = ratio(arm["rounds"], other)
    return cost if target.kind == "cost" else 1 / cost


def outcome(result: dict, target: Target) -> Outcome:
    """Whether one target of a measured case is met."""
    case = case_of(result)
    said = text(case, target)
    if target.over == "plain":
        said = said.replace("plain", f"the best plain torch ({plain(result['arms'])})")
    value = _reached(case, result, target)
    if isinstance(value, str):
        return Outcome(case.name, said, None, None, value)
    return Outcome(case.name, said, value, value >= target.bound if target.kind == "speed" else value <= target.bound)


def outcomes(result: dict) -> list[Outcome]:
    """Every target of a measured case."""
    return [outcome(result, target) for target in case_of(result).targets]


def ceiling_share(result: dict, name: str) -> float | None:
    """Time of the first floor that was timed ÷ time of an arm; None where there is none."""
    arms = result["arms"]
    floors = (total(arms, parts) for parts in case_of(result).floors(name).values())
    floor = next(filter(None, floors), None)
    return 1 / ratio(arms[name]["rounds"], floor) if floor else None


def ours(result: dict) -> list[str]:
    """Our arms that were timed, at the best instruction set."""
    return [name for name in case_of(result).OURS if name in result["arms"]]


def faster_than_us(result: dict) -> list[tuple[str, str, float]]:
    """(our arm, the other, time(ours) ÷ time(other)) for whoever beats our best arm of a case."""
    arms = result["arms"]
    if not ours(result):
        return []
    best = min(ours(result), key=lambda name: arms[name]["ms"])
    others = [n for n, row in arms.items() if "error" in row and not n.startswith("rlfast")]
    slower = [(best, n, ratio(arms[best]["rounds"], arms[n]["rounds"])) for n in others]
    return [row for row in slower if row[2] > 1]
