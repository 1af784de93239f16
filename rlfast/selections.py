"""Tokens that an objective treats apart: chosen by covariance or by entropy, for ``keep`` and ``extra`` of a loss.

Everything stays on the device: no ``item``, no ``nonzero``, no shape that depends on the data.
"""

from __future__ import annotations

import math

import torch

from rlfast import limits, validate
from rlfast.distributed.ranks import Ranks, counts_of, gathered, gathered_batch, own, ranks_of, summed


def _covariance(logp, adv, mask, ranks: Ranks | None):
    """((A − mean A)·(log p − mean log p), A as [B, T], mask as bool, its count on all ranks)."""
    validate.tensor("logp", logp)
    validate.tensor("adv", adv)
    logp, adv = logp.detach(), adv.detach()
    adv = adv[:, None].expand_as(logp) if adv.dim() == 1 and logp.dim() == 2 else adv
    validate.like("adv", adv, "logp", logp)
    mask = validate.counted(mask, "logp", logp)
    count, acc = mask.sum(), torch.promote_types(torch.promote_types(logp.dtype, adv.dtype), torch.float32)
    both = torch.stack([torch.where(mask, x.to(acc), 0.0) for x in (adv, logp)])
    sums = torch.cat([both.flatten(1).sum(1), count.to(acc).reshape(1)])
    if ranks is not None:
        sums = summed(sums.double(), ranks, "the covariance")
        count = sums[2].long()
    means = (sums[:2] / sums[2].clamp(min=1.0)).to(acc)
    moved = torch.where(mask, both - means.reshape(2, *[1] * logp.dim()), 0.0)
    return moved[0] * moved[1], adv, mask, count.clamp(min=1)


def _share(ratio, count):
    """How many of so many a ratio is; at least one."""
    return (validate.number("ratio", ratio, limits.SOME) * count).long().clamp(min=1)


def _ranked_below(score, number, ratio: float, ranks: Ranks | None, counts=None):
    """The ``number`` elements of the largest score, a 0-dim tensor; −inf is never among them.

    Over ranks, each sends the largest of its own, as many as ``ratio`` of all ``counts`` elements can be.
    """
    flat = score.reshape(-1)
    if ranks is not None:
        most = min(int(ratio * sum(counts)) + 1, max(counts))
        if not most:
            return torch.zeros_like(score, dtype=torch.bool)
        order = flat.argsort(descending=True, stable=True)[:most]
        best = torch.nn.functional.pad(flat[order], (0, most - order.numel()), value=-math.inf)
        every = gathered(best, ranks, "the largest scores").reshape(-1)
        chosen = _ranked_below(every, number, ratio, None).reshape(ranks.size, most)[ranks.rank]
        out = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        return out.scatter_(0, order, chosen[: order.numel()]).reshape(score.shape)
    order = flat.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    return ((rank < number) & (flat > -math.inf)).reshape(score.shape)


def _signed(x: int) -> int:
    """The int64 that has these 64 bits."""
    return x - (1 << 64) if x >> 63 else x


def _lots(like, seed, first: int = 0):
    """A number in [0, 1) for each place and seed, the same on every device: splitmix64, whose top 24 bits they are."""
    place = torch.arange(first, first + like.numel(), device=like.device)
    x = (place + torch.full((), seed, dtype=torch.int64, device=like.device) * (1 << 40)) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return (((x >> 40) & 0xFFFFFF).float() / (1 << 24)).reshape(like.shape)


def clip_cov_keep(
    logp, old_logp, adv, mask=None, *, ratio=2e-4, low=1.0, high=5.0, eps_low=0.2, eps_high=0.2, seed=0,
    process_group=None,
):  # fmt: skip
    """Clip-Cov: a random few of the tokens whose covariance is large lose their surrogate.

        cov = (A − mean A)·(log π − mean log π);   max(⌊ratio·n⌋, 1) of those with low < cov < high are dropped

    A token that PPO's clip takes anyway is not drawn.

    Args:
        logp, old_logp: [B, T] float. log π and log π_old.
        adv: [B, T] or [B] float. Advantages.
        mask: [B, T], bool or number. The tokens that count, of which there are n; None is all.
        ratio: the part of the n tokens that is dropped, of (0, 1].
        low, high: bounds of the covariance.
        eps_low, eps_high: PPO's clip range.
        seed: of the draw; give a new one at each step.
        process_group: the batch is spread over these ranks (or a ``DeviceMesh``'s, of one dimension): the means, n and
            the choice are over all of it, in the order of the ranks.

    Returns:
        bool [B, T], for ``keep`` of a loss.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type; the message names it.

    Reference:
        arXiv 2505.22617.

    Example:
        >>> logp, adv = torch.tensor([[-0.1, -5.0, -2.0]]), torch.tensor([[2.0, -2.0, 0.0]])
        >>> rlfast.clip_cov_keep(logp, logp, adv).sum().item()
        2
    """
    ranks = ranks_of(process_group)
    cov, adv, mask, count = _covariance(logp, adv, mask, ranks)
    validate.like("old_logp", old_logp, "logp", logp)
    for name, x, limit in (("low", low, limits.ANY), ("high", high, limits.ANY), ("eps_low", eps_low, limits.BOUND),
                           ("eps_high", eps_high, limits.BOUND)):  # fmt: skip
        validate.number(name, x, limit)
    validate.ordered("low", low, "high", high)
    if isinstance(seed, bool) or not isinstance(seed, int):
        validate.fail("seed", "an int", repr(seed), TypeError)
    moved = (logp.detach() - old_logp).exp()
    clipped = ((moved < 1.0 - eps_low) & (adv < 0)) | ((moved > 1.0 + eps_high) & (adv > 0))
    eligible = mask & ~clipped & (cov > low) & (cov < high)
    counts = None if ranks is None else counts_of({"logp": cov.reshape(-1)}, ranks)
    lots = _lots(cov, seed, 0 if ranks is None else own(ranks, counts).start)
    return ~_ranked_below(torch.where(eligible, lots, -math.inf), _share(ratio, count), ratio, ranks, counts)


def kl_cov_extra(logp, adv, mask=None, *, ratio=2e-4, process_group=None):
    """KL-Cov: 1 at the tokens of the largest covariance, whose surrogate gets a KL penalty; 0 elsewhere.

        cov = (A − mean A)·(log π − mean log π);   the max(⌊ratio·n⌋, 1) largest

    Args:
        logp: [B, T] float. log π.
        adv: [B, T] or [B] float. Advantages.
        mask: [B, T], bool or number. The tokens that count, of which there are n; None is all.
        ratio: the part of the n tokens that is chosen, of (0, 1].
        process_group: the batch is spread over these ranks (or a ``DeviceMesh``'s, of one dimension): the means, n and
            the choice are over all of it, in the order of the ranks.

    Returns:
        [B, T] like logp, for ``extra`` of ``rlfast.loss("kl_cov")``.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type; the message names it.

    Reference:
        arXiv 2505.22617.

    Example:
        >>> logp, adv = torch.tensor([[-0.1, -5.0, -2.0]]), torch.tensor([[2.0, -1.0, 0.0]])
        >>> rlfast.kl_cov_extra(logp, adv)
        tensor([[1., 0., 0.]])
    """
    ranks = ranks_of(process_group)
    cov, _, mask, count = _covariance(logp, adv, mask, ranks)
    counts = None if ranks is None else counts_of({"logp": cov.reshape(-1)}, ranks)
    score = torch.where(mask, cov, -math.inf)
    return _ranked_below(score, _share(ratio, count), ratio, ranks, counts).to(logp.dtype)


def top_entropy_keep(entropy, mask=None, *, quantile=0.8, process_group=None):
    """The tokens whose entropy is at or above a quantile of all.

        keep = H ≥ the ``quantile`` of H over the mask, linear between two tokens

    Args:
        entropy: [B, T] float, in nats.
        mask: [B, T], bool or number. The tokens that count; None is all.
        quantile: in [0, 1]; 0.8 keeps the upper fifth.
        process_group: the quantile is over the batches of these ranks (or of a ``DeviceMesh``'s, of one dimension).

    Returns:
        bool [B, T], for ``keep`` of a loss. No token where the mask is empty.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type; the message names it.

    Reference:
        arXiv 2506.01939.

    Example:
        >>> rlfast.top_entropy_keep(torch.tensor([[0.1, 0.5, 0.3, 0.2]]), quantile=0.5)
        tensor([[False,  True,  True, False]])
    """
    validate.tensor("entropy", entropy)
    quantile = validate.number("quantile", quantile, limits.SHARE)
    mask = validate.counted(mask, "entropy", entropy)
    entropy = entropy.detach()
    counted = torch.where(mask, entropy, math.inf).reshape(-1)
    ranks = ranks_of(process_group)
    if ranks is not None:
        counted = gathered_batch({"entropy": counted}, ranks)[0]["entropy"]
    if not counted.numel():
        return mask
    ascending = counted.sort().values.to(torch.promote_types(entropy.dtype, torch.float32))
    place = quantile * (torch.isfinite(ascending).sum() - 1).clamp(min=0).to(ascending.dtype)
    # gather: an index that is a 0-dim tensor would be read
    below, above = ascending.gather(0, torch.stack([place.floor(), place.ceil()]).long()).unbind()
    threshold = torch.where(place.floor() == place, below, torch.lerp(below, above, place - place.floor()))
    return mask & (entropy >= threshold)


def _divergence(old_logp, rollout_logp, kind: str):
    """What ``rollout_keep`` looks at, of each token; 0 where the rollout has no log-prob."""
    d = (old_logp - rollout_logp).nan_to_num(nan=0.0)
    if kind in ("k1", "k2", "k3"):
        return {"k1": d, "k2": 0.5 * d.square(), "k3": torch.expm1(d) - d}[kind]
    # within [1e-6, 1 − 1e-6] the logs of both outcomes are finite
    p, q = (x.exp().clamp(1e-6, 1.0 - 1e-6) for x in (rollout_logp, old_logp))
    moved = (p - q).abs() if kind == "tv" else p * (p / q).log() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).log()
    return moved.nan_to_num(nan=0.0)


def rollout_keep(old_logp, rollout_logp, mask=None, *, kind="binary_kl", level="token", low=-math.inf, high=math.inf):
    """Tokens, or sequences, whose sampler did not stray too far: the gates that ``rlfast.Correction`` has not got.

        d = log π_old − log π_rollout, p = π_rollout, q = π_old:
        k1 = d,  k2 = d²/2,  k3 = e^d − 1 − d,  tv = |p − q|,  binary_kl = p·log(p/q) + (1 − p)·log((1 − p)/(1 − q))
        keep = low ≤ the token's, or its sequence's sum, mean or maximum ≤ high

    Args:
        old_logp, rollout_logp: [B, T] float. A NaN of the rollout counts as no difference.
        mask: [B, T], bool or number. The tokens that count; None is all.
        kind: "binary_kl", "tv", "k1", "k2" or "k3".
        level: "token", "seq_sum", "seq_mean" or "seq_max".
        low, high: bounds of what is looked at, numbers or 0-dim tensors.

    Returns:
        bool [B, T], for ``keep`` of a loss, where the others keep their place in n; or for its ``mask``, where they
        do not. False where the mask is.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or name; the message names it.

    Reference:
        arXiv 2602.04879.

    Example:
        >>> old_logp, rollout_logp = torch.tensor([[-0.1, -2.0]]), torch.tensor([[-0.1, -0.5]])
        >>> rlfast.rollout_keep(old_logp, rollout_logp, kind="tv", high=0.2)
        tensor([[ True, False]])
    """
    validate.tensor("old_logp", old_logp)
    validate.like("rollout_logp", rollout_logp, "old_logp", old_logp)
    validate.one_of("kind", kind, ("binary_kl", "tv", "k1", "k2", "k3"))
    validate.one_of("level", level, ("token", "seq_sum", "seq_mean", "seq_max"))
    low, high = (validate.scalar(name, x, limits.ANY) for name, x in (("low", low), ("high", high)))
    if not (isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor)):
        validate.ordered("low", low, "high", high)
    mask = validate.counted(mask, "old_logp", old_logp)
    acc = torch.promote_types(old_logp.dtype, torch.float32)
    moved = torch.where(mask, _divergence(old_logp.detach().to(acc), rollout_logp.detach().to(acc), kind), 0.0)
    if level == "seq_max":
        moved = torch.where(mask, moved, -math.inf).amax(-1, keepdim=True) if moved.shape[-1] else moved
    elif level != "token":
        moved = moved.sum(-1, keepdim=True)
        moved = moved / mask.sum(-1, keepdim=True).clamp(min=1) if level == "seq_mean" else moved
    return mask & (moved >= low) & (moved <= high)
