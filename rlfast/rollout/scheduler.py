"""Which tokens go into the next forward: those of sequences that decode, then chunks of prompts, within the budgets."""

from __future__ import annotations

import bisect
import functools
import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

from rlfast.rollout.api import SamplingParams
from rlfast.rollout.kv import OutOfPages, PagePool


@dataclass(eq=False)
class Sample:
    """One response under way."""

    request: int
    index: int
    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)
    records: list[tuple] = field(default_factory=list)  # (logp_raw, logp, kept, entropy, version) of each token
    table: list[int] = field(default_factory=list)  # its pages
    computed: int = 0  # positions whose keys and values are there
    era: int = 0  # the pool's when the first of them was computed
    running: bool = False  # it has pages, and is not among those that wait
    waits_for: Sample | None = None  # the sample of the same prompt that computes its keys and values
    failed: bool = False  # its caller's function did
    settled: int = 0  # tokens after which it goes on
    finish: str = ""

    @functools.cached_property
    def key(self) -> int:
        """Of its noise: of its seed, and of its prompt, so that two prompts with one seed are not drawn alike."""
        text = ",".join(map(str, (self.params.seed, *self.prompt)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    @property
    def rank(self) -> tuple:
        """The order in which samples are served."""
        return -self.params.priority, self.request, self.index

    def __getitem__(self, some: slice) -> list[int]:
        """Tokens ``start`` to ``stop`` of prompt and response: a decode step asks for one, and copies no other."""
        start, stop, _ = some.indices(self.length)
        before = len(self.prompt)
        return [*self.prompt[start:stop], *self.tokens[max(start - before, 0) : max(stop - before, 0)]]


class Chunk(NamedTuple):
    """Tokens ``start`` to ``stop`` of a sequence, for one forward."""

    table: list[int]
    tokens: list[int] | Sample  # of the whole sequence
    start: int
    stop: int
    sample: Sample | None = None

    @property
    def completes(self) -> bool:
        """Whether its last token is the sample's."""
        return self.stop == self.sample.length


class Scheduler:
    """Samples that wait for pages and samples that have some.

    Args:
        pool: the pages.
        token_budget: most tokens of a forward.
        max_batch: most sequences of a forward.
    """

    def __init__(self, pool: PagePool, token_budget: int, max_batch: int):
        self.pool, self.token_budget, self.max_batch = pool, token_budget, max_batch
        self.waiting: list[Sample] = []  # by rank
        self.running: list[Sample] = []

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, samples: list[Sample]) -> None:
        """Samples of one prompt: the first computes what all of them share."""
        for sample in samples[1:]:
            sample.waits_for = samples[0]
        for sample in samples:
            self._wait(sample)

    def _wait(self, sample: Sample) -> None:
        bisect.insort(self.waiting, sample, key=lambda s: s.rank)

    def _run(self, sample: Sample) -> None:
        self.waiting.remove(sample)
        self.running.append(sample)
        sample.running = True

    def pick(self) -> list[Chunk]:
        """The chunks of the next forward; samples that lose their pages to others wait again."""
        chunks, budget = [], self.token_budget
        self.running.sort(key=lambda s: s.rank)
        for sample in list(self.running):
            if budget and sample.running:  # who gives way for another comes later in this order, and has no chunk yet
                chunk = self._chunk(sample, budget)
                if chunk is not None:
                    chunks.append(chunk)
                    budget -= chunk.stop - chunk.start
        for sample in list(self.waiting):
            if not budget or len(self.running) >= self.max_batch:
                break
            if sample.waits_for is None:
                if not self._admit(sample):  # and none is let past it, however small
                    break
                chunk = self._chunk(sample, budget)
                chunks.append(chunk)
                budget -= chunk.stop - chunk.start
        return chunks

    def _admit(self, sample: Sample) -> bool:
        """Start a sample if its prompt finds pages without taking another's."""
        sample.table = self.pool.find(sample[:-1])  # the last token is computed in any case: its logits are wanted
        sample.computed = len(sample.table) * self.pool.size
        if self.pool.pages_for(sample.length) - len(sample.table) > self.pool.free:
            self.pool.release(sample.table)
            sample.computed = 0
            return False
        sample.era = self.pool.era
        self._run(sample)
        return True

    def _chunk(self, sample: Sample, budget: int) -> Chunk | None:
        """The next tokens of a running sample, with pages of its own for them; None if it had to give way."""
        # the last token again where none was drawn after it, as when a caller's function raised
        start = min(sample.computed, sample.length - 1)
        stop = min(sample.length, start + budget)
        while True:
            try:
                self.pool.reserve(sample.table, stop)
                self.pool.own(sample.table, start)
                return Chunk(sample.table, sample, start, stop, sample)
            except OutOfPages:
                last = max(self.running, key=lambda s: s.rank)
                self.preempt(last)
                if last is sample:
                    return None

    def preempt(self, sample: Sample) -> None:
        """Take a sample's pages; it waits, and computes its keys and values again."""
        self.running.remove(sample)
        self._drop(sample)
        self._wait(sample)

    def recompute(self) -> None:
        """All keys and values are of other weights: everything that runs begins again, from the tokens that it has."""
        for sample in list(self.running):
            self.preempt(sample)

    def finish(self, sample: Sample) -> None:
        """It holds no page and is in no list any more; another one takes its place before those who wait for it."""
        if sample.running:
            self.publish(sample)
            self.running.remove(sample)
        else:
            self.waiting.remove(sample)
        self._drop(sample)
        followers = [s for s in self.waiting if s.waits_for is sample]
        for follower in followers:
            follower.waits_for = followers[0] if follower is not followers[0] else None

    def follow(self, leader: Sample) -> list[Sample]:
        """The samples that waited for this one's prompt run from here on, on its pages; those beyond ``max_batch``
        find them later."""
        followers = [s for s in self.waiting if s.waits_for is leader]
        started = followers[: max(self.max_batch - len(self.running), 0)]
        for sample in followers:
            sample.waits_for = None
        for sample in started:
            sample.table = self.pool.fork(leader.table)
            sample.computed, sample.era = leader.computed, leader.era
            self._run(sample)
        return started

    def publish(self, sample: Sample) -> None:
        """A sample's full pages are found from now on, unless it went on from keys and values of older weights."""
        if sample.era == self.pool.era:
            self.pool.publish(sample.table, sample[: sample.computed])

    def _drop(self, sample: Sample) -> None:
        self.pool.release(sample.table)
        sample.computed, sample.running = 0, False
