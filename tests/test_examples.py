"""The examples run, on models of a few thousand weights."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(monkeypatch, name: str, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("name", ("trl_grpo.py", "trl_dpo.py"))
def test_trl(name, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    run(monkeypatch, name, "--model", "tiny", "--steps", "1", "--out", str(tmp_path))
    assert (tmp_path / "model.safetensors").exists()


def test_verl_functions(monkeypatch, capsys):
    run(monkeypatch, "verl_functions.py", "--iterations", "20")
    said = capsys.readouterr().out
    learned = [int(line.partition(": ")[2].partition("%")[0]) for line in said.splitlines()]
    assert learned[-1] > 60, said
