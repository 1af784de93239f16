"""What the rows declare: a number that is changed in them alone fails here, however little it does in two steps."""

from __future__ import annotations

from dataclasses import MISSING, fields

import pytest

import rlfast
from rlfast.recipes.row import Stage
from tests.recipes.reported import REPORTED


def told(stage: Stage, prefix: str = "") -> dict:
    """What is no ``Value``: flags, names and counts that are not a stage's default."""
    found = {}
    for f in fields(stage):
        x = getattr(stage, f.name)
        if isinstance(x, Stage):
            found |= told(x, f"{prefix}{f.name}.")
        elif isinstance(x, bool | int | str | tuple) and f.name != "note" and x != f.default:
            assert f.default is not MISSING
            found[prefix + f.name] = x
    return found


def declared(name: str, recipe=None) -> list[dict]:
    """The stages of a row as ``REPORTED`` has them."""
    recipe = recipe or rlfast.recipe(name)
    stages = [told(stage) for stage in recipe.stages]
    for path, x in recipe.values():
        number, _, rest = path.partition(".")
        stages[int(number)][rest] = x.value
    return stages


@pytest.mark.parametrize("name", rlfast.RECIPES)
def test_every_number_is_the_reported_one(name):
    assert declared(name) == REPORTED[name]


def test_there_is_no_other_recipe():
    assert list(REPORTED) == list(rlfast.RECIPES)


@pytest.mark.parametrize("name", rlfast.RECIPES)
def test_each_of_them_one_per_cent_off_is_found(name):
    recipe = rlfast.recipe(name)
    numbers = [(p, x.value) for p, x in recipe.values() if isinstance(x.value, int | float) and x.value]
    for path, value in numbers:
        wrong = not value if isinstance(value, bool) else value * 1.01
        assert declared(name, recipe.replaced(path, wrong)) != REPORTED[name], path
