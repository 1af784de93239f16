"""The ``reference`` backend of the divergence ops: their oracles behind a kernel's interface, by autograd alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.ops.divergence_records import KINDS, Measure, allocate, candidates_of, student_rows
from rlfast.ops.oracle_linear import summed
from rlfast.ops.records import ENTROPY
from rlfast.reference.divergence import divergence as oracle
from rlfast.reference.linear_divergence import linear_divergence as linear_oracle


def _options(targets, mask, transform, other, measure: Measure) -> dict:
    names = ("temperature", "softcap", "logit_scale")
    own = dict(zip(names, (transform.temperature, transform.softcap or None, transform.logit_scale), strict=True))
    ref = (other.temperature, other.softcap or None, other.logit_scale)
    own |= dict(zip((f"ref_{name}" for name in names), ref, strict=True))
    return own | {"targets": targets, "mask": mask, "kind": KINDS[measure.kind], "beta": measure.beta}


def _fill(like, lead, targets, outputs: int, values: dict):
    out = allocate(like, lead, targets, outputs)
    out.aux.zero_()
    if outputs & ENTROPY:
        out.aux[student_rows(candidates_of(targets, len(lead)), outputs) - 1] = values["entropy"]
    for name, x in out._asdict().items():
        if x is not None and name != "aux":
            x.copy_(values[name])
    return out


def _pull(values: dict, grads: tuple, leaves: list):
    named = zip(("value", "logp", "lse", "entropy"), grads, strict=True)
    outputs = [(values[name], g) for name, g in named if g is not None]
    return torch.autograd.grad([v for v, _ in outputs], leaves, [g.to(v.dtype) for v, g in outputs])


def _forward(logits, ref_logits, targets, mask, transform, ref_transform, measure, outputs):
    values = oracle(logits, ref_logits, **_options(targets, mask, transform, ref_transform, measure))
    return _fill(logits, tuple(logits.shape[:-1]), targets, outputs, values)


def _backward(own, other, targets, mask, transform, other_transform, measure, saved, grads, out):
    with torch.enable_grad():
        leaf = own.detach().requires_grad_()
        options = _options(targets, mask, transform, other_transform, measure)
        # in float64: where few outcomes are left autograd's float32 terms all but cancel
        (gradient,) = _pull(oracle(leaf, other.detach(), dtype=torch.float64, **options), grads, [leaf])
    out.copy_(gradient)


def _linear(head, ref_head, options):
    return linear_oracle(head[0], head[1], ref_head[0], ref_head[1], head[2], ref_head[2], **options)


def _linear_forward(head, ref_head, targets, mask, transform, ref_transform, measure, outputs, keep):
    values = _linear(head, ref_head, _options(targets, mask, transform, ref_transform, measure))
    out = _fill(head.hidden, (head.hidden.shape[0],), targets, outputs, values)
    shape = (head.hidden.shape[0], head.weight.shape[0]) if keep else (0,)
    return out, *(head.hidden.new_empty(shape, dtype=out.value.dtype) for _ in range(2))


def _linear_backward(
    own, other, targets, mask, transform, other_transform, measure, saved, grads, needs, kept, other_kept, sums, dtype
):
    with torch.enable_grad():
        leaves = [x if x is None else x.detach().to(dtype).requires_grad_() for x in own]
        other = [x if x is None else x.detach().to(dtype) for x in other]
        values = _linear(leaves, other, _options(targets, mask, transform, other_transform, measure))
        pulled = iter(_pull(values, grads, [x for x, need in zip(leaves, needs, strict=True) if need]))
    found = [next(pulled) if need else own.hidden.new_empty(0, dtype=dtype) for need in needs]
    return tuple(found) if sums is None else summed(found, needs, sums)


divergence = SimpleNamespace(forward=_forward, backward=_backward)
linear_divergence = SimpleNamespace(forward=_linear_forward, backward=_linear_backward)
