"""The exact KL to the reference as a term of a policy loss.

    loss = factor/n · Σ_t m_t·c_t·(s_t·ρ_t·w_t − entropy_coef·H_t) + factor/n · Σ_t m_t·c_t·beta·KL_t

The KL of a token is a function of its whole distribution, as its entropy is, and so it takes the entropy's place in a
second launch, which has no surrogate: one formula, and no kernel of its own.
"""

from __future__ import annotations

import torch

from rlfast.ops import token_loss as op
from rlfast.ops.loss_records import METRICS, Fields, Output, Settings

FULL = "full"  # the name of this KL among the estimators
LOSS, KL, ENTROPY = map(METRICS.index, ("loss", "kl", "entropy"))


def term(prepared, beta: float, fields: Fields, settings: Settings, full_kl, needs_grad: bool, backend: str) -> Output:
    """The second sum, its gradient as ``dentropy``.

    Args:
        prepared: of the loss.
        beta: the KL's weight, or 1 where the fields' ``coefs`` have it.
        fields, settings: of the call; what a field does to the surrogate alone is left out.
        full_kl: like logp, KL(π‖π_ref) of each token.
        needs_grad: whether its gradient is needed.
        backend: that was asked for.
    """
    nothing = torch.zeros_like(fields.logp, requires_grad=False, memory_format=torch.contiguous_format)
    coefs = None if fields.coefs is None else fields.coefs.flip(0)
    fields = fields._replace(
        logp=fields.logp.detach(), entropy=full_kl, weights=nothing, ref_logp=None, keep=None, coefs=coefs
    )
    plan, settings = prepared.plan._replace(entropy_mean=0), settings._replace(entropy_coef=-beta)
    return op.call(
        *fields, prepared.surrogate, "", plan, settings, prepared.hyper, prepared.bounds, (False, needs_grad), backend
    )


def added(out: Output, kl: Output) -> Output:
    """A loss without its KL, and the KL."""
    metrics = out.metrics.clone()
    metrics[LOSS] += kl.metrics[LOSS]
    metrics[KL] = kl.metrics[ENTROPY]
    return out._replace(loss=out.loss + kl.loss, metrics=metrics)
