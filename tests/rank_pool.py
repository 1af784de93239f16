"""Processes that stay: four ranks over gloo, which run a function of a test module each and send back what it gives."""

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
PRELOAD = [
    "rlfast",
    "pytest",
    "tests.scan_cases",
    "tests.vocab_cases",
    "tests.vocab_layouts",
    "tests.decoders",
    "tests.rank_pool",
]
_groups: dict = {}


def group(size: int):
    """The group of so many ranks that this one is in, or None: 1 is rank 0, 2 are ranks 2 and 3, 4 are all."""
    return _groups[size]


def fresh_group(ranks: list[int]):
    """A group that a test may break; every rank calls this."""
    return dist.new_group(ranks, timeout=timedelta(seconds=PATIENCE))


def work(rank: int, meeting: str, pipe) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=SIZE, timeout=patience)
    for size, ranks in ((1, [0]), (2, [2, 3]), (SIZE, list(range(SIZE)))):
        made = dist.new_group(ranks, timeout=patience)
        _groups[size] = made if rank in ranks else None
    first = {None: (), SIZE: (dist.group.WORLD,), 2: (dist.new_group([0, 1], timeout=patience),)}
    while True:
        try:
            function, args, size = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*first[size], *args)
        except Exception as error:
            answer = False, (type(error).__name__, str(error), traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


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
    """The processes. One imports everything and the rest are its forks, which takes a few seconds of one core."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, f"{self.folder.name}/meeting", theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def outcomes(self, function, *args, size: int | None = None) -> list[tuple]:
        """(True, what ``run`` says of a rank), or (False, (the name of an error, its message, its traceback))."""
        message, pipes = pickle.dumps((function, args, size)), self.pipes[:size]
        for pipe in pipes:
            pipe.send_bytes(message)
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(2 * PATIENCE), f"rank {rank} does not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        return answers

    def run(self, function, *args, size: int | None = None) -> list:
        """What ``function(*args)`` gives on each rank; an error of one is an error of the test.

        With ``size`` it is the first 2 or 4 ranks that run ``function(group, *args)``, the group being theirs.
        """
        answers = self.outcomes(function, *args, size=size)
        wrong = [f"rank {rank}: {said[2]}" for rank, (fine, said) in enumerate(answers) if not fine]
        assert not wrong, "\n".join(wrong)
        return [said for _, said in answers]

    def close(self) -> None:
        """End them."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
