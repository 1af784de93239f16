"""What a caller types, on top of ``submit`` and ``step`` of any backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

from rlfast import validate
from rlfast.rollout.api import Request, Rollout, SamplingParams


class Calls:
    """Whole generations. ``later`` are rollouts that ended while a call waited for others."""

    later: list[Rollout]

    def generate(
        self, prompts, params: SamplingParams | Sequence[SamplingParams] | None = None, *, progress: bool = False
    ) -> list[Rollout]:
        """Rollouts of all prompts: n of the first, n of the second, …

        Args:
            prompts: strings, or lists of token ids.
            params: for all of them, or one each.
            progress: whether to show a bar.

        Raises:
            ValueError, TypeError: a prompt or a parameter is wrong; nothing has been generated then.
        """
        requests = requested(prompts, params)
        numbers = self.submit(requests)
        rollouts = self._until_done(dict(zip(numbers, (r.params.n for r in requests), strict=True)))
        if progress:
            from rich.progress import track

            rollouts = track(rollouts, "generating", total=sum(r.params.n for r in requests))
        return sorted(rollouts, key=lambda r: (r.request, r.index))

    def stream(
        self, prompts, params=None, *, until: Callable[[list[Rollout]], bool] | None = None
    ) -> Iterator[Rollout]:
        """Rollouts as they end.

        Args:
            prompts, params: as in ``generate``; None goes on with what an earlier ``stream`` left.
            until: told all that have ended after each of them; once true, the rest stays where it is.
        """
        if prompts is not None:
            requests = requested(prompts, params)
            for number, request in zip(self.submit(requests), requests, strict=True):
                self.left[number] = request.params.n
        found = []
        for rollout in self._until_done(self.left):
            found.append(rollout)
            yield rollout
            if until is not None and until(found):
                return

    async def astream(self, prompts, params=None, *, until=None):
        """``stream`` for asyncio: every step runs in a thread."""
        rollouts = self.stream(prompts, params, until=until)
        while (rollout := await asyncio.to_thread(next, rollouts, None)) is not None:
            yield rollout

    def _until_done(self, left: dict[int, int]) -> Iterator[Rollout]:
        """Rollouts of these requests, number → how many are missing, as they end."""
        while left:
            if self.paused:
                raise RuntimeError("the engine is paused: resume() it, or take what there is by partial()")
            ended, self.later = [*self.later, *self.step()], []
            self.later = [r for r in ended if r.request not in left]
            mine = [r for r in ended if r.request in left]
            while mine:
                rollout = mine.pop(0)
                left[rollout.request] -= 1
                if not left[rollout.request]:
                    del left[rollout.request]
                try:
                    yield rollout
                except GeneratorExit:
                    self.later += mine
                    raise


def requested(prompts, params) -> list[Request]:
    """A request a prompt."""
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)):
        validate.fail("prompts", "a list of strings or of lists of token ids", repr(prompts)[:60], TypeError)
    each = (
        params if isinstance(params, (list, tuple)) else [SamplingParams() if params is None else params] * len(prompts)
    )
    if len(each) != len(prompts):
        validate.fail("params", f"{len(prompts)}, one a prompt", str(len(each)))
    for one in each:
        if not isinstance(one, SamplingParams):
            validate.fail("params", "SamplingParams", repr(one), TypeError)
    return [Request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
