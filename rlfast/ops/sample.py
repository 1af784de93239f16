"""The ``rlfast::sample`` op: schema, backend choice, fake kernel. Not differentiable: a token is drawn.

A backend module provides

    forward(inputs) -> Outputs

with the records of ``sample_records.py``. Of each row x [V] in float32, or float64:

    w       x with its edits, the last of equal ids; −inf where an id is not allowed
    q       softmax(w / T)
    kept    the ids with w ≥ the k-th largest; of those, renormalised, the most probable whose mass reaches top_p, with
            the ties of the last of them; of those q ≥ min_p·max q
    token   the first argmax over kept of (w_v − max w)/T − log(−log u_v)
    u_v     (n + ½)·2⁻²⁴, n the upper 24 bits of word v % 4 of philox4x32-10(key: the seed, counter: the position's low
            and high word, v / 4, 0)

The outputs of a token t are log softmax(x)_t, log q_t / Σ_kept q, Σ_kept q, and the entropy of softmax(x). The first
and the last have the bits that ``token_logps`` gives. T = 0 takes the first argmax of w, log-prob 0, kept softmax(w)_t.
A row with NaN or +inf, and one with nothing that is finite and allowed, has token −1 and NaN.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.dispatch import LIB, unobserved
from rlfast.ops.sample_records import Inputs, Outputs, allocate

NAME = "sample"

LIB.define(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds,"
    " Tensor positions, Tensor? edit_ends, Tensor? edit_ids, Tensor? edit_values, Tensor? allowed, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
op = torch.ops.rlfast.sample.default


def _forward(*args) -> Outputs:
    x, backend = Inputs(*args[:-1]), args[-1]
    kernel = backends.implementation(NAME, backends.select(NAME, x.logits.device.type, x.logits.dtype, backend))
    return kernel.forward(x)


def _fake(*args) -> Outputs:
    return allocate(Inputs(*args[:-1]))


def call(*args):
    """The op; past the dispatcher where nobody would see it there: see ``token_logps.py``."""
    if torch.compiler.is_compiling() or not unobserved(*args[:-1]):
        return op(*args)
    return _forward(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("sample", _forward, _key)
torch.library.register_fake("rlfast::sample", _fake, lib=LIB)
