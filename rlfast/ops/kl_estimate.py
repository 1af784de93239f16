"""The ``rlfast::kl_estimate`` op: an estimator's formula, which a compiler cannot look into, behind a schema."""

from __future__ import annotations

import torch

from rlfast.kernels.formulas import ESTIMATORS
from rlfast.kernels.formulas.kl import KlBounds
from rlfast.kernels.lang import torch_version
from rlfast.ops.dispatch import LIB

LIB.define("kl_estimate(Tensor d, str estimator, float d_max, float kl_max) -> (Tensor, Tensor)")

op = torch.ops.rlfast.kl_estimate.default


def _forward(d, estimator: str, d_max: float, kl_max: float):
    """(the estimate, its derivative by log π)."""
    value, derivative = torch_version(ESTIMATORS[estimator])(d, KlBounds(d_max, kl_max))
    return value, torch.as_tensor(derivative).to(d).expand_as(d).contiguous()


def _fake(d, estimator, d_max, kl_max):
    return torch.empty_like(d), torch.empty_like(d, memory_format=torch.contiguous_format)


for _key in ("CPU", "CUDA"):
    LIB.impl("kl_estimate", _forward, _key)
torch.library.register_fake("rlfast::kl_estimate", _fake, lib=LIB)
