"""docs/recipes.md, from the rows of ``rlfast.RECIPES``.

python tools/recipe_docs.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from rlfast.recipes import RECIPES, SURE, show
from rlfast.recipes.row import Recipe, Stage, Value

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE, RESULT = (
    ROOT / "docs" / "recipes.md",
    ROOT / "docs" / "learning.png",
    ROOT / "bench/results/learning.json",
)
HEAD = """# The recipes

Made by `make docs` from `rlfast.RECIPES`: how the systems of the survey *Reinforcement Learning Enhanced LLMs*
([2412.10400](https://arxiv.org/abs/2412.10400)) and the papers around it were trained, as far as it is disclosed.

    rlfast.recipe("dapo").stages[0].loss        the objective: calling it is calling rlfast.loss("dapo", ...)
    rlfast recipes dapo                         every value with its source
    rlfast train dapo --steps 10 --model tiny   its stages on a model, at the size of the run

A value has the report that gives it; *ours* is one that no report gives, and then it is a common default. How sure a
row is:

"""
REST = """
What the loop does (`rlfast/recipes/training.py`) and what it does not: every stage has AdamW without decay and a
constant learning rate; a task gives prompts, a good answer to each, and a reward that can be checked, which also stands
in for the people or the model that ranked answers. Likelihoods that are mixed in are those of the task's own answers.
The numbers of a cluster (prompts a step, answers a prompt, lengths) are bounded by what a run is given (`fitted`).

`tests/recipes/` takes two steps of every row beside an independent float64 script that begins with the same weights and
tokens: losses, advantages, values and reward-model losses agree to 1e-6. What of the numbers it holds:

- every number is written a second time, in `tests/recipes/reported.py`, and has to be the same exactly;
- every coefficient (what a formula multiplies, bounds or divides by) that is 1% off in a run is found beside the
  script, once for stages that call the same functions with the same value. Three of them do nothing in two steps at
  their own size, and are tried at another: `nemotron4`'s last likelihood (1e-5, tried at 0.1), `deepseek_r1`'s
  lower bound of the ratio (10, which nothing reaches; at 0.2) and `skywork`'s target of the entropy (a threshold;
  just above what the entropy is);
- learning rates are the test's, 0.05; that one 1% off is found is tried once for each of them of each kind of
  stage;
- sizes are the test's too: two prompts, four answers, three epochs, two minibatches where `instructgpt` and `dapo`
  have more, `deepseek_r1`'s reference anew after each step, lengths as `fitted` shortens them. That a size by one
  off is found is tried once for each of them of each kind of stage of the systems; of the papers' own stages sizes
  are held by `reported.py` alone;
- the script is given the tokens, and holds their log-probs to those of the model, and at the temperature, that should
  have drawn them; an agent's steps likewise, where their log-probs are kept;
- `kimi`'s interval of the reference is that of its iterations: its objective has the policy before them by itself.
"""


def linked(text: str) -> str:
    """With arXiv ids as links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def name_of(path: str) -> str:
    """A path without its stage's number, which the heading has."""
    return path.split(".", 1)[1].removeprefix("stage.")


def line(path: str, x: Value) -> str:
    """One value."""
    return f"| `{name_of(path)}` | {show.described(x.value)} | {linked(x.source) or '*ours*'} |"


def notes(stage: Stage) -> list[str]:
    """What a stage has to say beside its values."""
    inner = notes(stage.stage) if hasattr(stage, "stage") else []
    return [*inner, *filter(None, [stage.note])]


def section(row: Recipe) -> list[str]:
    """A row: its stages, and every value that is worth a line."""
    sure = "; ".join(SURE[letter] for letter in row.sure)
    lines = [
        f"## {row.name}",
        "",
        f"{row.system}, {linked(row.paper)}. How sure: {row.sure} ({sure}). {row.note}".rstrip(),
    ]
    for number, stage in enumerate(row.stages):
        values = [(p, x) for p, x in show.told(row) if p.split(".")[0] == str(number)]
        lines += ["", f"**{number}. {show.summary(stage)}.** {' '.join(notes(stage))}".rstrip()]
        if values:
            lines += ["", "| value | | from |", "|---|---|---|", *(line(p, x) for p, x in values)]
    return [*lines, ""]


def ends(points: dict[str, float]) -> str:
    """Its first and its last point."""
    values = list(points.values())
    return f"{values[0]:.2f} → {values[-1]:.2f}"


def learned() -> list[str]:
    """Three recipes on SmolLM2, from the result file; nothing before there is one."""
    if not (RESULT.exists() and PICTURE.exists()):
        return []
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = ["", "## Do they learn?", "", f"{result['method']} {result['date']}, {result['commit']}.", ""]
    lines += ["![curves of three recipes](learning.png)", ""]
    lines += [
        "| recipe | | first point → last, a seed each | beside it |",
        "|---|---|---|---|",
    ]
    for name, one in result["learning"].items():
        ours, stock = (", ".join(map(ends, one["curves"].get(arm, {}).values())) for arm in ("rlfast", "stock"))
        said = "the same points" if ours == stock else stock
        lines.append(f"| {name} | {one['measure']} | {ours} | {one['stock']}: {said} |")
    return lines


def page() -> str:
    """The whole of docs/recipes.md."""
    lines = [HEAD + "\n".join(f"- {letter}: {what}" for letter, what in SURE.items()), REST]
    lines += ["| recipe | system | report | sure | stages |", "|---|---|---|---|---|"]
    for name, row in RECIPES.items():
        stages = "; ".join(show.summary(stage) for stage in row.stages)
        lines.append(
            f"| [{name}](#{name.replace('.', '')}) | {row.system} | {linked(row.paper)} | {row.sure} | {stages} |"
        )
    lines += [*learned(), ""]
    for row in RECIPES.values():
        lines += section(row)
    return "\n".join(lines).rstrip() + "\n"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    if parser.parse_args(arguments).check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
