"""What a call of an estimator is given, checked and laid out as the op wants it."""

from __future__ import annotations

import math

import torch

from rlfast import backends, validate
from rlfast.distributed.ranks import Ranks
from rlfast.ops import affine_scan as scan_op
from rlfast.ops.scan_records import (
    ADVANTAGES,
    BESSEL,
    DECOUPLED,
    FLOOR,
    INSIDE,
    RETURNS,
    REVERSE,
    SHIFT,
    VTRACE,
    WHITEN,
    ZERO,
    Inputs,
    Options,
)
from rlfast.reductions import Whiten, whitened

MASKINGS = ("carry", "zero")
_INTS = (torch.int64, torch.int32)


class Rows:
    """The rows of a call: padded [*, T], or packed [N] with their offsets."""

    def __init__(self, name: str, x, cu_seqlens):
        validate.tensor(name, x, (*validate.FLOATS, *validate.MASKS))
        if x.dim() == 0:
            validate.fail(name, "shape [*, T]", "()")
        self.name, self.like, self.shape, self.cu = name, x, x.shape, None
        if cu_seqlens is not None:
            self.cu = self._offsets(cu_seqlens)
            self.lead = (self.cu.shape[0] - 1,)
        else:
            self.lead = x.shape[:-1]

    @property
    def count(self) -> int:
        """How many rows."""
        return math.prod(self.lead)

    def _offsets(self, cu):
        validate.tensor("cu_seqlens", cu, _INTS)
        if self.like.dim() != 1:
            validate.fail(self.name, "shape (N,) where rows are packed", validate.shape(self.like))
        if cu.dim() != 1 or cu.shape[0] == 0:
            validate.fail("cu_seqlens", "shape (rows + 1,)", validate.shape(cu))
        validate.same_device("cu_seqlens", cu, self.name, self.like)
        cu = cu.long().contiguous()
        if validate.looked_at(cu):
            n = self.like.shape[0]
            if int(cu[0]) != 0 or int(cu[-1]) != n or bool((cu[1:] < cu[:-1]).any()):
                validate.fail("cu_seqlens", f"offsets that ascend from 0 to {n}", cu.tolist()[:8])
        return cu

    def tokens(self, name: str, x, dtypes=validate.FLOATS):
        """A tensor of one number a token, as [R, T] or [N]; None stays None."""
        if x is None:
            return None
        validate.tensor(name, x, dtypes)
        if x.shape != self.shape:
            validate.fail(name, f"shape {tuple(self.shape)} like {self.name}", validate.shape(x))
        if x.device != self.like.device:
            validate.same_device(name, x, self.name, self.like)
        if self.cu is None and x.dim() != 2:
            x = x.reshape(self.count, self.shape[-1])
        return x if x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()

    def flags(self, name: str, x):
        x = self.tokens(name, x, validate.MASKS)
        return x if x is None or x.dtype == torch.bool else x != 0

    def by_row(self, name: str, x):
        """A tensor of one number a row, as float64 [R]; None if it is one a token, or None.

        Packed rows may be as many as their tokens: then it is one a row.
        """
        if x is None:
            return None
        validate.tensor(name, x)
        if x.shape != self.lead:
            if x.shape == self.shape:
                return None
            validate.fail(name, f"shape {tuple(self.lead)}, one a row, or {tuple(self.shape)}", validate.shape(x))
        validate.same_device(name, x, self.name, self.like)
        return x.double().reshape(-1).contiguous()

    def rate(self, name: str, x, mask=None):
        """(float, None), or (1.0, float64 tensor): a factor in [0, 1], for all, a row or a token.

        With a mask, one a token is 1 where it is masked, whatever it holds there.
        """
        if isinstance(x, torch.Tensor):
            if x.dim() == 0:
                x = x.expand(self.lead)
            found = self.by_row(name, x)
            if found is None:
                found = self.tokens(name, x).double().contiguous()
                found = found if mask is None else torch.where(mask, found, 1.0)
            if found.requires_grad:
                validate.fail(name, "a tensor that needs no gradient", "requires_grad=True")
            if validate.looked_at(found):
                wrong = ~((found >= 0) & (found <= 1))
                if wrong.any():
                    validate.fail(name, "values in [0, 1]", found[wrong][0].item())
            return 1.0, found
        x = validate.finite(name, x)
        if not 0 <= x <= 1:
            validate.fail(name, "a float in [0, 1]", repr(x))
        return x, None


def _whiten_bits(w: Whiten) -> int:
    where = FLOOR if w.where == "floor" else INSIDE if w.where == "inside" else 0
    return WHITEN | where | (BESSEL if w.bessel else 0) | (SHIFT if w.shift_mean else 0)


def estimate(
    rows: Rows, *, wanted, gamma, lam, critic_lam=None, rewards=None, values=None, log_ratio=None, kl=None,
    kl_coef=0.0, clips=(1.0, 1.0, 1.0), mask=None, masking="carry", done=None, truncated=None, bootstrap=None,
    whiten: Whiten | None = None, ranks: Ranks | None = None,
):  # fmt: skip
    """The op on checked arguments: (advantages, returns), shaped like the tokens, of which ``wanted`` are there."""
    if masking not in MASKINGS:
        validate.fail("masking", f"one of {MASKINGS}", repr(masking))
    if rewards is None:
        validate.fail("rewards", "a torch.Tensor", "NoneType", TypeError)
    if truncated is not None and (not isinstance(bootstrap, torch.Tensor) or bootstrap.shape != rows.shape):
        came = validate.shape(bootstrap) if isinstance(bootstrap, torch.Tensor) else repr(bootstrap)
        validate.fail("bootstrap", f"shape {tuple(rows.shape)}, the values after truncated tokens", came)
    by_row = _rewards_by_row(rows, rewards)
    start = rows.by_row("bootstrap", bootstrap) if truncated is None else None  # else it is one a token
    mask = rows.flags("mask", mask)
    left_out = None if masking == "zero" else mask  # where the rates of masked tokens have no effect
    (gamma, gammas), (lam, lams) = rows.rate("gamma", gamma, left_out), rows.rate("lam", lam, left_out)
    critic, critics = (1.0, None) if critic_lam is None else rows.rate("critic_lam", critic_lam, left_out)
    inputs = Inputs(
        rewards=rows.tokens("rewards", rewards) if by_row is None else None,
        values=rows.tokens("values", values), log_ratio=rows.tokens("log_ratio", log_ratio), kl=rows.tokens("kl", kl),
        coefficients=None, next_values=rows.tokens("bootstrap", bootstrap) if start is None else None,
        mask=mask, done=rows.flags("done", done), truncated=rows.flags("truncated", truncated),
        row_rewards=by_row, bootstrap=start, gammas=gammas, lams=lams, critic_lams=critics, cu_seqlens=rows.cu,
    )  # fmt: skip
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    inside = whiten is not None and not recorded and ranks is None
    bits = REVERSE | wanted | (ZERO if masking == "zero" else 0) | (DECOUPLED if critic_lam is not None else 0)
    options = Options(
        gamma, lam, critic, kl_coef, *clips, bits | (VTRACE if log_ratio is not None else 0),
        _whiten_bits(whiten) if inside else 0, whiten.eps if inside else 0.0,
    )  # fmt: skip
    out = scan_op.call(*inputs, *options, backends.requested())
    if out.shape[1:] != rows.shape:
        out = out.reshape(out.shape[0], *rows.shape)
    advantages = out[0] if wanted & ADVANTAGES else None
    if whiten is not None and not inside:
        mask = mask if mask is None else mask.reshape(rows.shape)
        advantages = whitened(advantages, mask, **whiten._asdict(), ranks=ranks)
    return advantages, out[-1] if wanted & RETURNS else None


def _rewards_by_row(rows: Rows, rewards):
    """One reward a row, earned at its last valid token; None where there is one a token."""
    if rewards is None or (isinstance(rewards, torch.Tensor) and rewards.shape == rows.shape):
        return None
    return rows.by_row("rewards", rewards)
