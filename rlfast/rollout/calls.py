"""What a caller types, on top of what a backend does: look at a request, start it, work, cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from rlfast import validate
from rlfast.rollout import responses
from rlfast.rollout.api import PROMPTS, Request, Rollout, SamplingParams, listed

PATIENCE = 0.1  # seconds that one caller waits for a server before it looks at what others have received


class RequestError(RuntimeError):
    """A request has failed; the others go on."""


def alone(method):
    """A method of an open engine, in which one thread is at a time."""

    @functools.wraps(method)
    def locked(self, *args, **kwargs):
        with self.lock:
            self._open()
            return method(self, *args, **kwargs)

    return locked


class Calls:
    """Whole generations, for any number of callers and threads at once.

    A backend has ``_checked(request)``, ``_start(number, request)``, ``_work(timeout)``, ``cancel(number)`` and the
    numbers that are ``under_way``. What ends it hands over to ``later`` first, and only then it is no longer under way.
    """

    under_way: Collection[int]
    tokenizer = None

    def __init__(self):
        self.later: list[Rollout] = []  # ended, and nobody's yet
        self.failed: dict[int, RequestError] = {}
        self.left: dict[int, int] = {}  # what streams have left: request → how many rollouts are missing
        self.requests = self.version = 0
        self.paused = self.closed = False
        self.lock = threading.RLock()  # of the backend's work
        self.mail = threading.RLock()  # of what has ended; nobody holds it for long
        self.stepping: asyncio.Future | None = None

    # Requests

    @alone
    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers; none is taken if one of them is wrong."""
        listed("requests", requests, "Request")
        checked = [self._checked(request) for request in requests]
        numbers = list(range(self.requests, self.requests + len(checked)))
        self.requests += len(checked)
        for number, request in zip(numbers, checked, strict=True):
            self._start(number, request)
        return numbers

    def step(self, timeout: float | None = None) -> list[Rollout]:
        """One step of what is under way: a forward, or a wait for those that generate elsewhere.

        Args:
            timeout: seconds to wait at most; None is until something has ended.

        Returns:
            The rollouts that have ended and that no other call has handed out.

        Raises:
            RequestError: a request has failed; it is forgotten, and the others go on.
        """
        self._open()
        self._work(0 if self.later or self.failed else timeout)
        with self.mail:
            for number in self.failed:
                self.left.pop(number, None)
                raise self.failed.pop(number)
            found, self.later = self.later, []
            for rollout in found:
                count_down(self.left, rollout)
        return found

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
            RuntimeError: the engine is paused, or closed.
            RequestError: a server has failed at one of them; ``stream(None)`` hands out the rollouts of the others.
        """
        left = self._sent(requested(prompts, params))
        numbers, found = set(left), []
        rollouts = self._ended(left)
        if progress:
            from rich.progress import track

            rollouts = track(rollouts, "generating", total=sum(left.values()))
        try:
            for rollout in rollouts:
                found.append(rollout)
        except RequestError:
            self._give_back(found)
            raise
        except BaseException:
            left.clear()
            self._drop(numbers)
            raise
        return sorted(found, key=lambda r: (r.request, r.index))

    def stream(
        self, prompts, params=None, *, until: Callable[[list[Rollout]], bool] | None = None
    ) -> Iterator[Rollout]:
        """Rollouts as they end.

        Args:
            prompts, params: as in ``generate``; None goes on with what streams have left that came to their end: by
                ``until``, by an error, or because nobody asks them any more.
            until: told all that have ended after each of them; once true, the rest stays where it is.
        """
        yield from self._ended(self._begun(prompts, params), until)

    async def astream(self, prompts, params=None, *, until=None):
        """``stream`` for asyncio: every step runs in a thread, one for all who wait."""
        left = await asyncio.to_thread(self._begun, prompts, params)
        async with contextlib.aclosing(self._adriven(self._each(left, until))) as found:
            async for rollout in found:
                yield rollout

    def tokens(self, prompt, params: SamplingParams | None = None) -> Iterator[tuple[int, str]]:
        """The tokens of one response as they come: (id, the text that it adds). It is cancelled if nobody asks on.

        The texts are together the rollout's: a token at whose end a stop string may begin, or a character that is not
        whole, waits for the next ones.
        """
        yield from self._driven(self._token_by_token(prompt, params))

    async def atokens(self, prompt, params: SamplingParams | None = None):
        """``tokens`` for asyncio: every step runs in a thread, one for all who wait."""
        async with contextlib.aclosing(self._adriven(self._token_by_token(prompt, params))) as found:
            async for token in found:
                yield token

    def _token_by_token(self, prompt, params) -> Iterator[tuple[int, str] | None]:
        """(id, text) of one response, None where a step is due first."""
        params = params or SamplingParams()
        if params.n != 1:
            validate.fail("n", "1: the tokens are those of one response", str(params.n))
        left = self._sent([Request(prompt, params)])
        (number,) = left
        waiting, text, seen, rollout = [], "", 0, None
        try:
            while rollout is None:
                rollout = self._next(left)
                tokens = self._so_far(number) if rollout is None else rollout.tokens
                for n in range(seen + 1, len(tokens) + 1):
                    last = rollout is not None and n == len(tokens)
                    sure, whole = (
                        (rollout.text, True) if last else responses.certain(tokens[:n], params, self.tokenizer)
                    )
                    waiting.append((tokens[n - 1], sure[len(text) :]))
                    text = max(text, sure, key=len)
                    if whole:
                        yield from waiting
                        waiting = []
                seen = len(tokens)
                if rollout is None:
                    yield None
            if waiting:  # ended without another token
                *first, (token, added) = waiting
                yield from (*first, (token, added + rollout.text[len(text) :]))
        finally:
            self._drop({number})

    # Who waits for what

    def _begun(self, prompts, params) -> dict[int, int]:
        """Requests, sent, or those that streams have left: number → how many rollouts are missing."""
        if prompts is not None:
            return self._sent(requested(prompts, params))
        with self.mail:
            left, self.left = self.left, {}
        return left

    def _sent(self, requests: list[Request]) -> dict[int, int]:
        self._go_on()
        return dict(zip(self.submit(requests), (r.params.n for r in requests), strict=True))

    def _ended(self, left: dict[int, int], until=None) -> Iterator[Rollout]:
        """Rollouts of some requests as they end."""
        yield from self._driven(self._each(left, until))

    def _driven(self, each):
        """What a generator gives, with a step where it gives None."""
        with contextlib.closing(each):
            for x in each:
                if x is None:
                    self._work(PATIENCE)
                else:
                    yield x

    async def _adriven(self, each):
        """``_driven``, whose steps run in a thread, one for all who wait."""
        with contextlib.closing(each):
            for x in each:
                if x is None:
                    await self._stepped()
                else:
                    yield x

    def _each(self, left: dict[int, int], until=None) -> Iterator[Rollout | None]:
        """Rollouts of some requests, None where a step is due first. What is missing at the end is left."""
        found = []
        try:
            while left:
                rollout = self._next(left)
                yield rollout
                if rollout is not None:
                    found.append(rollout)
                    if until is not None and until(found):
                        return
        finally:
            with self.mail:
                self.left |= left

    def _next(self, left: dict[int, int]) -> Rollout | None:
        """A rollout of some requests that has ended; None if a step is due first."""
        rollout = self._take(left)
        if rollout is None:
            self._go_on()
            here = self.under_way
            if not any(number in here for number in left):
                rollout = self._take(left)  # what has ended since is there by now
                if rollout is None:
                    numbers = sorted(left)
                    left.clear()
                    raise RuntimeError(f"requests {numbers} are not under way: step() has handed out their rollouts")
        return rollout

    def _take(self, left: dict[int, int]) -> Rollout | None:
        """A rollout of some requests, if one is there."""
        with self.mail:
            for number in self.failed.keys() & left.keys():
                del left[number]
                raise self.failed.pop(number)
            for at, rollout in enumerate(self.later):
                if rollout.request in left:
                    count_down(left, rollout)
                    return self.later.pop(at)
        return None

    def _hand_over(self, rollouts: Iterable[Rollout]) -> None:
        with self.mail:
            self.later += rollouts

    def _give_back(self, rollouts: list[Rollout]) -> None:
        """They have been taken in vain: a stream of what is left will hand them out."""
        with self.mail:
            self.later[:0] = rollouts
            for rollout in rollouts:
                self.left[rollout.request] = self.left.get(rollout.request, 0) + 1

    def _drop(self, numbers: set[int]) -> None:
        """Cancel what is under way of some requests, and forget what has come of them."""
        with self.lock:
            here = () if self.closed else self.under_way
            for number in [number for number in numbers if number in here]:
                self.cancel(number)
        with self.mail:
            self.later = [r for r in self.later if r.request not in numbers]
            for number in numbers:
                self.failed.pop(number, None), self.left.pop(number, None)

    async def _stepped(self) -> None:
        """Wait for a step: one for all who wait in this event loop."""
        if self.stepping is None or self.stepping.done() or self.stepping.get_loop() is not asyncio.get_running_loop():
            self.stepping = asyncio.ensure_future(asyncio.to_thread(self._work, PATIENCE))
        await asyncio.shield(self.stepping)

    def _so_far(self, number: int) -> Sequence[int]:
        """The tokens of a request of one sample that is under way, where they can be seen."""
        return ()

    def _go_on(self) -> None:
        self._open()
        if self.paused:
            raise RuntimeError("the engine is paused: resume() it, or take what there is by partial()")

    def _open(self) -> None:
        if self.closed:
            raise RuntimeError("the engine is closed")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def count_down(left: dict[int, int], rollout: Rollout) -> None:
    """One of the missing rollouts is there."""
    if rollout.request in left:
        left[rollout.request] -= 1
        if not left[rollout.request]:
            del left[rollout.request]


def requested(prompts, params) -> list[Request]:
    """A request a prompt."""
    listed("prompts", prompts, PROMPTS)
    each = (
        params if isinstance(params, (list, tuple)) else [SamplingParams() if params is None else params] * len(prompts)
    )
    if len(each) != len(prompts):
        validate.fail("params", f"{len(prompts)}, one a prompt", str(len(each)))
    for one in each:
        if not isinstance(one, SamplingParams):
            validate.fail("params", "SamplingParams", repr(one), TypeError)
    return [Request(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
