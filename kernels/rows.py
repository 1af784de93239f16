"""Tokens of a row in the order of a recurrence: where they lie, which are valid, what is known of each.

``j`` counts from where the recurrence starts: from the end of the row where it is reversed.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.lang import jit, tl


class Tokens(NamedTuple):
    """The tensors of a call, dense; None: not given."""

    rewards: torch.Tensor | None
    critic: torch.Tensor | None  # V; a tuple of Triton has `values` of its own
    log_ratio: torch.Tensor | None
    kl: torch.Tensor | None
    coefficients: torch.Tensor | None
    next_values: torch.Tensor | None
    mask: torch.Tensor | None  # uint8, as the next two
    done: torch.Tensor | None
    truncated: torch.Tensor | None
    row_rewards: torch.Tensor | None
    bootstrap: torch.Tensor | None
    gammas: torch.Tensor | None
    lams: torch.Tensor | None
    critic_lams: torch.Tensor | None
    cu_seqlens: torch.Tensor | None


class Kind(NamedTuple):
    """What is compiled for."""

    vtrace: bool
    zero: bool
    reverse: bool
    decoupled: bool
    gamma_by_token: bool
    lam_by_token: bool
    critic_by_token: bool
    maps: bool  # find the segments' maps, and write no output


@jit
def latest(there, value, next_there, next_value):
    """The later of two values that is there."""
    return there | next_there, tl.where(next_there != 0, next_value, value)


@jit
def wide(pointer, at, inside):
    """Numbers as float64, 0 outside."""
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float64)


@jit
def token_of(begin, length, j, REVERSE: tl.constexpr):
    """Where the j-th token of the recurrence lies."""
    return begin + (length - 1 - j if REVERSE else j)


@jit
def rate(pointer, one, low, row, at, inside, BY_TOKEN: tl.constexpr):
    """γ or λ of these tokens; a number for all comes as two of float32."""
    if pointer is None:
        found = tl.cast(one, tl.float64) + tl.cast(low, tl.float64)
    elif BY_TOKEN:
        found = wide(pointer, at, inside)
    else:
        found = tl.load(pointer + row)
    return found


@jit
def first_valid(x, begin, length, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The j of the first valid token, or the length of the row."""
    first = length
    if x.mask is None:
        first = length - length
    else:
        base = length - length
        while (first == length) & (base < length):
            j = base + tl.arange(0, BLOCK)
            valid = tl.load(x.mask + token_of(begin, length, j, KIND.reverse), mask=j < length, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(valid, j, length), axis=0))
            base += BLOCK
    return first


@jit
def last_valid(mask, at, stop, step):
    """From a token back to the first one that is valid, as far as ``stop``."""
    while (at != stop) & (tl.load(mask + at) == 0):
        at = at - step
    return at


@jit
def value_before(x, begin, length, j, first, KIND: tl.constexpr):
    """V of the last valid token before the j-th, for a segment that begins there."""
    value = tl.zeros([], tl.float64)
    if x.critic is not None:
        k = j - 1
        at = token_of(begin, length, k, KIND.reverse)
        there = k >= 0
        if x.mask is not None:
            step = -1 if KIND.reverse else 1
            if not KIND.zero:
                at = last_valid(x.mask, at, token_of(begin, length, first, KIND.reverse), step)
            there = tl.load(x.mask + at) != 0
        value = wide(x.critic, at, there)
    return value


@jit
def rewards_of(x, row, at, j, first, valid, kl_coef):
    """r_t − kl_coef·kl_t, and at the first token of the recurrence the reward of the whole row."""
    r = tl.zeros(at.shape, tl.float64)
    if x.rewards is not None:
        r = wide(x.rewards, at, valid)
    if x.row_rewards is not None:
        r = tl.where(j == first, r + tl.load(x.row_rewards + row), r)
    if x.kl is not None:
        r = r - tl.cast(kl_coef, tl.float64) * wide(x.kl, at, valid)
    return tl.where(valid, r, 0.0)


@jit
def values_of(x, begin, length, j, at, valid, anchor, high, ahead, KIND: tl.constexpr):
    """(V, V of the token before in the order of the recurrence): of the one before the block, what went before it."""
    value = tl.zeros(j.shape, tl.float64)
    v = value
    if x.critic is not None:
        value = wide(x.critic, at, valid)
        near = (j > anchor) & (j <= high)
        before = token_of(begin, length, j - 1, KIND.reverse)
        there = near
        if x.mask is not None:
            there = near & (tl.load(x.mask + before, mask=near, other=0) != 0)
        near_value = wide(x.critic, before, there)
        if KIND.zero:
            there = near
        there, v = tl.associative_scan((there.to(tl.int32), near_value), 0, latest)
        v = tl.where(there != 0, v, ahead)
    elif x.bootstrap is not None and x.coefficients is None:
        v = tl.where(j == anchor, ahead, 0.0)
    return value, v


@jit
def at_ends(x, at, j, first, inside, valid, v):
    """(V', whether G' is that of the token before): where an episode ends nothing is, where it is cut a given value."""
    goes_on = inside
    if x.next_values is not None or x.truncated is not None:
        cut = valid & (j < 0)
        given = tl.zeros(j.shape, tl.float64)
        if x.next_values is not None:
            cut = valid & (j == first)
            given = wide(x.next_values, at, valid)
        if x.truncated is not None:
            cut = cut | (valid & (tl.load(x.truncated + at, mask=valid, other=0) != 0))
        v, goes_on = tl.where(cut, given, v), goes_on & (cut == 0)
    if x.done is not None:
        done = valid & (tl.load(x.done + at, mask=valid, other=0) != 0)
        v, goes_on = tl.where(done, 0.0, v), goes_on & (done == 0)
    return v, goes_on
