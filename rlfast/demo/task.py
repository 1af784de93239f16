"""Sums of one-digit numbers from reasoning-gym, and a reward that can be checked."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d+")


def problems(size: int, seed: int) -> list[dict]:
    """``size`` rows of {"prompt": conversation, "answer": str}."""
    import reasoning_gym

    made = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    return [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in made]


def closeness(completions, answer, **_) -> list[float]:
    """1 / (1 + |stated − true|) for the last whole number in the completion; 0 if it states none.

    1 is the right answer, which the untrained model finds now and then; the rest tells it how far off it was, so that
    a group of wrong answers still has something to learn from.
    """
    rewards = []
    for completion, true in zip(completions, answer, strict=True):
        stated = _NUMBER.findall(completion[0]["content"])
        rewards.append(1.0 / (1.0 + abs(int(stated[-1][:9]) - int(true))) if stated else 0.0)
    return rewards
