"""The examples run, on models of a few thousand weights."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
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


def module_of(name: str):
    """An example, imported."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(group, steps: int) -> list[float]:
    """A few steps of GRPO, whose first loss is asserted to be that of one process; long rows, and a shared head."""
    example = module_of("torchrun_grpo")
    example.long_rows(group)
    example.shared_head(group)
    return example.train(group, steps)


def test_grpo_over_ranks(ranks):
    """The ranks agree on every step, and the reward grows."""
    history, other = ranks.run(trained, 4, size=2)
    assert len(history) == 4 and other == history and history[-1] > history[0]


@pytest.mark.slow  # ten seconds of imports in three processes
def test_torchrun():
    """As its first lines say, on two processes; a rank that waits for ever is ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(EXAMPLES / "torchrun_grpo.py"), "--steps", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert not done.returncode, done.stderr
    said = done.stdout.splitlines()
    assert [line.partition("  mean")[0] for line in said if line.startswith("step")] == ["step  0", "step  1"]
    assert "advantages of rows over 2 ranks: those of whole rows" in said
    assert "log-probs of a head that 2 ranks share: those of the whole" in said
