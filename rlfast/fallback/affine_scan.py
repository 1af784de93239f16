"""The scan in plain PyTorch: pairs of tokens, pairs of pairs, and back, in float64.

The affine maps of two neighbours are one, (a, b)∘(a′, b′) = (a·a′, b + a·b′): half as many tokens, the same problem.
The valid tokens of a row are counted from where it begins to be scanned, so that what is padded and what is packed give
the same bits; rows of similar lengths go side by side.
"""

from __future__ import annotations

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
    whiten_options,
)
from rlfast.reductions import whitened

WIDE = torch.float64


def scanned(a, b):
    """A_t = b_t + a_t·A_{t+1} of [R, T], with 0 after the last token."""
    steps = b.shape[1]
    if steps < 2:
        return b.clone()
    if steps % 2:  # the first token joins on its own
        rest = scanned(a[:, 1:], b[:, 1:])
        return torch.cat((b[:, :1] + a[:, :1] * rest[:, :1], rest), 1)
    even_a, odd_a, even_b, odd_b = a[:, 0::2], a[:, 1::2], b[:, 0::2], b[:, 1::2]
    pairs = scanned(even_a * odd_a, torch.addcmul(even_b, even_a, odd_b))
    out = torch.empty_like(b)
    out[:, 0::2] = pairs
    out[:, 1::2] = odd_b
    out[:, 1:-1:2] += odd_a[:, :-1] * pairs[:, 1:]
    return out


class Rows:
    """The tokens that take part, of rows of length (2^(k−1), 2^k] side by side: indices into the flattened tokens."""

    def __init__(self, x: Inputs, o: Options, device):
        shape = x.tokens.shape
        if x.cu_seqlens is None:
            row = torch.arange(shape[0], device=device).repeat_interleave(shape[1])
        else:
            lengths = x.cu_seqlens.diff()
            row = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        self.count = shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
        token = torch.arange(row.shape[0], device=device)
        if x.mask is not None and not o.has(ZERO):
            token = token[x.mask.reshape(-1)]
        row = row[token]
        self.lengths = torch.bincount(row, minlength=self.count)
        ends = self.lengths.cumsum(0)
        # place of each token from the end of its row, or from its start
        order = torch.arange(token.shape[0], device=device)
        self.place = ends[row] - 1 - order if o.has(REVERSE) else order - (ends - self.lengths)[row]
        self.token, self.row = token, row
        self.steps = torch.where(
            self.lengths > 1, 1 << (self.lengths - 1).clamp(min=0).double().log2().floor().long() + 1, 1
        )

    def blocks(self):
        """(rows of similar length, their tokens [rows, steps], which of them are there), time from left to right."""
        for steps in self.steps[self.lengths > 0].unique().tolist():
            rows = ((self.steps == steps) & (self.lengths > 0)).nonzero().squeeze(-1)
            local = torch.full((self.count,), -1, device=rows.device).index_copy(
                0, rows, torch.arange(len(rows), device=rows.device)
            )
            mine = local[self.row] >= 0
            at = local[self.row[mine]], steps - 1 - self.place[mine]
            tokens = torch.zeros(len(rows), steps, dtype=torch.int64, device=rows.device)
            there = torch.zeros(len(rows), steps, dtype=torch.bool, device=rows.device)
            tokens[at], there[at] = self.token[mine], True
            yield rows, tokens, there


def _taken(x, tokens, there):
    """The values at these tokens in float64, 0 where there is none."""
    return None if x is None else torch.where(there, x.reshape(-1)[tokens].to(WIDE), 0.0)


def _flag(x, tokens, valid):
    return torch.zeros_like(valid) if x is None else x.reshape(-1)[tokens] & valid


def _rate(one: float, many, x: Inputs, rows, tokens):
    """A rate at these tokens: a number, or [rows, 1], or [rows, steps]."""
    if many is None:
        return one
    by_row = many.dim() == 1 and (x.cu_seqlens is None or many.shape[0] == x.cu_seqlens.shape[0] - 1)
    return many[rows].unsqueeze(-1) if by_row else many.reshape(-1)[tokens]


def _after(y, last):
    """y of the next token, ``last`` [rows] after the last one."""
    return torch.cat((y[:, 1:], last.unsqueeze(-1)), 1)


class Block:
    """Rows side by side: what is known of their tokens."""

    def __init__(self, x: Inputs, o: Options, rows, tokens, there):
        masked = o.has(ZERO) and x.mask is not None
        valid = there & x.mask.reshape(-1)[tokens] if masked else there
        self.there, self.valid = there, valid
        zero = torch.zeros(tokens.shape, dtype=WIDE, device=tokens.device)
        self.values = _taken(x.values, tokens, valid) if x.values is not None else zero
        self.rewards = _taken(x.rewards, tokens, valid) if x.rewards is not None else zero
        final = valid & (valid.flip(1).long().cumsum(1).flip(1) == 1)
        if x.row_rewards is not None:
            self.rewards = self.rewards + torch.where(final, x.row_rewards[rows].unsqueeze(-1), 0.0)
        if x.kl is not None:
            self.rewards = self.rewards - o.kl_coef * _taken(x.kl, tokens, valid)
        self.start = (
            torch.zeros(len(rows), dtype=WIDE, device=rows.device) if x.bootstrap is None else x.bootstrap[rows]
        )
        self.gamma = _rate(o.gamma, x.gammas, x, rows, tokens)
        self.lam = _rate(o.lam, x.lams, x, rows, tokens)
        self.critic_lam = _rate(o.critic_lam, x.critic_lams, x, rows, tokens)
        done, cut = _flag(x.done, tokens, valid), _flag(x.truncated, tokens, valid)
        given = _taken(x.next_values, tokens, valid) if x.next_values is not None else zero
        if x.next_values is not None:
            cut = cut | final
        self.ahead = torch.where(done, 0.0, torch.where(cut, given, _after(self.values, self.start)))
        self.goes_on = ~(done | cut)

    def returns(self, lam):
        """G − V by A_t = δ_t + γλ·A_{t+1}: nothing of V is added up along the row."""
        delta = self.rewards + self.gamma * self.ahead - self.values
        a = torch.where(self.there & self.goes_on, self.gamma * lam * torch.ones_like(delta), 0.0)
        return scanned(a, torch.where(self.there, delta, 0.0))

    def vtrace(self, o: Options, log_ratio):
        """(advantages, returns)."""
        ratio = log_ratio.exp()
        delta = self.rewards + self.gamma * self.ahead - self.values
        later = torch.where(self.goes_on, self.gamma * self.lam * torch.ones_like(delta), 0.0)
        a = later * ratio.clamp(max=o.clip_c)
        errors = scanned(
            torch.where(self.there, a, 0.0), torch.where(self.there, ratio.clamp(max=o.clip_rho) * delta, 0.0)
        )
        after = _after(errors, torch.zeros_like(self.start))
        return ratio.clamp(max=o.clip_pg) * (delta + later * after), self.values + errors


def _estimate(block: Block, x: Inputs, o: Options, tokens):
    """(advantages, returns) of a block."""
    if o.has(VTRACE):
        return block.vtrace(o, _taken(x.log_ratio, tokens, block.valid))
    first = block.returns(block.lam)
    last = block.returns(block.critic_lam) if o.has(DECOUPLED) else first
    return first, last + block.values


def _bare(x: Inputs, o: Options) -> torch.Tensor:
    """The bare scan; a masked token holds what the last valid one left."""
    out = torch.empty(x.tokens.shape, dtype=WIDE, device=x.tokens.device)
    rows = Rows(x, o, out.device)
    start = torch.zeros(rows.count, dtype=WIDE, device=out.device) if x.bootstrap is None else x.bootstrap
    flat, held = out.view(-1), torch.full((out.numel(),), -1, device=out.device)
    for which, tokens, there in rows.blocks():
        a, b = _taken(x.coefficients, tokens, there), _taken(x.rewards, tokens, there)
        b[:, -1] += a[:, -1] * start[which]
        flat[tokens[there]] = scanned(a, b)[there]
    if x.mask is None:
        return out
    return _held(x, o, flat, held, start).view(out.shape)


def _held(x: Inputs, o: Options, flat, held, start):
    mask = x.mask.reshape(-1)
    n = mask.shape[0]
    index = torch.arange(n, device=mask.device)
    if x.cu_seqlens is None:
        row = index // max(1, x.tokens.shape[1])
        edges = torch.stack((row * x.tokens.shape[1], (row + 1) * x.tokens.shape[1]))
    else:
        row = torch.arange(len(start), device=mask.device).repeat_interleave(x.cu_seqlens.diff())
        edges = torch.stack((x.cu_seqlens[:-1][row], x.cu_seqlens[1:][row]))
    if o.has(REVERSE):
        nearest = torch.where(mask, index, n).flip(0).cummin(0).values.flip(0)
        inside = nearest < edges[1]
    else:
        nearest = torch.where(mask, index, -1).cummax(0).values
        inside = nearest >= edges[0]
    return torch.where(inside, flat[nearest.clamp(0, max(0, n - 1))], start[row])


def forward(x: Inputs, o: Options) -> torch.Tensor:
    """See ``rlfast/ops/affine_scan.py``."""
    out = allocate(x, o)
    if x.coefficients is not None:
        out[0] = _bare(x, o)
        return out
    out.zero_()
    flat = out.view(out.shape[0], -1)
    rows = Rows(x, o, out.device)
    for which, tokens, there in rows.blocks():
        block = Block(x, o, which, tokens, there)
        advantages, returns = _estimate(block, x, o, tokens)
        at = tokens[block.valid]
        if o.has(ADVANTAGES):
            flat[0, at] = advantages[block.valid].to(out.dtype)
        if o.has(RETURNS):
            flat[-1, at] = returns[block.valid].to(out.dtype)
    if o.whiten:
        out[0] = whitened(out[0], x.mask, **whiten_options(o))
    return out
