"""What the ``affine_scan`` op passes to its backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Bits of the op's `options`; the first four also in csrc/bindings.h.
VTRACE, ZERO, REVERSE, DECOUPLED, ADVANTAGES, RETURNS = (1 << i for i in range(6))
# Bits of its `whiten`, as in csrc/bindings.h.
WHITEN, BESSEL, INSIDE, FLOOR, SHIFT = (1 << i for i in range(5))


class Inputs(NamedTuple):
    """Tensors of one call. Tokens are padded [R, T], the last dimension contiguous, or packed [N]; None: not given."""

    rewards: torch.Tensor | None  # r; of the bare scan, b
    values: torch.Tensor | None  # V
    log_ratio: torch.Tensor | None  # log ρ
    kl: torch.Tensor | None  # subtracted from the reward, times kl_coef
    coefficients: torch.Tensor | None  # a of the bare scan, in place of γλ
    next_values: torch.Tensor | None  # V and G after a truncated token, and after the last
    mask: torch.Tensor | None  # bool
    done: torch.Tensor | None  # bool: the episode ends here, nothing comes after
    truncated: torch.Tensor | None  # bool: the episode is cut here, `next_values` come after
    row_rewards: torch.Tensor | None  # float64 [R]: added at the last valid token
    bootstrap: torch.Tensor | None  # float64 [R]: V and G after the last token
    gammas: torch.Tensor | None  # float64, contiguous, [R] or shaped like the tokens: in place of the float
    lams: torch.Tensor | None
    critic_lams: torch.Tensor | None
    cu_seqlens: torch.Tensor | None  # int64 [R + 1], contiguous: where packed rows begin and end

    @property
    def tokens(self) -> torch.Tensor:
        """A tensor with one element a token."""
        return next(x for x in (self.rewards, self.values, self.kl, self.mask) if x is not None)


class Options(NamedTuple):
    """Numbers of one call."""

    gamma: float
    lam: float
    critic_lam: float
    kl_coef: float
    clip_rho: float
    clip_c: float
    clip_pg: float
    options: int
    whiten: int
    eps: float

    def has(self, bit: int) -> bool:
        return bool(self.options & bit)


def dtype_of(x: Inputs) -> torch.dtype:
    """float64 where a token input is, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in x[:6])
    return torch.float64 if wide else torch.float32


def allocate(x: Inputs, o: Options) -> torch.Tensor:
    """[1 or 2, *tokens]: the advantages, then the returns, as asked for.

    One block of memory: glibc hands two of 8 MiB back to the system after each call, and the page faults of new ones
    take four times as long as the scan.
    """
    like = x.tokens
    return torch.empty((o.has(ADVANTAGES) + o.has(RETURNS), *like.shape), dtype=dtype_of(x), device=like.device)


def whiten_options(o: Options) -> dict:
    """The arguments of ``reductions.whitened``."""
    where = "floor" if o.whiten & FLOOR else "inside" if o.whiten & INSIDE else "outside"
    return {"bessel": bool(o.whiten & BESSEL), "eps": o.eps, "where": where, "shift_mean": bool(o.whiten & SHIFT)}
