"""The ``rlfast::ranked_loss`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(groups, form, settings, reduce, most, out) -> None

which fills ``out``; the records are those of ``ranked_records``, a form is a formula of
``rlfast.kernels.formulas.RANKINGS``. ``most`` is the number of candidates a group; of packed groups the caller's bound
on it, or 0. Per group of K ≥ 2 candidates that count, where everything but s is constant:

    x = beta·(s − s_ref)/divisor
    ℓ = w·[form(x, rewards) − nll·(K − 1)²·s_best]
    loss = factor/n · Σ ℓ

A group of one candidate or none has the loss 0. Sums are in a fixed order.
"""

from __future__ import annotations

import torch

from rlfast.ops.dispatch import LIB, unobserved
from rlfast.ops.ranked_records import Groups, Output, Settings, allocate
from rlfast.ops.response_losses import kernel_of, with_one_gradient

NAME = "ranked_loss"
TENSORS = len(Groups._fields)

_FIELDS = ", ".join(f"Tensor{'' if name == 'scores' else '?'} {name}" for name in Groups._fields)
LIB.define(
    f"ranked_loss({_FIELDS}, str form, float[] settings, int reduce, int most, bool[2] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

op = torch.ops.rlfast.ranked_loss.default


def _forward(*args):
    form, settings, reduce, most, needs, backend = args[TENSORS:]
    groups = Groups(*args[:TENSORS])
    out = allocate(groups, needs)
    kernel = kernel_of(NAME, groups.scores, most, backend)
    if groups.cu_seqlens is not None and out.d_scores.numel():
        out.d_scores.zero_()  # a packed candidate need not be in a group
    kernel.forward(groups, form, Settings(*settings), reduce, most, out)
    return tuple(out)


def _fake_forward(*args):
    return tuple(allocate(Groups(*args[:TENSORS]), args[-2]))


def _below_autograd(*args):
    if unobserved(*args[:TENSORS]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _with_autograd(*args):
    return with_one_gradient(NAME, _below_autograd, args)


def call(*args) -> Output:
    """The op. In eager mode its autograd kernel is called from here, past the dispatcher."""
    return Output(*(op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)))


for _key in ("CPU", "CUDA"):
    LIB.impl("ranked_loss", _forward, _key)
LIB.impl("ranked_loss", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::ranked_loss", _fake_forward, lib=LIB)
