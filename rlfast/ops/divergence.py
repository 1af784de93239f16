"""The ``rlfast::divergence`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(logits, ref_logits, targets, mask, transform, ref_transform, measure, outputs) -> Outputs
    backward(own, other, targets, mask, transform, other_transform, measure, saved, grads, out) -> None

with logits and ref_logits [*lead, V] of one dtype and of one or two leading dimensions, each of any stride, the last
contiguous; targets int64 and contiguous, [*lead] or [*lead, K], or None; mask bool [*lead] or None: the rows that are
not
skipped, those whose targets are all −100 among the skipped. ``own`` is the side whose gradient is written to ``out``
[*lead, V]: the student's or the teacher's logits, with the measure as that side sees it (``Measure.swapped``).
``grads`` is
(g_value, g_logp, g_lse, g_entropy), each contiguous, or None; the teacher has no g_logp and no g_entropy.

S = p of the own side, T of the other:
    KL(T‖S)   ∂/∂z_j = S_j − T_j
    KL(S‖T)   ∂/∂z_j = S_j·(log S_j − log T_j − KL(S‖T)) = S_j·(gap_j − E_S[gap])
    JSD_β     ∂/∂z_j = (1 − β)·S_j·(log S_j − log M_j − KL(S‖M))
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode
from rlfast.ops.divergence_records import Measure, Outputs, Saved, allocate, candidates_of, saved_of
from rlfast.ops.records import ENTROPY, Transform

NAME = "divergence"
OPTIONS = (
    "Tensor? temperatures, Tensor? ref_temperatures, float temperature, float ref_temperature, float softcap,"
    " float ref_softcap, float logit_scale, float ref_logit_scale, int kind, float beta"
)
SAVED = "Tensor aux, Tensor other_aux, Tensor centre"
GRADS = "Tensor? g_value, Tensor? g_logp, Tensor? g_lse, Tensor? g_entropy"

_TAGS = (torch.Tag.needs_fixed_stride_order,)
LIB.define(
    f"divergence(Tensor logits, Tensor ref_logits, Tensor? targets, Tensor? mask, {OPTIONS}, int outputs, str backend)"
    " -> Tensor[]",
    tags=_TAGS,
)
LIB.define(
    f"divergence_backward(Tensor own, Tensor other, Tensor? targets, Tensor? mask, {OPTIONS}, {SAVED}, {GRADS},"
    " str backend) -> Tensor",
    tags=_TAGS,
)

op = torch.ops.rlfast.divergence.default
op_backward = torch.ops.rlfast.divergence_backward.default


def records(options) -> tuple[Transform, Transform, Measure]:
    """The ten arguments of ``OPTIONS`` as records: own transform, other transform, measure."""
    temperatures, ref_temperatures, temperature, ref_temperature, softcap, ref_softcap, scale, ref_scale, *kind = (
        options
    )
    own = Transform(temperature if temperatures is None else temperatures, softcap, scale)
    other = Transform(ref_temperature if ref_temperatures is None else ref_temperatures, ref_softcap, ref_scale)
    return own, other, Measure(*kind)


def swapped(options) -> tuple:
    """The ten arguments of ``OPTIONS`` as the teacher's side sees them."""
    t, ref_t, temperature, ref_temperature, softcap, ref_softcap, scale, ref_scale, *kind = options
    kind = Measure(*kind).swapped()
    return (ref_t, t, ref_temperature, temperature, ref_softcap, softcap, ref_scale, scale, *kind)


def _kernel(x, backend):
    return backends.implementation(NAME, backends.select(NAME, x.device.type, x.dtype, backend))


def _forward(logits, ref_logits, targets, mask, *rest):
    *options, outputs, backend = rest
    out = _kernel(logits, backend).forward(logits, ref_logits, targets, mask, *records(options), outputs)
    return out.asked()


def _fake_forward(logits, ref_logits, targets, mask, *rest):
    return allocate(logits, tuple(logits.shape[:-1]), targets, rest[-2]).asked()


def _backward(own, other, targets, mask, *rest):
    *options, aux, other_aux, centre, g_value, g_logp, g_lse, g_entropy, backend = rest
    grads = tuple(g if g is None else g.contiguous() for g in (g_value, g_logp, g_lse, g_entropy))
    out = _fake_backward(own)
    saved = Saved(aux, other_aux, centre)
    _kernel(own, backend).backward(own, other, targets, mask, *records(options), saved, grads, out)
    return out


def _fake_backward(own, *_):
    return torch.empty(own.shape, dtype=own.dtype, device=own.device)


def sides(grads, outputs: int, targets, lead: int, aux, options) -> tuple:
    """(what the backward of the student's side takes, of the teacher's): (options, saved, grads), None: no gradient.

    ``grads`` are those of every output of the op.
    """
    g = Outputs.named(grads, targets is not None, outputs)
    k = candidates_of(targets, lead)
    student = (g.value, g.logp, g.lse, g.entropy)
    teacher = (g.value, None, g.ref_lse, None)
    found = []
    for is_teacher, mine in ((False, student), (True, teacher)):
        if all(x is None for x in mine):
            found.append(None)
            continue
        seen = swapped(options) if is_teacher else tuple(options)
        found.append((seen, saved_of(aux, k, outputs & ENTROPY, is_teacher), mine))
    return tuple(found)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        logits, ref_logits, targets, mask, *options, outputs, backend = args
        with torch._C._AutoDispatchBelowAutograd():
            asked = op(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(asked[1])
        ctx.save_for_backward(logits, ref_logits, targets, mask, *options[:2], asked[1])
        ctx.options, ctx.outputs, ctx.backend = options[2:], outputs, backend
        return tuple(asked)

    @staticmethod
    @first_derivatives_only
    def backward(ctx, *grads):
        logits, ref_logits, targets, mask, *temperatures, aux = ctx.saved_tensors
        options = (*temperatures, *ctx.options)
        student, teacher = sides(grads, ctx.outputs, targets, logits.dim() - 1, aux, options)
        found = [None, None]
        if student is not None and ctx.needs_input_grad[0]:
            seen, saved, mine = student
            found[0] = op_backward(logits, ref_logits, targets, mask, *seen, *saved, *mine, ctx.backend)
        if teacher is not None and ctx.needs_input_grad[1]:
            seen, saved, mine = teacher
            found[1] = op_backward(ref_logits, logits, None, mask, *seen, *saved, *mine, ctx.backend)
        return (*found, *(None,) * 14)


def _with_autograd(*args):
    refuse_forward_mode(NAME, *args[:2])
    if torch.is_grad_enabled() and any(x.requires_grad for x in args[:2]):
        return list(_Divergence.apply(*args))
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("divergence", _forward, _key)
    LIB.impl("divergence_backward", _backward, _key)
LIB.impl("divergence", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::divergence", _fake_forward, lib=LIB)
torch.library.register_fake("rlfast::divergence_backward", _fake_backward, lib=LIB)
