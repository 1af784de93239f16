"""Process groups, and what ranks tell each other over them, in the order of the ranks whatever the backend."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import torch.distributed as dist

from rlfast import validate

_DTYPES = (*validate.FLOATS, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
_DIMS = 8
FLAGS = ("False", "True")


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


class Said(NamedTuple):
    """What of a call is to be the same on all ranks."""

    words: dict[str, str]  # by the name of what they are about
    known: tuple[str, ...]  # all words that there are
    most: int = 0  # numbers to send, so that calls that say less are as long

    def numbers(self) -> list[int]:
        found = [self.known.index(word) for word in self.words.values()]
        return found + [0] * (self.most - len(found))


def needs_gradient(**named) -> dict[str, str]:
    """What a call says of its inputs: the backward has collectives of its own."""
    needs = {k: torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.requires_grad for k, x in named.items()}
    return {f"{name}.requires_grad": str(x) for name, x in needs.items()}


def _by_rank(found, ranks: Ranks) -> str:
    return ", ".join(f"{x} on {ranks.name(rank)}" for rank, x in enumerate(found))


def the_same(name: str, found: list, ranks: Ranks) -> None:
    """An error that names the ranks if what they have is not the same."""
    if len({*found}) > 1:
        validate.fail(name, "the same on all ranks", _by_rank(found, ranks))


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


def failed(ranks, what: str) -> RuntimeError:
    """What a rank says whose exchange with ``ranks``, as the default group numbers them, did not come about."""
    me = dist.get_rank()
    others = [r for r in ranks if r != me]
    return RuntimeError(
        f"process_group: rank {me} waited in vain for ranks {others} with {what}: "
        "one of them has raised, is gone, or has tensors of another shape"
    )


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


def gathered_alike(x: torch.Tensor, ranks: Ranks, what: str) -> torch.Tensor:
    """``gathered`` of a vector that needs a gradient on all ranks or on none, as its backward is a collective too.

    That is one number more, where values may be looked at; a ValueError on every rank if it is not so.
    """
    if not validate.looked_at(x):
        return gathered(x, ranks, what)
    every = gathered(torch.cat((x, torch.full_like(x[:1], float(x.requires_grad)))), ranks, what)
    the_same(f"{what}, requires_grad", [FLAGS[int(flag)] for flag in every[:, -1].tolist()], ranks)
    return every[:, :-1]


def summed(x: torch.Tensor, ranks: Ranks, what: str) -> torch.Tensor:
    """Σ over the ranks in their order, with the same bits on each of them; x is small, and has no gradient."""
    return _Gathered.apply(x.detach(), ranks, what).sum(0)


def gathered_objects(x, ranks: Ranks, what: str) -> list:
    """Any object of every rank, pickled; the host waits for it."""
    every = [None] * ranks.size
    with together(what, ranks):
        dist.all_gather_object(every, x, group=ranks.group)
    return every


class _Rows(torch.autograd.Function):
    """Rows of every rank, one rank's after the other's."""

    @staticmethod
    def forward(ctx, x, ranks: Ranks, counts: list[int], what: str):
        ctx.ranks, ctx.counts, ctx.what = ranks, counts, what
        if not sum(counts):
            return x.clone()
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        every = _Gathered.apply(padded, ranks, what)
        return torch.cat([part[:n] for part, n in zip(every, counts, strict=True)])

    @staticmethod
    def backward(ctx, g):
        total = g.contiguous().clone()
        if total.numel():
            with together(f"{ctx.what}, backward", ctx.ranks):
                dist.all_reduce(total, group=ctx.ranks.group)
        return total[own(ctx.ranks, ctx.counts)], None, None, None


def own(ranks: Ranks, counts: list[int]) -> slice:
    """Which of all rows are this rank's."""
    start = sum(counts[: ranks.rank])
    return slice(start, start + counts[ranks.rank])


def _described(x) -> list[int]:
    """A tensor's dtype and shape, as ints; None is −1."""
    said = [-1] if x is None else [_DTYPES.index(x.dtype), x.dim(), *x.shape]
    return said + [0] * (2 + _DIMS - len(said))


def _said(one: list[int]) -> str:
    dtype, dim, *shape = one
    return "None" if dtype < 0 else f"{tuple(shape[:dim])} {str(_DTYPES[dtype]).removeprefix('torch.')}"


def counts_of(named: dict, ranks: Ranks, rows: bool = True, said: Said | None = None) -> list[int]:
    """How many rows each rank has; the host waits for it.

    Args:
        named: tensors by their names, or None; they have one number of rows.
        ranks: of the group.
        rows: whether ranks may have unequally many.
        said: what is to be the same on all ranks besides.

    Raises:
        ValueError: the ranks' dtypes or shapes, or what they say, differ; the message names the argument and the ranks.
            On every rank.
    """
    device = next(x.device for x in named.values() if x is not None)
    numbers = [number for x in named.values() for number in _described(x)] + ([] if said is None else said.numbers())
    every = gathered(torch.tensor(numbers, dtype=torch.int64, device=device), ranks, ", ".join(named)).tolist()
    width = 2 + _DIMS
    for i, name in enumerate({} if said is None else said.words):
        the_same(name, [said.known[one[len(named) * width + i]] for one in every], ranks)
    for i, name in enumerate(named):
        found = [one[i * width : (i + 1) * width] for one in every]
        if len({(*one[:2], *one[2 + rows :]) for one in found}) > 1:
            wanted = "one dtype, and one shape" + (" beyond the rows" if rows else "") + ", on all ranks"
            validate.fail(name, wanted, _by_rank(map(_said, found), ranks))
    return [next(one[at + 2] for at in range(0, len(named) * width, width) if one[at] >= 0) for one in every]


def gathered_batch(named: dict, ranks: Ranks, recorded: bool = False) -> tuple[dict, slice]:
    """Every tensor of all ranks along its first dimension, and where this rank's rows stand; differentiable.

    Args:
        named: tensors by their names, or None; a rank's have as many rows as the first, ranks may have unequally many.
        ranks: of the group.
        recorded: a backward may follow, so what needs a gradient has to on every rank.

    Raises:
        ValueError: as in ``counts_of``.
    """
    first = next(iter(named))
    for name, x in named.items():
        if x is not None and (x.dim() == 0 or x.shape[0] != named[first].shape[0]):
            validate.fail(name, f"{named[first].shape[0]} rows like {first}", validate.shape(x))
    counts = counts_of(named, ranks, said=Said(needs_gradient(**named), FLAGS) if recorded else None)
    whole = {name: x if x is None else _Rows.apply(x, ranks, counts, name) for name, x in named.items()}
    return whole, own(ranks, counts)


def alike(named: dict, ranks: Ranks, said: Said | None = None) -> None:
    """One shape on every rank, and one of what they say, where values may be looked at: elsewhere the host would have
    to wait for it.

    Raises:
        ValueError: it is not so; the message names the argument and the ranks. On every rank.
    """
    if validate.looked_at(next(x for x in named.values() if x is not None)):
        counts_of(named, ranks, rows=False, said=said)
