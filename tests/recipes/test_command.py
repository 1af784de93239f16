"""``rlfast recipes`` and ``rlfast train``; what a row refuses."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import rlfast
from rlfast import cli
from rlfast.compare import tiny as compare
from rlfast.demo.settings import INSTALL
from rlfast.recipes import Recipe, said, tasks, undisclosed, use
from rlfast.recipes.row import Policy
from rlfast.recipes.training import fitted, train

runner = CliRunner()


def test_the_table_has_every_row_and_every_source():
    done = runner.invoke(cli.app, ["recipes", "--json"])
    assert done.exit_code == 0, done.output
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(rlfast.RECIPES)
    values = rows["instructgpt"]["values"]
    assert values["1.nll"] == {"value": 27.8, "source": "2203.02155 §C.4"}
    assert values["1.advantage.lam"]["source"] is None
    table = runner.invoke(cli.app, ["recipes"])
    assert table.exit_code == 0 and "Magistral" in table.stdout


def test_one_row_says_what_is_undisclosed():
    done = runner.invoke(cli.app, ["recipes", "gpt4"])
    assert done.exit_code == 0 and "undisclosed" in done.stdout and "from memory" in done.stdout
    wrong = runner.invoke(cli.app, ["recipes", "gpt5"])
    assert wrong.exit_code == 2 and "instructgpt" in wrong.output


def test_train_runs_a_recipe():
    done = runner.invoke(cli.app, ["train", "gemma2", "--steps", "1", "--batch", "2", "--max-tokens", "4", "--json"])
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["kind"] for r in records] == ["distil", "reward_model", "policy", "policy"]
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in records)


def test_train_names_what_it_does_not_know():
    wrong = runner.invoke(cli.app, ["train", "gpt5"])
    assert wrong.exit_code == 2 and "instructgpt" in wrong.stderr


WRONG = {
    "steps": (["--steps", "0"], "--steps: expected at least 1, got 0"),
    "a batch": (["--batch", "0"], "--batch: expected at least 1, got 0"),
    "candidates": (["--candidates", "-1"], "--candidates: expected at least 1, got -1"),
    "tokens": (["--max-tokens", "0"], "--max-tokens: expected at least 1, got 0"),
    "a seed": (["--seed", "-1"], "--seed: expected at least 0, got -1"),
    "a large seed": (["--seed", str(1 << 62)], f"--seed: expected less than 2**62, got {1 << 62}"),
    "a rate": (["--learning-rate", "nan"], "--learning-rate: expected a float > 0, got nan"),
}


@pytest.mark.parametrize("what", WRONG)
def test_train_names_the_option(what):
    arguments, words = WRONG[what]
    done = runner.invoke(cli.app, ["train", "dapo", *arguments])
    assert done.exit_code == 2 and done.stderr == f"rlfast train: {words}\n"


@pytest.mark.parametrize("option, more", (("--model", []), ("--teacher", ["--model", "tiny"])))
def test_train_names_a_model_that_is_not_there(option, more, tmp_path):
    for where, words in ((tmp_path / "nowhere", "there is no folder"), (tmp_path, "got")):
        done = runner.invoke(cli.app, ["train", "gemma2", option, str(where), *more])
        assert done.exit_code == 2 and done.stderr.startswith(f"rlfast train: {option}: expected tiny, smollm2, or a")
        assert words in done.stderr and str(where) in done.stderr


def test_train_wants_a_teacher_that_reads_what_the_model_writes(tmp_path):
    compare.tiny("Qwen2").save_pretrained(tmp_path)
    compare.word_tokenizer().save_pretrained(tmp_path)
    done = runner.invoke(cli.app, ["train", "rlaif", "--teacher", str(tmp_path)])
    assert done.exit_code == 2
    assert "rlfast train: --teacher: expected a model with the tokens of --model tiny, got" in done.stderr


def test_train_names_the_package_that_a_model_needs(tmp_path, monkeypatch):
    compare.tiny("Qwen2").save_pretrained(tmp_path)
    compare.word_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # as if it were not installed
    missing = "import of reasoning_gym halted; None in sys.modules"
    done = runner.invoke(cli.app, ["train", "dapo", "--model", str(tmp_path)])
    assert done.exit_code == 2 and done.stderr.splitlines()[-1] == (
        f"rlfast train: --model {tmp_path}: {missing}; to install what it needs: {INSTALL}"
    )


@pytest.mark.parametrize("name", ("dapo", "phi3", "reka", "embedding_rewards"))
def test_a_step_without_an_update_is_said(name, caplog):
    alike = tasks.toy(4)._replace(reward=lambda number, rollout: 1.0)
    row = fitted(rlfast.recipe(name), batch=2, candidates=2)
    row = replace(row, stages=row.stages[:1])
    options = {"max_tokens": 4, "kv_budget": 1 << 20}
    assert not list(train(row, tasks.tiny(), alike, 2, **options))
    kind = {"dapo": "policy", "phi3": "preference"}.get(name, "reward_model")
    said = [f"stage 0 {kind}, step {step}: no update, in no group do rewards differ" for step in (0, 1)]
    assert [r.getMessage() for r in caplog.records if r.name == "rlfast.recipes"] == said


@pytest.mark.parametrize("candidates", (1, 2))
def test_a_step_without_an_advantage_is_said(candidates, caplog):
    """Of one candidate to compare with none, or of groups of one reward; the KL penalty has its update."""
    row = fitted(rlfast.recipe("deepseek_r1"), batch=2, candidates=candidates)
    at = next(i for i, stage in enumerate(row.stages) if isinstance(stage, Policy))
    alike = tasks.toy(4)._replace(reward=lambda number, rollout: number if candidates == 1 else 1.0)
    row = replace(row, stages=row.stages[at : at + 1])
    assert list(train(row, tasks.tiny(), alike, 1, max_tokens=4, kv_budget=1 << 20))
    said = [r.getMessage() for r in caplog.records if r.name == "rlfast.recipes"]
    assert said == ["stage 0 policy, step 0: every advantage is 0, in no group do rewards differ"]


def test_a_recipe_of_ones_own_learns_the_toy():
    row = Recipe(
        "mine", "Mine", "–", "K",
        (
            Policy(
                loss=use("loss", "dapo"),
                advantage=use("group_advantage", method=undisclosed("grpo")),
                candidates=said(8, "here"),
            ),
        ),
    )  # fmt: skip
    task = tasks.toy(16)
    records = list(
        train(fitted(row, batch=4, learning_rate=1e-2), tasks.tiny(), task, 12, max_tokens=6, kv_budget=1 << 20)
    )
    rewards = [r.reward for r in records]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6


def test_every_object_of_every_row_can_be_made():
    assert all(repr(row) for row in rlfast.RECIPES.values())
    for row in rlfast.RECIPES.values():
        for stage in row.stages:
            inner = getattr(stage, "stage", stage)
            if hasattr(inner, "loss"):
                assert inner.loss.ready is inner.loss.ready  # made once


def test_errors_name_what_was_wanted():
    with pytest.raises(ValueError, match="name: expected one of 'instructgpt'"):
        rlfast.recipe("gpt5")
    row = rlfast.recipe("dapo")
    with pytest.raises(ValueError, match=r"path: expected one of .*0\.loss\.eps_high"):
        row.replaced("0.loss.eps", 0.1)
    with pytest.raises(ValueError, match="sure"):
        Recipe("a", "A", "", "Z", ())
    with pytest.raises(ValueError, match="teacher"):
        list(train(fitted(rlfast.recipe("gemma2"), batch=2), tasks.tiny(), tasks.toy(4), 1))
