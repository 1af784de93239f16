"""A head that is sharded over ranks with tokens of their own, as FSDP2 and ZeRO-3 have it: gathered for a use.

The gather is a ``DTensor``'s redistribution, and its backward a reduce-scatter into the layout of the parameter.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlfast import validate


@dataclass(frozen=True)
class Gathered:
    """``process_group=Gathered()``: the weight is a ``DTensor`` sharded over ranks that have different tokens.

    Args:
        mean: the gradient is the mean over the ranks, as FSDP2 has it; False: the sum.

    Example:
        >>> out = loss.linear(hidden, model.lm_head.weight, targets, adv=adv, process_group=Gathered())
    """

    mean: bool = True

    def __post_init__(self):
        validate.flag("mean", self.mean)


@dataclass(frozen=True)
class Partitioned:
    """``process_group=Partitioned(gather)``: the weight is whole only within ``gather()``, as under ZeRO-3.

    The call is made within it, and so is what of its backward reads the weight; between the two, and afterwards, the
    weight is the caller's again. A fused loss reads it in its forward alone, unless its logits have to be made again.

    Args:
        gather: makes a context manager, a new one for each use.

    Example:
        >>> whole = rlfast.distributed.Partitioned(lambda: deepspeed.zero.GatheredParameters([head.weight]))
        >>> out = rlfast.linear_token_logps(hidden, head.weight, targets, process_group=whole)
    """

    gather: Callable

    def __post_init__(self):
        if not callable(self.gather):
            validate.fail("gather", "a function that makes a context manager", type(self.gather).__name__, TypeError)


def within(function: Callable) -> Callable:
    """A function whose ``process_group`` may be a ``Partitioned``, within whose context it then runs."""

    @functools.wraps(function)
    def call(*args, process_group=None, **options):
        if not isinstance(process_group, Partitioned):
            return function(*args, process_group=process_group, **options)
        with process_group.gather():
            return function(*args, process_group=process_group, **options)

    return call


class Gathering:
    """A gather that is under way."""

    def __init__(self, begun, ranks: int):
        self._begun, self._ranks = begun, ranks

    def tensor(self) -> torch.Tensor:
        """The whole tensor, as soon as it is there."""
        return _Waited.apply(self._begun, self._ranks)


class _Waited(torch.autograd.Function):
    """The tensor; its gradient is divided by a number, so that the sum over so many ranks is their mean."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.wait() if hasattr(x, "wait") else x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g if ctx.ranks == 1 else g / ctx.ranks, None


def placement(x):
    """(mesh, number of its dimension, dimension of x) of a ``DTensor`` sharded once; None: no DTensor."""
    if type(x) in (torch.Tensor, torch.nn.Parameter):
        return None
    module = sys.modules.get("torch.distributed.tensor")  # who has a DTensor has imported it; it takes half a second
    if module is None or not isinstance(x, module.DTensor):
        return None
    shards = [(at, p.dim) for at, p in enumerate(x.placements) if p.is_shard()]
    if len(shards) != 1 or any(p.is_partial() for p in x.placements):
        validate.fail(
            "weight", "a DTensor sharded on one dimension of its mesh, replicated on the others", x.placements
        )
    return x.device_mesh, *shards[0]


def gathered(weight, *, mean: bool = True, name: str = "weight") -> Gathering:
    """Begin to gather a sharded weight; ``.tensor()`` waits for it.

    Begun before the body of the model runs, the gather is over when the head is reached. ``process_group=Gathered()``
    begins it with the call, and waits.

    Args:
        weight: a ``DTensor``, as ``fully_shard`` leaves a parameter. Its gradient has its layout.
        mean: as in ``Gathered``.
        name: of the argument, for errors.

    Returns:
        Gathering.

    Raises:
        ValueError: the weight is no ``DTensor``.
    """
    if placement(weight) is None:
        validate.fail(name, "a DTensor, with process_group=Gathered()", type(weight).__name__)
    from torch.distributed.tensor import Partial, Replicate

    mesh, at, _ = placement(weight)
    everywhere = [Replicate()] * mesh.ndim
    by = [Partial("sum") if i == at else Replicate() for i in range(mesh.ndim)]
    local = weight.redistribute(placements=everywhere, async_op=True).to_local(grad_placements=by)
    return Gathering(local, mesh.size(at) if mean else 1)
