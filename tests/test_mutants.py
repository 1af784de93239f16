"""The table of ``make mutate`` matches the sources: a row that matches nothing plants nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from mutants import CPP, CUDA, PYTHON  # noqa: E402


@pytest.mark.parametrize("mutant", (*CPP, *CUDA, *PYTHON), ids=str)
def test_every_row_stands_in_its_file_once(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.new != mutant.parts()[1]
