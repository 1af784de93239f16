"""The ``reference`` backend of ``token_loss``: the oracle behind a kernel's interface, by autograd alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.kernels.formulas import SURROGATES
from rlfast.ops.loss_records import (
    LEVELS,
    METRICS,
    REDUCTIONS,
    UNITS,
    Fields,
    Output,
    Plan,
    Settings,
    allocate,
)
from rlfast.reference import surrogates
from rlfast.reference.token_loss import token_loss as oracle

TENSORS = ("logp", "old_logp", "ref_logp", "rollout_logp", "adv", "entropy", "weights", "extra", "mask", "keep")


def options(plan: Plan, s: Settings, estimator: str, kl_hyper) -> dict:
    """A plan and its settings in the oracle's words."""
    return s._asdict() | {
        "unit": UNITS[plan.unit], "signed": bool(plan.signed), "mean_adv": bool(plan.mean_adv),
        "kl": (estimator + "+" * plan.kl_through) or None, "kl_d_max": kl_hyper[0], "kl_max": kl_hyper[1],
        "kl_ratio": (None, "unit", "token", "score")[plan.kl_ratio], "reduce": REDUCTIONS[plan.reduce],
        "count_empty": bool(plan.count_empty), "entropy_mean": bool(plan.entropy_mean), "weight": LEVELS[plan.weight],
        "weight_in_ratio": bool(plan.weight_in_ratio), "gate": LEVELS[plan.gate], "gate_kind": f"k{plan.gate_kind}",
        "gate_masks": bool(plan.gate_masks),
    }  # fmt: skip


def named(surrogate: str, hyper) -> dict:
    """Hyper-parameters by their names."""
    found = SURROGATES[surrogate].hyper(*hyper)._asdict()
    found.pop("unused", None)
    return found


def padded(fields: Fields) -> tuple[dict, torch.Tensor]:
    """(the fields as [rows, T], which of those are tokens): packed rows are unpacked."""
    found = {name: getattr(fields, name) for name in TENSORS}
    if fields.cu_seqlens is None:
        found = {k: x if x is None or x.dim() == 2 else x.unsqueeze(0) for k, x in found.items()}
        return found, torch.ones_like(found["logp"], dtype=torch.bool)
    lengths = fields.cu_seqlens.diff()
    width = int(lengths.max()) if lengths.numel() else 0
    real = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)

    def unpacked(x):
        return None if x is None else x.new_zeros(real.shape).masked_scatter(real, x)

    found = {k: unpacked(x) for k, x in found.items()}
    found["mask"] = real if found["mask"] is None else found["mask"] & real
    return found, real


def _forward(fields: Fields, surrogate: str, estimator: str, plan, settings, hyper, kl_hyper, needs) -> Output:
    plan, s = Plan(*plan), Settings(*settings)
    if fields.coefs is not None:
        s = s._replace(beta=s.beta * fields.coefs[0], entropy_coef=s.entropy_coef * fields.coefs[1])
    found, real = padded(fields)
    leaves = [found[name] for name in ("logp", "entropy")]
    leaves = [x if x is None else x.detach().to(allocate(fields, (False, False)).loss.dtype) for x in leaves]
    out = allocate(fields, needs)
    with torch.enable_grad():
        leaves = [x if x is None else x.requires_grad_() for x in leaves]
        loss, metrics = oracle(
            **found | {"logp": leaves[0], "entropy": leaves[1]}, num_items=fields.num_items, surrogate=surrogate,
            hyper=named(surrogate, hyper), **options(plan, s, estimator, kl_hyper),
        )  # fmt: skip
        wanted = [x for x, need in zip(leaves, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True) if wanted and loss.requires_grad else ())
    for need, target, name in zip(needs, out[2:], ("scale", "entropy_scale"), strict=True):
        if need:
            g = next(grads, None)
            target.copy_((torch.zeros_like(real, dtype=target.dtype) if g is None else g)[real].view(target.shape))
            target /= metrics[name]
    out.loss.copy_(loss.detach())
    out.metrics.copy_(torch.stack([metrics[name].to(out.metrics) for name in METRICS]))
    return out


def _why_not(surrogate: str) -> str | None:
    return None if hasattr(surrogates, surrogate) else f"the oracle has no {surrogate!r}"


token_loss = SimpleNamespace(forward=_forward, why_not=_why_not)
