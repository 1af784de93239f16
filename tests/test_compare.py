"""``rlfast compare``: what it measures, what it says, and that it would see a mistake."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from rlfast import cli, integrations
from rlfast.compare import functions, report, run, steps, trainers
from rlfast.compare.functions import Case
from rlfast.compare.steps import Compared
from rlfast.demo.parity import Step
from rlfast.demo.settings import DemoError

runner = CliRunner()
SAME = Compared(Step((0.7, 0.7), (4.0, 4.0), 1.0, 2e-6, 3e-5), 1e-7, (0.2, 0.1), (3 << 20, 2 << 20))


def library(monkeypatch, scale: float = 1.0, gradient: float = 1.0):
    """A module that stands for a trainer's library, and one for ours whose numbers are off by a factor."""

    def entropy(logits, temperature=1.0):
        logits.div_(temperature)  # as OpenRLHF does
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1), {"tokens": len(logits), "none": None}

    def off(logits, temperature=1.0):
        value, metrics = entropy(logits, temperature)
        return scale * (gradient * value - (gradient - 1) * value.detach()), metrics

    class Loss:
        def __init__(self, weight):
            self.weight = weight

        def __call__(self, logits):
            return self.weight * entropy(logits)[0].mean()

    class Off(Loss):
        def __call__(self, logits):
            return scale * self.weight * off(logits)[0].mean()

    for name, function, loss in (("theirs", entropy, Loss), ("ours", off, Off)):
        monkeypatch.setitem(sys.modules, f"stands_for.{name}", types.SimpleNamespace(entropy=function, Loss=loss))
    given = lambda draw: {"logits": torch.randn(5, 9, generator=draw)}  # noqa: E731
    return (
        Case("stands_for.theirs", "entropy", lambda draw: given(draw) | {"temperature": 0.7}, ("logits",), note="0.7"),
        Case("stands_for.theirs", "entropy", given),
        Case("stands_for.theirs", "Loss", given, ("logits",), {"weight": 3.0}),
    )


def test_functions_that_are_the_same(monkeypatch):
    done = functions.compare(library(monkeypatch), "stands_for.ours")
    assert [measured.label for measured in done] == ["entropy 0.7", "entropy", "Loss"]
    assert [measured.value for measured in done] == [0.0] * 3
    assert [measured.gradient for measured in done] == [0.0, None, 0.0]
    assert not any(measured.failures for measured in done)


@pytest.mark.parametrize("wrong, words", (({"scale": 1.01}, "values"), ({"gradient": 1.01}, "gradients")))
def test_a_function_that_is_one_percent_off(wrong, words, monkeypatch):
    done = functions.compare(library(monkeypatch, **wrong), "stands_for.ours")
    failures = [failure for measured in done for failure in measured.failures]
    assert failures and any(f": {words} 0.01 apart" in failure for failure in failures)


def test_a_library_that_cannot_be_imported():
    with pytest.raises(DemoError, match=r"nonesuch\.module cannot be imported: No module named 'nonesuch'"):
        functions.compare((Case("nonesuch.module", "f", lambda draw: {}),), "rlfast.nonesuch")


def test_numbers_that_are_not_numbers_are_a_failure():
    assert functions.Measured("f", float("nan"), None, (1.0, 1.0)).failures
    assert functions.Measured("f", 0.0, float("nan"), (1.0, 1.0)).failures


@pytest.mark.parametrize("name", ("verl", "openrlhf"))
def test_the_functions_of(name):
    if name == "openrlhf":
        importlib.import_module("tests.openrlhf_code").load()  # without what its trainers need
    done = runner.invoke(cli.app, ["compare", name, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["functions"]) > 20 and not found["failures"]


@pytest.mark.parametrize(
    "change, words",
    (({"loss": (0.7, 0.71)}, "losses"), ({"grad_norm": (4.0, 4.04)}, "gradient norms"), ({"update": 0.01}, "updates")),
)
def test_a_step_out_of_tolerance_fails(change, words):
    assert not report.failures([SAME, SAME])
    (failure,) = report.failures([SAME, SAME._replace(step=SAME.step._replace(**change))])
    assert failure.startswith(f"step 2: {words}")


def test_what_is_written_of_steps():
    assert report.ratio([SAME._replace(seconds=(9.0, 1.0)), SAME, SAME]) == 2.0
    found = json.loads(json.dumps(report.as_json([SAME])))
    assert found["steps"][0]["peak_bytes"] == [3 << 20, 2 << 20] and found["time_ratio"] == 2.0
    assert report.steps_table([SAME], "a title").row_count == 1


@pytest.mark.parametrize("trainer", ("grpo", pytest.param("sft", marks=pytest.mark.slow)))
def test_a_trainer_stock_and_patched(trainer):
    pytest.importorskip("trl")
    done = runner.invoke(cli.app, ["compare", "trl", "--trainer", trainer, "--steps", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["steps"]) == 2 and not found["failures"]
    for step in found["steps"]:
        assert step["grad_norm"][0] > 1e-3 and step["update"] > 0 and min(step["seconds"]) > 0
        assert min(step["peak_bytes"]) > 1 << 26 and step["logp"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ("dpo", "kto", "rloo"))
def test_a_mistake_of_one_percent_is_seen(trainer, tmp_path):
    settings = trainers.prepared(trainers.Settings(trainer=trainer, steps=2, model="tiny"), tmp_path)
    assert not report.failures(steps.compare(settings, tmp_path))
    assert report.failures(steps.compare(settings, tmp_path, mistake=1.01))


WRONG = {
    "a library": (["nonesuch"], r"expected one of ('trl', 'verl', 'openrlhf'), got 'nonesuch'"),
    "a trainer": (["trl", "--trainer", "ppo"], r"--trainer: expected one of ('grpo', "),
    "steps": (["trl", "--steps", "0"], "--steps: expected at least 1, got 0"),
    "a model": (["trl", "--model", "nowhere"], "--model: expected tiny, smollm2 or the folder of a model"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    pytest.importorskip("trl")
    arguments, words = WRONG[what]
    done = runner.invoke(cli.app, ["compare", *arguments])
    assert done.exit_code == 1 and words in done.output


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(integrations.importlib.util, "find_spec", lambda name: None)
    done = runner.invoke(cli.app, ["compare", "openrlhf"])
    assert done.exit_code == 1
    assert 'openrlhf is not installed: run `pip install "openrlhf==0.11.*"`' in done.output


def test_a_difference_is_exit_code_1(monkeypatch):
    found = run.Found(report.steps_table([SAME], ""), "not the same steps", ["step 1: it is off"], {"failures": ["x"]})
    monkeypatch.setattr(run, "run", lambda *_: found)
    for arguments, words in (([], "step 1: it is off"), (["--json"], '"failures"')):
        done = runner.invoke(cli.app, ["compare", "trl", *arguments])
        assert done.exit_code == 1 and words in done.output
