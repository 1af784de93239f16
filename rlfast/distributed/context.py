"""Rows whose tokens are spread over ranks: the label of the token after the last, and scans that go on with the next
rank's state.

A rank's tokens are an affine map of the state that comes in, x → a·x + b. Each rank scans its own, all tell each other
their (a, b), and each folds those that come before its own: 16 bytes a row and rank.

``process_group`` of a function of ``rlfast`` says that a batch is spread over ranks. Of these functions it says that
rows are: they are functions of their own so that a call can only mean one of the two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from rlfast import backends, validate
from rlfast.advantages import affine_scan as local_scan
from rlfast.advantages.rows import MASKINGS, Rows
from rlfast.distributed.ranks import alike, gathered, ranks_of

LAYOUTS = {"contiguous": 1, "zigzag": 2}  # chunks of a row that a rank has
CLIP = validate.Limit("a float ≥ 0", 0.0, math.inf)


class Shards:
    """Which part of every row a rank has: one chunk after the other along the first dimension.

    "contiguous": rank r of W has the r-th of W. "zigzag": the r-th and the (2W − 1 − r)-th of 2W, side by side, as
    causal attention over ranks wants it.
    """

    def __init__(self, process_group, layout: str):
        self.ranks = ranks_of(process_group)
        if self.ranks is None:
            validate.fail("process_group", "the ranks over which rows are spread", "None", TypeError)
        self.layout = validate.one_of("layout", layout, tuple(LAYOUTS))
        self.chunks = LAYOUTS[layout]

    def split(self, name: str, x):
        """[R, T] → [chunks·R, T/chunks]; None stays None."""
        if x is None or self.chunks == 1:
            return x
        if x.shape[1] % self.chunks:
            validate.fail(name, f"tokens in {self.chunks} chunks of one length, in a zigzag layout", validate.shape(x))
        return x.unflatten(1, (self.chunks, -1)).transpose(0, 1).flatten(0, 1)

    def joined(self, x):
        """The other way."""
        return x if self.chunks == 1 else x.unflatten(0, (self.chunks, -1)).transpose(0, 1).flatten(1)

    def in_order(self, every):
        """[ranks, chunks, …] → the chunks of a row in their order."""
        if self.chunks == 1:
            return every[:, 0]
        return torch.cat((every[:, 0], every[:, 1].flip(0)))

    def own(self, each):
        """Of the chunks of a row in their order, this rank's."""
        rank, size = self.ranks.rank, self.ranks.size
        places = [rank] if self.chunks == 1 else [rank, 2 * size - 1 - rank]
        return each[places]


class _Carry(torch.autograd.Function):
    """The state before each of this rank's chunks: the maps of those before it, folded.

    s_{c+1} = b_c + a_c·s_c in the order of the scan. With u_c the gradient of s_c and of all that comes of it,
    u_c = g_c + a_c·u_{c+1}, ∂b_c = u_{c+1}, ∂a_c = u_{c+1}·s_c.
    """

    @staticmethod
    def forward(ctx, maps, initial, shards: Shards, reverse: bool):
        every = shards.in_order(gathered(maps, shards.ranks, "the maps of the scan"))
        every = every.flip(0) if reverse else every  # in the order of the scan
        states = [initial]
        for a, b in every.unbind(0):
            states.append(b + a * states[-1])
        states = torch.stack(states[:-1])
        ctx.save_for_backward(every[:, 0], states)
        ctx.shards, ctx.reverse = shards, reverse
        return shards.own(states.flip(0) if reverse else states)

    @staticmethod
    def backward(ctx, g):
        a, states = ctx.saved_tensors
        shards, flip = ctx.shards, ctx.reverse
        g = shards.in_order(gathered(g, shards.ranks, "the maps of the scan, backward"))
        g = g.flip(0) if flip else g
        later, found = torch.zeros_like(g[0]), []
        for c in reversed(range(len(g))):
            found.append(torch.stack((later * states[c], later)))
            later = g[c] + a[c] * later
        found = torch.stack(found)  # from the last to the first
        last = shards.own(torch.arange(len(g)))
        first = (len(g) - 1 if flip else 0) in last.tolist()  # who has the row's first step was given the state
        own = shards.own(found if flip else found.flip(0))
        return own, later if first else torch.zeros_like(later), None, None


class State(NamedTuple):
    """What a scan found, in float64."""

    out: torch.Tensor  # [chunks·R, T]
    carry: torch.Tensor  # [chunks·R]: the state before the first step of each chunk

    def before(self, reverse: bool = True):
        """The state that each step started from."""
        first = self.carry.unsqueeze(1)
        return torch.cat((self.out[:, 1:], first), 1) if reverse else torch.cat((first, self.out[:, :-1]), 1)


def _scan(a, b, mask, initial, shards: Shards, reverse: bool = True) -> State:
    """The recurrence over the chunks [chunks·R, T] of all ranks; initial [R]."""
    with backends.use_backend("torch"):  # float64
        alone = local_scan(a, b, reverse, mask=mask)
        product = (a if mask is None else torch.where(mask, a, 1.0)).prod(1)
        edge = (alone[:, 0] if reverse else alone[:, -1]) if b.shape[1] else torch.zeros_like(product)
        maps = torch.stack((product, edge)).unflatten(1, (shards.chunks, -1)).transpose(0, 1)
        carry = _Carry.apply(maps, initial, shards, reverse).flatten()
        return State(local_scan(a, b, reverse, mask=mask, initial=carry), carry)


class _Call:
    """An estimator's arguments, checked, in float64, as chunks side by side: see ``fallback/affine_scan.py``."""

    def __init__(self, name, like, shards: Shards, *, gamma, mask, masking, done=None, truncated=None, bootstrap=None):
        validate.one_of("masking", masking, MASKINGS)
        self.rows, self.shards = Rows(name, like, None), shards
        alike({name: like[..., :0]}, shards.ranks)
        if truncated is not None and (not isinstance(bootstrap, torch.Tensor) or bootstrap.shape != like.shape):
            came = validate.shape(bootstrap) if isinstance(bootstrap, torch.Tensor) else repr(bootstrap)
            validate.fail("bootstrap", f"shape {tuple(like.shape)}, the values after truncated tokens", came)
        mask = self.flags("mask", mask)
        count = shards.chunks * self.rows.count
        self.valid = torch.ones(count, like.shape[-1] // shards.chunks, dtype=torch.bool, device=like.device)
        self.valid = self.valid if mask is None else mask
        self.part = None if masking == "zero" else mask  # who takes part in the recurrence; None: all
        self.gamma = self.rate("gamma", gamma)
        start = self.rows.by_row("bootstrap", bootstrap) if truncated is None else None
        self.start = torch.zeros(self.rows.count, dtype=torch.float64, device=like.device) if start is None else start
        self.given = self.tokens("bootstrap", bootstrap) if bootstrap is not None and start is None else None
        self.ends = [self._ends(x) for x in (self.flags("done", done), self.flags("truncated", truncated))]

    def _ends(self, x):
        return torch.zeros_like(self.valid) if x is None else x & self.valid

    def flags(self, name: str, x):
        return self.shards.split(name, self.rows.flags(name, x))

    def tokens(self, name: str, x):
        """One number a token, 0 where it is masked."""
        x = self.shards.split(name, self.rows.tokens(name, x))
        return None if x is None else torch.where(self.valid, x.double(), 0.0)

    def rate(self, name: str, x):
        """A factor for all, a row or a token, as it multiplies the tokens."""
        left_out = self.shards.joined(self.part) if self.part is not None else None
        one, many = self.rows.rate(name, x, left_out)
        if many is None:
            return one
        if many.dim() == 1:
            return many.repeat(self.shards.chunks).unsqueeze(1)
        return self.shards.split(name, many)

    def final(self):
        """The last valid token of each row, on the rank that has it."""
        one = self.valid.double()
        after = _scan(torch.ones_like(one), one, None, torch.zeros_like(self.start), self.shards).before()
        return self.valid & (after == 0)

    def rewards(self, rewards):
        """r of every token; one a row is earned at its last valid token."""
        if isinstance(rewards, torch.Tensor) and rewards.shape != self.rows.shape:
            by_row = self.rows.by_row("rewards", rewards).repeat(self.shards.chunks).unsqueeze(1)
            return torch.where(self.final(), by_row, 0.0)
        validate.tensor("rewards", rewards)
        return self.tokens("rewards", rewards)

    def errors(self, rewards, values):
        """(δ, 1 where the recurrence goes on after a token, else 0)."""
        done, cut = self.ends
        ahead = _scan(torch.zeros_like(values), values, self.part, self.start, self.shards).before()
        if self.given is not None:
            cut = cut | self.final()
            ahead = torch.where(cut, self.given, ahead)
        ahead = torch.where(done, 0.0, ahead)
        return rewards + self.gamma * ahead - values, (~(done | cut)).double()

    def scan(self, a, b) -> State:
        """From the row's end, where nothing more is to come: what is there is in the last δ."""
        return _scan(a, b, self.part, torch.zeros_like(self.start), self.shards)

    def out(self, x, *inputs):
        """A result as it is handed out."""
        wide = any(y is not None and y.dtype == torch.float64 for y in inputs)
        x = self.shards.joined(torch.where(self.valid, x, 0.0))
        return x.to(torch.float64 if wide else torch.float32).reshape(self.rows.shape)


def shifted_targets(ids, *, process_group, layout="contiguous", ignore_index=validate.IGNORE_INDEX) -> torch.Tensor:
    """The targets of a rank's tokens: each token's successor, which for the last one is on the next rank.

        targets_t = ids_{t+1};   ignore_index after the end of a row

    Args:
        ids: [*, T] int, this rank's tokens of each row; T may be another on another rank.
        process_group: the ranks, or a ``DeviceMesh`` of one dimension, over which rows are spread, in its order.
        layout: "contiguous": rank r of W has the r-th of W parts of a row; "zigzag": the r-th and the (2W − 1 − r)-th
            of 2W parts, side by side.
        ignore_index: what the last token of a row gets.

    Returns:
        Like ids: targets of ``rlfast.token_logps`` and ``linear_token_logps``. One collective, of a token a row, part
        and rank.

    Raises:
        ValueError, TypeError: an argument is of the wrong type or shape, or shapes differ among ranks (not looked at
            on a GPU); the message names it, and the ranks.

    Example:
        >>> ids = torch.arange(4).reshape(1, 4) + 4 * torch.distributed.get_rank(group)
        >>> targets = rlfast.distributed.shifted_targets(ids, process_group=group)
        >>> (targets - ids)[:, :3]
        tensor([[1, 1, 1]])
    """
    shards = Shards(process_group, layout)
    validate.tensor("ids", ids, (torch.int64, torch.int32))
    if ids.dim() == 0 or not ids.shape[-1]:
        validate.fail("ids", "shape [*, T], one token at least", validate.shape(ids))
    rows = ids.reshape(-1, ids.shape[-1])
    alike({"ids": rows[:, :0]}, shards.ranks)
    rows = shards.split("ids", rows)
    firsts = gathered(rows[:, 0].unflatten(0, (shards.chunks, -1)), shards.ranks, "the first tokens")
    firsts = shards.in_order(firsts)
    after = torch.cat((firsts[1:], torch.full_like(firsts[:1], ignore_index)))
    out = torch.cat((rows[:, 1:], shards.own(after).reshape(-1, 1)), 1)
    return shards.joined(out).reshape(ids.shape)


def affine_scan(a, b, reverse=True, *, mask=None, initial=None, process_group, layout="contiguous") -> torch.Tensor:
    """``rlfast.affine_scan`` of rows that are spread over ranks.

    A_t = b_t + a_t·A_{t+1}, or b_t + a_t·A_{t−1} where not ``reverse``

    Args:
        a, b, reverse, mask: as in ``rlfast.affine_scan``, of this rank's tokens.
        initial: [*], what A is before a row's first step; the same on all ranks. Its gradient is with the rank that has
            that step, and 0 on the others.
        process_group, layout: as in ``shifted_targets``.

    Returns:
        [*, T] float32 (float64 for float64); differentiable, where the same inputs need a gradient on every rank.

    Raises:
        TypeError, ValueError: as in ``shifted_targets``.
    """
    shards = Shards(process_group, layout)
    rows = Rows("b", b, None)
    validate.tensor("a", a)
    alike({"b": b[..., :0]}, shards.ranks)
    start = rows.by_row("initial", initial)
    if initial is not None and start is None:
        validate.fail("initial", f"shape {tuple(rows.lead)}, one a row", validate.shape(initial))
    start = torch.zeros(rows.count, dtype=torch.float64, device=b.device) if start is None else start
    split = [shards.split(name, rows.tokens(name, x)).double() for name, x in (("a", a), ("b", b))]
    mask = shards.split("mask", rows.flags("mask", mask))
    out = shards.joined(_scan(*split, mask, start, shards, reverse).out)
    return out.to(torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32).reshape(b.shape)


def gae(
    rewards, values, mask=None, *, gamma, lam, masking="carry", done=None, truncated=None, bootstrap=None,
    critic_lam=None, process_group, layout="contiguous",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``rlfast.gae`` of rows that are spread over ranks.

    δ_t = r_t + γV_{t+1} − V_t;  A_t = δ_t + γλA_{t+1};  R_t = A_t + V_t

    Args:
        rewards, values, mask, gamma, lam, masking, done, truncated, critic_lam: as in ``rlfast.gae``, of this rank's
            tokens; what is one a row is the same on all ranks. Packed sequences: one row, ``done`` at their ends.
        bootstrap: [*], the value after a row's last token, the same on all ranks; or [*, T], as in ``rlfast.gae``.
        process_group, layout: as in ``shifted_targets``.

    Returns:
        (advantages, returns), float32 (float64 for float64), of this rank's tokens; differentiable as those of
        ``rlfast.gae``, where the same inputs need a gradient on every rank. Whitening: ``rlfast.masked_whiten``.

    Raises:
        TypeError, ValueError: as in ``rlfast.gae`` and ``shifted_targets``.
    """
    ends = {"done": done, "truncated": truncated, "bootstrap": bootstrap}
    call = _Call("values", values, Shards(process_group, layout), gamma=gamma, mask=mask, masking=masking, **ends)
    v = call.tokens("values", values)
    delta, goes_on = call.errors(call.rewards(rewards), v)
    adv = ret = call.scan(call.gamma * call.rate("lam", lam) * goes_on, delta).out
    if critic_lam is not None:
        ret = call.scan(call.gamma * call.rate("critic_lam", critic_lam) * goes_on, delta).out
    return call.out(adv, rewards, values), call.out(ret + v, rewards, values)


def lambda_returns(
    rewards, values, mask=None, *, gamma, lam, masking="carry", done=None, truncated=None, bootstrap=None,
    process_group, layout="contiguous",
) -> torch.Tensor:  # fmt: skip
    """``rlfast.lambda_returns`` of rows that are spread over ranks.

    G_t = r_t + γ[(1 − λ)V_{t+1} + λG_{t+1}]

    Args:
        rewards, values, mask, gamma, lam, masking, done, truncated, bootstrap, process_group, layout: as in ``gae``.

    Returns:
        [*, T] float32; differentiable.

    Raises:
        TypeError, ValueError: as in ``gae``.
    """
    return gae(
        rewards, values, mask, gamma=gamma, lam=lam, masking=masking, done=done, truncated=truncated,
        bootstrap=bootstrap, process_group=process_group, layout=layout,
    )[1]  # fmt: skip


def discounted_returns(
    rewards, mask=None, *, gamma, masking="carry", done=None, bootstrap=None, process_group, layout="contiguous"
) -> torch.Tensor:
    """``rlfast.discounted_returns`` of rows that are spread over ranks.

    G_t = r_t + γG_{t+1}

    Args:
        rewards: [*, T] float, of this rank's tokens.
        mask, gamma, masking, done, process_group, layout: as in ``gae``.
        bootstrap: [*], what G is after a row's last token, the same on all ranks; 0 if not given.

    Returns:
        [*, T] float32; differentiable.

    Raises:
        TypeError, ValueError: as in ``gae``.
    """
    validate.tensor("rewards", rewards)
    return gae(
        rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, masking=masking, done=done,
        bootstrap=bootstrap, process_group=process_group, layout=layout,
    )[1]  # fmt: skip


def vtrace(
    rewards, values, log_ratio, mask=None, *, gamma, lam=1.0, clip_rho=1.0, clip_c=1.0, clip_pg_rho=1.0,
    masking="carry", done=None, truncated=None, bootstrap=None, process_group, layout="contiguous",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """``rlfast.vtrace`` of rows that are spread over ranks.

    δ_t = min(ρ̄, ρ_t)(r_t + γV_{t+1} − V_t);  e_t = δ_t + γλ·min(c̄, ρ_t)·e_{t+1};  target = V + e

    Args:
        rewards, values, mask, gamma, lam, masking, done, truncated, bootstrap, process_group, layout: as in ``gae``.
        log_ratio, clip_rho, clip_c, clip_pg_rho: as in ``rlfast.vtrace``.

    Returns:
        (advantages, targets), float32: constants.

    Raises:
        TypeError, ValueError: as in ``gae``.
    """
    clips = {"clip_rho": clip_rho, "clip_c": clip_c, "clip_pg_rho": clip_pg_rho}
    rho, c, pg = (math.inf if x is None else validate.number(k, x, CLIP) for k, x in clips.items())
    ends = {"done": done, "truncated": truncated, "bootstrap": bootstrap}
    with torch.no_grad():
        call = _Call("values", values, Shards(process_group, layout), gamma=gamma, mask=mask, masking=masking, **ends)
        v = call.tokens("values", values)
        validate.tensor("log_ratio", log_ratio)
        ratio = call.tokens("log_ratio", log_ratio).exp()
        delta, goes_on = call.errors(call.rewards(rewards), v)
        later = call.gamma * call.rate("lam", lam) * goes_on
        found = call.scan(later * ratio.clamp(max=c), ratio.clamp(max=rho) * delta)
        adv = ratio.clamp(max=pg) * (delta + later * found.before())
        return tuple(call.out(x, rewards, values, log_ratio) for x in (adv, v + found.out))
