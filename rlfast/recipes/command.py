"""``rlfast recipes`` and ``rlfast train``."""

from __future__ import annotations

import importlib.util
import json
import sys

import typer
from rich.console import Console
from rich.table import Table

import rlfast
from rlfast.demo.settings import DemoError, at_least, seeds
from rlfast.recipes import SURE, show
from rlfast.recipes.row import Recipe


def print_recipes(console: Console, name: str | None, as_json: bool) -> None:
    """The table, or everything that one row says."""
    rows = list(rlfast.RECIPES.values()) if name is None else [rlfast.recipe(name)]
    if as_json:
        print(json.dumps([show.as_json(row) for row in rows], indent=1))
        return
    if name is not None:
        _print_one(console, rows[0])
        return
    table = Table("recipe", "system", "report", "sure", "stages")
    for row in rows:
        stages = "\n".join(show.summary(stage) for stage in row.stages)
        table.add_row(row.name, row.system, row.paper, row.sure, stages)
    console.print(table)
    console.print("; ".join(f"{letter}: {what}" for letter, what in SURE.items()), soft_wrap=True)


def _print_one(console: Console, row: Recipe) -> None:
    sure = "; ".join(SURE[letter] for letter in row.sure)
    console.print(f"{row.name}: {row.system} ({row.paper}); {sure}", soft_wrap=True, markup=False)
    for number, stage in enumerate(row.stages):
        console.print(f"{number}. {show.summary(stage)}. {stage.note}", soft_wrap=True, markup=False)
    table = Table("value", "", "from")
    for path, x in row.values():
        table.add_row(path, show.described(x.value), x.source or "undisclosed: ours")
    console.print(table)
    if row.note:
        console.print(row.note, soft_wrap=True, markup=False)


def train(
    name: str = typer.Argument(metavar="RECIPE", help="A row of `rlfast recipes`."),
    steps: int = typer.Option(2, help="Of each stage."),
    model: str = typer.Option("tiny", help="tiny, smollm2, or a folder or name that from_pretrained takes."),
    teacher: str = typer.Option(None, help="The model that a recipe distils from, or asks; tiny has another tiny one."),
    batch: int = typer.Option(4, help="Prompts a step at most."),
    candidates: int = typer.Option(4, help="Answers a prompt at most."),
    max_tokens: int = typer.Option(24, help="Tokens of an answer at most."),
    learning_rate: float = typer.Option(None, help="In place of the reports'."),
    seed: int = typer.Option(0, help="Of prompts, samples and new heads."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON object a line, one an update."),
) -> None:
    """Some steps of a recipe, at the size of this run: its stages one after the other."""
    if importlib.util.find_spec("transformers") is None:
        print("rlfast train: transformers is not installed: pip install 'rlfast[rollout]'", file=sys.stderr)
        raise typer.Exit(1)
    from rlfast.recipes import tasks
    from rlfast.recipes.training import fitted, train

    try:
        at_least(1, steps=steps, batch=batch, candidates=candidates, max_tokens=max_tokens)
        seeds(seed)
        if learning_rate is not None and not 0 < learning_rate < float("inf"):
            raise DemoError(f"--learning-rate: expected a float > 0, got {learning_rate}")
        row = fitted(
            rlfast.recipe(name), batch=batch, candidates=candidates, max_tokens=max_tokens, steps=steps,
            learning_rate=learning_rate,
        )  # fmt: skip
        policy, tokenizer, task = tasks.loaded(model, seed)
        if teacher is not None:
            other, words = tasks.read(teacher, seed, "--teacher")
            if words.get_vocab() != tokenizer.get_vocab():
                raise DemoError(f"--teacher: expected a model with the tokens of --model {model}, got {teacher!r}")
        else:
            other = tasks.tiny(seed + 1) if model == "tiny" else None
    except (ValueError, OSError, ImportError, DemoError) as error:  # what was asked for is not there
        print(f"rlfast train: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    try:
        options = {"tokenizer": tokenizer, "teacher": other, "max_tokens": max_tokens, "seed": seed}
        for record in train(row, policy, task, steps, **options):
            _say(record, as_json)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"rlfast train: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _say(record, as_json: bool) -> None:
    said = {"stage": record.stage, "kind": record.kind, "step": record.step, "loss": record.loss}
    said |= {"reward": record.reward}
    said |= {name: record.data[name] for name in ("value_loss", "accuracy") if name in record.data}
    if as_json:
        print(json.dumps(said), flush=True)
        return
    rest = "  ".join(f"{k} {x:.4f}" for k, x in said.items() if isinstance(x, float))
    print(f"{record.stage} {record.kind:<13}step {record.step:<4}{rest}", flush=True)
