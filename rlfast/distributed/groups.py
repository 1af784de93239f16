"""How a vocabulary is shared out over the ranks of a group, and that they agree on it.

Before the first exchange of a kind the ranks show each other what they have: an all-gather of 25 integers, whose answer
is kept for as long as the group lives. On a CPU every call begins with two, a checksum of what has to be alike and
whether the answer is there: collectives of different sizes would end the processes. On a GPU looking would synchronise,
so later calls cost a look-up, and what differs then is a timeout. A rank cannot see there that another's columns have
changed: the answer belongs to the weight that it was given for, and logits say their ``vocab_size``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from rlfast import backends, validate
from rlfast.distributed.gather import Gathered, Partitioned, gathered, is_dtensor, placement
from rlfast.distributed.ranks import failed, ranks_of
from rlfast.ops.linear_token_logps import NAME as HEAD
from rlfast.ops.token_logps import NAME as LOGITS

FACTS = 25  # integers of a handshake
COUNTED = "tokens that count"  # the fact that, as the number of rows, may be another in every call


@dataclass(frozen=True)
class VocabParallel:
    """A head whose rows are shared out over the ranks of a group, in their order; every rank has all tokens.

    Args:
        group: a ``torch.distributed.ProcessGroup``, or a ``DeviceMesh`` of one dimension. None: the mesh of the weight,
            a ``DTensor``.
        vocab_size: columns from there on are padding: no token of them is possible, and they get a gradient of 0.
            None: all are tokens.
        width: columns of a piece; None: a rank's shard is one. A record goes over the wire a piece, so that the bits of
            what comes back are the same for every number of ranks whose shards begin at multiples of ``width``.
        sum_hidden: whether ∂hidden is the sum over the ranks; False leaves each rank what its own columns add to it, as
            Megatron's layers want it, whose gather of the hidden states sums in its backward.
        timeout: seconds until a rank that waits for others raises. None: the group's own.

    Example:
        >>> share = rlfast.distributed.VocabParallel(tp_group, vocab_size=151_669)
        >>> out = rlfast.linear_token_logps(hidden, head_shard, targets, process_group=share)
    """

    group: object = None
    vocab_size: int | None = None
    width: int | None = None
    sum_hidden: bool = True
    timeout: float | None = None

    def __post_init__(self):
        for name, least in (("vocab_size", 1), ("width", 1)):
            x = getattr(self, name)
            if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < least):
                validate.fail(name, f"None or an int ≥ {least}", repr(x))
        validate.flag("sum_hidden", self.sum_hidden)
        if self.timeout is not None:
            validate.positive("timeout", self.timeout)


class Shards(NamedTuple):
    """A vocabulary in pieces, in the order of its columns."""

    group: object
    ranks: tuple[int, ...]  # of the group, as the default group numbers them
    timeout: timedelta | None
    vocab: int
    widest: int  # columns that memory is reckoned by: of the largest shard; with a width of all, for the same chunks
    spans: tuple[tuple[int, int], ...]  # global columns [first, last) of each piece, of rank 0 first
    counts: tuple[int, ...]  # pieces of each rank
    mine: tuple[slice, ...]  # this rank's pieces among its own columns
    first: int  # number of the first of them
    sum_hidden: bool = True
    around: Callable = nullcontext  # the context in which a backward finds the weight

    def own(self) -> list[tuple[slice, tuple[int, int]]]:
        """This rank's pieces: (its own columns, the global ones)."""
        return list(zip(self.mine, self.spans[self.first : self.first + len(self.mine)], strict=True))

    def everyones(self, record: torch.Tensor) -> torch.Tensor:
        """Of records [own pieces, …] those of all pieces, in their order."""
        most, size = max(self.counts), len(self.ranks)
        if size == 1:
            return record
        padded = record.new_zeros((most, *record.shape[1:]))
        padded[: record.shape[0]] = record
        out = record.new_empty((size * most, *record.shape[1:]))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        work = gather(out, padded, group=self.group, async_op=True)
        self._wait(work, "the statistics of", record)
        if all(count == most for count in self.counts):
            return out
        return torch.cat([out[r * most : r * most + count] for r, count in enumerate(self.counts)])

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        if len(self.ranks) > 1:
            self._wait(dist.all_reduce(x, group=self.group, async_op=True), "a sum over", x)
        return x

    def _wait(self, work, what: str, x) -> None:
        try:
            if self.timeout is None:
                work.wait()
            else:
                work.wait(self.timeout)
        except RuntimeError as error:
            raise failed(self.ranks, f"{what} {x.shape[-1]} columns of rows {tuple(x.shape)}") from error


@dataclass(frozen=True)
class Share(VocabParallel):
    """A ``VocabParallel`` whose group is known, beside the tensor that it is said of."""

    columns: int = 0  # of all ranks, where a ``DTensor`` says it
    owner: object = field(default=None, compare=False)  # the tensor as it came


def resolved(process_group, weight, dim: int, name: str) -> tuple:
    """(what ``agreed`` takes; None: nothing is shared out, the tensor that this rank computes with).

    Args:
        process_group: as the caller gave it.
        weight: a head, or logits, as it came.
        dim: of the vocabulary.
        name: of the argument ``weight``.
    """
    if isinstance(process_group, Gathered):
        return None, whole(process_group, weight, name)
    there, came = placement(weight, name), weight
    if process_group is None and there is None:
        return None, weight
    if torch.compiler.is_compiling():
        validate.fail("process_group", "None in compiled code", type(process_group).__name__)
    if isinstance(process_group, Shards | Partitioned):
        return process_group, alike(process_group, weight, name, dim)
    said = process_group if isinstance(process_group, VocabParallel) else VocabParallel(process_group)
    group = said.group if said.group is not None or there is None else there[0].get_group(there[1])
    if group is None:
        validate.fail("group", "a group, since the weight is no DTensor", "None")
    group = ranks_of(group).group
    if there is not None:
        weight = shard(weight, dim, name, group)
    columns = 0 if there is None else came.shape[dim]
    options = said.vocab_size, said.width, said.sum_hidden, said.timeout
    return Share(group, *options, columns, came), weight


def whole(process_group: Gathered, x, name: str) -> torch.Tensor:
    """A tensor that is sharded over other tokens, gathered."""
    return gathered(x, mean=process_group.mean, dtype=process_group.dtype, name=name).tensor()


def shard(x, dim: int, name: str, group=None) -> torch.Tensor:
    """This rank's part of a ``DTensor`` whose vocabulary, its dimension ``dim``, is sharded over a group's ranks."""
    mesh, at, where = placement(x, name)
    if where != dim % x.dim():
        validate.fail(name, f"a DTensor sharded on dimension {dim}", f"Shard({where})")
    if group is not None:
        wanted, found = (dist.get_process_group_ranks(g) for g in (group, mesh.get_group(at)))
        if found != wanted:
            validate.fail(name, f"a DTensor sharded over ranks {wanted}, those of process_group", f"ranks {found}")
    return x.to_local()


def local(x, name: str):
    """What this rank computes with of a tensor that every rank has whole."""
    if not is_dtensor(x):
        return x
    if not all(p.is_replicate() for p in x.placements):
        validate.fail(name, "a tensor of this rank's own, or a DTensor that is replicated", x.placements)
    return x.to_local()


def alike(process_group, x, name: str, dim: int = 0):
    """Another tensor with the vocabulary, whose parts lie on the ranks where those of the first do."""
    if not is_dtensor(x):
        return x
    if isinstance(process_group, Gathered):
        return whole(process_group, x, name)
    return shard(x, dim, name, process_group.group if isinstance(process_group, Share | Shards) else None)


def everywhere(process_group, x, name: str):
    """Another parameter of the head, without the vocabulary."""
    gathers = isinstance(process_group, Gathered) and is_dtensor(x)
    return whole(process_group, x, name) if gathers else local(x, name)


_agreed: WeakKeyDictionary = WeakKeyDictionary()  # group → a tensor, or that there is none → {what a rank has: shards}


class _NoOwner:
    """Where an answer is for every tensor."""


_NO_OWNER = _NoOwner()


def _known(share: Share, facts: dict, device) -> dict:
    """What has been agreed on, on a GPU for this weight: all ranks have seen it before, or none has."""
    looks = device.type == "cpu" or len(dist.get_process_group_ranks(share.group)) == 1
    told_apart = looks or share.columns or share.vocab_size is not None
    if not told_apart and facts["op"] == 0:
        validate.fail("vocab_size", "an int for logits on a GPU: VocabParallel(group, vocab_size=)", "None")
    of_group = _agreed.setdefault(share.group, WeakIdKeyDictionary())
    return of_group.setdefault(_NO_OWNER if told_apart else share.owner, {})


def agreed(share: Share | Shards | Partitioned | None, columns: int, facts: dict, rows: int, device) -> Shards | None:
    """The shards, once every rank has shown the same facts.

    Args:
        share: of ``resolved``.
        columns: this rank's, padding among them.
        facts: by name, integers that are to be the same on every rank.
        rows: the number of tokens, which is to be the same too.
        device: of the tensors.
    """
    if share is None or isinstance(share, Shards):
        return share
    if isinstance(share, Partitioned):
        alone = Shards(None, (0,), None, 0, 0, (), (1,), (), 0, True, share.around)
        return cut(alone, [columns], None, None, 0)
    said = {"vocab_size": share.vocab_size or 0, "width": share.width or 0, "sum_hidden": int(share.sum_hidden)}
    facts = said | {"columns": share.columns, "rows": rows} | facts
    known = _known(share, facts, device)
    key = (columns, share.timeout, *(item for item in facts.items() if item[0] not in ("rows", COUNTED)))
    found = known.get(key)
    if found is not None and device.type != "cpu":
        return found
    size = dist.get_world_size(share.group)
    ranks = tuple(dist.get_process_group_ranks(share.group))
    timeout = None if share.timeout is None else timedelta(seconds=share.timeout)
    shards = Shards(share.group, ranks, timeout, 0, 0, (), (1,) * size, (), 0, share.sum_hidden)
    if device.type == "cpu":
        # what a rank knows of the others' columns counts: another head may differ from this one in those alone
        checksum = zlib.crc32(repr((list(facts.items()), found and found.spans)).encode())
        alike = shards.everyones(torch.tensor([[checksum, int(found is None)]])).tolist()
        if found is not None and all(x == [checksum, 0] for x in alike):
            return found
    own = [columns, len(facts), *facts.values()]
    own = torch.tensor(own + [0] * (FACTS - len(own)), dtype=torch.int64, device=device)
    shown = shards.everyones(own.unsqueeze(0)).tolist()
    for at, name in enumerate(facts, 2):
        _same(name, [x[at] for x in shown], ranks)
    columns_of = [x[0] for x in shown]
    known[key] = cut(shards, columns_of, share.vocab_size, share.width, dist.get_rank(share.group))
    return known[key]


def _same(name: str, found: list[int], ranks) -> None:
    if len(set(found)) > 1:
        came = ", ".join(f"{x} on rank {r}" for x, r in zip(found, ranks, strict=True))
        validate.fail("process_group", f"ranks with the same {name.replace('_', ' ')}", came)


def cut(shards: Shards, columns: list[int], vocab_size: int | None, width: int | None, rank: int) -> Shards:
    """Shards of so many columns a rank, in pieces."""
    total = sum(columns)
    vocab = total if vocab_size is None else vocab_size
    if vocab > total:
        came = " + ".join(f"{x} on rank {r}" for x, r in zip(columns, shards.ranks, strict=True))
        validate.fail("process_group", f"shards of at least {vocab} columns, its vocab_size", came)
    spans, counts, mine, first, start = [], [], (), 0, 0
    for r, n in enumerate(columns):
        last = min(start + n, vocab)
        edges = [start] if width is None else [start, *range((start // width + 1) * width, last, width)]
        here = [(a, min(b, last)) for a, b in zip(edges, [*edges[1:], last], strict=True) if a < last]
        here = here or [(min(start, vocab),) * 2]
        if r == rank:
            first, mine = len(spans), tuple(slice(a - start, b - start) if a < b else slice(0, 0) for a, b in here)
        spans, start = spans + here, start + n
        counts.append(len(here))
    return shards._replace(
        vocab=vocab,
        widest=max(columns) if width is None else vocab,
        spans=tuple(spans),
        counts=tuple(counts),
        mine=mine,
        first=first,
    )


def facts_of(x, op: str) -> dict:
    """What the ranks are to have alike: the dtype, and the backend, whose records are its own."""
    backend = backends.select(op, x.device.type, x.dtype, backends.requested())
    if backend == "reference":
        validate.fail("process_group", "None on the reference backend, which is for one process", "a group")
    return {"dtype": validate.FLOATS.index(x.dtype), "backend": backends.NAMES.index(backend)}


def agreed_logits(share: Share | Shards, logits, asked: dict) -> Shards:
    """The shards of logits [*, columns of this rank]; ``asked``: what else is to be alike."""
    facts = facts_of(logits, LOGITS) | {"op": 0, "dimensions": logits.dim()} | asked
    return agreed(share, logits.shape[-1], facts, rows_of(logits.shape[:-1]), logits.device)


def agreed_head(share: Share | Shards | Partitioned, hidden, weight, bias, asked: dict) -> Shards:
    """The shards of a head, of which weight and bias are this rank's rows; ``asked``: what else is to be alike."""
    facts = facts_of(hidden, HEAD) | {"op": 1, "depth": hidden.shape[-1], "bias": int(bias is not None)}
    facts |= {"needs_grad": learning(hidden, weight, bias)} | asked
    return agreed(share, weight.shape[0], facts, rows_of(hidden.shape[:-1]), hidden.device)


def learning(*tensors) -> int:
    """Which of them need a gradient, as bits."""
    needs = [isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled() for x in tensors]
    return sum(1 << i for i, need in enumerate(needs) if need)


def candidates(targets, rows) -> int:
    """K of targets [*, K] of ``rows`` [*, …]; 0: there is none."""
    many = isinstance(targets, torch.Tensor) and targets.dim() == rows.dim()
    return targets.shape[-1] if many else 0


def rows_of(lead) -> int:
    """How many rows."""
    return math.prod(lead)
