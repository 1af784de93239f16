"""What a measured case says about its targets: ratios, passed or missed, and who was faster than us."""

from __future__ import annotations

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
    fields["targets"] = tuple(Target(**t) for t in fields["targets"])
    return Case(**fields)


def plain(arms: dict) -> str | None:
    """The fastest arm of plain torch: the baselines, eager and torch.compile."""
    names = [name for name in arms if name.startswith("plain") or name in ("eager", "compile")]
    return min(names, key=lambda name: arms[name]["ms"]) if names else None


def gemms_ms(arms: dict, forwards: int) -> float | None:
    """The bare GEMMs of a linear op: so many forwards, one dHidden, one dWeight."""
    parts = {name.split()[1]: row["ms"] for name, row in arms.items() if name.startswith("gemm ")}
    return forwards * parts["forward"] + parts["dHidden"] + parts["dWeight"] if len(parts) == 3 else None


def over_ms(arms: dict, over: str) -> float | None:
    """Milliseconds of what a target compares with."""
    if over.startswith("gemms "):
        return gemms_ms(arms, 2 if over.endswith("recompute") else 1)
    name = plain(arms) if over == "plain" else over
    return arms[name]["ms"] if name in arms else None


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
    other = over_ms(arms, target.over)
    if other is None:
        return Outcome(case.name, text, None, None, result["failures"].get(target.over, f"{target.over}: not here"))
    value = arm["ms"] / other if target.kind == "cost" else other / arm["ms"]
    return Outcome(case.name, text, value, value <= target.bound if target.kind == "cost" else value >= target.bound)


def outcomes(result: dict) -> list[Outcome]:
    """Every target of a measured case."""
    return [outcome(result, target) for target in case_of(result).targets]


def ceiling_share(result: dict, name: str) -> float | None:
    """Bytes or operations a second ÷ the ceiling of the same run; None where there is none."""
    case, arms = case_of(result), result["arms"]
    if case.width:
        total = gemms_ms(arms, 2 if "recompute" in name or name == "trl" else 1)
        return total / arms[name]["ms"] if total else None
    ceiling = next((arms[c]["gb_s"] for c in ("read", "copy") if c in arms), None)
    return arms[name]["gb_s"] / ceiling if ceiling else None


def faster_than_us(result: dict) -> list[tuple[str, str, float]]:
    """(our arm, the other, time(ours) ÷ time(other)) for whoever beats our best arm of a case."""
    arms = result["arms"]
    ours = [name for name in arms if name in ("rlfast", "rlfast keep", "rlfast recompute")]
    if not ours:
        return []
    best = min(ours, key=lambda name: arms[name]["ms"])
    others = [n for n in arms if not n.startswith(("rlfast", "gemm ", "read", "copy"))]
    return [(best, n, arms[best]["ms"] / arms[n]["ms"]) for n in others if arms[n]["ms"] < arms[best]["ms"]]
