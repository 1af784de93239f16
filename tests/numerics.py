"""The only tolerance code of the tests: asserts around ``rlfast.parity.measure``."""

from __future__ import annotations

import functools

import torch

from rlfast.parity import ORDERS, Parity, measure

# The largest error of a few orders is still an accident where one token's gradient is far larger than the others': one
# in some thousand of the suite's gradients is beyond the largest of four.
MOST_ORDERS = 16


class Orders:
    """PyTorch's float32 result by ``MOST_ORDERS`` orders of its sums, the largest error of which counts.

    Another order can only widen the bound: beyond the first they are made where a result is not within it.

    Args:
        make: order → the result; order 0 is the oracle's own.
    """

    def __init__(self, make):
        self.make = make

    def map(self, function) -> Orders:
        """A function of each."""
        return Orders(lambda order: function(self.make(order)))

    def some(self, count: int) -> list:
        """By so many orders."""
        return [self.make(order) for order in range(count)]


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
    counts = (1, ORDERS, MOST_ORDERS) if isinstance(yardstick, Orders) else (0,)
    for count in counts:
        parity = measure(got, truth, yardstick.some(count) if count else yardstick, kind, size=size)
        if parity.ok:
            break
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
