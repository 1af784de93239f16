"""Rollouts from engines in Ray workers, behind ``RolloutBackend``."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from rlfast import validate
from rlfast.rollout.api import MODES, Request, Rollout, checked_sizes, checked_version, listed, named_weights
from rlfast.rollout.calls import PATIENCE, alone
from rlfast.rollout.remote import Remote, ServerError


class RayPool(Remote):
    """Engines in Ray workers: a request goes to the one with the fewest samples under way, and shares its steps.

    What a sample is does not depend on which worker draws it. A worker that has died is asked no more: what it had
    under way fails, each request by itself, and the others go on. Without a worker left every call fails.

    Args:
        make: a function without arguments that makes an ``Engine``; it runs in the worker.
        workers: how many.
        options: of ``ray.remote``, such as ``num_gpus=1``.
    """

    logp_means = "processed"

    def __init__(self, make, workers: int = 1, **options):
        import ray

        checked_sizes(workers=workers)
        if not callable(make):
            validate.fail("make", "a function that makes an engine", repr(make)[:60], TypeError)
        super().__init__()
        self.ray = ray
        worker = ray.remote(**options)(_Worker) if options else ray.remote(_Worker)
        self.workers = [worker.remote(make) for _ in range(workers)]
        self.load = [0] * workers
        self.place: dict = {}  # handle → which worker
        self.dead: dict[int, str] = {}  # which has died, and what Ray said

    def _alive(self) -> list[int]:
        """The workers that have not died, of which there must be one."""
        places = [place for place in range(len(self.workers)) if place not in self.dead]
        if not places:
            raise ServerError(f"all {len(self.workers)} workers have died: {next(iter(self.dead.values()))}")
        return places

    def _said(self, place: int, handle) -> list:
        """[what a worker says]; [] if it has died, which is then known."""
        try:
            return [self.ray.get(handle)]
        except self.ray.exceptions.ActorDiedError as error:
            self.dead[place] = str(error)
            return []

    def _all(self, ask) -> list:
        """What the workers say to a call."""
        asked = [(place, ask(self.workers[place])) for place in self._alive()]
        return [said for place, handle in asked for said in self._said(place, handle)]

    def _every(self, name: str, *args) -> list:
        """What their engines say to one."""
        return self._all(lambda worker: worker.call.remote(name, *args))

    @property
    def bitwise(self) -> bool:
        """Whether all of the workers' engines are."""
        return all(self._every("bitwise"))

    def submit(self, requests: Sequence[Request]) -> list[int]:
        """Their numbers; a wrong one raises here, by the check of the first worker's engine, and none is taken then."""
        self._open()
        listed("requests", requests, "Request")
        found = []
        try:
            while not found:
                first = self._alive()[0]
                found = self._said(first, self.workers[first].checked.remote(list(requests)))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        return super().submit(found[0])

    def _checked(self, request: Request) -> Request:
        return request  # by the worker

    def _start(self, number: int, request: Request) -> None:
        place = min(self._alive(), key=self.load.__getitem__)
        self.load[place] += request.params.n
        handle = self.workers[place].generate.remote(number, request)
        self.place[handle], self.waiting[number] = place, (handle, request)

    def _done(self, handles: list, timeout: float | None):
        return self.ray.wait(handles, timeout=timeout)[0] if handles else ()

    def _rollouts(self, number: int, request: Request, handle) -> list[Rollout]:
        place = self.place[handle]
        self._unload(handle, request)
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.ActorDiedError as error:
            self.dead[place] = str(error)
            raise ServerError(f"request {number}: its worker, number {place}, has died: {error}") from error
        except self.ray.exceptions.RayError as error:
            raise ServerError(f"request {number}: its worker failed: {error}") from error

    def _unload(self, handle, request: Request) -> None:
        self.load[self.place.pop(handle)] -= request.params.n

    def _forget(self, handle, request: Request) -> None:
        self._unload(handle, request)
        self.ray.cancel(handle)

    @alone
    def pause(self, mode: str = "keep") -> None:
        """Nothing is generated until ``resume``; the modes are those of the workers' engines."""
        self._every("pause", validate.one_of("mode", mode, MODES))
        self.paused = True

    @alone
    def resume(self) -> None:
        """Go on."""
        self._every("resume")
        self.paused = False

    @alone
    def sync_weights(self, named_params, version: int) -> None:
        """The parameters into every worker's model."""
        checked_version(version)
        weights = self.ray.put({name: p.detach().cpu() for name, p in named_weights(named_params)})
        try:
            self._all(lambda worker: worker.load.remote(weights, version))
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        self.version = version

    def close(self) -> None:
        """End the workers."""
        self.closed = True
        self.waiting.clear()
        for worker in self.workers:
            self.ray.kill(worker)


class _Worker:
    """An engine in a process of Ray's, whose calls run beside each other: their requests share the engine's steps."""

    def __init__(self, make):
        self.engine = make()

    async def call(self, name: str, *args):
        found = getattr(self.engine, name)
        return found(*args) if callable(found) else found

    async def checked(self, requests: list[Request]) -> list[Request]:
        return [self.engine._checked(request) for request in requests]

    async def generate(self, number: int, request: Request) -> list[Rollout]:
        engine, found = self.engine, []
        (own,) = engine.submit([request])
        left = {own: request.params.n}
        try:
            while left:
                rollout = engine._take(left)
                if rollout is not None:
                    found.append(rollout._replace(request=number))
                elif engine.paused:
                    await asyncio.sleep(PATIENCE)
                else:
                    await engine._stepped()
        finally:
            engine._drop({own})  # cancelled, or failed
        return found

    async def load(self, weights: dict, version: int) -> None:
        model = self.engine.model if hasattr(self.engine, "model") else self.engine.decoder.model
        own = dict(model.named_parameters())
        wrong = [name for name, p in own.items() if name not in weights or weights[name].shape != p.shape]
        if wrong:  # before any of them is another policy's
            validate.fail("named_params", f"the worker's model's {len(own)}", f"none like {', '.join(wrong[:3])}")
        with self.engine.lock, torch.no_grad():
            for name, p in own.items():
                p.copy_(weights[name])
            self.engine.sync_weights(None, version)
