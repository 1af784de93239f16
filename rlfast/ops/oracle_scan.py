"""The ``reference`` backend of the advantage ops: the oracles of ``rlfast/reference`` behind a kernel's interface."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.ops.scan_records import (
    ADVANTAGES,
    DECOUPLED,
    RETURNS,
    REVERSE,
    VTRACE,
    ZERO,
    Inputs,
    Options,
    allocate,
    dtype_of,
    whiten_options,
)
from rlfast.reference import affine_scan as oracle

_ROW = ("row_rewards", "bootstrap")
_RATES = ("gammas", "lams", "critic_lams")


def _row(x: Inputs, r: int) -> Inputs:
    """One packed row, as padded rows of one."""
    part = slice(int(x.cu_seqlens[r]), int(x.cu_seqlens[r + 1]))
    rows = x.cu_seqlens.shape[0] - 1

    def cut(name, t):
        if t is None or name == "cu_seqlens":
            return None
        by_row = name in _ROW or (name in _RATES and t.shape[0] == rows)
        return t[r : r + 1] if by_row else t[part].unsqueeze(0)

    return Inputs(**{name: cut(name, t) for name, t in x._asdict().items()})


def _padded(x: Inputs, o: Options, dtype) -> tuple:
    """(advantages, returns) of rows side by side, by autograd; of the bare scan twice the same."""
    x = Inputs(*(t if t is None or not t.is_floating_point() else t.to(dtype) for t in x))
    start = 0.0 if x.bootstrap is None else x.bootstrap
    if x.coefficients is not None:
        out = oracle.affine_scan(x.coefficients, x.rewards, x.mask, o.has(REVERSE), start)
        return out, out
    values = torch.zeros(x.tokens.shape, dtype=dtype, device=x.tokens.device) if x.values is None else x.values
    rewards = oracle.shaped_rewards(x.rewards, values, x.mask, x.row_rewards, x.kl, o.kl_coef)
    rest = {"mask": x.mask, "zero": o.has(ZERO), "done": x.done, "truncated": x.truncated}
    rest |= {"next_values": x.next_values, "bootstrap": start, "gamma": o.gamma if x.gammas is None else x.gammas}
    lam = o.lam if x.lams is None else x.lams
    if o.has(VTRACE):
        clips = {"clip_rho": o.clip_rho, "clip_c": o.clip_c, "clip_pg": o.clip_pg}
        return oracle.vtrace(rewards, values, x.log_ratio, lam=lam, **clips, **rest)
    advantages, returns = oracle.gae(rewards, values, lam=lam, **rest)
    if o.has(DECOUPLED):
        _, returns = oracle.gae(rewards, values, lam=o.critic_lam if x.critic_lams is None else x.critic_lams, **rest)
    return advantages, returns


def outputs(x: Inputs, o: Options, dtype: torch.dtype) -> torch.Tensor:
    """What the op returns, computed in ``dtype`` by the recurrences of the papers, differentiable by autograd."""
    if x.cu_seqlens is None:
        advantages, returns = _padded(x, o, dtype)
    else:
        rows = [_padded(_row(x, r), o, dtype) for r in range(x.cu_seqlens.shape[0] - 1)]
        empty = torch.empty(0, dtype=dtype, device=x.tokens.device)
        advantages, returns = (torch.cat([empty, *(row[i][0] for row in rows)]) for i in (0, 1))
    if o.whiten:
        advantages = oracle.masked_whiten(advantages, x.mask, **whiten_options(o))
    return torch.stack([advantages] * o.has(ADVANTAGES) + [returns] * o.has(RETURNS))


def _forward(x: Inputs, o: Options) -> torch.Tensor:
    return allocate(x, o).copy_(outputs(x, o, dtype_of(x)))


affine_scan = SimpleNamespace(forward=_forward)
