"""Whitening of what a scan wrote: moments of segments, of rows and of the batch, in float64; then one pass over it.

The scan adds up each segment about a number near its mean, so that squares keep their digits whatever the offset.
Tokens of a segment, segments of a row and rows come in one order, so that the bits depend neither on the padding nor on
how rows are split.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.lang import jit, tl
from rlfast.ops.scan_records import Options, whiten_options

ROWS = 1024  # of a program that adds rows up, and sums that a program adds up at a time
BLOCK = 1024  # tokens of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


class How(NamedTuple):
    """What is compiled for."""

    bessel: bool
    where: str
    shift_mean: bool


@jit
def place_of(cu_seqlens, row, rows, segments, SEGMENT: tl.constexpr):
    """Where the segments of a row begin: packed, a row of n tokens has n // SEGMENT places or one more."""
    if cu_seqlens is None:
        place = row * segments
    else:
        place = row + tl.load(cu_seqlens + row, mask=row <= rows, other=0) // SEGMENT
    return place


@jit
def more(n, near, first, second, x, valid):
    """(n, a number near the mean, Σ(x − it), Σ(x − it)²) with a block of numbers added."""
    here = tl.sum(valid.to(tl.float64), axis=0)
    x = tl.where(valid, x, 0.0)
    # float32: a division of doubles is a call, and any number near the mean does
    mean = (tl.sum(x, axis=0).to(tl.float32) / tl.maximum(here, 1.0).to(tl.float32)).to(tl.float64)
    near = tl.where(n == 0.0, mean, near)
    d = tl.where(valid, x - near, 0.0)
    return n + here, near, first + tl.sum(d, axis=0), second + tl.sum(d * d, axis=0)


@jit
def put(moments, place, n, near, first, second):
    """The moments of a segment in its place."""
    tl.store(moments + place * 4, n)
    tl.store(moments + place * 4 + 1, near)
    tl.store(moments + place * 4 + 2, first)
    tl.store(moments + place * 4 + 3, second)


@jit
def joined(n, mean, squares, other_n, other_mean, other_squares):
    """(n, mean, Σ(x − mean)²) of two sets of numbers, either of which may be empty."""
    both = n + other_n
    share, gap = other_n / tl.maximum(both, 1.0), other_mean - mean
    return both, mean + gap * share, squares + other_squares + gap * gap * n * share


@jit
def together(n, mean, squares):
    """The same of all the sets of a block."""
    both = tl.sum(n, axis=0)
    center = tl.sum(n * mean, axis=0) / tl.maximum(both, 1.0)
    gap = mean - center
    return both, center, tl.sum(squares + n * gap * gap, axis=0)


@jit(do_not_specialize=["rows", "segments"])
def add_rows(moments, cu_seqlens, sums, rows, segments, SEGMENT: tl.constexpr, ROWS: tl.constexpr):
    """(n, mean, Σ(x − mean)²) of ROWS rows, from the moments of their segments."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    begin = place_of(cu_seqlens, row, rows, segments, SEGMENT)
    end = tl.where(row < rows, place_of(cu_seqlens, row + 1, rows, segments, SEGMENT), begin)
    n, mean, squares = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for k in range(tl.max(end - begin, axis=0)):
        at, there = moments + (begin + k) * 4, begin + k < end
        here = tl.load(at, mask=there, other=0.0)
        near, first = tl.load(at + 1, mask=there, other=0.0), tl.load(at + 2, mask=there, other=0.0)
        off = first / tl.maximum(here, 1.0)
        rest = tl.load(at + 3, mask=there, other=0.0) - first * off
        n, mean, squares = joined(n, mean, squares, here, near + off, rest)
    n_all, mean_all, squares_all = together(n, mean, squares)
    tl.store(sums + program * 3, n_all)
    tl.store(sums + program * 3 + 1, mean_all)
    tl.store(sums + program * 3 + 2, squares_all)


@jit(do_not_specialize=["size", "programs", "eps"])
def whiten(x, mask, sums, size, programs, eps, HOW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """(x − mean) ÷ the deviation at the valid tokens, in place; 0 at the others."""
    nothing = tl.zeros([], tl.float64)
    n, mean, squares = nothing, nothing, nothing
    for base in range(0, programs, ROWS):
        i = base + tl.arange(0, ROWS)
        at, there = sums + i * 3, i < programs
        each_n, each_mean = tl.load(at, mask=there, other=0.0), tl.load(at + 1, mask=there, other=0.0)
        more_n, more_mean, more_squares = together(each_n, each_mean, tl.load(at + 2, mask=there, other=0.0))
        n, mean, squares = joined(n, mean, squares, more_n, more_mean, more_squares)
    # alone, a token is at the mean: its variance is 0, with Bessel's correction too
    var = tl.maximum(squares, 0.0) / tl.maximum(n - (1.0 if HOW.bessel else 0.0), 1.0)
    eps = tl.cast(eps, tl.float64)
    if HOW.where == "outside":
        deviation = tl.sqrt(var) + eps
    elif HOW.where == "floor":
        deviation = tl.sqrt(tl.maximum(var, eps))
    else:
        deviation = tl.sqrt(var + eps)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    valid = inside
    if mask is not None:
        valid = inside & (tl.load(mask + i, mask=inside, other=0) != 0)
    out = (tl.load(x + i, mask=valid, other=0.0).to(tl.float64) - mean) * (1.0 / deviation)
    if not HOW.shift_mean:
        out += mean
    tl.store(x + i, tl.where(valid, out, 0.0).to(tl.float32), mask=inside)


def launch(x, mask, moments, cu_seqlens, rows: int, segments: int, segment: int, o: Options) -> None:
    """Whitens ``x``, dense, from the ``moments`` [places, 4] of its segments."""
    programs = -(-rows // ROWS)
    sums = torch.empty((programs, 3), dtype=torch.float64, device=x.device)
    how = whiten_options(o)
    add_rows[(programs,)](moments, cu_seqlens, sums, rows, segments, SEGMENT=segment, ROWS=ROWS, **OPTIONS)
    whiten[(-(-x.numel() // BLOCK),)](
        x, mask, sums, x.numel(), programs, how.pop("eps"), HOW=How(**how), BLOCK=BLOCK, ROWS=ROWS, **OPTIONS
    )
