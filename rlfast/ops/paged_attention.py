"""The ``rlfast::paged_attention`` op: schema, backend choice, fake kernel. It has no gradient: a cache is a constant.

A backend module provides

    forward(inputs, options) -> [T, H, Dv], contiguous, of q's dtype

with the records of ``attention_records.py``. The query at position p of a sequence sees its keys j ≤ p, and
j > p − window where there is a window; head h reads key head h // (H / Hkv):

    s_j = scale·q·k_j, or softcap·tanh(scale·q·k_j / softcap)       out = Σ_j e^{s_j}·v_j / (Σ_j e^{s_j} + e^{sink_h})

On ``cpu`` and ``triton`` the bits of a query's output depend on its q, its keys and values and the options alone: keys
are taken in splits at absolute positions, each relative to its own peak, and splits are merged in ascending
order. What no query sees is not read, or has no effect. A NaN among the keys or values of a sequence may reach all of
its queries, and those of no other.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.attention_records import Inputs, Options, allocate
from rlfast.ops.dispatch import LIB, unobserved

NAME = "paged_attention"

LIB.define(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor cu_q, Tensor kv_lens,"
    " Tensor? sinks, float scale, float softcap, int window,"
    " bool shared_prefix, str backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
op = torch.ops.rlfast.paged_attention.default
TENSORS = len(Inputs._fields)


def kernel_of(q: torch.Tensor, backend: str):
    """The backend module that serves these queries."""
    return backends.implementation(NAME, backends.select(NAME, q.device.type, q.dtype, backend))


def _forward(*args):
    x = Inputs(*args[:TENSORS])
    return kernel_of(x.q, args[-1]).forward(x, Options(*args[TENSORS:-1]))


def _fake(*args):
    return allocate(Inputs(*args[:TENSORS]))


def _without_gradient(*args):
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args[:TENSORS]):
        raise NotImplementedError(
            "paged_attention: it has no gradient, and an input requires one: call it under torch.no_grad(), or "
            "rlfast.packed_attention, which gives the same bits"
        )
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call(*args):
    """The op; past the dispatcher where nobody would see it there: see ``token_logps.py``."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not unobserved(*args[:TENSORS]):
        return op(*args)
    return _forward(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("paged_attention", _forward, _key)
LIB.impl("paged_attention", _without_gradient, "Autograd")
torch.library.register_fake("rlfast::paged_attention", _fake, lib=LIB)
