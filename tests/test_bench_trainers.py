"""``bench.trainers``: every row gives what the trainer gives, at a size that takes milliseconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import trainers

ROWS = trainers.rows()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.trainer} {row.name}")
def test_a_row_is_right_and_is_timed(row):
    found = trainers.run_row(replace(row, budget_s=0.0), small=True)
    assert found["error"] <= row.gate and found["ratio"] > 0


def test_a_wrong_row_is_not_timed():
    row = ROWS[2]
    stock, ours = row.build(True)
    off = replace(row, build=lambda small: (stock, lambda: {k: x * 1.01 for k, x in ours().items()}))
    with pytest.raises(RuntimeError, match="rlfast is off by"):
        trainers.run_row(off, small=True)
