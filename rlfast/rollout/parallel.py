"""The ranks of ``torchrun``: each generates a share of the prompts on its own weights, and all get all rollouts.

With torch.distributed initialised, on every rank alike:

    pool = RankPool(Engine(model, tokenizer))
    rollouts = pool.generate(prompts, params)     # the same prompts, the same rollouts
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch.distributed as dist

from rlfast.rollout.api import Request, Rollout
from rlfast.rollout.calls import Calls

DROPPED = -1  # of a request that another rank has refused


class RankPool(Calls):
    """``RolloutBackend`` over the ranks of a process group. Its calls are collective: every rank makes the same ones.

    Args:
        engine: this rank's, any backend; on every rank it has the same weights.
        process_group: by default all ranks.

    Raises:
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> pool = rlfast.rollout.RankPool(rlfast.rollout.Engine(model, tokenizer))
        >>> rollouts = pool.generate(prompts, SamplingParams(n=4, max_tokens=8, seed=1))
    """

    def __init__(self, engine, process_group=None):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("RankPool: torch.distributed is not initialised: init_process_group() comes first")
        self.engine, self.group = engine, process_group
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.logp_means = engine.logp_means
        self.numbers: dict[int, int] = {}  # the engine's number of a request → ours
        self.wanted: dict[int, int] = {}  # the engine's number → how many samples are missing
        self.found: list[Rollout] = []  # that the other ranks have not got
        self.later: list[Rollout] = []
        self.left: dict[int, int] = {}
        self.requests = 0

    @property
    def bitwise(self) -> bool:
        """Whether this rank's engine is."""
        return self.engine.bitwise

    @property
    def paused(self) -> bool:
        return self.engine.paused

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers; request i is generated on rank i modulo how many there are.

        Raises:
            RuntimeError: a rank was given other requests, or has refused one; on every rank, and none is taken.
        """
        first, share, mine, said = self.requests, requests[self.rank :: self.size], [], None
        try:
            mine = self.engine.submit(share)
        except (TypeError, ValueError, RuntimeError) as error:
            said = error
        places = range(first + self.rank, first + len(requests), self.size)
        self.numbers.update(zip(mine, places, strict=False))
        self.wanted.update((number, request.params.n) for number, request in zip(mine, share, strict=False))
        try:
            counts = self._gathered(len(requests), said)
            if len({*counts}) > 1:
                raise RuntimeError(f"requests: expected the same on every rank, got {counts} of them")
        except RuntimeError:
            for number in mine:
                self.numbers[number] = DROPPED
                self.engine.cancel(number)
            raise
        self.requests += len(requests)
        return [*range(first, self.requests)]

    def step(self, timeout: float | None = None) -> list[Rollout]:
        """Generates what is under way on this rank, for ``timeout`` seconds at most, and waits for the others. Returns
        what has ended on any rank, in the same order on each.

        Raises:
            RuntimeError: a rank has failed; which and why, on every rank. What the others have comes with a later step.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while self.wanted and not self.paused and time.monotonic() < until:
                self._keep(self.engine.step(timeout))
        except Exception as error:
            self._gathered([], error)
            raise
        together = [rollout for found in self._gathered(self.found) for rollout in found]
        self.found = []
        return sorted(together, key=lambda r: (r.request, r.index))

    def _keep(self, rollouts: list[Rollout]) -> None:
        for rollout in rollouts:
            number = rollout.request
            if number not in self.wanted:
                self.engine.later.append(rollout)  # of a call of the engine's own
                continue
            self.wanted[number] -= 1
            if self.numbers[number] != DROPPED:
                self.found.append(rollout._replace(request=self.numbers[number]))
            if not self.wanted[number]:
                del self.wanted[number], self.numbers[number]

    def _gathered(self, value, error: Exception | None = None) -> list:
        """The value of every rank; a RuntimeError on all of them if one has an error."""
        said = None if error is None else f"{type(error).__name__}: {error}"
        every = [None] * self.size
        dist.all_gather_object(every, (value, said), group=self.group)
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(every) if text is not None]
        if failed:
            raise RuntimeError("; ".join(failed)) from error
        return [value for value, _ in every]

    def cancel(self, number: int) -> None:
        """End a request's samples; the next ``step`` returns them, as far as they came, with "abort"."""
        for theirs, ours in self.numbers.items():
            if ours == number:
                self.engine.cancel(theirs)

    def pause(self, mode: str = "keep") -> None:
        """``step`` generates nothing until ``resume``; the modes are the engine's."""
        self.engine.pause(mode)

    def resume(self) -> None:
        """Go on."""
        self.engine.resume()

    def sync_weights(self, named_params, version: int) -> None:
        """Of this rank's engine; every rank has its own weights, or all have the same by then."""
        self.engine.sync_weights(named_params, version)

    def close(self) -> None:
        """Close this rank's engine."""
        self.engine.close()
