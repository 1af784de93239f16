"""A head that is sharded over ranks with tokens of their own, as FSDP2 and ZeRO-3 have it: gathered for a use.

The gather is a ``DTensor``'s redistribution, and its backward the sum over every dimension of its mesh, in the layout
of the parameter.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from rlfast import validate
from rlfast.distributed.ranks import failed


@dataclass(frozen=True)
class Gathered:
    """``process_group=Gathered()``: the weight is a ``DTensor`` sharded over ranks that have different tokens.

    Every rank of its mesh counts, those along which it is replicated (HSDP) too.

    Args:
        mean: the gradient is the mean over the ranks, as FSDP2 has it; False: the sum.
        dtype: that the weight is gathered in, as FSDP2's ``param_dtype``; None: its own. Its gradient is added up in
            the weight's own.

    Example:
        >>> out = loss.linear(hidden, model.lm_head.weight, targets, adv=adv, process_group=Gathered())
    """

    mean: bool = True
    dtype: torch.dtype | None = None

    def __post_init__(self):
        validate.flag("mean", self.mean)
        if self.dtype not in (None, *validate.FLOATS):
            validate.fail("dtype", f"None or one of {validate.FLOATS}", repr(self.dtype))


@dataclass(frozen=True)
class Partitioned:
    """``process_group=Partitioned(gather)``: the weight is whole only within ``gather()``, as under ZeRO-3.

    The call is made within it, and so is what of its backward reads the weight; between the two, and afterwards, the
    weight is the caller's again. A fused loss reads it in its forward alone, unless its logits have to be made again.
    A parameter to which ``backward()`` adds has to be whole then too, which is the caller's to see to: ``around()``.

    Args:
        gather: makes a context manager, a new one for each use.

    Example:
        >>> whole = rlfast.distributed.Partitioned(lambda: deepspeed.zero.GatheredParameters([head.weight]))
        >>> out = rlfast.linear_token_logps(hidden, head.weight, targets, process_group=whole)
        >>> with whole.around():
        ...     out.logp.sum().backward()
    """

    gather: Callable
    _within: list = field(default_factory=list, init=False, repr=False, compare=False)

    @contextlib.contextmanager
    def around(self):
        """The context; within itself it is not entered again."""
        if self._within:
            yield
            return
        with self.gather():
            self._within.append(True)
            try:
                yield
            finally:
                self._within.pop()

    def __post_init__(self):
        if not callable(self.gather):
            validate.fail("gather", "a function that makes a context manager", type(self.gather).__name__, TypeError)


def context_of(process_group):
    """What a call runs within: the context of a ``Partitioned``."""
    return process_group.around() if isinstance(process_group, Partitioned) else contextlib.nullcontext()


def within(function: Callable) -> Callable:
    """A function whose ``process_group`` may be a ``Partitioned``, within whose context it then runs."""

    @functools.wraps(function)
    def call(*args, process_group=None, **options):
        with context_of(process_group):
            return function(*args, process_group=process_group, **options)

    return call


class Gathering:
    """A gather that is under way."""

    def __init__(self, weight, mean: bool, dtype: torch.dtype | None, name: str):
        self._weight, self._mean, self._name = weight, mean, name
        with together(weight.device_mesh, f"the gather of {name}"):
            own = weight.detach() if dtype is None else weight.detach().to(dtype)
            self._begun = _moved(own, [_placements().Replicate()] * own.device_mesh.ndim)

    def tensor(self) -> torch.Tensor:
        """The whole tensor, as soon as it is there."""
        return _Waited.apply(self._weight, self._begun, self._mean, self._name)


def _moved(x, placements):
    """What this rank has of it under other placements, perhaps not there yet."""
    return x.redistribute(placements=placements, async_op=True).to_local()


def _there(begun) -> torch.Tensor:
    return (begun.wait() if hasattr(begun, "wait") else begun).detach()


def _placements():
    return sys.modules["torch.distributed.tensor"]  # who has a DTensor has imported it; it takes half a second


@contextlib.contextmanager
def together(mesh, what: str):
    """A collective over a mesh, whose failure names the ranks."""
    try:
        yield
    except RuntimeError as error:
        raise failed(mesh.mesh.flatten().tolist(), what) from error


class _Waited(torch.autograd.Function):
    """The tensor. Its gradient is what all ranks of the mesh give, in the layout of the parameter."""

    @staticmethod
    def forward(ctx, weight, begun, mean: bool, name: str):
        ctx.spec, ctx.dtype, ctx.mean, ctx.name = (weight.device_mesh, weight.placements), weight.dtype, mean, name
        with together(weight.device_mesh, f"the gather of {name}"):
            return _there(begun)

    @staticmethod
    def backward(ctx, g):
        (mesh, placements), module = ctx.spec, _placements()
        g = g.to(ctx.dtype)
        g = g / mesh.size() if ctx.mean else g
        with together(mesh, f"the gradient of {ctx.name}"):
            parts = module.DTensor.from_local(g, mesh, [module.Partial("sum")] * mesh.ndim, run_check=False)
            own = _there(_moved(parts, placements))
        like = {"shape": parts.shape, "stride": parts.stride()}
        return module.DTensor.from_local(own, mesh, placements, run_check=False, **like), None, None, None


def is_dtensor(x) -> bool:
    """Whether it is a ``DTensor``."""
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def laid_out_like(parameter, local):
    """A ``DTensor`` of which this rank has that part, in the layout of a parameter."""
    like = {"shape": parameter.shape, "stride": parameter.stride()}
    return _placements().DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, **like)


def placement(x, name: str):
    """(mesh, number of its dimension, dimension of x) of a ``DTensor`` sharded once; None: no DTensor."""
    if not is_dtensor(x):
        return None
    shards = [(at, p.dim) for at, p in enumerate(x.placements) if p.is_shard()]
    if len(shards) != 1 or any(p.is_partial() for p in x.placements):
        validate.fail(name, "a DTensor sharded on one dimension of its mesh, replicated on the others", x.placements)
    return x.device_mesh, *shards[0]


def gathered(weight, *, mean: bool = True, dtype: torch.dtype | None = None, name: str = "weight") -> Gathering:
    """Begin to gather a sharded weight; ``.tensor()`` waits for it.

    Begun before the body of the model runs, the gather is over when the head is reached. ``process_group=Gathered()``
    begins it with the call, and waits.

    Args:
        weight: a ``DTensor``, as ``fully_shard`` leaves a parameter, of a mesh of any number of dimensions. Its
            gradient has its layout and its dtype.
        mean, dtype: as in ``Gathered``.
        name: of the argument, for errors.

    Returns:
        Gathering.

    Raises:
        ValueError: the weight is no ``DTensor``. RuntimeError: another rank has failed; it names those it waited for.
    """
    if not is_dtensor(weight) or any(p.is_partial() for p in weight.placements):
        came = weight.placements if is_dtensor(weight) else type(weight).__name__
        validate.fail(name, "a DTensor, sharded or replicated, with process_group=Gathered()", came)
    Gathered(mean, dtype)
    return Gathering(weight, mean, dtype, name)
