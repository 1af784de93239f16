"""What ``pair_loss`` and ``unpaired_loss`` share: the sums of a response, its score, its gradient's way back."""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas import SCORES
from rlfast.kernels.formulas.score import Response
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.loss_rows import load, total
from rlfast.ops.preference_records import Rest, Settings, Side, Term

TOKENS_AT_A_TIME = 1024
RESPONSES_AT_A_TIME = 256  # of sums: one a thread
PROGRAMS = 1024  # as in token_loss
# Told how many registers there are, ptxas does not spill a few to fit one more program on an SM.
OPTIONS = {"num_warps": 8, "maxnreg": 128, "enable_fp_fusion": False}


class Span(NamedTuple):
    """Where the tokens of a response are: offsets of the first one, and how many."""

    logp: object
    ref_logp: object
    mask: object
    out: object
    n: object


class Sums(NamedTuple):
    """Of some responses: float32 blocks."""

    logp: object
    log_ratio: object
    length: object


class Numbers(NamedTuple):
    """Run-time floats: of each term its weight, its score's and its link's hyper-parameters; tail, factor."""

    weights: tuple
    scores: tuple
    links: tuple
    settings: Settings


@jit
def span_of(side, row, stride_logp, stride_ref, stride_mask, length):
    """The tokens of one response."""
    span = Span(row * stride_logp, row * stride_ref, row * stride_mask, row * length, length)
    if side.cu_seqlens is not None:
        begin = tl.load(side.cu_seqlens + row)
        span = Span(begin, begin, begin, begin, (tl.load(side.cu_seqlens + row + 1) - begin).to(tl.int32))
    return span


@jit
def inside_of(side, span, column):
    """The tokens that count."""
    inside = column < span.n
    if side.mask is not None:
        inside = inside & (tl.load(side.mask + span.mask + column, mask=inside, other=0) != 0)
    return inside


@jit
def count_of(side, span, BLOCK: tl.constexpr):
    """How many tokens count."""
    count = tl.zeros([], tl.int32)
    for begin in range(0, span.n, BLOCK):
        count += tl.sum(inside_of(side, span, begin + tl.arange(0, BLOCK)).to(tl.int32), 0)
    return count


@jit
def tail_of(inside, before, shortest, tail):
    """(c of the tokens: tail after the first ``shortest`` that count, else 1; how many count up to here)."""
    position = before + tl.cumsum(inside.to(tl.int32), 0)
    return tl.where(position > shortest, tail, 1.0), before + tl.sum(inside.to(tl.int32), 0)


@jit
def reduced(side, span, shortest, tail, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """S, S − S_ref and n of one response."""
    logp, ref = tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    count, before = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, span.n, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = inside_of(side, span, column)
        x, y = load(side.logp, span.logp + column, inside), load(side.ref_logp, span.ref_logp + column, inside)
        if TAIL:
            c, before = tail_of(inside, before, shortest, tail)
            x, y = c * x, c * y
        logp += total(x)
        ref += total(y)
        count += tl.sum(inside.to(tl.int32), 0)
    return Sums(logp.to(tl.float32), (logp - ref).to(tl.float32), count.to(tl.float32))


@jit
def pulled_back(side, span, d, out, shortest, tail, TAIL: tl.constexpr, BLOCK: tl.constexpr):
    """∂/∂S to each token that counts, 0 to the others."""
    before = tl.zeros([], tl.int32)
    for begin in range(0, span.n, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = inside_of(side, span, column)
        g = tl.where(inside, d, 0.0)
        if TAIL:
            c, before = tail_of(inside, before, shortest, tail)
            g = c * g
        tl.store(out + span.out + column, g, mask=column < span.n)


@jit
def given(side, i, inside):
    """Sums that came as such."""
    logp = load(side.logp, i, inside)
    length = tl.zeros(i.shape, tl.float32) + 1.0
    if side.lengths is not None:
        length = tl.load(side.lengths + i, mask=inside, other=1.0)
    return Sums(logp, logp - load(side.ref_logp, i, inside), length)


@jit
def scored(sums, hyper, SCORE: tl.constexpr, MEAN: tl.constexpr):
    """(s, ∂s/∂S) of responses."""
    n = tl.maximum(sums.length, 1.0)  # the mean of no tokens is 0
    s, slope = SCORE(Response(sums.logp, sums.log_ratio, n), hyper)
    slope = slope + tl.zeros(s.shape, tl.float32)
    if MEAN:
        s, slope = tl.div_rn(s, n), tl.div_rn(slope, n)
    return s, slope


@jit
def scale_of(rest, factor, rows, SUM: tl.constexpr):
    """factor/n."""
    n = tl.maximum(rows, 1).to(tl.float32)
    if SUM:
        n = n * 0.0 + 1.0
    if rest.num_items is not None:
        n = tl.load(rest.num_items)
    return tl.div_rn(factor, tl.where(n > 0.0, n, 1.0))


def numbers_of(terms: list[Term], links: dict, settings: Settings) -> Numbers:
    """The run-time numbers of the terms."""

    def record(formula, numbers):
        return formula.hyper(*numbers[: len(formula.hyper._fields)])

    return Numbers(
        tuple(t.weight for t in terms), tuple(record(SCORES[t.score], t.score_hyper) for t in terms),
        tuple(record(links[t.link], t.link_hyper) for t in terms[1:]), settings,
    )  # fmt: skip


def structure_of(terms: list[Term], links: dict) -> dict:
    """The formulas of the terms, which make a kernel."""
    return {
        "SCORES": tuple(SCORES[t.score].function for t in terms),
        "MEANS": tuple(int(t.mean) for t in terms),
        "LINKS": tuple(links[t.link].function for t in terms[1:]),
    }


def strides_of(side: Side) -> tuple[int, int, int, int]:
    """Of logp, ref_logp and mask from row to row, and a padded row's length."""
    strides = (0 if x is None or side.cu_seqlens is not None else x.stride(0) for x in side[:3])
    return (*strides, side.logp.shape[-1])


def dense(x: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """Sums one after the other; tokens of any row stride."""
    return x if x is None or dim == 2 else x.contiguous()


def laid(side: Side) -> Side:
    """A side as the kernel addresses it."""
    dim = side.logp.dim()
    return side._replace(logp=dense(side.logp, dim), ref_logp=dense(side.ref_logp, dim), mask=dense(side.mask, dim))


def rest_of(rest: Rest) -> Rest:
    """The fields of the pairs as the kernel addresses them: ``shared`` is one number."""
    shared = rest.shared if rest.shared is None else rest.shared[:1]
    rest = Rest(*(x if x is None else x.contiguous() for x in rest._replace(shared=None)))
    return rest._replace(shared=shared)


def written(x: torch.Tensor) -> torch.Tensor | None:
    """An output, if it is needed."""
    return x if x.numel() else None


def term_of(links: dict, link: str, score: str = "log_ratio", mean: bool = False) -> Term:
    """A term with the default hyper-parameters."""
    hyper = tuple(links[link].hyper()) if link else ()
    return Term(score, mean, link, 1.0, tuple(SCORES[score].hyper()), hyper)
