"""Estimates of the KL to a reference policy, a token at a time."""

from __future__ import annotations

import torch

from rlfast import validate
from rlfast.full_kl import FULL
from rlfast.kernels.formulas import ESTIMATORS
from rlfast.ops import kl_estimate
from rlfast.ops.dispatch import first_derivatives_only
from rlfast.presets import kl_bounds, trainer

KL_KINDS = (*ESTIMATORS, *(f"{name}+" for name in ESTIMATORS))
ALIASES = {"abs": "absolute", "abs+": "absolute+"}  # as verl calls it


def estimator(argument: str, name, known: tuple[str, ...] = KL_KINDS) -> str:
    """One of ``KL_KINDS``, by its name or another."""
    if name in tuple(ALIASES):
        return ALIASES[name]
    return validate.one_of(argument, name, known)


def of_loss(argument: str, name) -> str:
    """What a loss may have for its KL."""
    return estimator(argument, name, (*KL_KINDS, FULL))


class _Estimate(torch.autograd.Function):
    """The value of an estimator, with its own gradient by log π or, with a "+", that of k2."""

    @staticmethod
    def forward(ctx, logp, ref_logp, kind, bounds):
        acc = torch.promote_types(torch.promote_types(logp.dtype, ref_logp.dtype), torch.float32)
        d = ref_logp.to(acc) - logp.to(acc)
        value, derivative = kl_estimate.op(d, kind.removesuffix("+"), *bounds)
        ctx.save_for_backward(-d if kind.endswith("+") else derivative)
        ctx.dtype = logp.dtype
        return value

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        (derivative,) = ctx.saved_tensors
        return (g * derivative).to(ctx.dtype), None, None, None


def kl_penalty(logp, ref_logp, *, kind="k3", like=None):
    """An estimate of KL(π‖π_ref) at each token, differentiable by ``logp``.

        d = log π_ref − log π:   k1 = −d,   k2 = d²/2,   k3 = e^d − 1 − d,   absolute = |d|

    Args:
        logp: any shape, float. log π of the sampled tokens, with gradient.
        ref_logp: like logp. log π_ref of the same tokens.
        kind: "k1", "k2", "k3" or "absolute" ("abs"); with a "+", its value with the gradient of k2, that of the
            KL on-policy.
        like: "trl", "verl", "openrlhf", "nemo-rl" or "liger": with that trainer's bounds on d and on the estimate.

    Returns:
        like logp, float32 (float64 where an input is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or name; the message names it.

    Reference:
        Schulman, http://joschu.net/blog/kl-approx.html.

    Example:
        >>> logp, ref_logp = torch.tensor([-1.0, -0.5, -2.0, -0.1]), torch.tensor([-1.1, -0.7, -1.9, -0.3])
        >>> round(rlfast.kl_penalty(logp, ref_logp).mean().item(), 6)
        0.011867
    """
    validate.tensor("logp", logp)
    validate.like("ref_logp", ref_logp, "logp", logp)
    kind = estimator("kind", kind)
    given = kl_bounds(trainer(like), kind) if like is not None else {}
    bounds = tuple(given.get(name, float("inf")) for name in ("kl_d_max", "kl_max"))
    return _Estimate.apply(logp, ref_logp.detach(), kind, bounds)
