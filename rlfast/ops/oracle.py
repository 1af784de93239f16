"""The ``reference`` backend: the oracles of ``rlfast/reference`` behind a kernel's interface, by autograd alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.ops.oracle_attention import paged_attention  # noqa: F401
from rlfast.ops.oracle_divergence import divergence, linear_divergence  # noqa: F401
from rlfast.ops.oracle_group import group_advantage  # noqa: F401
from rlfast.ops.oracle_linear import linear, summed  # noqa: F401
from rlfast.ops.oracle_loss import token_loss  # noqa: F401
from rlfast.ops.oracle_preference import pair_loss, unpaired_loss  # noqa: F401
from rlfast.ops.oracle_ranked import ranked_loss  # noqa: F401
from rlfast.ops.oracle_sample import sample  # noqa: F401
from rlfast.ops.oracle_scan import affine_scan  # noqa: F401
from rlfast.ops.records import Outputs, Row, Transform, Wanted, allocate
from rlfast.reference.linear_token_logps import linear_token_logps as linear_oracle
from rlfast.reference.token_logps import token_logps as oracle


def _options(mask, transform: Transform) -> dict:
    return {
        "mask": mask,
        "temperature": transform.temperature,
        "softcap": transform.softcap or None,
        "logit_scale": transform.logit_scale,
    }


def _fill(like, lead, targets, wanted: Wanted, values: dict) -> Outputs:
    out = allocate(like, lead, targets, wanted)
    out.aux.zero_()
    row = Row.of(targets.shape[-1] if targets.dim() > len(lead) else 1, wanted)
    out.logp.copy_(values["logp"])
    for name in ("entropy", "log_sum_sq_probs", "mean_logits", "tail_mass"):
        if getattr(row, name) >= 0:
            out.aux[getattr(row, name)] = values[name]
    for name in ("lse", "entropy", "is_top1", "topk_logp", "topk_ids"):
        if getattr(out, name).numel():
            getattr(out, name).copy_(values[name])
    return out


def _pull(values: dict, grads: tuple, leaves: list):
    outputs = [(values[name], g) for name, g in zip(("logp", "lse", "entropy"), grads, strict=True) if g is not None]
    return torch.autograd.grad([v for v, _ in outputs], leaves, [g.to(v.dtype) for v, g in outputs])


def _forward(logits, targets, mask, transform, wanted):
    values = oracle(logits, targets, top_k=wanted.top_k or None, **_options(mask, transform))
    return _fill(logits, tuple(logits.shape[:-1]), targets, wanted, values)


def _backward(logits, targets, mask, transform, aux, grads, out):
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (gradient,) = _pull(oracle(leaf, targets, **_options(mask, transform)), grads, [leaf])
    out.copy_(gradient)


def _linear_forward(hidden, weight, bias, targets, mask, transform, wanted, keep):
    options = _options(mask, transform)
    values = linear_oracle(hidden, weight, targets, bias, top_k=wanted.top_k or None, **options)
    out = _fill(hidden, (hidden.shape[0],), targets, wanted, values)
    return out, hidden.new_empty((hidden.shape[0], weight.shape[0]) if keep else (0,), dtype=out.logp.dtype)


def _linear_backward(hidden, weight, bias, targets, mask, transform, aux, grads, needs, kept, sums, dtype):
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        values = linear_oracle(leaves[0], leaves[1], targets, leaves[2], **_options(mask, transform))
        pulled = iter(_pull(values, grads, [x for x, need in zip(leaves, needs, strict=True) if need]))
    found = [next(pulled) if need else hidden.new_empty(0, dtype=dtype) for need in needs]
    return tuple(found) if sums is None else summed(found, needs, sums)


token_logps = SimpleNamespace(forward=_forward, backward=_backward)
linear_token_logps = SimpleNamespace(forward=_linear_forward, backward=_linear_backward)
