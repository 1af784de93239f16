"""Rows whose tokens are spread over ranks: the label of the token after the last, and scans that go on with the next
rank's state.

A rank's tokens are an affine map of the state that comes in, x → a·x + b. Each rank scans its own, all tell each other
their (a, b), and each folds those that come before its own: 16 bytes a row and rank.

``process_group`` of a function of ``rlfast`` says that a batch is spread over ranks. Of these functions it says that
rows are: they are functions of their own so that a call can only mean one of the two.
"""

from __future__ import annotations

import math

import torch

from rlfast import validate
from rlfast.advantages.rows import MASKINGS, Rows
from rlfast.distributed.ranks import gathered, needs_gradient
from rlfast.distributed.shards import Shards, State, form, scan

CLIP = validate.Limit("a float ≥ 0", 0.0, math.inf)


class _Call:
    """An estimator's arguments, checked, in float64, as chunks side by side: see ``fallback/affine_scan.py``."""

    def __init__(
        self, function, values, shards: Shards, *, rewards, gamma, mask, masking, done=None, truncated=None,
        bootstrap=None, critic_lam=None,
    ):  # fmt: skip
        validate.one_of("masking", masking, MASKINGS)
        self.rows, self.shards, like = Rows("values", values, None), shards, values
        needs = needs_gradient(rewards=rewards, values=values, bootstrap=bootstrap)
        shards.compare(
            function, {"values": values}, masking=masking, rewards=form(rewards, values),
            bootstrap=form(bootstrap, values), critic_lam="None" if critic_lam is None else "given", **needs,
        )  # fmt: skip
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
        after = scan(torch.ones_like(one), one, None, torch.zeros_like(self.start), self.shards).before()
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
        ahead = scan(torch.zeros_like(values), values, self.part, self.start, self.shards).before()
        if self.given is not None:
            cut = cut | self.final()
            ahead = torch.where(cut, self.given, ahead)
        ahead = torch.where(done, 0.0, ahead)
        return rewards + self.gamma * ahead - values, (~(done | cut)).double()

    def scan(self, a, b) -> State:
        """From the row's end, where nothing more is to come: what is there is in the last δ."""
        return scan(a, b, self.part, torch.zeros_like(self.start), self.shards)

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
    shards.compare("shifted_targets", {"ids": rows})
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
    says = {"reverse": str(bool(reverse)), "initial": form(initial, b)} | needs_gradient(a=a, b=b, initial=initial)
    shards.compare("affine_scan", {"b": b}, **says)
    start = rows.by_row("initial", initial)
    if initial is not None and start is None:
        validate.fail("initial", f"shape {tuple(rows.lead)}, one a row", validate.shape(initial))
    start = torch.zeros(rows.count, dtype=torch.float64, device=b.device) if start is None else start
    split = [shards.split(name, rows.tokens(name, x)).double() for name, x in (("a", a), ("b", b))]
    mask = shards.split("mask", rows.flags("mask", mask))
    out = shards.joined(scan(*split, mask, start, shards, reverse).out)
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
    given = {"rewards": rewards, "critic_lam": critic_lam, "gamma": gamma, "mask": mask, "masking": masking}
    call = _Call("gae", values, Shards(process_group, layout), **given, **ends)
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
        given = {"rewards": rewards, "gamma": gamma, "mask": mask, "masking": masking}
        call = _Call("vtrace", values, Shards(process_group, layout), **given, **ends)
        v = call.tokens("values", values)
        validate.tensor("log_ratio", log_ratio)
        ratio = call.tokens("log_ratio", log_ratio).exp()
        delta, goes_on = call.errors(call.rewards(rewards), v)
        later = call.gamma * call.rate("lam", lam) * goes_on
        found = call.scan(later * ratio.clamp(max=c), ratio.clamp(max=rho) * delta)
        adv = ratio.clamp(max=pg) * (delta + later * found.before())
        return tuple(call.out(x, rewards, values, log_ratio) for x in (adv, v + found.out))
