"""The example for torchrun, on two of the processes that stay, for a few steps."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


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
