"""``bench.learning`` on a tiny model: both arms take the same steps, and the file and the picture are written."""

from __future__ import annotations

import json

import pytest

from bench import learning


@pytest.mark.parametrize("name", learning.PLANS)
def test_both_arms_of_a_tiny_model_agree(name, tmp_path, capsys):
    path, picture = tmp_path / "learning.json", tmp_path / "learning.png"
    arguments = ["--recipe", name, "--seeds", "1", "--steps", "3", "--every", "1", "--model", "tiny"]
    learning.main([*arguments, "--learning-rate", "0.01", "--json", str(path), "--picture", str(picture)])
    one = json.loads(path.read_text(encoding="utf-8"))["learning"][name]
    curves = [one["curves"][arm]["0"] for arm in learning.ARMS]
    assert list(curves[0]) == ["0", "1", "2", "3"] == list(curves[1])
    assert list(curves[0].values()) == pytest.approx(list(curves[1].values()), abs=1e-6)
    assert len(set(curves[0].values())) > 1
    assert name != "dpo" or curves[0]["0"] == 0.5
    assert picture.stat().st_size > 1000
    assert "rises by" in capsys.readouterr().out


def test_a_curve_that_falls_is_told():
    assert learning.rises({0: 0.1, 5: 0.4}) > 0 > learning.rises({0: 0.4, 5: 0.5, 10: 0.2})
