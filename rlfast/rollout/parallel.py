"""The ranks of ``torchrun``: each generates a share of the prompts on its own weights, and all get all rollouts.

With torch.distributed initialised, on every rank alike:

    pool = RankPool(Engine(model, tokenizer))
    rollouts = pool.generate(prompts, params)     # the same prompts, the same rollouts
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
import time

import torch.distributed as dist

from rlfast import validate
from rlfast.distributed.ranks import gathered_objects, ranks_of
from rlfast.rollout.api import Request, Rollout, SamplingParams
from rlfast.rollout.calls import PATIENCE, Calls, RequestError, alone, count_down


def spelled(x):
    """What is one text where parameters are equal, in every process: ``hash`` of a string is not. A function's name."""
    if isinstance(x, SamplingParams):
        return [spelled(getattr(x, field.name)) for field in dataclasses.fields(x)]
    if isinstance(x, dict):
        return sorted((spelled(key), spelled(value)) for key, value in x.items())
    if isinstance(x, tuple | list):
        return [spelled(y) for y in x]
    if isinstance(x, numbers.Real):
        return x.as_integer_ratio()  # 1 is 1.0
    if callable(x):
        x = x if hasattr(x, "__qualname__") else type(x)
        return f"{getattr(x, '__module__', None)}.{x.__qualname__}"
    return x


class RankPool(Calls):
    """``RolloutBackend`` over the ranks of a process group. Its calls are collective: every rank makes the same ones.

    A sample's tokens are a function of its prompt, seed and index: they do not depend on how many ranks there are.

    Args:
        engine: this rank's, any backend; on every rank it has the same weights.
        process_group: ranks, or a ``DeviceMesh`` of one dimension; by default all ranks. Its timeout has to be longer
            than the time by which one rank generates longer than another.

    Raises:
        RequestError: in a call: a server has failed at a request, on every rank; the others go on.
        RuntimeError: torch.distributed is not initialised. In a call: a rank has failed, or was given other requests
            (a function among their parameters is known by its name); which and why, on every rank. What the others have
            comes with a later step. A rank that is gone, or does not come within the group's timeout, raises on all
            others.

    Example:
        >>> pool = rlfast.rollout.RankPool(rlfast.rollout.Engine(model, tokenizer))
        >>> rollouts = pool.generate(prompts, SamplingParams(n=4, max_tokens=8, seed=1))
    """

    def __init__(self, engine, process_group=None):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("RankPool: torch.distributed is not initialised: init_process_group() comes first")
        super().__init__()
        self.engine, self.tokenizer, self.logp_means = engine, engine.tokenizer, engine.logp_means
        self.ranks = ranks_of(dist.group.WORLD if process_group is None else process_group)
        self.rank, self.size = self.ranks.rank, self.ranks.size
        self.given = ""  # a digest of all requests so far
        self.under_way: dict[int, int] = {}  # request → how many samples are missing, on every rank
        self.own: dict[int, int] = {}  # the same of this rank's, by the engine's numbers
        self.numbers: dict[int, int] = {}  # the engine's number → ours
        self.found: list[Rollout] = []  # that the other ranks have not got
        self.lost: dict[int, str] = {}  # requests that have failed here, which they do not know

    @property
    def bitwise(self) -> bool:
        """Whether this rank's engine is."""
        return self.engine.bitwise

    def _checked(self, request: Request) -> Request:
        return self.engine._checked(request)  # on every rank, so that all refuse it

    def _start(self, number: int, request: Request) -> None:
        """Request i is generated on rank i modulo how many there are."""
        text = repr((self.given, request.prompt, spelled(request.params)))
        self.given = hashlib.sha256(text.encode()).hexdigest()
        self.under_way[number] = request.params.n
        if number % self.size == self.rank:
            (theirs,) = self.engine.submit([request])
            self.own[theirs], self.numbers[theirs] = request.params.n, number

    @alone
    def _work(self, timeout: float | None = None) -> None:
        """Generates what is under way on this rank, for ``timeout`` seconds at most, and waits for the other ranks."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        try:
            while self._collect() and not self.paused and time.monotonic() < until:
                self.engine._work(PATIENCE)
        except Exception as error:
            self._share(error)
            raise
        self._share()

    def _collect(self) -> bool:
        """Take what has ended here; whether anything is under way."""
        while self._taken():
            pass
        return bool(self.own)

    def _taken(self) -> bool:
        """Take one that has ended here, or has failed; whether there was one."""
        before = [*self.own]
        try:
            rollout = self.engine._take(self.own)
        except RequestError as error:
            (gone,) = (theirs for theirs in before if theirs not in self.own)
            self.lost[self.numbers.pop(gone)] = str(error)
            return True
        if rollout is None:
            return False
        self.found.append(rollout._replace(request=self.numbers[rollout.request]))
        if rollout.request not in self.own:
            del self.numbers[rollout.request]
        return True

    def _share(self, error: Exception | None = None) -> None:
        """What every rank has found, to every rank, in one order; a RuntimeError on all of them if one has an error."""
        said = None if error is None else f"{type(error).__name__}: {error}"
        own = self.requests, self.given, self.found, self.lost, said
        counts, given, found, lost, errors = zip(*gathered_objects(own, self.ranks, "RankPool"), strict=True)
        failed = [f"{self.ranks.name(rank)}: {text}" for rank, text in enumerate(errors) if text is not None]
        if failed:
            raise RuntimeError("; ".join(failed)) from error
        if len({*counts}) > 1:
            raise RuntimeError(f"requests: expected the same on every rank, got {list(counts)} of them")
        others = [self.ranks.name(rank) for rank, number in enumerate(given) if number != given[0]]
        if others:
            raise RuntimeError(f"requests: expected the same on every rank, got others on {', '.join(others)}")
        self.found, self.lost = [], {}
        for rank, part in enumerate(lost):
            for number, text in part.items():
                self.failed[number] = RequestError(f"request {number} of {self.ranks.name(rank)}: {text}")
                self.under_way.pop(number, None)
        together = sorted((r for part in found for r in part), key=lambda r: (r.request, r.index))
        self._hand_over(together)
        for rollout in together:
            count_down(self.under_way, rollout)

    @alone
    def cancel(self, number: int) -> None:
        """End a request's samples; the next ``step`` returns them, as far as they came, with "abort"."""
        if number not in self.under_way:
            validate.fail("number", "a request under way", repr(number))
        for theirs in [theirs for theirs in self.own if self.numbers[theirs] == number]:
            self.engine.cancel(theirs)
        self._collect()
        self._share()

    @alone
    def pause(self, mode: str = "keep") -> None:
        """Nothing is generated until ``resume``; the modes are the engine's."""
        self.engine.pause(mode)
        self.paused = True

    @alone
    def resume(self) -> None:
        """Go on."""
        self.engine.resume()
        self.paused = False

    def sync_weights(self, named_params, version: int) -> None:
        """Of this rank's engine; every rank has its own weights, or all have the same by then."""
        self.engine.sync_weights(named_params, version)

    def close(self) -> None:
        """Close this rank's engine."""
        self.closed = True
        self.engine.close()
