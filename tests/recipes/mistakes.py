"""What the tests of the recipes put off, by one per cent or by one, to see that it is found."""

from __future__ import annotations

from collections.abc import Iterable

from rlfast.recipes import show
from rlfast.recipes.paper_stages import Agent, Extrapolated, Feedback, Guided
from rlfast.recipes.row import Average, Recipe, Stage

RATES = ("learning_rate", "critic_rate", "teacher_rate")
COUNTS = (*RATES, "batch", "candidates", "epochs", "minibatches", "warm_up", "lora", "runs", "refresh", "max_len",
          "buffer", "updates", "back", "members")  # fmt: skip
OUTER = (Average, Extrapolated)  # they run another stage, at its size
ROOMS = (Agent, Feedback, Guided)  # no text is sampled in them


def stage_of(recipe: Recipe, path: str) -> tuple[Stage, str]:
    """The stage that has a value, and the value's path in it."""
    number, _, rest = path.partition(".")
    stage = recipe.stages[int(number)]
    while rest.startswith("stage."):
        stage, rest = stage.stage, rest.removeprefix("stage.")
    return stage, rest


def used(recipe: Recipe) -> Iterable[tuple[str, Stage, str, object]]:
    """(path, stage, path in it, value) of the numbers that a run reads and that are not 0."""
    for path, x in recipe.values():
        stage, rest = stage_of(recipe, path)
        read = "." in rest or not isinstance(stage, OUTER) or not hasattr(Stage, rest)
        if read and isinstance(x.value, int | float) and not isinstance(x.value, bool) and x.value:
            yield path, stage, rest, x.value


def coefficients(recipes: Iterable[tuple[str, Recipe]]) -> list[tuple[str, str, float]]:
    """(name, path, wrong value) of what is multiplied, bounded or divided by, 1% off, once of stages that are alike."""
    found, seen = [], set()
    for name, recipe in recipes:
        for path, stage, rest, value in used(recipe):
            key = show.summary(stage), rest, value
            counts = isinstance(value, float) and rest not in RATES
            if counts and (rest != "temperature" or not isinstance(stage, ROOMS)) and key not in seen:
                seen.add(key)
                found.append((name, path, value * 0.99))
    return found


def counts(recipes: Iterable[tuple[str, Recipe]]) -> list[tuple[str, str, object]]:
    """(name, path, wrong value): learning rates 1% off, counts by one, in the first recipe that has each in a stage."""
    found, seen = [], set()
    for name, recipe in recipes:
        for path, stage, rest, value in used(recipe):
            key = type(stage), rest
            if rest.rpartition(".")[2] in COUNTS and (isinstance(value, int) or rest in RATES) and key not in seen:
                seen.add(key)
                found.append((name, path, value * 0.99 if rest in RATES else value + 1))
    return found
