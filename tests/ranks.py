"""Four processes over gloo that stay for a whole file: functions run on all of them at once, or on the first two."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

SIZE = 4
PATIENCE = 30.0  # seconds that a rank waits for another


class Failed(Exception):
    """What a function raised on a rank."""


def worker(rank: int, meeting: str, pipe) -> None:
    """What a process does: tasks as they come."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE, timeout=patience)
    groups = {SIZE: dist.group.WORLD, 2: dist.new_group([0, 1])}
    while (task := pickle.loads(pipe.recv_bytes())) is not None:
        function, args, size = task
        try:
            found = True, function(groups[size], *args)
        except Exception as error:
            found = False, (type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(found))
    dist.destroy_process_group()


@contextlib.contextmanager
def sent():
    """Bytes that this rank gives to each collective within, in a list."""
    found, gather, reduce = [], dist.all_gather, dist.all_reduce

    def counted(call, own, *args, **kwargs):
        found.append(own.numel() * own.element_size())
        return call(*args, **kwargs)

    dist.all_gather = lambda out, x, **rest: counted(gather, x, out, x, **rest)
    dist.all_reduce = lambda x, **rest: counted(reduce, x, x, **rest)
    try:
        yield found
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce


class Ranks:
    """The processes. One is started with everything imported, the others are forked from it."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rlfast", "pytest", "tests.scan_cases", "tests.decoders", "tests.ranks"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            ours, theirs = context.Pipe()
            args = rank, f"{self.folder.name}/meeting", theirs
            self.processes.append(context.Process(target=worker, args=args, daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def outcomes(self, function, *args, size: int = SIZE) -> list[tuple]:
        """(True, what ``function(group, *args)`` gives) of each of the first ``size`` ranks; or (False, (the name of an
        error, its message, its traceback)). A function is sent by its name: it belongs to a module."""
        for pipe in self.pipes[:size]:
            pipe.send_bytes(pickle.dumps((function, args, size)))
        found = []
        for rank, pipe in enumerate(self.pipes[:size]):
            assert pipe.poll(2 * PATIENCE), f"rank {rank} does not answer"
            found.append(pickle.loads(pipe.recv_bytes()))
        return found

    def run(self, function, *args, size: int = SIZE) -> list:
        """What ``function(group, *args)`` gives on each of the first ``size`` ranks."""
        found = self.outcomes(function, *args, size=size)
        for rank, (well, said) in enumerate(found):
            if not well:
                raise Failed(f"rank {rank}: {said[2]}")
        return [said for _, said in found]

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
