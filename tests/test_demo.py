"""The demo's verdict and what it shows, on steps made by hand; `make demo` itself trains a model for minutes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlfast.demo import report
from rlfast.demo.parity import Step
from rlfast.demo.settings import DemoError, Settings, check

SAME = Step(loss=(0.05, 0.05), grad_norm=(4.0, 4.0), mean_adv=0.8, flat_groups=0.25, logp=2e-5, update=3e-4)
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


def test_what_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    written = result().write(tmp_path, tmp_path / "demo.json")
    assert {path.name for path in written} == {"demo.png", "demo.html", "demo.json"}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "1.50" in page and "a processor" in page
    assert json.loads((tmp_path / "demo.json").read_text())["ratio"] == pytest.approx(1.5, rel=1e-3)
