"""``rlfast new-loss``: what it writes, where, and what it refuses."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
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


FINISHED = {
    "kernels/formulas/token.py": """

class TightCap(NamedTuple):
    \"\"\"An upper bound of the ratio.\"\"\"

    cap: float = 1.05


@jit
def tight(t: Token, h: TightCap):
    \"\"\"ℓ = −sg(min(r, cap))·A·log p.

    ∂ℓ/∂log p = −min(r, cap)·A. arXiv 2506.13585.
    \"\"\"
    weight = tl.minimum(t.ratio, h.cap)
    return -weight * t.adv * t.logp, 0.0, -weight * t.adv, tl.where(weight != t.ratio, 1.0, 0.0)
""",
    "rlfast/loss_table.py": '    _row("tight", "tight", "2506.13585"),\n',
    "rlfast/reference/surrogates.py": """

def tight(t, cap=1.05):
    return -torch.clamp(t.ratio, max=cap).detach() * t.adv * t.logp


BOUNDS["tight"] = lambda t, r, h: r > h.get("cap", 1.05)
""",
}


def test_three_places_are_enough(tmp_path):
    """docs/add_a_loss.md to the letter, in a copy of the sources: the tests of the table take the new row."""
    for folder in ("kernels", "rlfast", "tests", "tools"):
        skipped = shutil.ignore_patterns("__pycache__", "_cuda*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skipped)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, text in FINISHED.items():
        path = tmp_path / file
        before = path.read_text(encoding="utf-8")
        end = ")  # fmt: skip\n\n\ndef loss("
        path.write_text(before.replace(end, text + end) if end in before else before + text, encoding="utf-8")
    tests = ["tests/test_losses.py", "-k", "test_every_row and tight", "--backend", "torch"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "6 passed" in done.stdout, done.stdout[-300:]


@pytest.mark.parametrize("name", ("ppo_clip", "dapo"))
def test_a_loss_that_is_there(tree, name):
    with pytest.raises(ValueError, match="expected a new one"):
        new_loss.planned(name, tree)


@pytest.mark.parametrize("name", ("Soft", "2x", "a-b", "lambda", ""))
def test_no_name(tree, name):
    with pytest.raises(ValueError, match="name: expected lower-case"):
        new_loss.planned(name, tree)
