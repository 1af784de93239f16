"""A library's functions stock beside the same names patched: values, gradients, time and memory, on seeded inputs.

Each arm is a fresh process, asked for one call at a time; so a patch is what it is in training, with its dispatch and
its way back to the original. What a patch leaves alone by choice is compared with rlfast's function of that name.
"""

from __future__ import annotations

import importlib
import logging
import operator
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlfast.demo.settings import DemoError
from rlfast.demo.trainer import ARMS, PeakMemory
from rlfast.demo.workers import Worker

VALUE_TOLERANCE = 1e-5  # of the largest number of the output, or of 1
GRADIENT_TOLERANCE = 2e-5  # of the largest number of the gradient
REPEATS = 5


class Case(NamedTuple):
    """One function with one set of options."""

    module: str  # the library's
    name: str  # in it; dotted for a method, whose ``self`` is given as None
    given: Callable[[torch.Generator], dict]  # its arguments by name
    learns: tuple[str, ...] = ()  # those with a gradient
    made: dict | None = None  # of a class: what it is made with; its calls are compared
    note: str = ""  # the options, in words
    swapped: str = ""  # what a patch replaces of it, if that has another name
    gpu: bool = False  # the library's own runs on a GPU alone
    positional: bool = False  # its arguments have no names

    @property
    def label(self) -> str:
        return f"{self.name} {self.note}".strip()


class Measured(NamedTuple):
    """One case, measured."""

    label: str
    value: float  # largest difference ÷ the largest number
    gradient: float | None
    seconds: tuple[float, float]  # theirs, ours; forward and backward
    ran: str = ""  # what ran in the patched arm, where that is not rlfast's function by the library's name

    @property
    def failures(self) -> list[str]:
        """What is out of tolerance, in words."""
        found = [("values", self.value, VALUE_TOLERANCE), ("gradients", self.gradient, GRADIENT_TOLERANCE)]
        return [
            f"{self.label}: {what} {apart:.2g} apart, allowed {allowed:.0e}"
            for what, apart, allowed in found
            if apart is not None and not apart <= allowed
        ]


class Done(NamedTuple):
    """All cases of a library."""

    measured: list[Measured]
    peak: tuple[int, int]  # bytes resident at most, of either process
    notes: list[str]  # what was not compared, or not as a training run has it


def compare(table: str, progress=lambda _: None, *, threads: int = 0, seed: int = 0) -> Done:
    """Every case of a library.

    Args:
        table: a module with ``CASES``, ``OURS`` (the module that has rlfast's functions under the library's names),
            ``load()``, which imports the library and returns what is to be said of it, and ``patch()``.
        threads: of torch in both arms; 0 is its default.
        seed: of the inputs.

    Raises:
        DemoError: the library cannot be imported, or one of its functions fails.
    """
    cases = importlib.import_module(table).CASES
    here = [(k, case) for k, case in enumerate(cases) if torch.cuda.is_available() or not case.gpu]
    notes = [f"{case.label} is not compared: the library's own needs a GPU" for case in cases if case.gpu]
    workers = {arm: Worker(_serve, table, arm, threads, seed) for arm in ARMS}
    try:
        for arm, worker in workers.items():
            progress(f"{arm}: importing")
            said = worker.receive()
            if isinstance(said, str):
                raise DemoError(said)
        notes = said + (notes if len(here) < len(cases) else [])
        measured = []
        for k, case in here:
            progress(case.label)
            measured.append(_measured(case, [_asked(workers[arm], k) for arm in ARMS], workers, k))
        peak = tuple(_asked(workers[arm], None) for arm in ARMS)
    finally:
        for worker in workers.values():
            worker.close()
    return Done(measured, peak, notes)


def _asked(worker: Worker, *message):
    worker.send(message)
    return worker.receive()


def _measured(case: Case, runs: list[dict], workers: dict[str, Worker], k: int) -> Measured:
    theirs, ours = runs
    if len(theirs["values"]) != len(ours["values"]):
        raise DemoError(f"{case.label}: {len(theirs['values'])} outputs and {len(ours['values'])}")
    value = max((_apart(*x, 1.0) for x in zip(theirs["values"], ours["values"], strict=True)), default=0.0)
    gradient = max((_apart(*x, 0.0) for x in zip(theirs["grads"], ours["grads"], strict=True)), default=None)
    times = {arm: [] for arm in ARMS}
    for _ in range(REPEATS):
        for arm in ARMS:
            times[arm].append(_asked(workers[arm], k, False)["seconds"])
    seconds = tuple(sorted(times[arm])[REPEATS // 2] for arm in ARMS)
    return Measured(case.label, value, gradient, seconds, ours["ran"])


class _Said(logging.Handler):
    """What rlfast logs of functions that run as they are."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record) -> None:
        self.lines.append(record.getMessage())


def _serve(channel, table: str, arm: str, threads: int, seed: int) -> None:
    """Runs in the arm's process: a call for each message (a case's number, whether its tensors are wanted)."""
    if threads:
        torch.set_num_threads(threads)
    library, memory, said = importlib.import_module(table), PeakMemory(), _Said()
    logger = logging.getLogger("rlfast.integrations")
    logger.addHandler(said)
    logger.propagate = False
    try:
        notes = library.load()
    except ImportError as error:
        channel.send(f"{library.LIBRARY} cannot be imported: {error}")
        return
    replaced = library.patch().replaced if arm == "rlfast" else None
    channel.send(notes)
    memory.start()
    while True:
        k, *wanted = channel.recv()
        if k is None:
            memory.stop()
            channel.send(memory.bytes)
            continue
        case, before = library.CASES[k], len(said.lines)
        function, ran = _function(case, library.OURS, replaced)
        values, grads, seconds = _run(case, function, seed)
        if wanted:
            channel.send({"seconds": seconds})
        else:
            ran = "; ".join([ran, *said.lines[before:]]).strip("; ")
            channel.send({"values": _arrays(values), "grads": _arrays(grads), "seconds": seconds, "ran": ran})


def _function(case: Case, ours: str, replaced: tuple[str, ...] | None):
    """(what an arm calls, what there is to be said of it)."""
    place, ran = case.module, ""
    name = f"{place}.{case.swapped or case.name}"
    if replaced is not None and not any(x == name or x.startswith(name + ".") for x in replaced):
        place, ran = ours, f"{ours}.{case.name}, since a patch leaves the library's as it is"
    found = operator.attrgetter(case.name)(importlib.import_module(place))
    return (found if case.made is None else found(**case.made)), ran


def _run(case: Case, function, seed: int = 0) -> tuple[list, list, float]:
    """(outputs, gradients of Σ output · a fixed draw, seconds)."""
    given = case.given(torch.Generator().manual_seed(seed))
    if case.gpu:
        given = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in given.items()}
    leaves = [given[name].requires_grad_() for name in case.learns]
    given = {k: x * 1 if k in case.learns else x for k, x in given.items()}  # some functions write into what they get
    start = time.perf_counter()
    outputs = _tensors(function(*given.values()) if case.positional else function(**given))
    differentiable = [x for x in outputs if x.requires_grad]
    grads = []
    if leaves:
        draw = torch.Generator().manual_seed(seed + 1)
        pulls = [torch.rand(x.shape, generator=draw).to(x) + 0.5 for x in differentiable]
        grads = list(torch.autograd.grad(differentiable, leaves, pulls))
    if case.gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return [x.detach() for x in outputs], grads, seconds


def _tensors(out) -> list[torch.Tensor]:
    """The numbers of a result: a tensor, a float, a dict of metrics, None, or several of those."""
    if out is None:
        return []
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        return [x for key in sorted(out) for x in _tensors(out[key])]
    if isinstance(out, list | tuple):
        return [x for one in out for x in _tensors(one)]
    return [torch.tensor(float(out))]


def _arrays(tensors) -> list:
    """In NumPy, which goes through a pipe as it is."""
    return [x.as_subclass(torch.Tensor).double().cpu().numpy() for x in tensors]


def _apart(theirs, ours, least: float) -> float:
    if theirs.shape != ours.shape:
        return float("nan")
    if not ours.size:
        return 0.0
    size = max(float(abs(theirs).max()), least)
    return float(abs(ours - theirs).max()) / (size or 1.0)
