"""The only tolerance code of the tests: asserts around ``rlfast.parity.measure``."""

from __future__ import annotations

import functools

import torch

from rlfast.parity import ORDERS, Parity, measure


class Orders:
    """PyTorch's float32 result by ``ORDERS`` orders of its sums, the largest error of which counts.

    Another order can only widen the bound: beyond the first they are made where a result is not within it.

    Args:
        make: order → the result; order 0 is the oracle's own.
    """

    def __init__(self, make):
        self.make = make

    def map(self, function) -> Orders:
        """A function of each."""
        return Orders(lambda order: function(self.make(order)))

    def first(self) -> list:
        return [self.make(0)]

    def all(self) -> list:
        return [self.make(order) for order in range(ORDERS)]


def by_name(make) -> tuple[dict[str, Orders], ...]:
    """``make(order)`` gives (values, gradients), each by name; so does this, with every order of each."""
    runs = functools.cache(make)
    return tuple(
        {name: Orders(lambda order, i=i, name=name: runs(order)[i][name]) for name in runs(0)[i]} for i in (0, 1)
    )


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
    several = isinstance(yardstick, Orders)
    parity = measure(got, truth, yardstick.first() if several else yardstick, kind, size=size)
    if several and not parity.ok:
        parity = measure(got, truth, yardstick.all(), kind, size=size)
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
