"""Process groups, and what ranks tell each other over them, in the order of the ranks whatever the backend."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from rlfast import validate

_DTYPES = (*validate.FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
_DIMS = 8


class Ranks(NamedTuple):
    """A process group as a rank of it sees it."""

    group: object
    rank: int  # within the group
    size: int

    def name(self, rank: int) -> str:
        """``rank 3``: what torchrun calls a rank of this group."""
        return f"rank {dist.get_global_rank(self.group, rank)}"


def ranks_of(process_group, name: str = "process_group") -> Ranks | None:
    """The ranks of a ``ProcessGroup`` or of a ``DeviceMesh`` of one dimension; None stays None.

    Raises:
        TypeError, ValueError: it is neither, or this process is not in it.
    """
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        validate.fail(name, "None: torch.distributed is not initialised", type(process_group).__name__)
    group = process_group
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            wanted = 'a DeviceMesh of one dimension, such as mesh["dp"]'
            validate.fail(name, wanted, f"one of {group.ndim}: {group.mesh_dim_names or validate.shape(group.mesh)}")
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        validate.fail(name, "a group that this process is in", f"one without {dist.get_rank()}")
    if not isinstance(group, dist.ProcessGroup):
        validate.fail(name, "a ProcessGroup or a DeviceMesh", type(group).__name__, TypeError)
    rank = dist.get_rank(group)
    if rank < 0:
        others = dist.get_process_group_ranks(group)
        validate.fail(name, "a group that this process is in", f"ranks {others} without {dist.get_rank()}")
    return Ranks(group, rank, dist.get_world_size(group))


@contextlib.contextmanager
def together(what: str, ranks: Ranks):
    """A collective, whose failure says what it was and who waited; the timeout is the group's own."""
    try:
        yield
    except RuntimeError as error:
        everyone = dist.get_process_group_ranks(ranks.group)
        raise RuntimeError(
            f"{what}: {ranks.name(ranks.rank)} did not get what it waited for of ranks {everyone}: one of them has "
            f"failed, or is somewhere else ({error})"
        ) from error


class _Gathered(torch.autograd.Function):
    """[ranks, …] of one shape everywhere. The gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, x, ranks: Ranks, what: str):
        ctx.ranks, ctx.what = ranks, what
        x = x.contiguous()
        out = torch.empty((ranks.size, *x.shape), dtype=x.dtype, device=x.device)
        with together(what, ranks):
            dist.all_gather(list(out.unbind(0)), x, group=ranks.group)
        return out

    @staticmethod
    def backward(ctx, g):
        return summed(g, ctx.ranks, f"{ctx.what}, backward")[ctx.ranks.rank], None, None


def gathered(x: torch.Tensor, ranks: Ranks, what: str) -> torch.Tensor:
    """[ranks, …]: x of every rank, which has one shape on all of them; differentiable."""
    return _Gathered.apply(x, ranks, what)


def summed(x: torch.Tensor, ranks: Ranks, what: str) -> torch.Tensor:
    """Σ over the ranks in their order, with the same bits on each of them; x is small, and has no gradient."""
    return _Gathered.apply(x.detach(), ranks, what).sum(0)


class _Rows(torch.autograd.Function):
    """Rows of every rank, one rank's after the other's."""

    @staticmethod
    def forward(ctx, x, ranks: Ranks, counts: list[int], what: str):
        ctx.ranks, ctx.counts, ctx.what = ranks, counts, what
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        every = _Gathered.apply(padded, ranks, what)
        return torch.cat([part[:n] for part, n in zip(every, counts, strict=True)])

    @staticmethod
    def backward(ctx, g):
        total = g.contiguous().clone()
        with together(f"{ctx.what}, backward", ctx.ranks):
            dist.all_reduce(total, group=ctx.ranks.group)
        return total[own(ctx.ranks, ctx.counts)], None, None, None


def own(ranks: Ranks, counts: list[int]) -> slice:
    """Which of all rows are this rank's."""
    start = sum(counts[: ranks.rank])
    return slice(start, start + counts[ranks.rank])


def counts_of(name: str, x: torch.Tensor, ranks: Ranks) -> list[int]:
    """How many rows each rank has; the host waits for it.

    Raises:
        ValueError: the ranks' dtypes, or shapes beyond the rows, differ; the message names the ranks. On every rank.
    """
    said = [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    said = torch.tensor(said + [0] * (2 + _DIMS - len(said)), dtype=torch.int64, device=x.device)
    found = gathered(said, ranks, name).tolist()
    if len({(dtype, dim, *shape[1:]) for dtype, dim, *shape in found}) > 1:
        each = [
            f"{tuple(shape[:dim])} {str(_DTYPES[dtype]).removeprefix('torch.')} on {ranks.name(rank)}"
            for rank, (dtype, dim, *shape) in enumerate(found)
        ]
        validate.fail(name, "one dtype, and one shape beyond the first dimension, on all ranks", ", ".join(each))
    return [row[2] for row in found]


def gathered_rows(name: str, x: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, slice]:
    """(x of every rank along the first dimension, where its own stand); differentiable, as many rows as a rank has."""
    counts = counts_of(name, x, ranks)
    return _Rows.apply(x, ranks, counts, name), own(ranks, counts)


def alike(name: str, x: torch.Tensor, ranks: Ranks) -> None:
    """One shape on every rank, where values may be looked at: elsewhere the host would have to wait for it.

    Raises:
        ValueError: it is not so; the message names the ranks. On every rank.
    """
    if not validate.looked_at(x):
        return
    counts = counts_of(name, x, ranks)
    if len({*counts}) > 1:
        each = [f"{n} on {ranks.name(rank)}" for rank, n in enumerate(counts)]
        validate.fail(name, "as many rows on all ranks", ", ".join(each))
