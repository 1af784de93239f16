"""What each trainer does differently from the paper of a loss: options of ``rlfast.Loss``, by trainer and row."""

from __future__ import annotations

from rlfast import validate

PRESETS: dict[str, dict[str, dict]] = {"trl": {}, "verl": {}, "openrlhf": {}, "nemo-rl": {}, "liger": {}}


def preset(name: str, like: str) -> dict:
    """The options by which a row becomes a trainer's own.

    Raises:
        ValueError: the trainer is unknown, or has no such loss.
    """
    rows = PRESETS[validate.one_of("like", like, tuple(PRESETS))]
    if name not in rows:
        validate.fail("name", f"one of {', '.join(rows)} for like={like!r}", repr(name))
    return rows[name]
