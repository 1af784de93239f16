"""Every system of the survey as a recipe: a row of stages whose numbers say where they are from.

It is also how to write such training with rlfast, in this order:

    row.py, paper_stages.py                 what a row can say
    classic.py, pairs.py, reasoning.py, papers.py      the rows
    models.py       policy, reward model, critic
    session.py      what the stages of a run share
    policy.py, preferences.py, feedback.py, agents.py  the stages
    gridworld.py    the room of the agents
    training.py     ``train``: one after the other; ``fitted``: at the size of a run
    tasks.py        what ``rlfast train`` trains on
    command.py, show.py                     what it prints
"""

from __future__ import annotations

from rlfast import validate
from rlfast.recipes import classic, pairs, papers, reasoning
from rlfast.recipes.row import SURE, Recipe, Stage, Use, Value, said, undisclosed, use

TABLES = (classic.ROWS, pairs.ROWS, reasoning.ROWS, papers.ROWS)
RECIPES: dict[str, Recipe] = {row.name: row for rows in TABLES for row in rows}

__all__ = ["RECIPES", "SURE", "Recipe", "Stage", "Use", "Value", "recipe", "said", "undisclosed", "use"]


def recipe(name: str) -> Recipe:
    """The recipe of a system: its stages, with their losses and estimators ready to be called.

    Args:
        name: a row of ``rlfast.RECIPES``.

    Returns:
        Recipe. ``stages[i].loss`` and its neighbours are callables, and ``.ready`` of one is the ``rlfast.Loss`` that
        it calls; ``values()`` goes through every number with its source.

    Raises:
        ValueError: the name is unknown; the message lists what there is.

    Example:
        >>> reward_model, policy = rlfast.recipe("instructgpt").stages
        >>> reward_model.loss(torch.tensor([[2.0, 1.0, 0.5, -1.0]])).loss.item() < 0.3
        True
        >>> policy.nll.value, policy.nll.source
        (27.8, '2203.02155 §C.4')
    """
    return RECIPES[validate.one_of("name", name, tuple(RECIPES))]
