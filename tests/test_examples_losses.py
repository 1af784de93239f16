"""The examples that are loops of their own: they run, and they learn."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests import openrlhf_code

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def example(name: str):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_ppo_from_scratch_learns():
    said = []
    scores = example("ppo_from_scratch").train(iterations=20, say=said.append)
    assert scores[0] < 0.2 and sum(scores[-3:]) / 3 > 0.9
    assert said[0].startswith("iteration   0   reward 0.0") and len(said) == 5


def test_ppo_from_scratch_is_deterministic():
    ppo = example("ppo_from_scratch")
    assert ppo.train(iterations=3, say=len) == ppo.train(iterations=3, say=len)


@pytest.mark.parametrize("installed", (False, True))
def test_openrlhf_losses(installed, monkeypatch, capsys):
    openrlhf_code.load()
    if not installed:
        monkeypatch.setitem(sys.modules, "openrlhf.models.utils", None)
    losses = example("openrlhf_losses")
    monkeypatch.setattr(sys, "argv", ["openrlhf_losses.py", "--rows", "4", "--length", "12"])
    entropy = sys.modules["openrlhf.models.utils"]
    if installed:  # without its compiler, which takes longer than the example
        monkeypatch.setattr(entropy, "compute_entropy", entropy.compute_entropy._torchdynamo_orig_callable)
    losses.main()
    said = capsys.readouterr().out
    assert ("is not here" in said) is not installed
    for name in ("reward_model", "dpo", "ppo"):
        line = next(x for x in said.splitlines() if x.startswith(name)).split()
        assert len(line) == (5 if installed else 3)
        assert not installed or abs(float(line[2]) - float(line[4])) < 2e-5


def test_openrlhf_losses_notices_an_error_of_one_percent(monkeypatch):
    openrlhf_code.load()
    losses = example("openrlhf_losses")
    pairs = losses.losses.PairWiseLoss
    right = pairs.forward
    monkeypatch.setattr(pairs, "forward", lambda self, *rewards: 1.01 * right(self, *rewards))
    monkeypatch.setattr(sys, "argv", ["openrlhf_losses.py", "--rows", "4", "--length", "12"])
    with pytest.raises(AssertionError):
        losses.main()
