"""``rlfast compare``: what it measures, what it says, and that it would see a mistake."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

from rlfast import cli, integrations
from rlfast.compare import functions, report, run, steps, trainers
from rlfast.compare.steps import Compared
from rlfast.demo.parity import Step
from rlfast.demo.settings import DemoError
from tests import compare_library

runner = CliRunner()
SAME = Compared(Step((0.7, 0.7), (4.0, 4.0), 1.0, 2e-6, 3e-5), 1e-7, (0.2, 0.1), (3 << 20, 2 << 20))


TABLE = "tests.compare_library"


def test_functions_that_are_the_same():
    done = functions.compare(TABLE, seed=3)
    assert [m.label for m in done.measured][:5] == ["entropy 0.7", "entropy", "Loss", "alone", "product"]
    assert [m.value for m in done.measured] == [0.0] * len(done.measured)
    assert [m.gradient for m in done.measured][:5] == [0.0, None, 0.0, None, 0.0]
    assert not any(m.failures for m in done.measured) and min(done.peak) > 1 << 26
    ran = [m.ran for m in done.measured]
    assert ran[1] == "it runs as it is: three rows" and "a patch leaves the library's as it is" in ran[3]
    assert not ran[0] and not ran[2] and not ran[4]
    assert done.notes[0] == "it is small"


@pytest.mark.parametrize("wrong", ("values", "gradients"))
def test_a_function_that_is_one_percent_off(wrong, monkeypatch):
    monkeypatch.setenv(compare_library.WRONG, wrong)
    failures = [failure for m in functions.compare(TABLE).measured for failure in m.failures]
    assert failures and any(f": {wrong} 0.01 apart" in failure for failure in failures)


def test_a_library_that_cannot_be_imported(monkeypatch):
    monkeypatch.setenv(compare_library.WRONG, "missing")
    with pytest.raises(DemoError, match="a library cannot be imported: No module named 'nonesuch'"):
        functions.compare(TABLE)


def test_numbers_that_are_not_numbers_are_a_failure():
    assert functions.Measured("f", float("nan"), None, (1.0, 1.0)).failures
    assert functions.Measured("f", 0.0, float("nan"), (1.0, 1.0)).failures


LEFT = ("compute_approx_kl", "masked_mean", "masked_normalize")  # of OpenRLHF, by choice


@pytest.mark.parametrize("name", ("verl", "openrlhf"))
def test_the_functions_of(name):
    done = runner.invoke(cli.app, ["compare", name, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["functions"]) > 20 and not found["failures"]
    assert min(found["peak_bytes"]) > 1 << 26
    for row in found["functions"]:
        if row["label"].endswith("of a tensor's subclass"):
            assert "runs as it is" in row["ran"]
        elif name == "openrlhf" and row["label"].startswith(LEFT):
            assert "a patch leaves" in row["ran"]
        else:
            assert not row["ran"], row
    if name == "openrlhf" and not importlib.util.find_spec("deepspeed"):
        assert any("stand-ins" in note for note in found["notes"])
    if name == "verl" and not torch.cuda.is_available():
        assert found["notes"] == ["linear_cross_entropy is not compared: the library's own needs a GPU"]


APART = {
    "losses": {"loss": (0.7, 0.70002)},
    "gradient norms": {"grad_norm": (4.0, 4.002)},
    "log-probs": {"logp": 5e-5},
    "updates": {"update": 0.01},
}


@pytest.mark.parametrize("words", APART)
def test_a_step_out_of_tolerance_fails(words):
    assert not report.failures([SAME, SAME], report.TINY)
    wrong = SAME._replace(step=SAME.step._replace(**APART[words]))
    (failure,) = report.failures([SAME, wrong], report.TINY)
    assert failure.startswith(f"step 2: {words}")
    assert bool(report.failures([wrong])) == (words in ("updates", "gradient norms"))  # a deep model has wider bounds


@pytest.mark.parametrize("weights", (2e-5, float("nan")))
def test_weights_out_of_tolerance_fail(weights):
    (failure,) = report.failures([SAME, SAME._replace(weights=weights)])
    assert failure.startswith("step 2: weights")


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
@pytest.mark.parametrize("trainer", trainers.KINDS)
def test_a_mistake_of_one_percent_is_seen(trainer, tmp_path):
    settings = trainers.prepared(trainers.Settings(trainer=trainer, steps=2, model="tiny"), tmp_path)
    assert not report.failures(steps.compare(settings, tmp_path))
    assert report.failures(steps.compare(settings, tmp_path, mistake=1.01))


WRONG = {
    "a library": (["nonesuch"], r"expected one of ('trl', 'verl', 'openrlhf'), got 'nonesuch'"),
    "a trainer": (["trl", "--trainer", "ppo"], r"--trainer: expected one of ('grpo', "),
    "steps": (["trl", "--steps", "0"], "--steps: expected at least 1, got 0"),
    "a model": (["trl", "--model", "nowhere"], "--model: expected tiny, smollm2 or the folder of a model"),
    "a batch": (["trl", "--trainer", "dpo", "--batch", "0"], "--batch: expected at least 1, got 0"),
    "half a group": (["trl", "--batch", "3"], "--batch: expected a multiple of 2"),
    "more than there is": (["trl", "--batch", "14"], "and at most 12, got 14"),
    "no other completion": (["trl", "--trainer", "kto", "--batch", "1"], "--batch: expected at least 2, got 1"),
    "a loss": (["trl", "--loss-type", "ppo"], "--loss-type: expected one of ('grpo', "),
    "one of two losses": (["trl", "--trainer", "dpo", "--loss-type", "ipo,nll"], "got 'nll'"),
    "two losses": (["trl", "--trainer", "sft", "--loss-type", "nll,dft"], "--loss-type: expected one name"),
    "a loss of none": (["trl", "--trainer", "rloo", "--loss-type", "grpo"], "rloo has one loss"),
    "a rate": (["trl", "--learning-rate", "0"], "--learning-rate: expected a float > 0, got 0.0"),
    "threads": (["verl", "--threads", "-1"], "--threads: expected at least 0, got -1"),
    "a seed": (["openrlhf", "--seed", str(1 << 62)], "--seed: expected less than 2**62"),
    "a trainer of verl": (["verl", "--trainer", "ppo"], "--trainer: of TRL's trainers; of verl functions are compared"),
    "steps of OpenRLHF": (["openrlhf", "--steps", "5"], "--steps: of TRL's trainers"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what):
    pytest.importorskip("trl")
    arguments, words = WRONG[what]
    done = runner.invoke(cli.app, ["compare", *arguments])
    assert done.exit_code == 2 and words in done.output


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(integrations.importlib.util, "find_spec", lambda name: None)
    done = runner.invoke(cli.app, ["compare", "openrlhf"])
    assert done.exit_code == 2
    assert 'openrlhf is not installed: run `pip install "openrlhf==0.11.*"`' in done.output


def test_a_difference_is_exit_code_1(monkeypatch):
    found = run.Found(report.steps_table([SAME], ""), "not the same steps", ["step 1: it is off"], {"failures": ["x"]})
    monkeypatch.setattr(run, "run", lambda *_: found)
    for arguments, words in (([], "step 1: it is off"), (["--json"], '"failures"')):
        done = runner.invoke(cli.app, ["compare", "trl", *arguments])
        assert done.exit_code == 1 and words in done.output
