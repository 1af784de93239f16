"""How far a result is from the truth, and whether that is within the numerics contract.

The truth is float64 arithmetic from the same (rounded) inputs; the yardstick is PyTorch computing in float32 from them.

    values       |got − truth| ≤ 1.0·max|yardstick − truth| + 4 ulps of float32
    gradients    |got − truth| ≤ 1.2·max|yardstick − truth| + 4 ulps of float32
    in bfloat16 or float16: one ulp of that dtype more, for the rounding of the result

The maximum is over the tensor, an ulp is that of each element of the truth. There is no other tolerance.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

ORDERS = 4  # yardsticks, each with its own order of summation
FACTORS = {"value": 1.0, "gradient": 1.2}
ULPS = 4

_FORMATS = {  # explicit mantissa bits, exponent of the smallest subnormal
    torch.float64: (52, -1074),
    torch.float32: (23, -149),
    torch.bfloat16: (7, -133),
    torch.float16: (10, -24),
}


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
    x = x.double()
    _, exponent = torch.frexp(x)  # |x| in [2^(exponent − 1), 2^exponent); 0 has no exponent of its own
    exponent = torch.where(x == 0, smallest, exponent - 1 - bits).clamp(min=smallest)
    return torch.ldexp(torch.ones_like(x), exponent)


def _largest_error(x, truth, finite):
    return torch.where(finite & x.isfinite(), (x - truth).abs(), 0.0).max()


def measure(got, truth, yardstick, kind: str = "value", dtype: torch.dtype | None = None) -> Parity:
    """Compare a result with the float64 truth, by the yardstick's own error.

    Args:
        got: the result, any float dtype.
        truth: float64, of the same shape. NaN and infinities must be met exactly.
        yardstick: the same quantity from PyTorch in float32; where it is not finite its error does not count. Or a list
            of them, by different orders of summation: the rounding of one order is an accident (over 40 seeds the
            largest error of a head's gradient varies by a factor of 2), so the largest counts.
        kind: "value" or "gradient".
        dtype: the dtype that the result was rounded to; got's own if it is None.

    Example:
        >>> measure(torch.tensor([1.0]), torch.tensor([1.0]).double(), torch.tensor([1.0])).ok
        True
    """
    dtype = dtype or got.dtype
    yardsticks = yardstick if isinstance(yardstick, list) else [yardstick]
    got, truth = (x.detach().cpu().double() for x in (got, truth))
    if not got.shape == truth.shape == yardsticks[0].shape:
        raise ValueError(f"got: expected shape {tuple(truth.shape)}, got {tuple(got.shape)}")
    if not got.numel():
        return Parity(True, 0.0, (), 0.0, 0.0, 0.0)
    finite = truth.isfinite()
    safe = torch.where(finite, truth, 0.0)
    error = torch.where(finite, (got - safe).abs(), 0.0)
    own = torch.stack([_largest_error(x.detach().cpu().double(), safe, finite) for x in yardsticks]).max()
    allowed = FACTORS[kind] * own + ULPS * ulp(safe, torch.float32)
    if dtype in (torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        # a truth that rounds to an infinity of this dtype is met by that infinity
        error = torch.where(
            (got == got.sign() * torch.inf) & (safe.abs() >= largest) & (got.sign() == safe.sign()), 0.0, error
        )
        allowed = allowed + ulp(safe, dtype)
    same = (got == truth) | (got.isnan() & truth.isnan())
    excess = torch.where(finite, error / allowed, torch.where(same, 0.0, torch.inf)).nan_to_num(nan=torch.inf)
    worst = int(excess.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), got.shape))
    # a perfect result rounded to float32 is off by half an ulp: the least that the yardstick is taken for
    least = 0.5 * float(ulp(safe.abs().max(), torch.float32))
    ratio = float(error.nan_to_num(nan=torch.inf).max()) / max(float(own), least)
    flat = (x.reshape(-1)[worst].item() for x in (got, truth, allowed))
    return Parity(bool(excess.max() <= 1.0), ratio, at, *flat)


def reordered(leaves: dict, targets, seed: int) -> tuple[dict, torch.Tensor, dict]:
    """The same log-probs by another order of summation: the vocabulary and the hidden dimension shuffled.

    Args:
        leaves: ``logits`` [*, V], or ``hidden`` [*, D], ``weight`` [V, D] and perhaps ``bias`` [V].
        targets: ids, −100 for none.

    Returns:
        The shuffled leaves, the targets' new ids, and for each leaf the function that puts its gradient in order.
    """
    draw = torch.Generator().manual_seed(seed)
    vocab = leaves["logits"].shape[-1] if "logits" in leaves else leaves["weight"].shape[0]
    ids = torch.randperm(vocab, generator=draw).to(targets.device)
    place = ids.argsort()
    moved, back = dict(leaves), {"logits": lambda g: g[..., place], "bias": lambda g: g[place]}
    if "logits" in leaves:
        moved["logits"] = leaves["logits"][..., ids]
    else:
        columns = torch.randperm(leaves["weight"].shape[1], generator=draw).to(targets.device)
        order = columns.argsort()
        back |= {"hidden": lambda g: g[..., order], "weight": lambda g: g[place][:, order]}
        moved |= {"hidden": leaves["hidden"][..., columns], "weight": leaves["weight"][ids][:, columns]}
        if leaves.get("bias") is not None:
            moved["bias"] = leaves["bias"][ids]
    return moved, torch.where(targets == -100, -100, place[targets.long().clamp(min=0)]), back
