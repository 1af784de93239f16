"""Processes that stay: four ranks over gloo, which run a function of a test module each and send back what it gives."""

from __future__ import annotations

import multiprocessing
import pickle
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

SIZE = 4
PATIENCE = 30.0
_groups: dict = {}


def group(size: int):
    """The group of so many ranks that this one is in, or None: 1 is rank 0, 2 are ranks 2 and 3, 4 are all."""
    return _groups[size]


def fresh_group(ranks: list[int]):
    """A group that a test may break; every rank calls this."""
    return dist.new_group(ranks, timeout=timedelta(seconds=PATIENCE))


def work(rank: int, folder: str, pipe) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE, timeout=patience
    )
    for size, ranks in ((1, [0]), (2, [2, 3]), (SIZE, list(range(SIZE)))):
        made = dist.new_group(ranks, timeout=patience)
        _groups[size] = made if rank in ranks else None
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(answer))
            if "KeyboardInterrupt" in answer[1]:
                raise
        else:
            pipe.send_bytes(pickle.dumps(answer))


class Ranks:
    """The processes. One imports torch and the rest are its forks, which takes a few seconds of one core."""

    def __init__(self, folder, preload: list[str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(preload)
        self.pipes, self.processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, str(folder), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function, *args) -> list:
        """What the function gives on each rank; an error of one is an error of the test."""
        message = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(message)
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(2 * PATIENCE), f"rank {rank} does not answer"
            answers.append(pickle.loads(pipe.recv_bytes()))
        wrong = [f"rank {rank}: {said}" for rank, (fine, said) in enumerate(answers) if not fine]
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
