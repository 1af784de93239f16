"""How a vocabulary is shared out over the ranks of a group, and that they agree on it.

Before the first exchange of a kind the ranks show each other what they have: an all-gather of 16 integers, whose answer
is kept for as long as the group lives. On a CPU every call begins with two, a checksum of what has to be alike and
whether the answer is there: collectives of different sizes would end the processes. On a GPU looking would synchronise,
so later calls cost a look-up, and what differs then is a timeout; two heads of one group that differ in another rank's
columns alone are told apart by their ``vocab_size``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from rlfast import backends, validate
from rlfast.distributed.gather import Gathered, Partitioned, gathered, placement
from rlfast.distributed.ranks import ranks_of
from rlfast.ops.linear_token_logps import NAME as HEAD
from rlfast.ops.token_logps import NAME as LOGITS

FACTS = 16  # integers of a handshake


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
        timeout: seconds until a rank that waits for others raises. None: the group's own.

    Example:
        >>> share = rlfast.distributed.VocabParallel(tp_group, vocab_size=151_669)
        >>> out = rlfast.linear_token_logps(hidden, head_shard, targets, process_group=share)
    """

    group: object = None
    vocab_size: int | None = None
    width: int | None = None
    timeout: float | None = None

    def __post_init__(self):
        for name, least in (("vocab_size", 1), ("width", 1)):
            x = getattr(self, name)
            if x is not None and (isinstance(x, bool) or not isinstance(x, int) or x < least):
                validate.fail(name, f"None or an int ≥ {least}", repr(x))
        if self.timeout is not None:
            validate.positive("timeout", self.timeout)


class Shards(NamedTuple):
    """A vocabulary in pieces, in the order of its columns."""

    group: object
    ranks: tuple[int, ...]  # of the group, as the default group numbers them
    timeout: timedelta | None
    vocab: int
    widest: int  # columns of the largest shard
    spans: tuple[tuple[int, int], ...]  # global columns [first, last) of each piece, of rank 0 first
    counts: tuple[int, ...]  # pieces of each rank
    mine: tuple[slice, ...]  # this rank's pieces among its own columns
    first: int  # number of the first of them
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
            raise failed(self.group, self.ranks, f"{what} {x.shape[-1]} columns of rows {tuple(x.shape)}") from error


def failed(group, ranks, what: str) -> RuntimeError:
    """What a rank says whose exchange did not come about."""
    me = dist.get_rank()
    others = [r for r in ranks if r != me]
    return RuntimeError(
        f"process_group: rank {me} waited in vain for ranks {others} with {what}: "
        "one of them has raised, is gone, or has tensors of another shape"
    )


def resolved(process_group, weight, dim: int, name: str) -> tuple:
    """(what ``agreed`` takes; None: nothing is shared out, the tensor that this rank computes with).

    Args:
        process_group: as the caller gave it.
        weight: a head, or logits, as it came.
        dim: of the vocabulary.
        name: of the argument ``weight``.
    """
    if isinstance(process_group, Gathered):
        return None, gathered(weight, mean=process_group.mean, name=name).tensor()
    there = placement(weight)
    if process_group is None and there is None:
        return None, weight
    if torch.compiler.is_compiling():
        validate.fail("process_group", "None in compiled code", type(process_group).__name__)
    its_own = None
    if there is not None:
        mesh, at, where = there
        if where != dim % weight.dim():
            validate.fail(name, f"a DTensor sharded on dimension {dim}", f"Shard({where})")
        weight, its_own = weight.to_local(), mesh.get_group(at)
    if isinstance(process_group, Shards | Partitioned):
        return process_group, weight
    share = process_group if isinstance(process_group, VocabParallel) else VocabParallel(process_group)
    group = its_own if share.group is None else share.group
    if group is None:
        validate.fail("group", "a group, since the weight is no DTensor", "None")
    return replace(share, group=ranks_of(group).group), weight


def local(x):
    """What this rank has of a tensor."""
    return x if placement(x) is None else x.to_local()


def alike(process_group, x):
    """Another weight, whose rows lie as those of the first."""
    if isinstance(process_group, Gathered) and placement(x) is not None:
        return gathered(x, mean=process_group.mean).tensor()
    return local(x)


_agreed: WeakKeyDictionary = WeakKeyDictionary()  # group → {what a rank has: the shards}


def agreed(share: VocabParallel | Shards | None, columns: int, facts: dict, rows: int, device) -> Shards | None:
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
        alone = Shards(None, (0,), None, 0, 0, (), (1,), (), 0, share.gather)
        return cut(alone, [columns], None, None, 0)
    facts = {"vocab_size": share.vocab_size or 0, "width": share.width or 0, "rows": rows} | facts
    known = _agreed.setdefault(share.group, {})
    key = (columns, share.timeout, *(item for item in facts.items() if item[0] != "rows"))
    found = known.get(key)
    if found is not None and device.type != "cpu":
        return found
    size = dist.get_world_size(share.group)
    ranks = tuple(dist.get_process_group_ranks(share.group))
    timeout = None if share.timeout is None else timedelta(seconds=share.timeout)
    shards = Shards(share.group, ranks, timeout, 0, 0, (), (1,) * size, (), 0)
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
        vocab=vocab, widest=max(columns), spans=tuple(spans), counts=tuple(counts), mine=mine, first=first
    )


def facts_of(x, op: str) -> dict:
    """What the ranks are to have alike: the dtype, and the backend, whose records are its own."""
    backend = backends.select(op, x.device.type, x.dtype, backends.requested())
    if backend == "reference":
        validate.fail("process_group", "None on the reference backend, which is for one process", "a group")
    return {"dtype": validate.FLOATS.index(x.dtype), "backend": backends.NAMES.index(backend)}


def agreed_logits(share: VocabParallel | Shards, logits) -> Shards:
    """The shards of logits [*, columns of this rank]."""
    facts = facts_of(logits, LOGITS) | {"kind": 0, "dimensions": logits.dim()}
    return agreed(share, logits.shape[-1], facts, rows_of(logits.shape[:-1]), logits.device)


def agreed_head(share: VocabParallel | Shards, hidden, weight, bias) -> Shards:
    """The shards of a head, of which weight and bias are this rank's rows."""
    facts = facts_of(hidden, HEAD) | {"kind": 1, "depth": hidden.shape[-1], "bias": int(bias is not None)}
    grads = enumerate((hidden, weight, bias))
    facts["needs_grad"] = sum(1 << i for i, x in grads if x is not None and x.requires_grad and torch.is_grad_enabled())
    return agreed(share, weight.shape[0], facts, rows_of(hidden.shape[:-1]), hidden.device)


def rows_of(lead) -> int:
    """How many rows."""
    return math.prod(lead)
