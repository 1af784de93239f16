"""The ``rlfast::unpaired_loss`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(side, desirable, rest, terms, settings, reduce, out) -> None

as ``pair_loss`` does, of single responses: desirable is bool [B], and

    ℓ = w·Σ_k weight_k·link_k(s, desirable, extra, shared)
"""

from __future__ import annotations

import torch

from rlfast.ops.dispatch import LIB, unobserved
from rlfast.ops.pair_loss import SIDE, clear_around
from rlfast.ops.preference_records import SINGLE_METRICS, Output, Rest, Settings, Side, allocate, rows_of, terms_of
from rlfast.ops.response_losses import kernel_of, with_one_gradient

NAME = "unpaired_loss"
TENSORS = SIDE + 1 + len(Rest._fields)

_SIDE = ", ".join(f"Tensor{'' if field == 'logp' else '?'} {field}" for field in Side._fields)
LIB.define(
    f"unpaired_loss({_SIDE}, Tensor desirable, {', '.join(f'Tensor? {name}' for name in Rest._fields)}, str[] scores,"
    " bool[] means, str[] links, float[] numbers, float[] settings, int reduce, bool[2] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

op = torch.ops.rlfast.unpaired_loss.default


def _allocated(args) -> Output:
    side, needs = Side(*args[:SIDE]), args[-2]
    return allocate(side.logp, None, rows_of(side), len(SINGLE_METRICS), (needs[0], False, needs[1]), sides=1)


def _asked(out: Output) -> tuple:
    return out.loss, out.metrics, out.d_first, out.losses, out.rewards


def _forward(*args):
    *_, scores, means, links, numbers, settings, reduce, _, backend = args
    side, out = Side(*args[:SIDE]), _allocated(args)
    kernel = kernel_of(NAME, side.logp, (scores, links), backend)
    clear_around(out, side, None)
    terms, settings = terms_of(scores, means, links, numbers), Settings(*settings)
    kernel.forward(side, args[SIDE], Rest(*args[SIDE + 1 : TENSORS]), terms, settings, reduce, out)
    return _asked(out)


def _fake_forward(*args):
    return _asked(_allocated(args))


def _below_autograd(*args):
    if unobserved(*args[:TENSORS]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _with_autograd(*args):
    return with_one_gradient(NAME, _below_autograd, args)


def call(*args) -> Output:
    """The op. In eager mode its autograd kernel is called from here, past the dispatcher."""
    loss, metrics, d, losses, rewards = op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)
    return Output(loss, metrics, d, d.new_empty(0), losses, rewards)


for _key in ("CPU", "CUDA"):
    LIB.impl("unpaired_loss", _forward, _key)
LIB.impl("unpaired_loss", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::unpaired_loss", _fake_forward, lib=LIB)
