"""A library's functions beside ours of the same name and signature: values, gradients and time, on seeded inputs."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from rlfast.demo.settings import DemoError

VALUE_TOLERANCE = 1e-5  # of the largest number of the output, or of 1
GRADIENT_TOLERANCE = 2e-5  # of the largest number of the gradient
REPEATS = 5


class Case(NamedTuple):
    """One function with one set of options."""

    module: str  # the library's
    name: str
    given: Callable[[torch.Generator], dict]  # its arguments by name
    learns: tuple[str, ...] = ()  # those with a gradient
    made: dict | None = None  # of a class: what it is made with; its calls are compared
    note: str = ""  # the options, in words

    @property
    def label(self) -> str:
        return f"{self.name} {self.note}".strip()


class Measured(NamedTuple):
    """One case, measured."""

    label: str
    value: float  # largest difference ÷ the largest number
    gradient: float | None
    seconds: tuple[float, float]  # theirs, ours; forward and backward

    @property
    def failures(self) -> list[str]:
        """What is out of tolerance, in words."""
        found = [("values", self.value, VALUE_TOLERANCE), ("gradients", self.gradient, GRADIENT_TOLERANCE)]
        return [
            f"{self.label}: {what} {apart:.2g} apart, allowed {allowed:.0e}"
            for what, apart, allowed in found
            if apart is not None and not apart <= allowed
        ]


def compare(cases: tuple[Case, ...], ours: str, progress=lambda _: None) -> list[Measured]:
    """Every case of a library; ``ours`` is the module that has its functions under the same names.

    Raises:
        DemoError: the library, or the module, cannot be imported.
    """
    measured = []
    for case in cases:
        progress(case.label)
        both = []
        for module in (case.module, ours):
            try:
                found = getattr(importlib.import_module(module), case.name)
            except ImportError as error:
                raise DemoError(f"{module} cannot be imported: {error}") from None
            both.append(found if case.made is None else found(**case.made))
        measured.append(_measured(case, *both))
    return measured


def _measured(case: Case, theirs, ours) -> Measured:
    runs = [_run(case, f) for f in (theirs, ours)]
    (values, grads, _), (other_values, other_grads, _) = runs
    if len(values) != len(other_values):
        raise DemoError(f"{case.label}: {len(values)} outputs and {len(other_values)}")
    value = max((_apart(a, b, 1.0) for a, b in zip(values, other_values, strict=True)), default=0.0)
    gradient = max((_apart(a, b, 0.0) for a, b in zip(grads, other_grads, strict=True)), default=None)
    times = [[], []]
    for _ in range(REPEATS):
        for kept, f in zip(times, (theirs, ours), strict=True):
            kept.append(_run(case, f)[2])
    return Measured(case.label, value, gradient, tuple(sorted(t)[REPEATS // 2] for t in times))


def _run(case: Case, function) -> tuple[list, list, float]:
    """(outputs, gradients of Σ output · a fixed draw, seconds)."""
    given = case.given(torch.Generator().manual_seed(0))
    leaves = [given[name].requires_grad_() for name in case.learns]
    given = {k: x * 1 if k in case.learns else x for k, x in given.items()}  # some functions write into what they get
    start = time.perf_counter()
    outputs = _tensors(function(**given))
    differentiable = [x for x in outputs if x.requires_grad]
    grads = []
    if leaves:
        draw = torch.Generator().manual_seed(1)
        pulls = [torch.rand(x.shape, generator=draw).to(x.dtype) + 0.5 for x in differentiable]
        grads = list(torch.autograd.grad(differentiable, leaves, pulls))
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


def _apart(theirs, ours, least: float) -> float:
    if theirs.shape != ours.shape:
        return float("nan")
    theirs, ours = theirs.double(), ours.double()
    size = max(theirs.abs().max().item() if theirs.numel() else 0.0, least)
    return ((ours - theirs).abs().max().item() / size if size else ours.abs().max().item()) if ours.numel() else 0.0
