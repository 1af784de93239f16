"""A batch that is spread over ranks: what makes the loss of N ranks that of one.

Trainers take the mean of the ranks' gradients. So a rank's loss is its own sum ÷ the count of all ranks × their number:
the mean over the ranks is the loss of the whole batch, and so is its gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast import validate
from rlfast.distributed.ranks import Ranks, gathered, gathered_batch, ranks_of, the_same
from rlfast.loss_inputs import boundaries
from rlfast.losses import Loss
from rlfast.ops.loss_records import REDUCTIONS, SEQ_SUM_OVER_MAX_LEN

REDUCED = ("token_sum", "sum")  # whose n is 1
PER_LENGTH = REDUCTIONS[SEQ_SUM_OVER_MAX_LEN]


class Share(NamedTuple):
    """What a loss is told of the other ranks: ``loss(..., **share._asdict())``."""

    num_items: torch.Tensor  # float64 []: n of all ranks
    world_size: int


class LengthShare(NamedTuple):
    """The same of ``seq_sum_over_max_len``, whose length has to be one on all ranks."""

    num_items: torch.Tensor
    world_size: int
    max_len: float


def share(objective, counted, *, cu_seqlens=None, max_len=None, process_group) -> Share | LengthShare:
    """n of all ranks, and how many ranks there are: with them the mean of the ranks' losses is that of the whole batch.

        Σ_ranks loss_rank ÷ N = Σ_ranks Σ_t … ÷ n,   n = Σ_ranks n_rank

    Args:
        objective: a loss of any kind, or the name of its reduction, such as "token_mean" of ``rlfast.value_loss``.
        counted: of a ``Loss`` the mask of its call, [B, T], or [N] with ``cu_seqlens``. Of any other loss the number of
            pairs, responses or groups of its call. Of several micro-batches: their masks, or numbers, in a list.
        cu_seqlens: int [B + 1], or a list of them: where packed sequences begin and end, where n counts sequences.
        max_len: what "seq_sum_over_max_len" divides by, the same on all ranks; None: the largest T of the ranks' masks,
            for which the host waits. Others do not read it.
        process_group: the ranks, or a ``DeviceMesh`` of one dimension, over which the batch is spread.

    Returns:
        Share(num_items, world_size), for the arguments of those names, of "seq_sum_over_max_len" LengthShare, which has
        max_len too. One collective of one number, or of three.

    Raises:
        ValueError, TypeError: an argument is of the wrong type or shape; or the objective's gate takes tokens out of
            n, which is known only when the loss is: give ``rlfast.rollout_keep`` in the mask instead. Or max_len is not
            the same on all ranks (not looked at on a GPU); the message names them.

    Example:
        >>> logp, mask = torch.full((4, 8), -1.0), torch.ones(4, 8)
        >>> share = rlfast.distributed.share("token_mean", mask, process_group=group)
        >>> out = rlfast.loss("dapo")(logp, adv=torch.ones(4), mask=mask, **share._asdict())
        >>> out.loss.item()
        -1.0
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        validate.fail("process_group", "the ranks over which the batch is spread", "None", TypeError)
    reduce = objective if isinstance(objective, str) else getattr(objective, "reduce", objective)
    validate.one_of("objective", reduce, (*REDUCTIONS, "mean", "sum"))
    if isinstance(objective, Loss) and objective.prepared.plan.gate_masks:
        validate.fail("objective", "one whose gate leaves n alone: put rollout_keep(...) into the mask", objective.name)
    empty = isinstance(objective, Loss) and objective.count_empty
    parts = counted if isinstance(counted, list) else [counted]
    ends = cu_seqlens if isinstance(cu_seqlens, list) else [cu_seqlens] * len(parts)
    if len(ends) != len(parts):
        validate.fail("cu_seqlens", f"{len(parts)} of them, as counted", len(ends))
    n = sum(_count(x, cu, reduce, empty) for x, cu in zip(parts, ends, strict=True))
    device = next((x.device for x in parts if isinstance(x, torch.Tensor)), None)
    n = torch.as_tensor(n, dtype=torch.float64, device=_device(ranks, device))
    length = _length(parts, max_len) if reduce == PER_LENGTH else None
    numbers = (n,) if length is None else (n, *(torch.full_like(n, x) for x in (length, max_len is not None)))
    n, *lengths = gathered(torch.stack(numbers), ranks, "share").unbind(1)
    n = n.sum().clamp(min=1.0)
    n = torch.ones_like(n) if reduce in REDUCED else n
    return Share(n, ranks.size) if length is None else LengthShare(n, ranks.size, _longest(*lengths, max_len, ranks))


def _length(parts: list, max_len) -> float:
    """What this rank knows of the length."""
    if max_len is not None:
        return validate.positive("max_len", max_len)
    if not all(isinstance(x, torch.Tensor) and x.dim() == 2 for x in parts):
        validate.fail("max_len", f"the length of {PER_LENGTH}, where counted is not masks [B, T]", "None")
    return float(max((x.shape[1] for x in parts), default=0))


def _longest(lengths, said, max_len, ranks: Ranks) -> float:
    """The one length of all ranks."""
    if validate.looked_at(lengths) and said.any():
        pairs = zip(lengths.tolist(), said.tolist(), strict=True)
        the_same("max_len", [length if given else None for length, given in pairs], ranks)
    return lengths.max().item() if max_len is None else float(max_len)


def _device(ranks: Ranks, device):
    """Where numbers are, which a group of GPUs cannot send from the host."""
    if device is not None:
        return device
    backend = torch.distributed.get_backend(ranks.group)
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")


def _count(x, cu_seqlens, reduce: str, empty: bool):
    """n of one call."""
    if not isinstance(x, torch.Tensor):
        return validate.number("counted", x, validate.Limit("a mask, or a number ≥ 0", 0, float("inf")))
    validate.tensor("counted", x, validate.MASKS)
    if x.dim() not in (1, 2):
        validate.fail("counted", "a mask [B, T], or [N] with cu_seqlens", validate.shape(x))
    x = x != 0
    if reduce in ("token_mean", *REDUCED):
        return x.sum()
    if x.dim() == 1:
        cu = boundaries(cu_seqlens, x, "counted")
        if cu is None:
            validate.fail("cu_seqlens", "the boundaries of packed sequences: n counts sequences", "None")
        if empty:
            return cu.shape[0] - 1
        ahead = torch.nn.functional.pad(x.cumsum(0), (1, 0))
        return (ahead[cu].diff() > 0).sum()
    return x.shape[0] if empty else x.any(-1).sum()


def gather_batch(*tensors, process_group) -> tuple[torch.Tensor | None, ...]:
    """The rows of all ranks, in the order of the ranks, for what has to see the whole batch: AOT's sort.

    Every rank then computes the same loss, of all rows, and their mean is that loss too. A rank's gradient is that of
    its own rows, times the number of ranks, over which trainers take the mean.

    Args:
        tensors: [B, *] each, of one B, which may be another on another rank; or None, which stays None.
        process_group: the ranks, or a ``DeviceMesh`` of one dimension.

    Returns:
        As many [Σ B, *]; differentiable.

    Raises:
        ValueError: the ranks' dtypes, or shapes beyond the rows, differ, or a tensor needs a gradient on some ranks
            alone; the message names the ranks. On every rank.

    Example:
        >>> chosen, rejected = torch.randn(4) - 20, torch.randn(4) - 20
        >>> chosen, rejected = rlfast.distributed.gather_batch(chosen, rejected, process_group=group)
        >>> out = rlfast.preference_loss("aot", reference_free=True)(chosen, rejected)
    """
    ranks = ranks_of(process_group)
    if ranks is None:
        validate.fail("process_group", "the ranks over which the batch is spread", "None", TypeError)
    named = {f"tensors[{i}]": x for i, x in enumerate(tensors)}
    for name, x in named.items():
        if x is not None:
            validate.tensor(name, x, (*validate.FLOATS, *validate.MASKS))
    return tuple(gathered_batch(named, ranks, recorded=True)[0].values())
