"""The ``rlfast::group_advantage`` op: schema, backend choice, fake kernel. Not differentiable: rewards are constants.

A backend module provides

    forward(inputs, options) -> (advantages, statistics)

with the records of ``group_records.py``. Over the valid samples of a group of n, in float64,

    A_i = (r_i − b) / (s + eps)
    b   MEAN: Σr/n;  LEAVE_ONE_OUT: (Σr − r_i)/(n − 1);  WEIGHTED: Σwr/Σw;  SOFT: τ·log(Σ exp(r/τ)/n)
        SECOND: the second largest, for the first that has the largest; the others get 0
    s   UNSCALED: 1, without eps;  STD: of the group;  OTHERS_STD: of the group without i

A sample that is masked gets 0 and has no effect.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.ops.dispatch import LIB, unobserved
from rlfast.ops.group_records import Inputs, Options, allocate

NAME = "group_advantage"

LIB.define(
    "group_advantage(Tensor rewards, Tensor? ids, Tensor? mask, Tensor? weights, int group_size, int baseline,"
    " int scale, bool bessel, bool lone_raw, bool skip_zero, float eps, float tau, str backend) -> (Tensor, Tensor)",
)
op = torch.ops.rlfast.group_advantage.default
TENSORS = len(Inputs._fields)


def _forward(*args):
    x, backend = Inputs(*args[:TENSORS]), args[-1]
    kernel = backends.implementation(NAME, backends.select(NAME, x.rewards.device.type, x.rewards.dtype, backend))
    return kernel.forward(x, Options(*args[TENSORS:-1]))


def _fake(*args):
    return allocate(Inputs(*args[:TENSORS]))


def call(*args):
    """The op; past the dispatcher where nobody would see it there: see ``token_logps.py``."""
    if torch.compiler.is_compiling() or not unobserved(*args[:TENSORS]):
        return op(*args)
    return _forward(*args)


for _key in ("CPU", "CUDA"):
    LIB.impl("group_advantage", _forward, _key)
torch.library.register_fake("rlfast::group_advantage", _fake, lib=LIB)
