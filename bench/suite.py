"""Every case, collected from the families. A family's module has ``CASES``, of its own subclasses of ``Case``."""

from __future__ import annotations

from bench.case import Case
from bench.families import (
    advantages,
    attention,
    divergences,
    linear,
    linear_policy,
    linear_preference,
    log_probs,
    preferences,
    ranked_loss,
    sampling,
    token_loss,
)

FAMILIES = (
    log_probs, linear, divergences, token_loss, preferences, linear_preference, linear_policy, ranked_loss, advantages,
    attention, sampling,
)  # fmt: skip
CASES: tuple[Case, ...] = tuple(case for family in FAMILIES for case in family.CASES)
_CLASS = {key: type(case) for case in reversed(CASES) for key in (case.op, case.name)}
_FAMILY = {case.op: family for family in FAMILIES for case in family.CASES}


def read(fields: dict) -> Case:
    """The case that a result file holds."""
    return _CLASS[fields["name"] if fields["name"] in _CLASS else fields["op"]].read(fields)


def family(op: str):
    """The module that an op's cases are in."""
    return _FAMILY[op]


def selected(ops=None, names=None) -> list[Case]:
    """Cases of these ops whose names contain one of these words; all of them by default."""
    for op in ops or ():
        if op not in _FAMILY:
            raise ValueError(f"op: expected one of {sorted(_FAMILY)}, got {op!r}")
    return [c for c in CASES if (not ops or c.op in ops) and (not names or any(n in c.name for n in names))]
