"""Losses of a critic: squared error, Huber, and cross-entropy over bins; the value of a policy near a prior."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast import limits, validate
from rlfast.logps import token_logps
from rlfast.loss_outputs import LossMetrics, LossOutput
from rlfast.losses import Loss
from rlfast.ops.loss_records import METRICS, REDUCTIONS
from rlfast.presets import VALUES

KINDS = ("mse", "huber", "categorical")
# What a launch says of a critic; the rest of its metrics is about policies.
MEANT = ("loss", "scale", "tokens", "sequences", "clip_high", "dropped")
SAID = tuple(name if name in MEANT else None for name in METRICS)


def two_hot(returns, support):
    """A return as weights on the two bins around it: (index of the lower, weight of the upper).

    Args:
        returns: any shape, float.
        support: [bins], ascending centres of the bins, of the same dtype. A return beyond them is at the outermost.
    """
    returns = returns.clamp(support[0], support[-1])
    low = (torch.searchsorted(support, returns.contiguous(), right=True) - 1).clamp(0, support.shape[0] - 2)
    return low, (returns - support[low]) / (support[low + 1] - support[low])


def _centres(support, bins: int, like) -> torch.Tensor:
    """The bins' centres, from (low, high) or as they are, in the dtype of ``like``."""
    if not isinstance(support, torch.Tensor):
        wanted = "(low, high) with low < high, or a tensor [bins]"
        if not isinstance(support, tuple | list) or len(support) != 2:
            validate.fail("support", wanted, repr(support))
        low, high = (validate.number("support", x, limits.FINITE) for x in support)
        if not low < high:
            validate.fail("support", wanted, repr(support))
        return torch.linspace(low, high, bins, dtype=like.dtype, device=like.device)
    validate.tensor("support", support)
    if support.shape != (bins,):
        validate.fail("support", f"shape ({bins},), one centre a bin", validate.shape(support))
    validate.same_device("support", support, "values", like)
    support = support.to(like.dtype)
    if validate.looked_at(support) and not bool((support[1:] > support[:-1]).all()):
        validate.fail("support", "centres that ascend", str(support.tolist()[:8]))
    return support


def _categorical_logp(values, returns, mask, support):
    """Σ of the two bins' weights times their log-probs: minus the cross-entropy. [B, T]."""
    if values.shape[:-1] != returns.shape:
        validate.fail("values", f"logits of shape {(*returns.shape, 'bins')}", validate.shape(values))
    bins = values.shape[-1]
    if bins < 2:
        validate.fail("values", "at least two bins", str(bins))
    counted = validate.counted(mask, "returns", returns)
    returns = torch.where(counted, returns.to(torch.promote_types(returns.dtype, torch.float32)), 0.0)
    low, weight = two_hot(returns, _centres(support, bins, returns))
    weight = torch.where(counted, weight, 0.0)
    candidates = torch.where(counted[..., None], torch.stack([low, low + 1], -1), -100)
    logp = token_logps(values, candidates).logp
    return (1.0 - weight) * logp[..., 0] + weight * logp[..., 1]


def _objective(kind: str, clip, delta: float, reduce: str) -> Loss:
    # V and V_old are no log-probs, and their difference is no ratio
    shared = {"reduce": reduce, "unit_low": 0.0, "unit_high": 0.0, "name": "value_loss"}
    if kind == "categorical":
        return Loss("nll", reduce=reduce, name="value_loss")
    bound = {} if clip is None else {"clip": validate.positive("clip", clip)}
    if kind == "huber":
        return Loss("value_huber", {"delta": validate.positive("delta", delta)} | bound, **shared)
    return Loss("value_clipped", bound, **shared)


def _said(out: LossOutput) -> LossOutput:
    return out._replace(metrics=LossMetrics(out.metrics.values, SAID))


def value_loss(
    values, old_values, returns, mask=None, *, clip=..., kind="mse", delta=1.0, support=None, reduce=None, like=None,
    cu_seqlens=None, num_items=None, max_len=None, world_size=1, accumulation=1,
) -> LossOutput:  # fmt: skip
    """The loss of a critic, clipped as PPO clips it.

        mse:          ½·max((V − R)², (V_c − R)²),   V_c = clip(V, V_old − c, V_old + c)
        huber:        ½·e² where |e| ≤ δ, else δ·(|e| − ½δ),   e the larger of V − R and V_c − R
        categorical:  −Σ_b w_b·log softmax(V)_b,   w the two bins around R, weighted so that their mean is R

    Args:
        values: [B, T], or [N] packed with ``cu_seqlens``; float, with gradient. Logits [B, T, bins] or [N, bins] for
            "categorical".
        old_values: like returns. V_old; None where nothing is clipped.
        returns: [B, T] or [N] float. R.
        mask: like returns, bool or number. 0 takes a token out; what it holds has no effect.
        clip: how far V may move from V_old; None for no bound. If left out 0.2, or the trainer's.
        kind: "mse", "huber" or "categorical", which is never clipped.
        delta: δ of "huber".
        support: of "categorical": (low, high) of evenly spaced centres of the bins, or the centres [bins], ascending
            (on a GPU, and in compiled code, that is not looked at).
        reduce: of ``rlfast.Loss``; "token_mean" if None.
        like: "trl", "verl", "openrlhf" or "nemo-rl": that trainer's clip and reduction.
        cu_seqlens, num_items, max_len, world_size, accumulation: as in a call of ``rlfast.Loss``.

    Returns:
        LossOutput(loss, metrics). ``clip_high`` is the part of the tokens whose clipped loss is the larger; of the
        metrics of a policy there are only those that mean something here.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or name; the message names it.

    Reference:
        arXiv 1707.06347; the cross-entropy, 2403.03950.

    Example:
        >>> values, returns = torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 1.0]])
        >>> round(rlfast.value_loss(values, torch.tensor([[0.0, 1.0]]), returns, clip=0.2).loss.item(), 6)
        0.16
    """
    validate.one_of("kind", kind, KINDS)
    defaults = VALUES[validate.one_of("like", like, tuple(VALUES))]
    reduce = validate.one_of("reduce", defaults["reduce"] if reduce is None else reduce, REDUCTIONS)
    given = clip is not ...
    clip = clip if given else defaults["clip"]
    for name, x in (("values", values), ("returns", returns)):
        validate.tensor(name, x)
    call = {"mask": mask, "cu_seqlens": cu_seqlens, "num_items": num_items, "max_len": max_len,
            "world_size": world_size, "accumulation": accumulation}  # fmt: skip
    returns = returns.detach()
    if kind == "categorical":
        if given and clip is not None:
            validate.fail("clip", 'None for kind="categorical", which is never clipped', repr(clip))
        return _said(_objective(kind, None, delta, reduce)(_categorical_logp(values, returns, mask, support), **call))
    validate.like("returns", returns, "values", values)
    call["mask"] = validate.mask_like(mask, "values", values)
    if clip is not None:
        if old_values is None:
            validate.fail("old_values", "a tensor: values are clipped to it", "None")
        old_values = validate.like("old_values", old_values, "values", values).detach()
    old_values = None if clip is None else old_values
    return _said(_objective(kind, clip, delta, reduce)(values, old_logp=old_values, adv=returns, **call))


class RegularizedValue(NamedTuple):
    """The best value of a state with the KL to a prior taken off, and the policy that has it."""

    value: torch.Tensor  # [*]
    logp: torch.Tensor  # [*, A]: log π of that policy


def regularized_value(q, prior_logp, *, lam) -> RegularizedValue:
    """The value of a state whose policy is held near a prior, such as what a language model would do.

        V = λ·log Σ_a π_0(a)·e^{Q(a)/λ} = max_π Σ_a π(a)·Q(a) − λ·KL(π‖π_0);   π(a) = π_0(a)·e^{(Q(a) − V)/λ}

    ∂V/∂Q(a) = π(a). The target of a regularised Q-learning step is r + γV(s').

    Args:
        q: [*, A] float. Q of each action, with gradient.
        prior_logp: like q. log π_0 up to a constant, for it is normalised over the actions here, as the log-probs of
            candidate actions by ``Engine.choose`` want it. −inf where there is no such action. No gradient.
        lam: λ > 0. Towards 0 it is max_a Q; large, Σ_a π_0(a)·Q(a).

    Returns:
        RegularizedValue(value [*], logp [*, A]), float32 (float64 where an input is); differentiable in q.

    Raises:
        ValueError, TypeError: a shape or a type is wrong, or lam is no float > 0; the message names it.

    Reference:
        LINVIT, arXiv 2402.16181.

    Example:
        >>> found = rlfast.regularized_value(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, -2.0]), lam=1.0)
        >>> found.value, found.logp.exp()
        (tensor(0.6201), tensor([0.7311, 0.2689]))
    """
    lam = validate.positive("lam", lam)
    validate.tensor("q", q)
    if not q.dim() or not q.shape[-1]:
        validate.fail("q", "shape [*, A], with one action at least", validate.shape(q))
    validate.like("prior_logp", prior_logp, "q", q)
    acc = torch.promote_types(torch.promote_types(q.dtype, prior_logp.dtype), torch.float32)
    prior = torch.log_softmax(prior_logp.detach().to(acc), -1)
    q = torch.where(prior == -torch.inf, 0.0, q.to(acc))  # what an action that is not there holds has no effect
    top = q.detach().amax(-1, keepdim=True)  # (Q − top)/λ keeps its digits where Q/λ is large
    scaled = prior + (q - top) / lam
    total = torch.logsumexp(scaled, -1)
    return RegularizedValue(top[..., 0] + lam * total, scaled - total[..., None])
