"""What a measured case says about its targets: ratios, passed or missed, and who was faster than us."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from bench.suite import Case, Target


class Outcome(NamedTuple):
    """One target of one case."""

    case: str
    text: str
    value: float | None  # the ratio reached; None if an arm is not there
    passed: bool | None
    note: str = ""


def case_of(result: dict) -> Case:
    """The Case that a result was measured for."""
    fields = dict(result["case"])
    for name in ("targets", "gpu_targets"):
        fields[name] = tuple(Target(**t) for t in fields.get(name, ()))
    return Case(**fields)


def plain(arms: dict) -> str | None:
    """The fastest arm of plain torch: the baselines, eager and torch.compile."""
    names = [name for name in arms if name.startswith("plain") or name in ("eager", "compile")]
    return min(names, key=lambda name: arms[name]["ms"]) if names else None


def gemms(arms: dict, forwards: int) -> list[float] | None:
    """Milliseconds, round by round, of a linear op's bare GEMMs: so many forwards, one dHidden, one dWeight."""
    parts = {name.split()[1]: row["rounds"] for name, row in arms.items() if name.startswith("gemm ")}
    if len(parts) != 3:
        return None
    return [forwards * f + h + w for f, h, w in zip(parts["forward"], parts["dHidden"], parts["dWeight"], strict=True)]


def rounds(arms: dict, over: str) -> list[float] | None:
    """Milliseconds, round by round, of what a target compares with."""
    if over.startswith("gemms "):
        return gemms(arms, 2 if over.endswith("recompute") else 1)
    name = plain(arms) if over == "plain" else over
    return arms[name]["rounds"] if name in arms else None


def ratio(ours: list[float], other: list[float]) -> float:
    """Median over rounds of time(ours) ÷ time(other): what slows a whole round down cancels."""
    return statistics.median(a / b for a, b in zip(ours, other, strict=True))


def outcome(result: dict, target: Target) -> Outcome:
    """Whether one target of a measured case is met."""
    case, arms = case_of(result), result["arms"]
    text = (
        target.text.replace("plain", f"the best plain torch ({plain(arms)})") if target.over == "plain" else target.text
    )
    arm = arms.get(target.arm)
    if arm is None:
        why = result["failures"].get(target.arm, "not measured in this run")
        return Outcome(case.name, text, None, None, why)
    if target.kind == "memory":
        if arm.get("extra_bytes") is None:
            return Outcome(case.name, text, None, None, "memory not measured in this run")
        # where the weight is not float32, its gradient's float32 accumulator is allowed for
        accumulator = 4 * case.vocab * case.width if case.dtype != "float32" else 0
        value = max(0, arm["extra_bytes"] - accumulator) / case.logits_bytes
        return Outcome(case.name, text, value, value <= target.bound)
    if target.over == "copy":  # it moves every byte twice
        share = ceiling_share(result, target.arm) if "copy" in arms else None
        return Outcome(case.name, text, share, None if share is None else share >= target.bound)
    other = rounds(arms, target.over)
    if other is None:
        return Outcome(case.name, text, None, None, result["failures"].get(target.over, f"{target.over}: not here"))
    value = ratio(arm["rounds"], other) if target.kind == "cost" else 1 / ratio(arm["rounds"], other)
    return Outcome(case.name, text, value, value <= target.bound if target.kind == "cost" else value >= target.bound)


def outcomes(result: dict) -> list[Outcome]:
    """Every target of a measured case."""
    return [outcome(result, target) for target in case_of(result).targets]


def ceiling_share(result: dict, name: str) -> float | None:
    """Bytes or operations a second ÷ the ceiling of the same run; None where there is none."""
    case, arms = case_of(result), result["arms"]
    if case.width:
        total = gemms(arms, 2 if "recompute" in name or name == "trl" else 1)
        return 1 / ratio(arms[name]["rounds"], total) if total else None
    ceiling = next((c for c in ("read", "copy") if c in arms), None)
    if ceiling is None:
        return None
    once = arms[name]["gb_s"] * arms[name]["ms"] / (arms[ceiling]["gb_s"] * arms[ceiling]["ms"])
    return once / ratio(arms[name]["rounds"], arms[ceiling]["rounds"])


def faster_than_us(result: dict) -> list[tuple[str, str, float]]:
    """(our arm, the other, time(ours) ÷ time(other)) for whoever beats our best arm of a case."""
    arms = result["arms"]
    ours = [name for name in arms if name in ("rlfast", "rlfast keep", "rlfast recompute")]
    if not ours:
        return []
    best = min(ours, key=lambda name: arms[name]["ms"])
    others = [n for n in arms if not n.startswith(("rlfast", "gemm ", "read", "copy"))]
    slower = [(best, n, ratio(arms[best]["rounds"], arms[n]["rounds"])) for n in others]
    return [row for row in slower if row[2] > 1]
