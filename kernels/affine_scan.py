"""The ``triton`` backend of the scan: a program a row, a block of tokens at a time, in float64.

The affine maps of a block's tokens are composed by ``tl.associative_scan``, (a, b)∘(a′, b′) = (a·a′, b + a·b′), and the
state of the recurrence goes from block to block. A row of more than SEGMENT tokens is scanned in segments, each a map
G = P·carry + Q of what comes before it: where rows are few and long, a program has one segment, a first launch finds
the maps and a second the outputs; else a program has a row, and one launch is all. The bits are the same. Of packed
rows only the mean length is known: they are long where it is more than a segment.

``j`` counts the tokens of a row in the order of the recurrence, from its first valid one on, so that they do not depend
on the padding either.
"""

import ctypes
from typing import NamedTuple

import torch

from rlfast.kernels import whiten
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.rows import (
    Kind,
    Tokens,
    at_ends,
    first_valid,
    rate,
    rewards_of,
    token_of,
    value_before,
    values_of,
    wide,
)
from rlfast.kernels.whiten import more, place_of, put
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
    allocate,
)

BLOCK = 512  # tokens of a step: 4 a thread, so that the scan of four float64 stays in registers
SEGMENT = 16384  # tokens of a segment, where a row is split over programs
BUSY = 528  # programs that fill an H100 (132 SMs × 4); with fewer rows than this, long ones are split
FEW = 1024  # a power of two that is more
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

SCALARS = (
    "steps", "gamma", "gamma_low", "lam", "lam_low", "critic_lam", "critic_low", "kl_coef", "clip_rho", "clip_c",
    "clip_pg", "segments", "rows",
)  # fmt: skip


@jit
def compose(a, b, next_a, next_b):
    """The map of one token, then that of the next: state → next_b + next_a·(b + a·state)."""
    return a * next_a, next_b + next_a * b


@jit
def compose_both(a, b, before_a, before_b, next_a, next_b, next_before_a, next_before_b):
    """The same, and the map of all tokens but the last."""
    return a * next_a, next_b + next_a * b, a * next_before_a, next_before_b + next_before_a * b


@jit
def last(x, BLOCK: tl.constexpr):
    """The last element of a block."""
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, x, 0.0), axis=0)


@jit
def row_of(cu_seqlens, place, rows, SEGMENT: tl.constexpr, FEW: tl.constexpr):
    """The packed row that a place among the segments belongs to: the last one that begins there or before."""
    row = tl.arange(0, FEW)
    begins = place_of(cu_seqlens, row, rows, 0, SEGMENT)
    return tl.sum(((row < rows) & (begins <= place)).to(tl.int64), axis=0) - 1


@jit
def write_before(x, advantages, returns, begin, length, anchor, start, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The outputs of the masked tokens that come before the first valid one."""
    outside = tl.zeros([BLOCK], tl.float64)
    if x.coefficients is not None:
        outside += start
    for base in range(0, anchor, BLOCK):
        j = base + tl.arange(0, BLOCK)
        at = token_of(begin, length, j, KIND.reverse)
        if advantages is not None:
            tl.store(advantages + at, outside.to(tl.float32), mask=j < anchor)
        if returns is not None:
            tl.store(returns + at, outside.to(tl.float32), mask=j < anchor)


@jit(do_not_specialize=SCALARS, do_not_specialize_on_alignment=["advantages", "returns"])
def scan_rows(
    x, advantages, returns, maps, moments,
    steps, gamma, gamma_low, lam, lam_low, critic_lam, critic_low, kl_coef, clip_rho, clip_c, clip_pg, segments, rows,
    KIND: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """A row, or one segment of it where ``maps`` [places, 4] are given: G = P·carry + Q for one or two λ.

    Each segment has a place there, and in ``moments`` [places, 4], those of its advantages, where they are whitened.
    """
    row = tl.program_id(0).to(tl.int64)
    if maps is not None:
        row = row // segments if x.cu_seqlens is None else row_of(x.cu_seqlens, row, rows, SEGMENT, FEW)
    place = place_of(x.cu_seqlens, row, rows, segments, SEGMENT)
    segment = place - place
    if maps is not None:
        segment = tl.program_id(0) - place
    begin, length = row * steps, tl.cast(steps, tl.int64)
    if x.cu_seqlens is not None:
        begin = tl.load(x.cu_seqlens + row)
        length = tl.load(x.cu_seqlens + row + 1) - begin
    first = first_valid(x, begin, length, KIND, BLOCK)
    anchor = first
    start = tl.zeros([], tl.float64)
    if x.bootstrap is not None:
        start = tl.load(x.bootstrap + row)
    if KIND.zero and (x.bootstrap is not None or x.next_values is not None):
        anchor = length - length
    low, high = anchor, length
    carry, carry2, ahead = start, start, start
    if maps is not None:
        low = anchor + segment * SEGMENT
        high = tl.minimum(length, low + SEGMENT)
        if segment > 0 and low < length:
            ahead = value_before(x, begin, length, low, first, KIND)
        if not KIND.maps:
            for s in range(segment):
                at = maps + (place + s) * 4
                p, q = tl.load(at), tl.load(at + 1)
                carry = tl.where(p == 0.0, q, q + p * carry)
                if KIND.decoupled:
                    p, q = tl.load(at + 2), tl.load(at + 3)
                    carry2 = tl.where(p == 0.0, q, q + p * carry2)
    if not KIND.maps and segment == 0:
        write_before(x, advantages, returns, begin, length, anchor, start, KIND, BLOCK)
    one, nothing = tl.full([], 1.0, tl.float64), tl.zeros([], tl.float64)
    p, q, p2, q2 = one, nothing, one, nothing
    n, near, first_moment, second_moment = nothing, nothing, nothing, nothing
    place += segment
    for base in range(low, high, BLOCK):
        if maps is None and base > low and (base - low) % SEGMENT == 0:
            carry, carry2 = tl.where(p == 0.0, q, q + p * carry), tl.where(p2 == 0.0, q2, q2 + p2 * carry2)
            p, q, p2, q2 = one, nothing, one, nothing
            if moments is not None:
                put(moments, place, n, near, first_moment, second_moment)
                n, near, first_moment, second_moment = nothing, nothing, nothing, nothing
                place += 1
        j = base + tl.arange(0, BLOCK)
        at = token_of(begin, length, j, KIND.reverse)
        inside = j < high
        valid = inside
        if x.mask is not None:
            valid = inside & (tl.load(x.mask + at, mask=inside, other=0) != 0)
        value, v = values_of(x, begin, length, j, at, valid, anchor, high, ahead, KIND)
        ahead = last(v, BLOCK)
        r = rewards_of(x, row, at, j, first, valid, kl_coef)
        g = rate(x.gammas, gamma, gamma_low, row, at, inside, KIND.gamma_by_token)
        g_lam = g * rate(x.lams, lam, lam_low, row, at, inside, KIND.lam_by_token)
        v, goes_on = at_ends(x, at, j, first, inside, valid, v)
        takes_part = inside if KIND.zero else valid
        delta = (r + g * v) - value
        if KIND.vtrace:
            ratio = tl.exp(wide(x.log_ratio, at, valid))
            rho, c = clipped(ratio, clip_rho), clipped(ratio, clip_c)
            a = g_lam * c
            b = tl.where(goes_on, (value + rho * delta) - a * v, value + rho * delta)
        elif x.coefficients is not None:
            a, b = wide(x.coefficients, at, valid), r
        else:
            a = g_lam + tl.zeros([BLOCK], tl.float64)
            b = tl.where(goes_on, r + (g - g_lam) * v, r + g * v)
        a = tl.where(takes_part, tl.where(goes_on, a, 0.0), 1.0)
        b = tl.where(takes_part, b, 0.0)
        if KIND.vtrace:
            same, no_shift = tl.full([BLOCK], 1.0, tl.float64), tl.zeros([BLOCK], tl.float64)
            a, b, before_a, before_b = tl.associative_scan((a, b, same, no_shift), 0, compose_both)
            ahead_g = state_of(before_a, before_b, p, q, carry)
            rest = tl.where(goes_on, g_lam * (ahead_g - v), 0.0)
            out = clipped(ratio, clip_pg) * (delta + rest)
        else:
            a, b = tl.associative_scan((a, b), 0, compose)
        p_all, q_all = a * p, b + a * q
        state = tl.where(p_all == 0.0, q_all, q_all + p_all * carry)
        p, q = last(p_all, BLOCK), last(q_all, BLOCK)
        if not KIND.vtrace:
            out = state - value
        back = state
        if KIND.decoupled:
            g_lam2 = g * rate(x.critic_lams, critic_lam, critic_low, row, at, inside, KIND.critic_by_token)
            a = tl.where(takes_part, tl.where(goes_on, g_lam2, 0.0), 1.0)
            b = tl.where(takes_part, tl.where(goes_on, r + (g - g_lam2) * v, r + g * v), 0.0)
            a, b = tl.associative_scan((a, b), 0, compose)
            p_all, q_all = a * p2, b + a * q2
            back = tl.where(p_all == 0.0, q_all, q_all + p_all * carry2)
            p2, q2 = last(p_all, BLOCK), last(q_all, BLOCK)
        if x.coefficients is None:
            out, back = tl.where(valid, out, 0.0), tl.where(valid, back, 0.0)
        if not KIND.maps:
            if advantages is not None:
                tl.store(advantages + at, out.to(tl.float32), mask=inside)
            if returns is not None:
                tl.store(returns + at, back.to(tl.float32), mask=inside)
        if moments is not None:
            shown = out.to(tl.float32).to(tl.float64)
            n, near, first_moment, second_moment = more(n, near, first_moment, second_moment, shown, valid)
    if moments is not None:
        put(moments, place, n, near, first_moment, second_moment)
        if maps is None:  # the places of segments that the row does not have
            for unused in range(place + 1, place_of(x.cu_seqlens, row + 1, rows, segments, SEGMENT)):
                put(moments, unused, nothing, nothing, nothing, nothing)
    if KIND.maps:
        at = maps + place * 4
        tl.store(at, p)
        tl.store(at + 1, q)
        tl.store(at + 2, p2)
        tl.store(at + 3, q2)


@jit
def clipped(ratio, clip):
    """min(clip, ratio), NaN where the ratio is."""
    clip = tl.cast(clip, tl.float64)
    return tl.where(ratio > clip, clip, ratio)


@jit
def state_of(a, b, p, q, carry):
    """What a map of the block makes of the state before it."""
    p_all, q_all = a * p, b + a * q
    return tl.where(p_all == 0.0, q_all, q_all + p_all * carry)


def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    if x is None:
        return None
    x = x.contiguous()
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def _by_token(rates, x: Inputs, rows: int) -> bool:
    return rates is not None and (rates.dim() > 1 or not (x.cu_seqlens is None or rates.shape[0] == rows))


def _low(x: float) -> float:
    """What is left of a number that a kernel gets, which is in float32."""
    return x - ctypes.c_float(x).value


def _rows(x: Inputs) -> int:
    return x.tokens.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1


def _launch(x: Inputs, o: Options, out, segments: int, programs: int, maps, moments, only_maps: bool) -> None:
    rows = _rows(x)
    kind = Kind(
        o.has(VTRACE), o.has(ZERO), o.has(REVERSE), o.has(DECOUPLED), _by_token(x.gammas, x, rows),
        _by_token(x.lams, x, rows), _by_token(x.critic_lams, x, rows), only_maps,
    )  # fmt: skip
    steps = x.tokens.shape[1] if x.cu_seqlens is None else 0
    advantages = out[0] if o.has(ADVANTAGES) else None
    returns = out[-1] if o.has(RETURNS) else None
    scan_rows[(programs,)](
        Tokens(*map(_dense, x)), advantages, returns, maps, moments, steps, o.gamma, _low(o.gamma), o.lam, _low(o.lam),
        o.critic_lam, _low(o.critic_lam), o.kl_coef, o.clip_rho, o.clip_c, o.clip_pg, segments, rows, KIND=kind,
        BLOCK=BLOCK, SEGMENT=SEGMENT, FEW=FEW, **OPTIONS,
    )  # fmt: skip


def forward(x: Inputs, o: Options) -> torch.Tensor:
    """See ``rlfast/ops/affine_scan.py``."""
    out, rows, tokens = allocate(x, o), _rows(x), x.tokens.numel()
    if out.numel() == 0 or rows == 0:
        return out
    segments = -(-x.tokens.shape[-1] // SEGMENT)  # of padded rows
    places = rows * segments if x.cu_seqlens is None else rows + tokens // SEGMENT
    split = rows < BUSY and tokens > rows * SEGMENT

    def per_place():
        return torch.empty((places, 4), dtype=torch.float64, device=out.device)

    maps, moments = per_place() if split else None, per_place() if o.whiten else None
    with torch.cuda.device_of(out):
        if split:
            _launch(x, o, out, segments, places, maps, None, True)
        _launch(x, o, out, segments, places if split else rows, maps, moments, False)
        if o.whiten:
            whiten.launch(out[0], _dense(x.mask), moments, x.cu_seqlens, rows, segments, SEGMENT, o)
    return out


class CompileCase(NamedTuple):
    """One call whose launches ``make compile`` compiles."""

    name: str
    options: int
    given: tuple  # names of the inputs
    dtype: torch.dtype
    packed: bool = False
    steps: int = 100
    whiten: int = 0

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.name}"


_BOTH = ADVANTAGES | RETURNS | REVERSE
_GAE = ("rewards", "values", "mask")
_ENDS = ("done", "truncated", "next_values")
_ALL = (*_GAE, *_ENDS, "row_rewards", "kl", "gammas", "lams", "critic_lams")
COMPILE = tuple(
    case
    for dtype in (torch.float32, torch.bfloat16)
    for case in (
        CompileCase("gae", _BOTH, _GAE, dtype),
        CompileCase("gae all outputs", _BOTH | DECOUPLED, _ALL, dtype),
        CompileCase("gae few long rows", _BOTH, _GAE, dtype, steps=3 * SEGMENT),
        CompileCase("gae few long packed rows", _BOTH, _GAE, dtype, packed=True, steps=9 * SEGMENT),
        CompileCase("gae whitened", _BOTH, _GAE, dtype, whiten=WHITEN | BESSEL | INSIDE | SHIFT),
        CompileCase("gae whitened packed", _BOTH, _GAE, dtype, packed=True, whiten=WHITEN | FLOOR),
        CompileCase("gae zero", _BOTH | ZERO, (*_GAE, "bootstrap"), dtype),
        CompileCase("vtrace", _BOTH | VTRACE, (*_GAE, "log_ratio", *_ENDS), dtype),
        CompileCase("vtrace packed", _BOTH | VTRACE, (*_GAE, "log_ratio"), dtype, packed=True),
        CompileCase("scan", RETURNS, ("rewards", "coefficients", "mask", "bootstrap"), dtype),
    )
)


def launch_to_compile(case: CompileCase) -> None:
    """The launches of a case, for a driver that compiles and does not run."""
    shape = (case.steps,) if case.packed else (3, case.steps)
    flags, wide_ = ("mask", "done", "truncated"), ("row_rewards", "bootstrap", "gammas", "lams", "critic_lams")

    def tensor(name):
        if name in flags:
            return torch.zeros(shape, dtype=torch.bool)
        return torch.zeros(3, dtype=torch.float64) if name in wide_ else torch.zeros(shape, dtype=case.dtype)

    x = Inputs(**{name: tensor(name) if name in case.given else None for name in Inputs._fields})
    if case.packed:
        x = x._replace(cu_seqlens=torch.tensor([0, 5, case.steps]))
    forward(x, Options(0.9, 0.8, 1.0, 0.1, 1.0, 1.0, 1.0, case.options, case.whiten, 1e-8))
