"""``bench.learning`` on a tiny model: both arms take the same steps, and the file and the picture are written."""

from __future__ import annotations

import json

import pytest

from bench import learning


@pytest.mark.parametrize("name", learning.PLANS)
def test_both_arms_of_a_tiny_model_agree(name, tmp_path, capsys):
    path, picture = tmp_path / "learning.json", tmp_path / "learning.png"
    arguments = ["--recipe", name, "--seeds", "1", "--steps", "3", "--model", "tiny"]
    learning.main([*arguments, "--json", str(path), "--picture", str(picture)])
    one = json.loads(path.read_text(encoding="utf-8"))["learning"][name]
    curves = [one["curves"][arm]["0"] for arm in learning.ARMS]
    assert len(curves[0]) == (2 if name == "dpo" else 3)
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert picture.stat().st_size > 1000
    assert "rises by" in capsys.readouterr().out


def test_a_curve_that_falls_is_told():
    assert learning.rises([0.1, 0.2, 0.3, 0.4]) > 0 > learning.rises([0.4, 0.3, 0.2])
