"""A recipe in words, for the command line and docs/recipes.md."""

from __future__ import annotations

from dataclasses import fields

from rlfast.recipes.row import Recipe, Stage, Use, Value

NAMES = {"RewardModel": "reward model", "Policy": "policy", "Preference": "preferences", "BestOf": "best of N",
         "Distil": "distillation", "Average": "average", "Compared": "reward model by a judge",
         "Demonstrated": "inverse RL", "Embedded": "reward models on embeddings", "Restarted": "policy with restarts",
         "Rated": "preferences by ratings", "Extrapolated": "extrapolation", "Agent": "agent",
         "Feedback": "reward model of an agent", "Guided": "agent with a prior",
         "Advised": "agent with a teacher"}  # fmt: skip


def kind(stage: Stage) -> str:
    """What a stage is called."""
    return NAMES.get(type(stage).__name__, type(stage).__name__)


def summary(stage: Stage) -> str:
    """One line: what it is, and the functions that it calls."""
    uses = []
    for f in fields(stage):
        x = getattr(stage, f.name)
        for use in [x] if isinstance(x, Use) else list(x.values()) if isinstance(x, dict) else []:
            method = use.values.get("method")
            uses.append(use.function + (f" {use.name or method}" if use.name or method else ""))
    inner = f" of ({summary(stage.stage)})" if hasattr(stage, "stage") else ""
    return f"{kind(stage)}{inner}: {', '.join(uses)}" if uses else f"{kind(stage)}{inner}"


def described(x) -> str:
    """A value as a table shows it."""
    return f"{x:g}" if isinstance(x, float) else str(x)


def as_json(row: Recipe) -> dict:
    """A row, every value with its source; None is undisclosed."""
    values = {path: {"value": x.value, "source": x.source or None} for path, x in row.values()}
    return {
        "name": row.name, "system": row.system, "paper": row.paper, "sure": row.sure, "note": row.note,
        "stages": [summary(stage) for stage in row.stages], "values": values,
    }  # fmt: skip


def told(row: Recipe) -> list[tuple[str, Value]]:
    """The values that are worth a line: those that a report gives, and the defaults of arguments of losses."""
    return [(path, x) for path, x in row.values() if x.source or path.replace(".stage.", ".").count(".") > 1]
