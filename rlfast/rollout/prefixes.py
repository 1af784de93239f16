"""Prompts that begin in the middle of an earlier response: rollouts from the states that a policy was in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlfast import validate
from rlfast.rollout.api import Rollout, checked_ids


def restarts(rollouts: Sequence[Rollout], *, back: int, append=(), step_ids=None, seed: int = 0) -> list[list[int]]:
    """Prompts for ``Engine.generate`` that go on from earlier responses, of which some last steps are taken back.

        prompt, y_1, …, y_{L−t}, append;   t uniform in 0, …, min(back, L)

    The engine knows the pages of such a prefix while the weights are the same: it is not computed again.

    Args:
        rollouts: what ``generate`` returned, right and wrong ones; ``rlfast.reflection_bonus`` pays by which it was.
        back: at most so many steps are taken back.
        append: token ids at the end of each, such as Satori's "reflect".
        step_ids: token ids that end a step; None: each token is one.
        seed: of t.

    Returns:
        Token ids, a list for each rollout.

    Raises:
        ValueError, TypeError: an argument is no rollout, no int ≥ 0 or no token ids; the message names it.

    Reference:
        Satori's "restart and explore", arXiv 2502.02508, algorithm 1.
    """
    for name, x in (("back", back), ("seed", seed)):
        if isinstance(x, bool) or not isinstance(x, int) or x < 0:
            validate.fail(name, "an int ≥ 0", repr(x), ValueError if isinstance(x, int) else TypeError)
    append = checked_ids("append", append, 1 << 62).tolist()
    ends = None if step_ids is None else frozenset(checked_ids("step_ids", step_ids, 1 << 62).tolist())
    rng, found = torch.Generator().manual_seed(seed), []
    for rollout in rollouts:
        if not isinstance(rollout, Rollout):
            validate.fail("rollouts", "Rollout", repr(rollout)[:60], TypeError)
        kept = [0, *_ends(rollout.tokens, ends)]  # lengths at which a response can be cut
        t = int(torch.randint(min(back, len(kept) - 1) + 1, (), generator=rng))
        found.append([*rollout.prompt_tokens, *rollout.tokens[: kept[len(kept) - 1 - t]], *append])
    return found


def _ends(tokens: list[int], ends: frozenset[int] | None) -> list[int]:
    """How many tokens there are after each step; the last one ends with the response."""
    if ends is None:
        return list(range(1, len(tokens) + 1))
    found = [i for i, token in enumerate(tokens, 1) if token in ends]
    return found if not tokens or (found and found[-1] == len(tokens)) else [*found, len(tokens)]
