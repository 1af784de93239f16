"""A head with a low-rank part, as LoRA trains it beside a frozen weight.

    z = hidden·weightᵀ + scale·(hidden·aᵀ)·bᵀ + bias = [hidden, u]·[weight, b]ᵀ + bias,   u = scale·hidden·aᵀ

So it is a head that is r columns wider, and with ∂z of its logits

    ∂b = ∂zᵀ·u      ∂u = ∂z·b      ∂a = scale·∂uᵀ·hidden      ∂hidden = ∂z·weight + scale·∂u·a

of which none is as large as the weight. Beside bfloat16 or float16 weights u goes in as three such numbers whose sum it
is: rounded to one, it would lose what a float32 product has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.fallback.token_logps import compute_dtype
from rlfast.ops.linear_token_logps import as_given

NARROW = (torch.bfloat16, torch.float16)
PIECES = 3  # numbers of a narrow dtype that hold one of float32


class Lora(NamedTuple):
    """The factors."""

    a: torch.Tensor  # [r, D]
    b: torch.Tensor  # [V, r]
    scale: float

    def pieces(self) -> int:
        """Numbers of the head's dtype that u is given as."""
        return PIECES if self.a.dtype in NARROW else 1


def pieces_of(x, dtype: torch.dtype) -> list[torch.Tensor]:
    """Numbers of a dtype whose sum is x."""
    found = [x.to(dtype)]
    for _ in range(PIECES - 1 if x.dtype != dtype else 0):
        x = x - found[-1].to(x.dtype)
        found.append(x.to(dtype))
    return found


def live_hidden(hidden, mask) -> torch.Tensor:
    """Hidden states in the compute dtype, 0 where masked: there they may be NaN, and 0·NaN is NaN."""
    wide = hidden.to(compute_dtype(hidden))
    return wide if mask is None else torch.where(mask.unsqueeze(-1), wide, torch.zeros((), dtype=wide.dtype))


def widened(hidden, weight, mask, lora: Lora) -> tuple[torch.Tensor, torch.Tensor]:
    """([hidden, u], [weight, b])."""
    with as_given(hidden):
        u = lora.scale * (live_hidden(hidden, mask) @ lora.a.to(compute_dtype(hidden)).T)
    return torch.cat([hidden, *pieces_of(u, hidden.dtype)], -1), torch.cat([weight, *[lora.b] * lora.pieces()], -1)


class Sums:
    """The gradients of the factors and of the bias, a chunk after the other, in the compute dtype."""

    def __init__(self, lora: Lora, hidden, needs: tuple[bool, bool], bias, apart: bool):
        """``apart``: the logits that were kept are those of [hidden, u], whatever head they are given back with."""
        self.lora, self.width, self.bias, self.apart = lora, hidden.shape[-1], bias, apart
        self.low = slice(self.width, None)  # the columns of u and b
        columns = lora.a.shape[0] * lora.pieces() + (0 if apart else self.width)
        shapes = lora.a.shape, (lora.b.shape[0], columns)
        self.a, self.wide_b = (
            torch.zeros(shape, dtype=compute_dtype(hidden), device=hidden.device) if need else None
            for shape, need in zip(shapes, needs, strict=True)
        )

    def add(self, rows, pull, by, need_hidden: bool):
        """A chunk's part; its ∂hidden, or None. ``rows`` are the widened ones, ``pull`` is of ``linear_loss``."""
        with as_given(rows.hidden):
            if self.wide_b is not None or self.bias is not None:
                columns = self.low if self.apart else slice(None)
                head = rows.hidden[:, columns], rows.weight[:, columns], rows.bias
                pull(by, (self.wide_b, self.bias), False, head)
            if not need_hidden and self.a is None:
                return None
            d, a = pull(by, (None, None), True), self.lora.a
            d_u = self.lora.scale * d[:, self.width : self.width + a.shape[0]]  # the other pieces have the same
            if self.a is not None:
                self.a.addmm_(d_u.T, live_hidden(rows.hidden[:, : self.width], rows.mask))
            return d[:, : self.width] + d_u @ a.to(d.dtype) if need_hidden else None

    def gradients(self) -> tuple:
        """(∂a, ∂b), None where not needed."""
        b = self.wide_b
        if b is None:
            return self.a, None
        b = b if self.apart else b[:, self.low]
        return self.a, b.unflatten(1, (self.lora.pieces(), -1)).sum(1)
