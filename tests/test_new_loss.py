"""``rlfast new-loss``: what it writes, where, and what it refuses."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from tools import new_loss

ROOT = Path(__file__).resolve().parent.parent
FILES = ("kernels/formulas/token.py", "rlfast/loss_table.py", "rlfast/reference/surrogates.py")


@pytest.fixture
def tree(tmp_path):
    for file in FILES:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def test_an_outline_in_three_places(tree):
    plan = new_loss.planned("soft_clip", tree)
    assert {str(path.relative_to(tree)) for path in plan} == set(FILES)
    added = 0
    for path, text in plan.items():
        names = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        before = path.read_text(encoding="utf-8")
        added += len([line for line in text.splitlines() if line]) - len([x for x in before.splitlines() if x])
        if path.name == "loss_table.py":
            (row,) = [line for line in text.splitlines() if '"soft_clip"' in line]
            assert row.strip().startswith('_row("soft_clip", "soft_clip"')
        else:
            assert "soft_clip" in names
    assert added <= 30, "a loss is at most thirty lines"


@pytest.mark.parametrize("name", ("ppo_clip", "dapo"))
def test_a_loss_that_is_there(tree, name):
    with pytest.raises(ValueError, match="expected a new one"):
        new_loss.planned(name, tree)


@pytest.mark.parametrize("name", ("Soft", "2x", "a-b", "lambda", ""))
def test_no_name(tree, name):
    with pytest.raises(ValueError, match="name: expected lower-case"):
        new_loss.planned(name, tree)
