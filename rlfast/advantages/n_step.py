"""n-step returns: n affine maps of one token each, composed by doubling."""

from __future__ import annotations

import torch

from rlfast import validate
from rlfast.advantages.rows import Rows


def _row_of(rows: Rows, n: int, device) -> torch.Tensor:
    """The row of each token, flattened."""
    token = torch.arange(n, device=device)
    if rows.cu is None:
        return token // max(1, rows.shape[-1])
    return torch.searchsorted(rows.cu, token, right=True) - 1


def _ahead(x, m: int, row, beyond):
    """x of the token m further on in the same row; ``beyond`` where there is none."""
    n = x.shape[0]
    if m >= n:
        return beyond.expand(x.shape)
    moved = torch.cat((x[m:], x[:m]))
    same = torch.cat((row[m:] == row[: n - m], torch.zeros(m, dtype=torch.bool, device=row.device)))
    return torch.where(same, moved, beyond)


def n_step_returns(rewards, values, mask=None, *, gamma, n, done=None, bootstrap=None, cu_seqlens=None) -> torch.Tensor:
    """Returns of n steps, then the critic.

    G_t = Σ_{k<n} γᵏ·r_{t+k} + γⁿ·V_{t+n}

    Args:
        rewards, values: [*, T] float, or packed [N] with ``cu_seqlens``.
        mask: [*, T], 0 where a token is left out: steps are counted over valid tokens. Its output is 0.
        gamma: a float in [0, 1], or a tensor of them, one a row [*] or one a token.
        n: an int ≥ 1.
        done: [*, T], nonzero where an episode ends: nothing of what comes after counts.
        bootstrap: [*], V after a row's last token, where fewer than n steps are left; 0 if not given.
        cu_seqlens: int [rows + 1], the offsets of packed rows.

    Returns:
        [*, T] float32 (float64 for float64); differentiable in rewards, values and bootstrap. Plain PyTorch in float64,
        log₂ n passes: the maps x → r + γx of 2ᵏ tokens are composed of two of 2ᵏ⁻¹, and nothing is subtracted.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.

    Example:
        >>> rlfast.n_step_returns(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.0, 0.0, 8.0]]), gamma=0.5, n=2)
        tensor([[4., 4., 4.]])
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        validate.fail("n", "an int ≥ 1", repr(n), ValueError if isinstance(n, int) else TypeError)
    rows = Rows("values", values, cu_seqlens)
    validate.tensor("rewards", rewards)
    v, r = rows.tokens("values", values).reshape(-1), rows.tokens("rewards", rewards).reshape(-1)
    keep, ends = rows.flags("mask", mask), rows.flags("done", done)
    start = rows.by_row("bootstrap", bootstrap)
    if bootstrap is not None and start is None:
        validate.fail("bootstrap", f"shape {tuple(rows.lead)}, one a row", validate.shape(bootstrap))
    one, many = rows.rate("gamma", gamma, keep)
    row = _row_of(rows, v.shape[0], v.device)
    a = torch.full_like(v, one, dtype=torch.float64)
    if many is not None:
        a = many[row] if many.shape == (rows.count,) else many.reshape(-1)
    if ends is not None:
        a = torch.where(ends.reshape(-1), 0.0, a)
    keep = torch.ones_like(row, dtype=torch.bool) if keep is None else keep.reshape(-1)
    # the valid tokens first, in their order; the others are rows of their own
    order = torch.argsort(~keep, stable=True)
    row = torch.where(keep, row, -1 - torch.arange(len(row), device=row.device))[order]
    zero, unit = (
        torch.zeros((), dtype=torch.float64, device=v.device),
        torch.ones((), dtype=torch.float64, device=v.device),
    )
    a, b = a[order], torch.where(keep, r, 0.0).double()[order]
    last = zero if start is None else start[row.clamp(min=0)]
    done_steps, whole = 0, (torch.ones_like(a), torch.zeros_like(b))
    for bit in range(n.bit_length()):
        m = 1 << bit
        if n & m:  # what has been composed so far, then m tokens more
            next_a, next_b = _ahead(a, done_steps, row, unit), _ahead(b, done_steps, row, zero)
            whole = whole[0] * next_a, whole[1] + whole[0] * next_b
            done_steps += m
        if bit + 1 < n.bit_length():
            a, b = a * _ahead(a, m, row, unit), b + a * _ahead(b, m, row, zero)
    out = whole[1] + whole[0] * _ahead(torch.where(keep, v, 0.0).double()[order], n, row, last)
    out = torch.zeros_like(out).index_copy(0, order, torch.where(row >= 0, out, 0.0))
    wide = torch.float64 in (values.dtype, rewards.dtype)
    return out.to(torch.float64 if wide else torch.float32).reshape(rows.shape)
