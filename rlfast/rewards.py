"""Reward shaping: the KL in the reward, and what the length of a response costs."""

from __future__ import annotations

import torch

from rlfast import limits, validate
from rlfast.distributed.ranks import gathered_batch, ranks_of
from rlfast.kl import kl_penalty
from rlfast.presets import REWARDS

LEVELS = ("token", "sequence")


def _last(mask):
    """bool like mask: the last token of each row that counts."""
    place = torch.arange(mask.shape[-1], device=mask.device)
    last = torch.where(mask, place, -1).amax(-1, keepdim=True) if mask.shape[-1] else place.new_zeros(())
    return mask & (place == last)


def _clipped(scores, clip):
    """The scores within (low, high)."""
    if not isinstance(clip, tuple | list) or len(clip) != 2:
        validate.fail("clip", "(low, high)", repr(clip))
    low, high = (validate.number("clip", x, limits.ANY) for x in clip)
    if low > high:
        validate.fail("clip", "(low, high) with low <= high", repr(clip))
    return scores.clamp(low, high)


def shape_rewards(scores, logp, ref_logp, mask=None, *, beta=None, kind=None, clip=None, level=None, like=None):
    """The reward with the KL to the reference policy taken off.

        token:     r_t = −β·KL_t, and the score more at the last token that counts
        sequence:  R = score − β·Σ_t KL_t

    Args:
        scores: [B] or [B, T] float. Rewards of the responses; scores of tokens stay where they are.
        logp: [B, T] float. log π of the policy that sampled; no gradient.
        ref_logp: like logp. log π_ref.
        mask: like logp, bool or number. The tokens that count; None is all.
        beta: a number or a 0-dim tensor, such as ``AdaptiveKL.value``. 0.05 if None.
        kind: of ``rlfast.kl_penalty``. "k1" if None.
        clip: (low, high), bounds of the scores before the KL is taken off; none if None, or the trainer's.
        level: "token" or "sequence". "token" if None.
        like: "trl" (its RLOO), "verl", "openrlhf" or "nemo-rl": that trainer's beta, kind, level and bounds.

    Returns:
        [B, T], 0 where the mask is; or [B] at the level of the sequence. float32 (float64 where an input is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or name; the message names it.

    Reference:
        arXiv 1909.08593.

    Example:
        >>> logp, ref_logp = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])
        >>> rlfast.shape_rewards(torch.tensor([1.0]), logp, ref_logp, beta=0.1)
        tensor([[-0.0500,  1.0000]])
    """
    defaults = REWARDS[validate.one_of("like", like, tuple(REWARDS))]
    beta = validate.scalar("beta", defaults["beta"] if beta is None else beta, limits.FINITE)
    kind = defaults["kind"] if kind is None else kind
    level = validate.one_of("level", defaults["level"] if level is None else level, LEVELS)
    validate.tensor("scores", scores)
    validate.tensor("logp", logp)
    kl = kl_penalty(logp.detach(), ref_logp, kind=kind, like=like)
    if kl.dim() != 2:
        validate.fail("logp", "shape [B, T]", validate.shape(logp))
    if scores.shape not in (kl.shape, kl.shape[:1]):
        validate.fail("scores", f"shape {tuple(kl.shape[:1])} or {tuple(kl.shape)}", validate.shape(scores))
    validate.same_device("scores", scores, "logp", logp)
    mask = validate.counted(mask, "logp", logp)
    clip = defaults.get("clip") if clip is None else clip
    if clip is not None:
        scores = _clipped(scores, clip)
    cost = torch.where(mask, beta * kl, 0.0)
    if level == "sequence":
        total = scores if scores.dim() == 1 else torch.where(mask, scores, 0.0).sum(-1)
        return total - cost.sum(-1)
    placed = torch.where(_last(mask), scores[:, None], 0.0) if scores.dim() == 1 else torch.where(mask, scores, 0.0)
    return placed - cost


def _vector(name: str, x) -> None:
    validate.tensor(name, x, validate.COUNTS)
    if x.dim() != 1:
        validate.fail(name, "shape [B]", validate.shape(x))


def length_reward(lengths, correct, *, group_size=None, process_group=None):
    """Kimi's length reward: within a group the short are paid, and the wrong only lose.

        λ = ½ − (len − min len)/(max len − min len);   λ if the answer is right, else min(0, λ);   0 if max = min

    Args:
        lengths: [B], int or float. Tokens of each response.
        correct: [B], bool or number. Whether its answer is right.
        group_size: responses to one prompt, which are neighbours; None is all of them.
        process_group: ranks over which the responses are spread: neighbours in the order of the ranks.

    Returns:
        [B] float32.

    Raises:
        ValueError, TypeError: a shape or a type is wrong, or group_size does not divide B; the message names it.

    Reference:
        arXiv 2501.12599.

    Example:
        >>> rlfast.length_reward(torch.tensor([10, 20, 30]), torch.tensor([True, True, False]))
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    _vector("lengths", lengths)
    validate.like("correct", correct, "lengths", lengths, validate.MASKS)
    ranks = ranks_of(process_group)
    if ranks is not None:
        both, own = gathered_batch({"lengths": lengths, "correct": correct}, ranks)
        return length_reward(**both, group_size=group_size)[own]
    size = lengths.shape[0] if group_size is None else group_size
    if not lengths.shape[0]:
        return lengths.float()
    if isinstance(size, bool) or not isinstance(size, int):
        validate.fail("group_size", "an int", repr(size), TypeError)
    if size < 1 or lengths.shape[0] % size:
        validate.fail("group_size", f"a divisor of the {lengths.shape[0]} responses", repr(group_size))
    grouped = lengths.float().reshape(-1, size)
    least, most = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    span = most - least
    gain = torch.where(span > 0, 0.5 - (grouped - least) / torch.where(span > 0, span, 1.0), 0.0).reshape(-1)
    return torch.where(correct != 0, gain, gain.clamp(max=0.0))


def overlong_penalty(lengths, *, max_len, buffer, factor=1.0, bounded=True):
    """DAPO's soft overlong punishment: it grows over the last ``buffer`` tokens before ``max_len``.

        −factor·clip((len − (max_len − buffer)) / buffer, 0, 1)

    Args:
        lengths: [B], int or float. Tokens of each response.
        max_len: where the whole penalty is reached. DAPO: 20480.
        buffer: tokens over which it grows; with 0 it is all or nothing. DAPO: 4096.
        factor: the whole penalty.
        bounded: False lets it grow beyond, as verl does.

    Returns:
        [B] float32, to add to the rewards.

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type, or buffer is negative or larger than max_len.

    Reference:
        arXiv 2503.14476, equation 13.

    Example:
        >>> rlfast.overlong_penalty(torch.tensor([70, 90, 120]), max_len=100, buffer=20)
        tensor([-0.0000, -0.5000, -1.0000])
    """
    _vector("lengths", lengths)
    validate.number("max_len", max_len, limits.NOT_NEGATIVE)
    factor = validate.number("factor", factor, limits.FINITE)
    validate.number("buffer", buffer, validate.Limit(f"a number in [0, max_len = {max_len}]", 0, max_len))
    over = lengths.float() - (max_len - buffer)
    share = over.clamp(min=0.0) / buffer if buffer else (over > 0).float()
    return -factor * (share.clamp(max=1.0) if bounded else share)
