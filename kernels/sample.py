"""The ``triton`` backend of sampled tokens: the logits are read twice, three times where something is cut.

``read_leaves`` keeps the statistics of each leaf of LEAF columns, raw by the function of ``token_logps`` and as the
options change it. ``find_least`` finds what top-k, top-p and min-p keep: by bisection over the floats as integers of
the same order, exact in at most 33 rounds, over leaves whose peak reaches the pivot. ``race`` perturbs what is kept and
leaves each leaf's leader behind, ``choose`` takes the first of the largest and looks at its leaf again, and the
``merge`` of ``token_logps`` gives the raw log-prob and the entropy.
"""

from typing import NamedTuple

import torch

from rlfast.kernels.formulas.elementary import exp
from rlfast.kernels.formulas.logit import logp_of
from rlfast.kernels.formulas.noise import gumbel
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.leaves import (
    ENTROPY,
    INTS,
    LEAF,
    Place,
    Scratch,
    Sizes,
    Tokens,
    alignment,
    allocate_scratch,
    finite,
    fold_chosen,
    fold_leaf,
    inside_of,
    load_logits,
    place_of,
    tree_sum,
)
from rlfast.kernels.token_logps import launch_merge
from rlfast.ops import records
from rlfast.ops.sample_records import Inputs, Outputs, allocate, sorted_edits

NOBODY = tl.constexpr(2147483647)
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False, "maxnreg": 255}
# The noise of a column is ten rounds of four words: half the columns a thread, or registers spill.
NOISY = {**OPTIONS, "num_warps": 16, "maxnreg": 128}


class Options(NamedTuple):
    """One of each a row, as in ``sample_records.py``."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor


class Edits(NamedTuple):
    """What changes the logits; None: nothing does."""

    bounds: torch.Tensor | None  # int64 [rows, leaves + 1]: where the edits of each leaf begin, and end
    places: torch.Tensor | None  # int64 [E]: row·V + id, ascending
    put: torch.Tensor | None  # float32 [E]; a tuple of Triton has `values` of its own
    allowed: torch.Tensor | None  # int32 [rows, words]


class Found(NamedTuple):
    """What the kernels leave for one another. A column is a row of the batch."""

    peak: torch.Tensor  # float32 [leaves, rows]: of w
    mass: torch.Tensor  # float32 [leaves, rows]: Σ exp((w − peak)/T)
    kept: torch.Tensor  # float32 [leaves, rows]: the same over what is kept
    value: torch.Tensor  # float32 [leaves, rows]: of the leader
    leader: torch.Tensor  # int32 [leaves, rows]
    top: torch.Tensor  # float32 [rows]: the maximum of w
    least: torch.Tensor  # float32 [rows]: what w must reach to be kept


@jit
def warmth(asked, row):
    """The row's temperature, 1 where it is 0."""
    t = tl.load(asked.temperature + row)
    return tl.where(t == 0.0, 1.0, t)


@jit
def changed(x, edits, row, leaf, column, inside, sizes):
    """w of a leaf's columns: edits put in, in their order, and −inf where an id is not allowed; a NaN stays."""
    w = x
    if edits.bounds is not None:
        at = edits.bounds + row * (sizes.leaves + 1) + leaf
        for e in range(tl.load(at), tl.load(at + 1)):
            w = tl.where(row * sizes.vocab + column == tl.load(edits.places + e), tl.load(edits.put + e), w)
    if edits.allowed is not None:
        at = edits.allowed + row * tl.cdiv(sizes.vocab, 32)
        bits = tl.load(at + column // 32, mask=inside, other=0) >> (column % 32)
        w = tl.where((bits & 1) != 0, w, tl.where(w == w, float("-inf"), w))
    return tl.where(inside, w, float("-inf"))


@jit
def columns_of(x_ptr, place, tokens, edits, row, leaf, sizes, ALIGNED: tl.constexpr):
    """(ids, which are there, x, w) of a leaf."""
    column = leaf * LEAF + tl.arange(0, LEAF)
    inside = inside_of(place, column, ALIGNED)
    x = load_logits(x_ptr, place, tokens, row.to(tl.int32), column, ALIGNED)
    return column, inside, x, changed(x, edits, row, leaf, column, inside, sizes)


@jit
def weights(w, peak, temperature):
    """exp((w − peak)/T); 0 throughout where the peak is −inf."""
    return tl.exp(tl.div_rn(w - finite(peak), temperature))


@jit
def mass_at(sums, found, leaf, row, top, temperature, sizes):
    """A leaf's Σ relative to the row's maximum, in float64."""
    at = leaf * tl.cast(sizes.rows, tl.int64) + row
    peak = tl.load(found.peak + at)
    scale = tl.where(peak == float("-inf"), 0.0, exp(tl.div_rn(finite(peak) - top, temperature)))
    return (scale * tl.load(sums + at)).to(tl.float64)


@jit(do_not_specialize=INTS)
def read_leaves(
    x_ptr, tokens, asked, edits, scratch, found,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The raw statistics of a leaf, and the peak and the mass of w; grid: rows × leaves."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    row, leaf = (tl.program_id(0) // leaves).to(tl.int64), tl.program_id(0) % leaves
    _, inside, x, w = columns_of(x_ptr, place, tokens, edits, row, leaf, sizes, ALIGNED)
    fold_leaf(tl.where(inside, x, float("-inf")), inside, leaf, row, sizes, scratch, ENTROPY)
    peak = tl.max(w, axis=0)
    at = leaf * tl.cast(rows, tl.int64) + row
    tl.store(found.peak + at, peak)
    tl.store(found.mass + at, tree_sum(weights(w, peak, warmth(asked, row))))


@jit
def ordered(bits):
    """The bits of a float32 as an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def amount(x_ptr, place, tokens, edits, found, row, pivot, top, temperature, sizes,
           BY_MASS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """(what is wanted of the w ≥ the pivot, their mass relative to the maximum or their number; their number)."""
    mass, count = tl.zeros([], tl.float64), tl.zeros([], tl.int32)
    for leaf in range(sizes.leaves):
        if tl.load(found.peak + leaf * tl.cast(sizes.rows, tl.int64) + row) >= pivot:
            _, _, _, w = columns_of(x_ptr, place, tokens, edits, row, leaf, sizes, ALIGNED)
            count += tl.sum((w >= pivot).to(tl.int32), axis=0)
            if BY_MASS:
                mass += tree_sum(tl.where(w >= pivot, weights(w, top, temperature), 0.0)).to(tl.float64)
    if not BY_MASS:
        mass = count.to(tl.float64)
    return mass, count


@jit
def bisect(x_ptr, place, tokens, edits, found, row, wanted, top, temperature, sizes,
           BY_MASS: tl.constexpr, ALIGNED: tl.constexpr):  # fmt: skip
    """A number such that what is ≥ it amounts to ``wanted`` and no fewer do; −inf if nothing is enough.

    It ends where one w lies between enough and too few, and at the very number where those are tied.
    """
    low = ordered(tl.full([], float("-inf"), tl.float32).to(tl.int32, bitcast=True)).to(tl.int64)
    high = ordered(top.to(tl.int32, bitcast=True)).to(tl.int64) + 1
    many, few = sizes.vocab + tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    while (high - low > 1) & (many - few > 1):
        middle = (low + high) >> 1
        pivot = ordered(middle.to(tl.int32)).to(tl.float32, bitcast=True)
        reached, count = amount(
            x_ptr, place, tokens, edits, found, row, pivot, top, temperature, sizes, BY_MASS, ALIGNED
        )
        enough = reached >= wanted
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        many, few = tl.where(enough, count, many), tl.where(enough, few, count)
    return ordered(low.to(tl.int32)).to(tl.float32, bitcast=True)


@jit(do_not_specialize=INTS)
def find_least(
    x_ptr, tokens, asked, edits, found,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The maximum of w and the least w that is kept; grid: rows."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([], float("-inf"), tl.float32)
    for leaf in range(leaves):
        top = tl.maximum(top, tl.load(found.peak + leaf * tl.cast(rows, tl.int64) + row))
    tl.store(found.top + row, top)
    least, temperature = tl.full([], float("-inf"), tl.float32), warmth(asked, row)
    if (tl.load(asked.temperature + row) != 0.0) & (top > float("-inf")) & (top < float("inf")):
        k, p, min_p = tl.load(asked.top_k + row), tl.load(asked.top_p + row), tl.load(asked.min_p + row)
        if (k > 0) & (k < vocab):
            wanted = k.to(tl.float64)
            least = bisect(x_ptr, place, tokens, edits, found, row, wanted, top, temperature, sizes, False, ALIGNED)
        if p < 1.0:
            lowest = tl.maximum(least, -3.4028234663852886e38)  # what is −inf has no mass
            mass, _ = amount(x_ptr, place, tokens, edits, found, row, lowest, top, temperature, sizes, True, ALIGNED)
            wanted = p.to(tl.float64) * mass
            least = tl.maximum(
                least,
                bisect(x_ptr, place, tokens, edits, found, row, wanted, top, temperature, sizes, True, ALIGNED),
            )
        if min_p > 0.0:
            least = tl.maximum(least, top + temperature * tl.log(min_p))
    tl.store(found.least + row, least)


@jit
def noise_of(seed, position, leaf):
    """Gumbel numbers of a leaf's columns: four words of a counter belong to four neighbours."""
    block = leaf * (LEAF // 4) + tl.arange(0, LEAF // 4)
    zero = (block - block).to(tl.uint32)
    position = position.to(tl.uint64)
    low, high = zero + (position & 0xFFFFFFFF).to(tl.uint32), zero + (position >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, block.to(tl.uint32), zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [LEAF])
    return gumbel((words >> 8).to(tl.float32))


@jit(do_not_specialize=INTS)
def race(
    x_ptr, tokens, asked, edits, found,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The mass that is kept of a leaf, and its leader; grid: rows × leaves."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    row, leaf = (tl.program_id(0) // leaves).to(tl.int64), tl.program_id(0) % leaves
    at = leaf * tl.cast(rows, tl.int64) + row
    peak, top, least = tl.load(found.peak + at), tl.load(found.top + row), tl.load(found.least + row)
    kept, value = tl.zeros([], tl.float32), tl.full([], float("-inf"), tl.float32)
    leader = tl.full([], NOBODY, tl.int32)
    if peak >= least:
        temperature, greedy = warmth(asked, row), tl.load(asked.temperature + row) == 0.0
        column, _, _, w = columns_of(x_ptr, place, tokens, edits, row, leaf, sizes, ALIGNED)
        kept = tree_sum(tl.where(w >= least, weights(w, peak, temperature), 0.0))
        perturbed = w
        if not greedy:
            noise = noise_of(tl.load(asked.seeds + row), tl.load(asked.positions + row), leaf)
            perturbed = tl.div_rn(w - finite(top), temperature) + noise
        perturbed = tl.where(w >= least, perturbed, float("-inf"))
        value = tl.max(perturbed, axis=0)
        leader = tl.min(tl.where(perturbed == value, column, NOBODY), axis=0)
        leader = tl.where(value > float("-inf"), leader, NOBODY)
    tl.store(found.kept + at, kept)
    tl.store(found.value + at, value)
    tl.store(found.leader + at, leader)


@jit
def winner(scratch, found, row, top, temperature, sizes):
    """(the token or −1, the mass of w, the mass that is kept), the masses relative to the maximum of w."""
    raw, mass, kept = tl.zeros([], tl.float32), tl.zeros([], tl.float64), tl.zeros([], tl.float64)
    best, token = tl.full([], float("-inf"), tl.float32), tl.full([], NOBODY, tl.int32)
    rows = tl.cast(sizes.rows, tl.int64)
    for leaf in range(sizes.leaves):
        at = leaf * rows + row
        raw += tl.load(scratch.sums + sizes.leaves * rows + at)
        mass += mass_at(found.mass, found, leaf, row, finite(top), temperature, sizes)
        kept += mass_at(found.kept, found, leaf, row, finite(top), temperature, sizes)
        value = tl.load(found.value + at)
        token = tl.where(value > best, tl.load(found.leader + at), token)
        best = tl.where(value > best, value, best)
    sound = (raw == raw) & (mass > 0.0) & (token != NOBODY)  # a NaN is greater than nothing
    return tl.where(sound, token, -1), mass, kept


@jit(do_not_specialize=INTS)
def choose(
    x_ptr, tokens, asked, edits, scratch, found, logp_ptr, kept_ptr,
    inner, stride_outer, stride_inner, start, columns, first_row, candidates, rows, vocab, leaves,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The token, its log-prob in what is kept, and what the raw merge wants of its leaf; grid: rows."""
    place = Place(inner, stride_outer, stride_inner, start, columns, first_row)
    sizes = Sizes(candidates, rows, vocab, leaves)
    row = tl.program_id(0).to(tl.int64)
    top, least, temperature = tl.load(found.top + row), tl.load(found.least + row), warmth(asked, row)
    token, mass, kept = winner(scratch, found, row, top, temperature, sizes)
    tl.store(tokens.targets + row, token.to(tl.int64))
    logp, share = tl.full([], float("nan"), tl.float32), tl.full([], float("nan"), tl.float32)
    if token >= 0:
        mine = token // LEAF
        column, inside, x, w = columns_of(x_ptr, place, tokens, edits, row, mine, sizes, ALIGNED)
        chosen = column == token
        fold_chosen(tl.where(inside, x, float("-inf")), chosen, scratch.chosen + row, sizes)
        own = tl.sum(tl.where(chosen, w, 0.0), axis=0)
        w = tl.where(chosen, float("-inf"), tl.where(w >= least, w, float("-inf")))
        mine_peak = tl.max(w, axis=0)
        mine_sum = tree_sum(weights(w, mine_peak, temperature))
        peak = mine_peak  # of the others that are kept
        for leaf in range(leaves):
            at = leaf * tl.cast(rows, tl.int64) + row
            there = (leaf != mine) & (tl.load(found.kept + at) > 0.0)
            peak = tl.maximum(peak, tl.where(there, tl.load(found.peak + at), float("-inf")))
        peak = finite(peak)
        others = tl.zeros([], tl.float32)
        for leaf in range(leaves):
            at = leaf * tl.cast(rows, tl.int64) + row
            here = tl.where(leaf == mine, mine_peak, tl.load(found.peak + at))
            part = tl.where(leaf == mine, mine_sum, tl.load(found.kept + at))
            scale = exp(tl.div_rn(tl.minimum(finite(here) - peak, 0.0), temperature))
            others += tl.where(part > 0.0, scale * part, 0.0)
        logp = logp_of(tl.div_rn(peak - own, temperature), others, 0.0)
        share = (kept / mass).to(tl.float32)
        if tl.load(asked.temperature + row) == 0.0:
            share, logp = exp(logp), logp * 0.0
    tl.store(logp_ptr + row, logp)
    tl.store(kept_ptr + row, share)


def edits_of(x: Inputs, sizes: Sizes) -> Edits:
    """The edits sorted, and where those of each leaf are."""
    found = sorted_edits(x)
    if found is None:
        return Edits(None, None, None, x.allowed)
    device = x.logits.device
    leaf = torch.arange(sizes.leaves + 1, device=device) * LEAF.value
    row = torch.arange(sizes.rows, device=device) * sizes.vocab
    begins = row.unsqueeze(-1) + leaf.clamp(max=sizes.vocab)
    return Edits(torch.searchsorted(found.places, begins), *found, x.allowed)


def allocate_found(sizes: Sizes, like: torch.Tensor) -> Found:
    """Room for what the kernels leave for one another."""
    shapes = {"top": (sizes.rows,), "least": (sizes.rows,)}

    def room(name: str):
        dtype = torch.int32 if name == "leader" else torch.float32
        return torch.empty(shapes.get(name, (sizes.leaves, sizes.rows)), dtype=dtype, device=like.device)

    return Found(*map(room, Found._fields))


def launch(x: Inputs, tokens: Tokens, sizes: Sizes, scratch: Scratch, out: Outputs) -> None:
    """Everything up to the token."""
    place, aligned = place_of(x.logits), alignment(x.logits)
    options, edits, found = Options(*x[1:7]), edits_of(x, sizes), allocate_found(sizes, x.logits)
    rows, all_leaves, ints = (sizes.rows,), (sizes.rows * sizes.leaves,), (*place, *sizes)
    given = (x.logits, tokens, options, edits)
    read_leaves[all_leaves](*given, scratch, found, *ints, ALIGNED=aligned, **NOISY)
    find_least[rows](*given, found, *ints, ALIGNED=aligned, **OPTIONS)
    race[all_leaves](*given, found, *ints, ALIGNED=aligned, **NOISY)
    choose[rows](*given, scratch, found, out.logp, out.kept, *ints, ALIGNED=aligned, **NOISY)


def forward(x: Inputs) -> Outputs:
    """See ``rlfast/ops/sample.py``."""
    out, (rows, vocab) = allocate(x), x.logits.shape
    if rows == 0:
        return out
    tokens = Tokens(out.tokens, None, None, None)
    sizes, wanted = Sizes(1, rows, vocab, -(-vocab // LEAF.value)), records.Wanted(records.ENTROPY, 0)
    scratch = allocate_scratch(sizes, x.logits)
    raw = records.allocate(x.logits, (rows,), out.tokens, wanted)._replace(logp=out.logp_raw, entropy=out.entropy)
    with torch.cuda.device_of(x.logits):
        launch(x, tokens, sizes, scratch, out)
        launch_merge(tokens, sizes, scratch, None, raw, wanted)
    return out


class CompileCase(NamedTuple):
    """One call whose launches ``make compile`` compiles."""

    dtype: torch.dtype
    edited: bool
    vocab: int  # a multiple of 16 or not: wide or narrow loads

    def __str__(self) -> str:
        width = "wide" if self.vocab % 16 == 0 else "narrow"
        return f"{str(self.dtype).removeprefix('torch.')} sampled {width}{' all outputs' if self.edited else ''}"


COMPILE = (
    *(CompileCase(dtype, True, 8192) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(CompileCase(dtype, edited, 8191) for dtype in (torch.float32, torch.bfloat16) for edited in (False, True)),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launches of a case, for a driver that compiles and does not run."""
    rows, row = 3, torch.zeros(3)
    options = (row, row.int(), row, row, row.long(), row.long())
    ends, bits = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(rows, -(-case.vocab // 32), dtype=torch.int32)
    edits = (ends, torch.zeros(2, dtype=torch.int32), torch.zeros(2), bits) if case.edited else (None,) * 4
    forward(Inputs(torch.zeros(rows, case.vocab, dtype=case.dtype), *options, *edits))
