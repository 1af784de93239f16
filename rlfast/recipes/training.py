"""``train``: the stages of a recipe, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

from rlfast import validate
from rlfast.recipes import agents, feedback, policy, preferences  # noqa: F401  they say who runs which stage
from rlfast.recipes.row import Average, Distil, Recipe
from rlfast.recipes.session import RUNNERS, Record, Session, Task, learn, run, runs
from rlfast.weights import merge

__all__ = ["RUNNERS", "Record", "Session", "Task", "fitted", "train"]


@runs(Distil)
def distil(session: Session, stage: Distil, steps: int) -> Iterator[Record]:
    """The divergence from the teacher on the student's own answers."""
    if session.teacher is None:
        validate.fail("teacher", "a model, since the recipe distils one", "None")
    optimizer = session.optimizer(session.model.parameters(), stage.learning_rate)
    session.begins(stage, teacher=session.teacher.model)
    for step in range(steps):
        answers = session.sample(stage)
        loss = session.actor.divergence(answers.batch, session.teacher, **stage.divergence.values)
        learn(loss, optimizer)
        yield session.record("distil", step, loss, answers)


@runs(Average)
def average(session: Session, stage: Average, steps: int) -> Iterator[Record]:
    """The same stage from the same weights, with other prompts each time; then one model of them."""
    start = {k: x.clone() for k, x in session.model.state_dict().items()}
    found = []
    for _ in range(stage.runs.value):
        session.model.load_state_dict(start)
        yield from run(session, stage.stage, steps)
        found.append({k: x.clone() for k, x in session.model.state_dict().items()})
    merged = stage.merge(found) if stage.merge.function == "merge" else stage.merge(*found, base=start)
    if stage.back is not None:
        merged = merge([start, merged], weights=[stage.back.value, 1.0 - stage.back.value])
    session.model.load_state_dict(merged)


def train(recipe: Recipe, model, task: Task, steps: int, **options) -> Iterator[Record]:
    """So many steps of each stage of a recipe; a record of every update, as it is made.

    Args:
        recipe: a row, or one of its ``fitted`` forms.
        model: a causal language model of transformers; it is trained in place.
        task: prompts and their reward.
        steps: of each stage.
        options: of ``Session``: tokenizer, teacher, max_tokens, seed, kv_budget, watch.

    Example:
        >>> for record in train(fitted(rlfast.recipe("dapo"), batch=4), model, task, steps=10):
        ...     print(record.step, record.loss, record.reward)
    """
    session = Session(model, task, **options)
    for session.place, stage in enumerate(recipe.stages):
        yield from run(session, stage, steps)


def fitted(
    recipe: Recipe, *, batch: int | None = None, candidates: int | None = None, max_tokens: int | None = None,
    steps: int | None = None, learning_rate: float | None = None,
) -> Recipe:  # fmt: skip
    """The recipe at the size of a run: what a cluster's numbers are bounded by; None leaves them as reported.

    Args:
        batch, candidates: bounds of prompts a step and answers a prompt.
        max_tokens: of a response: the lengths of an overlong penalty shrink with it.
        steps: a critic's warm-up takes at most half of them.
        learning_rate: in place of the reports', which are of models a thousand times as large.
    """
    bounds = {"batch": batch, "candidates": candidates, "warm_up": None if steps is None else steps // 2}
    values = dict(recipe.values())
    for path, x in values.items():
        name = path.rpartition(".")[2]
        if bounds.get(name) is not None:
            recipe = recipe.replaced(path, min(x.value, bounds[name]))
        elif name in ("learning_rate", "critic_rate", "teacher_rate") and learning_rate is not None:
            recipe = recipe.replaced(path, learning_rate)
        elif name == "max_len" and max_tokens is not None and max_tokens < x.value:
            buffer = path[: -len(name)] + "buffer"
            share = values[buffer].value / x.value
            recipe = recipe.replaced(path, max_tokens).replaced(buffer, max(1, round(max_tokens * share)))
    return recipe
