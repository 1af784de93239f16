"""Argument checks with one wording: ``name: expected <what was wanted>, got <what came>``."""

from __future__ import annotations

import math
import numbers
from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS = (torch.bool, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, *FLOATS)
COUNTS = (torch.int64, torch.int32, *FLOATS)
IGNORE_INDEX = -100
# Beyond these a positive scale is 0 or inf once a kernel has it in float32, or its inverse is.
LEAST, MOST = 1e-30, 1e30
FLOAT32_MAX = torch.finfo(torch.float32).max


class Limit(NamedTuple):
    """The range of a number, both ends included, and how a message says it."""

    words: str
    low: float
    high: float


def fail(name: str, wanted: str, came, kind: type[Exception] = ValueError):
    """Raise with the standard wording."""
    raise kind(f"{name}: expected {wanted}, got {came}")


def shape(x: torch.Tensor) -> str:
    """``(8, 512)`` for a tensor of that shape."""
    return str(tuple(x.shape))


def tensor(name: str, x, dtypes=FLOATS) -> None:
    """A dense tensor of one of these dtypes."""
    if not isinstance(x, torch.Tensor):
        fail(name, "a torch.Tensor", type(x).__name__, TypeError)
    if x.dtype not in dtypes:
        fail(name, "dtype " + " or ".join(str(d).removeprefix("torch.") for d in dtypes), str(x.dtype), TypeError)
    if x.layout is not torch.strided:
        fail(name, "a dense tensor", str(x.layout), TypeError)


def same_device(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both on one device."""
    if x.device != other.device:
        fail(name, f"device {other.device} like {other_name}", str(x.device))


def positive(name: str, x) -> float:
    """A finite float > 0."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        fail(name, "a float > 0", repr(x), TypeError)
    if not 0 < x < math.inf:  # no isfinite: Dynamo cannot trace it for a float that it made symbolic
        fail(name, "a finite float > 0", repr(x))
    if not LEAST <= x <= MOST:
        fail(name, f"a float from {LEAST} to {MOST}", repr(x))
    return float(x)


def finite(name: str, x) -> float:
    """A finite float."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        fail(name, "a float", repr(x), TypeError)
    if not -math.inf < x < math.inf:
        fail(name, "a finite float", repr(x))
    if not -FLOAT32_MAX <= x <= FLOAT32_MAX:
        fail(name, "a float within the range of float32", repr(x))
    return float(x)


def number(name: str, x, limit: Limit) -> float:
    """A float within a range."""
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        fail(name, limit.words, repr(x), TypeError)
    if not limit.low <= x <= limit.high:  # NaN is in no range
        fail(name, limit.words, repr(x))
    return float(x)


def within(name: str, x: torch.Tensor | None, limit: Limit) -> None:
    """Every element within a range, where values may be looked at; none is None."""
    if not isinstance(x, torch.Tensor) or not looked_at(x) or not x.numel():
        return
    out = ~((x >= limit.low) & (x <= limit.high))
    if out.any():
        fail(name, f"{limit.words} each", f"{x[out][0].item():g}")


def scalar(name: str, x, limit: Limit | None = None):
    """A number, within a range if one is given, or a 0-dim tensor, which is not looked at."""
    if isinstance(x, torch.Tensor):
        if x.dim() != 0:
            fail(name, "a number or a 0-dim tensor", shape(x))
        return x
    if limit is not None:
        return number(name, x, limit)
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        fail(name, "a number or a 0-dim tensor", repr(x), TypeError)
    return x


def share(world_size, accumulation) -> float:
    """What a loss is multiplied by: world_size ÷ accumulation."""
    if world_size == 1 and accumulation == 1:
        return 1.0
    return positive("world_size", world_size) / positive("accumulation", accumulation)


def ordered(name: str, low: float, high_name: str, high: float) -> None:
    """Two numbers, the first no larger than the second."""
    if not low <= high:
        fail(f"{name}, {high_name}", f"{name} <= {high_name}", f"{low}, {high}")


def span(name: str, x, limit: Limit) -> tuple[float, float]:
    """(low, high), both within a range."""
    if not isinstance(x, tuple | list) or len(x) != 2:
        fail(name, "(low, high)", repr(x))
    low, high = (number(name, y, limit) for y in x)
    if low > high:
        fail(name, "(low, high) with low <= high", repr(x))
    return low, high


def options(given, known, owner: str) -> None:
    """Names of options that there are."""
    for name in given:
        if name not in known:
            fail(name, f"an option of {owner}: {', '.join(sorted(known))}", "an unknown name", TypeError)


def flag(name: str, x) -> bool:
    """True or False."""
    if not isinstance(x, bool):
        fail(name, "True or False", repr(x), TypeError)
    return x


def one_of(name: str, x, choices):
    """One of these values."""
    if x not in choices:
        fail(name, f"one of {', '.join(repr(c) for c in choices)}", repr(x))
    return x


def at_least(name: str, x, least: float) -> float:
    """A finite float ≥ ``least``."""
    x = finite(name, x)
    if x < least:
        fail(name, f"a float ≥ {least:g}", repr(x))
    return x


def looked_at(x: torch.Tensor) -> bool:
    """Whether values may be looked at: not in compiled code, and not on a GPU, where that would synchronise."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def like(name: str, x, other_name: str, other: torch.Tensor, dtypes=FLOATS) -> torch.Tensor:
    """A tensor shaped like another, on its device."""
    tensor(name, x, dtypes)
    if x.shape != other.shape:
        fail(name, f"shape {shape(other)} like {other_name}", shape(x))
    same_device(name, x, other_name, other)
    return x


def mask_like(mask, other_name: str, other: torch.Tensor, name: str = "mask") -> torch.Tensor | None:
    """A mask shaped like ``other``, as bool; None stays None."""
    if mask is None:
        return None
    like(name, mask, other_name, other, MASKS)
    return mask if mask.dtype == torch.bool else mask != 0


def counted(mask, other_name: str, other: torch.Tensor) -> torch.Tensor:
    """The same where None is all."""
    mask = mask_like(mask, other_name, other)
    return torch.ones(other.shape, dtype=torch.bool, device=other.device) if mask is None else mask
