"""The only tolerance code of the tests: asserts around ``rlfast.parity.measure``."""

from __future__ import annotations

import torch

from rlfast.parity import Parity, measure


def assert_value(name: str, got, truth, yardstick, size=None) -> Parity:
    """An output against the float64 truth: no further from it than PyTorch in float32, and 4 ulps.

    ``size`` is Σ|terms| of an output that is one sum, whose terms may cancel.
    """
    return _assert(name, got, truth, yardstick, "value", size)


def assert_gradient(name: str, got, truth, yardstick) -> Parity:
    """A gradient against the float64 truth: 1.2 × the error of PyTorch's, 4 ulps, and the rounding of its dtype."""
    return _assert(name, got, truth, yardstick, "gradient")


def _assert(name, got, truth, yardstick, kind, size=None) -> Parity:
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    parity = measure(got, truth, yardstick, kind, size=size)
    assert parity.ok, f"{name} {parity}"
    return parity


def assert_same_bits(name: str, got, expected) -> None:
    """Equal to the last bit, the sign of zero included; NaN equals NaN."""
    assert got.dtype == expected.dtype and got.shape == expected.shape, f"{name}: {got.dtype} {tuple(got.shape)}"
    same = got == expected
    if got.dtype.is_floating_point:
        same = (same & (got.signbit() == expected.signbit())) | (got.isnan() & expected.isnan())
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} elements differ"


def assert_zero(name: str, got) -> None:
    """Exactly 0 everywhere."""
    assert int(torch.count_nonzero(got)) == 0, f"{name}: expected zeros, got {got[got != 0][:4]}"
