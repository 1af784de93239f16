"""Advantages of whole answers against the others to the same prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch

from rlfast import backends, validate
from rlfast.distributed.ranks import gathered_batch, gathered_objects, ranks_of
from rlfast.ops import group_advantage as group_op
from rlfast.ops.group_records import (
    LEAVE_ONE_OUT,
    MEAN,
    OTHERS_STD,
    SECOND,
    SOFT,
    STD,
    UNSCALED,
    WEIGHTED,
    Inputs,
    Options,
)
from rlfast.reductions import WHITENINGS, Whiten, deviation, total

SCALES = {"none": UNSCALED, "group": STD, "others": OTHERS_STD, "batch": UNSCALED}


class Method(NamedTuple):
    """How an estimator compares a reward with its group."""

    baseline: int | None  # None: 0, or what is given
    scale: str = "none"  # a key of SCALES; "batch": the standard deviation of all rewards
    bessel: bool = True
    eps: float = 1e-4
    lone_raw: bool = False  # a group of one keeps its reward
    skip_zero: bool = False  # a deviation of 0 does not divide
    whiten: Whiten | None = None  # over the batch, at last
    per_nonzero: bool = False  # times samples ÷ nonzero rewards
    delta: float = 0.0  # added to the baseline
    tau: float = 1.0
    paper: str = ""


METHODS = {
    "grpo": Method(MEAN, "group", paper="2402.03300"),
    "grpo_leave_one_out": Method(LEAVE_ONE_OUT, "others", eps=1e-6, skip_zero=True),
    "dr_grpo": Method(MEAN, paper="2503.20783"),
    "batch_std": Method(MEAN, "batch"),
    "rloo": Method(LEAVE_ONE_OUT, paper="2402.14740"),
    "opo": Method(WEIGHTED, paper="2505.23585"),
    "remax": Method(None, paper="2310.10505"),
    "reinforce++": Method(None, whiten=Whiten(), paper="2501.03262"),
    "reinforce++_baseline": Method(MEAN, whiten=Whiten(), paper="2501.03262"),
    "gpg": Method(MEAN, per_nonzero=True, paper="2504.02546"),
    "pass@k": Method(SECOND, "group", eps=1e-6, paper="2503.19595"),
    "gdpo": Method(MEAN, "group", whiten=Whiten(), paper="2601.05242"),
    "asymre": Method(MEAN, delta=-0.1, paper="2506.20520"),
    "kimi": Method(MEAN, paper="2501.12599"),
    "kimi_soft": Method(SOFT, paper="2501.12599"),
    "a*-po": Method(SOFT, tau=0.5, paper="2505.20686"),
}
# What a trainer has in place of the paper's numbers; its whitening is for the methods that whiten.
LIKE = {
    "trl": {"eps": 1e-4, "whiten": Whiten(eps=1e-4, where="outside")},
    "verl": {"eps": 1e-6, "lone_raw": True, "whiten": WHITENINGS["verl"]},
    "openrlhf": {"eps": 1e-9, "whiten": WHITENINGS["openrlhf"]},
    "halos": {"eps": 1e-2, "bessel": False},
    "open-instruct": {"eps": 1e-8, "bessel": False},
    "nemo-rl": {"eps": 1e-6, "skip_zero": True, "whiten": WHITENINGS["openrlhf"]},  # of REINFORCE++
}
RENAMED = {("nemo-rl", "grpo"): "grpo_leave_one_out"}
# GDPO in NeMo-RL: over the others, then divided by the deviation alone, unless that is 0.
OF_METHOD = {
    ("nemo-rl", "gdpo"): {"baseline": LEAVE_ONE_OUT, "scale": "others", "whiten": Whiten(eps=1e-30, where="floor")},
}


class GroupStatistics(NamedTuple):
    """What trainers log of a batch of groups; tensors of one float64."""

    groups: torch.Tensor  # groups with a valid sample
    zero_variance: torch.Tensor  # fraction of them whose rewards are all equal
    reward_mean: torch.Tensor  # mean of the groups' means
    reward_std: torch.Tensor  # mean of the groups' standard deviations


def _method(name, like, changed: dict) -> Method:
    if name not in tuple(METHODS):
        validate.fail("method", f"one of {tuple(METHODS)}", repr(name))
    if like is not None and like not in tuple(LIKE):
        validate.fail("like", f"one of {tuple(LIKE)} or None", repr(like))
    method = METHODS[RENAMED.get((like, name), name)]
    theirs = LIKE.get(like, {}) | OF_METHOD.get((like, name), {})
    method = method._replace(**(theirs if method.whiten else {k: v for k, v in theirs.items() if k != "whiten"}))
    given = {k: v for k, v in changed.items() if v is not None}
    method = method._replace(**given)
    if method.scale not in tuple(SCALES):
        validate.fail("scale", f"one of {tuple(SCALES)}", repr(method.scale))
    validate.at_least("eps", method.eps, 0.0)
    validate.positive("tau", method.tau)
    validate.finite("delta", method.delta)
    validate.flag("bessel", method.bessel)
    _refuse_unread(name, method, given)
    if method.whiten is not None and method.scale == "none":
        own = {k: given[k] for k in ("bessel", "eps") if k in given}
        method = method._replace(whiten=method.whiten._replace(**own))
    return method


def _refuse_unread(name: str, method: Method, given: dict) -> None:
    """What is given and has no effect."""
    divides = method.scale != "none" or method.whiten is not None
    unread = {
        "scale": method.baseline is None and method.scale in ("group", "others"),
        "bessel": not divides,
        "eps": not divides,
        "tau": method.baseline != SOFT,
    }
    for key, ignored in unread.items():
        if ignored and key in given:
            validate.fail(key, f"None: {name} does not read it", repr(given[key]))
    # the op divides by a group's deviation before δ is taken off; whitening takes away what all have in common
    if method.delta and (method.scale in ("group", "others") or method.whiten is not None or method.baseline == SECOND):
        validate.fail("delta", f"0: {name} with scale {method.scale!r} does not take it", repr(method.delta))


def _ids(group_ids, rewards):
    """int64 [N]: a tensor of ints as it is, anything else numbered in the order in which it comes."""
    n = rewards.shape[0]
    if not isinstance(group_ids, torch.Tensor):
        names = list(group_ids) if isinstance(group_ids, Iterable) else None
        if names is None or not all(isinstance(key, Hashable) for key in names):
            validate.fail("group_ids", "a tensor of ints, or a sequence of hashable names", repr(group_ids), TypeError)
        seen = {}
        group_ids = torch.tensor([seen.setdefault(key, len(seen)) for key in names], dtype=torch.int64)
        group_ids = group_ids.to(rewards.device)
    validate.tensor("group_ids", group_ids, (torch.int64, torch.int32))
    if group_ids.shape != (n,):
        validate.fail("group_ids", f"shape ({n},) like rewards", validate.shape(group_ids))
    validate.same_device("group_ids", group_ids, "rewards", rewards)
    return group_ids.long().contiguous()


def _groups(rewards, group_size, group_ids) -> tuple:
    """(ids or None, group size)."""
    if (group_size is None) == (group_ids is None):
        validate.fail("group_size", "one of group_size and group_ids", "both" if group_ids is not None else "neither")
    if group_ids is not None:
        return _ids(group_ids, rewards), 1
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        validate.fail("group_size", "an int", repr(group_size), TypeError)
    if group_size < 1 or rewards.shape[0] % group_size:
        validate.fail("group_size", f"a divisor of the {rewards.shape[0]} rewards", group_size)
    return None, group_size


def _like_rewards(name: str, x, rewards):
    if x is None:
        return None
    validate.tensor(name, x, (*validate.FLOATS, torch.int64, torch.int32))
    if x.shape != rewards.shape[:1]:
        validate.fail(name, f"shape ({rewards.shape[0]},) like rewards", validate.shape(x))
    validate.same_device(name, x, "rewards", rewards)
    return x.double().contiguous()


def _of_all_ranks(process_group, group_ids, **named) -> tuple[dict, slice]:
    """(the arguments of all ranks, which samples are this one's)."""
    ranks = ranks_of(process_group)
    for name, x in named.items():
        if x is not None or name == "rewards":
            validate.tensor(name, x, (*validate.FLOATS, *validate.MASKS))
    ids = group_ids if isinstance(group_ids, torch.Tensor) else None
    named, own = gathered_batch({**named, "group_ids": ids}, ranks)
    if ids is None and group_ids is not None:
        named["group_ids"] = [x for part in gathered_objects(list(group_ids), ranks, "group_ids") for x in part]
    return named, own


def _over_groups(rewards, ids, size, mask, lengths, m: Method):
    inputs = Inputs(rewards.detach().contiguous(), ids, mask, lengths if m.baseline == WEIGHTED else None)
    options = Options(size, m.baseline, SCALES[m.scale], m.bessel, m.lone_raw, m.skip_zero, float(m.eps), float(m.tau))
    return group_op.call(*inputs, *options, backends.requested())


def _moments(x, mask, weights, bessel: bool):
    """(mean, variance) of the valid elements in float64, weighted as if each stood there as often as its weight.

    The variance of one element is 0, with Bessel's correction too: alone, a sample is at the mean.
    """
    w = torch.ones_like(x, dtype=torch.float64) if weights is None else weights
    w = w if mask is None else torch.where(mask, w, 0.0)
    x = x.double() if mask is None else torch.where(mask, x, 0.0).double()
    count = total(w)
    mean = total(w * x) / count
    freedom = count - int(bessel)
    return mean, total(w * (x - mean).square()) / torch.where(freedom > 0, freedom, 1.0)


def _over_batch(advantages, rewards, mask, lengths, m: Method):
    """What is done with the batch once its groups are: a deviation, a factor, whitening."""
    kind = advantages.dtype
    if m.delta:
        advantages = (advantages.double() - m.delta).to(kind)
        advantages = advantages if mask is None else torch.where(mask, advantages, 0.0)
    if m.per_nonzero:
        counted = rewards != 0 if mask is None else (rewards != 0) & mask
        n = rewards.shape[0] if mask is None else mask.sum()
        advantages = (advantages.double() * (n / counted.sum().clamp(min=1))).to(kind)
    if m.scale == "batch":
        _, var = _moments(rewards, mask, None, m.bessel)
        advantages = (advantages.double() / (var.sqrt() + m.eps)).to(kind)
    if m.whiten is not None:
        mean, var = _moments(advantages, mask, lengths, m.whiten.bessel)
        advantages = ((advantages.double() - mean) / deviation(var, m.whiten.eps, m.whiten.where)).to(kind)
        advantages = advantages if mask is None else torch.where(mask, advantages, 0.0)
    return advantages


def group_advantage(
    rewards, *, group_size=None, group_ids=None, method="grpo", like=None, mask=None, lengths=None, baselines=None,
    weights=None, scale=None, bessel=None, eps=None, tau=None, delta=None, process_group=None,
) -> torch.Tensor:  # fmt: skip
    """The advantage of each answer over the others to its prompt.

    A_i = (r_i − b) / (s + eps), with the baseline b and the deviation s of the method

    Args:
        rewards: [N] float; [N, K], several rewards each, for "gdpo".
        group_size: an int: groups are so many answers, one after the other. Or
        group_ids: [N] int, or a sequence of N hashable names: equal ones are a group, wherever they stand. "remax" and
            "reinforce++" compare with no group and need neither.
        method: "grpo" (r − mean) / (std + eps); "dr_grpo" r − mean; "batch_std" (r − mean) / (std of all + eps);
            "rloo" r − mean of the others; "grpo_leave_one_out" that, over the std of the others; "opo" r − the mean
            weighted by ``lengths``; "remax" r − ``baselines``; "reinforce++" r, and "reinforce++_baseline" r − mean,
            whitened over the batch; "gpg" (r − mean)·N ÷ nonzero rewards; "pass@k" (largest − second) / (std + eps) for
            the best, 0 for the others; "gdpo" each reward as in "grpo", summed with ``weights``, whitened; "asymre"
            r − (mean + δ); "kimi" r − mean; "kimi_soft" and "a*-po" r − τ·log mean exp(r/τ).
        like: "trl", "verl", "openrlhf", "nemo-rl", "halos", "open-instruct": that trainer's eps, deviation, whitening
            and groups of one (verl: they keep their reward; else 0).
        mask: [N], 0 for a sample that counts nowhere: it gets 0.
        lengths: [N], valid tokens of each answer: the weights of "opo", and of whitening over tokens.
        baselines: [N], the reward of the greedy answer, of "remax".
        weights: K floats, of "gdpo" with K rewards; all 1 if not given.
        scale: "none", "group", "others", "batch": in place of the method's.
        bessel, eps: in place of the method's: of the deviation s, or where the method only whitens, of its whitening.
        tau: of "kimi_soft" and "a*-po", in place of the method's.
        delta: added to the baseline, in place of the method's: −0.1 for "asymre", 0 for the others. Where a group's
            deviation divides, where whitening would take it away, and for "pass@k", it must be 0.
        process_group: ranks, or a ``DeviceMesh`` of one dimension, over which the samples are spread, each with its own
            N. What is computed is what one process would of all of them, in the order of the ranks, bit for bit: a
            group may straddle ranks, with ``group_ids`` of one meaning everywhere, or where ``group_size`` counts on.

    Returns:
        [N] float32 (float64 for float64), a constant.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range, or is not read.

    Reference:
        The papers are in ``rlfast.advantages.group.METHODS``.

    Example:
        >>> rlfast.group_advantage(torch.tensor([1.0, 0.0, 0.0, 1.0]), group_size=4, method="rloo")
        tensor([ 0.6667, -0.6667, -0.6667,  0.6667])
    """
    if process_group is not None:
        named = {"rewards": rewards, "mask": mask, "lengths": lengths, "baselines": baselines}
        named, own = _of_all_ranks(process_group, group_ids, **named)
        options = {"scale": scale, "bessel": bessel, "eps": eps, "tau": tau, "delta": delta, "weights": weights}
        return group_advantage(**named, group_size=group_size, method=method, like=like, **options)[own]
    validate.tensor("rewards", rewards)
    m = _method(method, like, {"scale": scale, "bessel": bessel, "eps": eps, "tau": tau, "delta": delta})
    several = method == "gdpo" and rewards.dim() == 2
    if several and not rewards.shape[1]:
        validate.fail("rewards", "shape (N, K) with K ≥ 1", validate.shape(rewards))
    if rewards.dim() != 1 and not several:
        validate.fail("rewards", "shape (N,), or (N, K) for gdpo", validate.shape(rewards))
    alone = m.baseline is None and group_size is group_ids is None
    ids, size = (None, 1) if alone else _groups(rewards, group_size, group_ids)
    if mask is not None:
        mask = validate.mask_like(mask, "rewards", rewards[:, 0] if several else rewards).contiguous()
    lengths, baselines = _like_rewards("lengths", lengths, rewards), _like_rewards("baselines", baselines, rewards)
    for name, given, needed, read in (
        ("lengths", lengths, m.baseline == WEIGHTED, m.baseline == WEIGHTED or m.whiten is not None),
        ("baselines", baselines, method == "remax", method == "remax"),
        ("weights", weights, False, several),
    ):
        if needed and given is None:
            validate.fail(name, f"a tensor, since method is {method!r}", "None", TypeError)
        if given is not None and not read:
            validate.fail(name, f"None: {method} does not read it", "a value")
    if several:
        advantages = _weighted_sum(rewards, ids, size, mask, lengths, weights, m)
    elif m.baseline is None:
        kind = torch.float64 if rewards.dtype == torch.float64 else torch.float32
        advantages = (rewards.double() - (0.0 if baselines is None else baselines)).to(kind)
        advantages = advantages if mask is None else torch.where(mask, advantages, 0.0)
    else:
        advantages, _ = _over_groups(rewards, ids, size, mask, lengths, m)
    plain = m.whiten is None and m.scale != "batch" and not m.per_nonzero and not m.delta
    return advantages if plain else _over_batch(advantages, rewards, mask, lengths, m)


def _weighted_sum(rewards, ids, size, mask, lengths, weights, m: Method):
    """Σ_k w_k·A_k of the advantages by each of K rewards."""
    count = rewards.shape[1]
    if weights is not None and not isinstance(weights, tuple | list):
        validate.fail("weights", f"{count} floats, one for each column of rewards", repr(weights), TypeError)
    weights = (1.0,) * count if weights is None else tuple(validate.finite("weights", w) for w in weights)
    if len(weights) != count:
        validate.fail("weights", f"{count} floats, one for each column of rewards", len(weights))
    parts = [_over_groups(rewards[:, k], ids, size, mask, lengths, m)[0] for k in range(count)]
    return sum(w * part.double() for w, part in zip(weights, parts, strict=True)).to(parts[0].dtype)


def group_statistics(
    rewards, *, group_size=None, group_ids=None, mask=None, bessel=True, process_group=None
) -> GroupStatistics:
    """What trainers log of the rewards: how many groups say nothing, and how rewards spread.

    zero_variance = groups whose valid rewards are all equal ÷ groups

    Args:
        rewards, group_size, group_ids, mask, bessel, process_group: as in ``group_advantage``.

    Returns:
        GroupStatistics.

    Raises:
        TypeError, ValueError: as in ``group_advantage``.

    Example:
        >>> rlfast.group_statistics(torch.tensor([1.0, 1.0, 0.0, 1.0]), group_size=2).zero_variance
        tensor(0.5000, dtype=torch.float64)
    """
    if process_group is not None:
        named, _ = _of_all_ranks(process_group, group_ids, rewards=rewards, mask=mask)
        return group_statistics(**named, group_size=group_size, bessel=bessel)
    validate.tensor("rewards", rewards)
    if rewards.dim() != 1:
        validate.fail("rewards", "shape (N,)", validate.shape(rewards))
    ids, size = _groups(rewards, group_size, group_ids)
    mask = validate.mask_like(mask, "rewards", rewards)
    method = METHODS["dr_grpo"]._replace(bessel=validate.flag("bessel", bessel))
    _, (groups, equal, means, stds) = _over_groups(rewards, ids, size, mask, None, method)
    return GroupStatistics(groups, equal / groups, means / groups, stds / groups)
