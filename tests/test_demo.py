"""The demo's verdict and what it shows, on steps made by hand; `make demo` itself trains a model for minutes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlfast.demo import pairs, report
from rlfast.demo.pairs import pairs_of
from rlfast.demo.parity import Step
from rlfast.demo.settings import DemoError, DpoSettings, Settings, check

SAME = Step(loss=(0.05, 0.05), grad_norm=(4.0, 4.0), scale=0.8, flat_groups=0.25, logp=2e-5, update=3e-4)
STAMP = {
    "date": "2026-01-01T00:00:00+00:00",
    "commit": "0",
    "machine": {"cpu": "a processor", "cores": 2, "memory_gib": 24, "isa": "avx2", "torch_threads": 2},
    "backend": "cpu",
    "versions": {"rlfast": "0", "torch": "0", "trl": "0"},
    "wall_seconds": 1.0,
}


def timed(whole: float, flat_groups: float = 0.25) -> list[dict]:
    """Two steps of one arm."""
    parts = {"generation": 1.0, "logps": 1.0, "head forward": 0.5, "backward": 1.0, "head backward": 0.5}
    one = {"seconds": parts | {"whole": whole}, "rows": 10, "peak": 1 << 30, "loss": 0.0, "reward": 0.5, "tokens": 8}
    return [one | {"flat_groups": flat_groups}] * 2


def result(parity=(SAME,), flat_groups: float = 0.25) -> report.Result:
    speed = {"stock": timed(6.0, flat_groups), "rlfast": timed(4.0, flat_groups)}
    return report.Result(Settings(), list(parity), speed, STAMP)


@pytest.mark.parametrize(
    "change",
    (
        {"logp": 1.1e-4},
        {"grad_norm": (4.0, 4.0005)},
        {"update": 1.1e-3},
        {"loss": (0.05, 0.0501)},
        {"logp": float("nan")},
    ),
    ids=str,
)
def test_a_step_out_of_tolerance_fails(change):
    assert not SAME.failures
    assert len(SAME._replace(**change).failures) == 1
    assert result([SAME, SAME._replace(**change)]).failures[0].startswith("parity, step 2")


def test_too_few_groups_with_an_advantage_fail():
    assert not result(flat_groups=0.5).failures
    assert any("advantage" in words for words in result([SAME._replace(flat_groups=0.9)], flat_groups=0.9).failures)


def test_the_ratio_is_of_medians():
    assert result().ratio == pytest.approx(1.5, rel=1e-12)


@pytest.mark.parametrize("wrong", ({"batch": 6}, {"generations": 1}, {"steps": 0}, {"parity_steps": 0}), ids=str)
def test_options_that_cannot_work(wrong):
    check(Settings())
    with pytest.raises(DemoError, match="expected"):
        check(replace(Settings(), **wrong))


@pytest.mark.parametrize("wrong", ({"batch": 64}, {"batch": 0}, {"samples": 1}), ids=str)
def test_options_of_dpo_that_cannot_work(wrong):
    check(DpoSettings())
    with pytest.raises(DemoError, match="--pairs"):
        check(replace(DpoSettings(), **wrong))


def test_a_right_answer_is_put_beside_a_wrong_one():
    row = {"prompt": [{"role": "user", "content": "1 + 2 = ?"}], "answer": "3"}
    said = ["it is 4", "3", "it is 4", "so: 3", "who knows", "the answer is 3"]
    made = pairs_of(row, said)
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in made] == [
        ("3", "it is 4"),
        ("so: 3", "who knows"),
    ]
    assert all(p["prompt"] == row["prompt"] for p in made)
    assert not pairs_of(row, ["3", "is 3"]) and not pairs_of(row, ["4"])


class FewPairs:
    """A worker that answers every problem, and finds too little."""

    def __init__(self, *_):
        self.messages = ["0 of 32 pairs", [{"prompt": "p"}] * 5]

    def receive(self):
        return self.messages.pop(0)

    def close(self):
        pass


def test_too_few_pairs_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "Worker", FewPairs)
    said = []
    settings = DpoSettings(model=str(tmp_path / "model"))
    with pytest.raises(DemoError, match=r"only 5 pairs .* wanted 32: raise --samples"):
        pairs.prepare(settings, said.append)
    assert said == ["0 of 32 pairs"] and not list(tmp_path.iterdir())
    path = pairs.prepare(replace(settings, pairs=5), said.append)
    assert pairs.prepare(replace(settings, pairs=5), None) == path
    assert len(pairs.read(replace(settings, pairs_file=str(path)))) == 5


def test_what_dpo_writes(tmp_path):
    pytest.importorskip("matplotlib")
    seconds = {"logps": 2.0, "head forward": 0.5, "backward": 1.0, "head backward": 0.5}
    step = {"rows": 10, "peak": 1 << 30, "loss": 0.69, "margin": 0.0, "accuracy": 0.5}
    speed = {arm: [step | {"seconds": seconds | {"whole": whole}}] * 2 for arm, whole in (("stock", 6), ("rlfast", 4))}
    made = report.Result(DpoSettings(), [SAME], speed, STAMP)
    written = made.write(tmp_path, None)
    assert {path.name for path in written} == {"demo-dpo.png", "demo-dpo.html"}
    page = (tmp_path / "demo-dpo.html").read_text(encoding="utf-8")
    assert "A DPO step: 1.50×" in page and "DPOTrainer" in page and "8 pairs" in page and "generation" not in page
    assert made.record()["trainer"] == "DPO" and not made.failures


def test_what_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    written = result().write(tmp_path, tmp_path / "demo.json")
    assert {path.name for path in written} == {"demo.png", "demo.html", "demo.json"}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "1.50" in page and "a processor" in page
    assert json.loads((tmp_path / "demo.json").read_text())["ratio"] == pytest.approx(1.5, rel=1e-3)
