"""How far a result is from the truth, and whether that is within the numerics contract.

The truth is float64 arithmetic from the same (rounded) inputs; the yardstick is PyTorch computing in float32 from them.

    values       |got − truth| ≤ 1.0·max|yardstick − truth| + 4 ulps of float32
    gradients    |got − truth| ≤ 1.2·max|yardstick − truth| + 4 ulps of float32
    in bfloat16 or float16: one ulp of that dtype more, for the rounding of the result

The maximum is over the tensor, an ulp is that of each element of the truth; of a number that is one sum, whose terms
may cancel, it is that of the sum of their absolute values. There is no other tolerance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

ORDERS = 4  # yardsticks, each with its own order of summation
FACTORS = {"value": 1.0, "gradient": 1.2}
ULPS = 4
PIECE = 1 << 24  # elements that are compared at a time: 128 MiB a temporary

_FORMATS = {  # explicit mantissa bits, exponent of the smallest subnormal
    torch.float64: (52, -1074),
    torch.float32: (23, -149),
    torch.bfloat16: (7, -133),
    torch.float16: (10, -24),
}
_EXPONENT = 0x7FF << 52  # of a float64


class Parity(NamedTuple):
    """The outcome of ``measure``, with the element that is furthest beyond (or nearest to) its bound."""

    ok: bool
    ratio: float  # max|got − truth| ÷ max|yardstick − truth|
    worst_index: tuple
    got: float
    truth: float
    allowed: float  # the bound on |got − truth| there

    def __str__(self) -> str:
        return (
            f"at {self.worst_index}: got {self.got!r}, truth {self.truth!r}, error {abs(self.got - self.truth):.3g}, "
            f"allowed {self.allowed:.3g}; error / torch's own error: {self.ratio:.3g}"
        )


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The spacing of ``dtype`` at each |x|, in float64."""
    bits, smallest = _FORMATS[dtype]
    x = x.double().abs().clamp(min=2.0 ** (smallest + bits))  # below it the spacing stays what it is there
    x.view(torch.int64).bitwise_and_(_EXPONENT)
    return x.mul_(2.0**-bits)


def _pieces(*tensors):
    """The tensors side by side as flat float64 pieces on the CPU: the temporaries of a head's gradient stay small."""
    for parts in zip(*(x.detach().reshape(-1).split(PIECE) for x in tensors), strict=True):
        yield [x.cpu().double() for x in parts]


def _largest_error(x, truth) -> float:
    return max(_largest_of(a, b) for a, b in _pieces(x, truth))


def _largest_of(x, truth) -> float:
    largest = float((x - truth).abs_().max())
    if math.isfinite(largest):
        return largest
    return float(torch.where(truth.isfinite() & x.isfinite(), (x - truth).abs(), 0.0).max())


def measure(got, truth, yardstick, kind: str = "value", dtype: torch.dtype | None = None, size=None) -> Parity:
    """Compare a result with the float64 truth, by the yardstick's own error.

    Args:
        got: the result, any float dtype.
        truth: float64, of the same shape. NaN and infinities must be met exactly.
        yardstick: the same quantity from PyTorch in float32; where it is not finite its error does not count. Or a list
            of them, by different orders of summation: the rounding of one order is an accident (over 40 seeds the
            largest error of a head's gradient varies by a factor of 2), so the largest counts.
        kind: "value" or "gradient".
        dtype: the dtype that the result was rounded to; got's own if it is None.
        size: float64, like truth: Σ|terms| of results that are sums; None where ulps are those of the truth.

    Example:
        >>> measure(torch.tensor([1.0]), torch.tensor([1.0]).double(), torch.tensor([1.0])).ok
        True
    """
    dtype = dtype or got.dtype
    yardsticks = yardstick if isinstance(yardstick, list) else [yardstick]
    if not got.shape == truth.shape == yardsticks[0].shape:
        raise ValueError(f"got: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}")
    if not got.numel():
        return Parity(True, 0.0, (), 0.0, 0.0, 0.0)
    own = max(_largest_error(x, truth) for x in yardsticks)
    start, worst, error, largest, found = 0, -1.0, 0.0, 0.0, None
    for x, t, terms in _pieces(got, truth, truth if size is None else size.nan_to_num(0.0, 0.0, 0.0)):
        excess, errors, allowed = _excess(x, t, FACTORS[kind] * own, dtype, terms)
        error, largest = max(error, float(errors.max())), max(largest, _largest_of(t, torch.zeros(())))
        here = int(excess.argmax())
        if float(excess[here]) > worst:
            worst, found = float(excess[here]), (start + here, *(y[here].item() for y in (x, t, allowed)))
        start += x.numel()
    index, *flat = found
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), got.shape))
    # a perfect result rounded to float32 is off by half an ulp: the least that the yardstick is taken for
    least = 0.5 * float(ulp(torch.tensor(largest), torch.float32))
    return Parity(worst <= 1.0, error / max(own, least), at, *flat)


def _excess(got, truth, bound: float, dtype: torch.dtype, size):
    """(error ÷ allowed, error, allowed) of each element; infinite where a NaN or an infinity is not met."""
    error, allowed = (got - truth).abs_(), ulp(size, torch.float32).mul_(ULPS).add_(bound)
    if dtype in (torch.bfloat16, torch.float16):
        allowed += ulp(truth, dtype)
    excess = error / allowed
    if math.isfinite(float(excess.sum())):
        return excess, error, allowed
    finite = truth.isfinite()
    safe = torch.where(finite, truth, 0.0)
    error = torch.where(finite, (got - safe).abs(), 0.0)
    allowed = bound + ULPS * ulp(torch.where(finite, size, 0.0), torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        # a truth that rounds to an infinity of this dtype is met by that infinity
        met = (got == got.sign() * torch.inf) & (safe.abs() >= largest) & (got.sign() == safe.sign())
        error = torch.where(met, 0.0, error)
        allowed = allowed + ulp(safe, dtype)
    same = (got == truth) | (got.isnan() & truth.isnan())
    excess = torch.where(finite, error / allowed, torch.where(same, 0.0, torch.inf))
    return excess.nan_to_num(nan=torch.inf), error.nan_to_num(nan=torch.inf), allowed
