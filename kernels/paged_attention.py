"""The ``triton`` backend of attention over a paged cache.

A program has a tile of query rows, the heads of one key head's group for as many tokens as fit, and walks the keys in
splits at absolute positions. A split gives weights relative to its own peak, their sum and weights·v, and is merged
with those before it. Where programs are few, a tile's keys are shared out over ``parts`` of them: they leave
each split's numbers in memory, and ``merge`` merges those, in the same order by the same function.

Where neighbouring sequences begin with the same pages (kernels/shared_prefix.py), a first launch has their queries in
one tile and leaves the numbers of the splits that they share; the next reads those in place of the keys.

A row's bits do not depend on the other rows of its tile. The tile's shape follows from the dtype and the widths alone;
an element of a matrix product of one shape is one chain of multiply-adds over its own row of the left operand, wherever
that row lies; the maximum is exact, ``row_sums`` adds in an order that the text fixes; and what a row does not see has
a weight of exactly 0, which changes no sum.

Precision. Scores are products of the inputs as they are, accumulated in float32. Weights go into their product as three
bfloat16 numbers, which hold all 24 bits of a float32; float16 values as two, exactly, and products below 2⁻²⁴ are left
out. A decode step waits for memory whatever the tensor cores do; a long prefill pays twice for it. float32 inputs are
multiplied in float32. Triton's own ``exp`` has an error of |x|·2⁻²⁴, of a weight e^x at most a third of 2⁻²⁴.
"""

from typing import NamedTuple

import torch

from rlfast import backends
from rlfast.kernels.formulas.elementary import exp, tanh
from rlfast.kernels.lang import jit, tl
from rlfast.kernels.shared_prefix import block_of, leading_splits
from rlfast.ops.attention_records import Inputs, Options, allocate

BUSY = 264  # programs that fill an H100 (132 SMs × 2)
SPLITS_EACH = 8  # at least so many splits a part: a tile of queries is worth loading for 256 keys
SCRATCH_BYTES = 256 << 20  # what the parts may leave behind
OPTIONS = {"enable_fp_fusion": False, "maxnreg": 255}
WARPS = 8
TENSOR_CORES, FLOAT32, INTERPRETED = (tl.constexpr(i) for i in range(3))  # who multiplies
NOTHING = tl.constexpr(float("-inf"))  # the peak of no key
NEVER = tl.constexpr((1 << 31) - 1)

COUNTS = ("sequences", "page_size", "window", "kept", "each")


class Tile(NamedTuple):
    """What is compiled for: the tile's shape follows from the dtype and the widths."""

    group: int  # heads of a key head
    heads: int  # of them, in a tile
    tokens: int  # of a tile
    rows: int
    width: int
    value_width: int
    split: int  # keys of a split


class Strides(NamedTuple):
    """In elements."""

    q_token: int
    q_head: int
    k_page: int
    k_slot: int
    k_head: int
    v_page: int
    v_slot: int
    v_head: int
    table_row: int


@jit
def last_at_most(cu, sequences, x, TOKENS: tl.constexpr, APART: tl.constexpr):
    """The last sequence whose cu // TOKENS (+ its number, where APART) is at most x."""
    low, high = tl.cast(0, tl.int32), tl.cast(sequences, tl.int32)
    while low < high:
        middle = (low + high) // 2
        first = tl.load(cu + middle) // TOKENS
        if APART:
            first += middle
        if first <= x:
            low = middle + 1
        else:
            high = middle
    return low - 1


@jit
def row_sums(x):
    """Σ over the columns of x [rows, power of two], in an order that the text fixes: halves are added to halves."""
    for _ in tl.static_range(8):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), axis=1)
    return tl.reshape(x, [x.shape[0]])


@jit
def pieces(x):
    """x in float32 as three bfloat16 numbers whose sum it is, the largest first."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@jit
def product(a, b, BY: tl.constexpr):
    """a·b of float32 matrices in float32."""
    if BY == INTERPRETED:  # numpy's product of a row depends on where in the tile the row lies
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    return tl.dot(a, b, input_precision="ieee")


@jit
def scores_of(q, keys, BY: tl.constexpr):
    """q·k in float32."""
    if BY != TENSOR_CORES:
        return product(q.to(tl.float32), keys.to(tl.float32), BY)
    return tl.dot(q, keys)


@jit
def weighted(w, values, BY: tl.constexpr):
    """w·v in float32, small products first."""
    if BY != TENSOR_CORES:
        return product(w, values.to(tl.float32), BY)
    high, middle, low = pieces(w)
    if values.dtype == tl.bfloat16:
        found = tl.dot(low, values)
        return tl.dot(high, values, tl.dot(middle, values, found))
    most, rest, _ = pieces(values.to(tl.float32))
    found = tl.dot(middle, rest, tl.dot(low, most))
    return tl.dot(high, most, tl.dot(middle, most, tl.dot(high, rest, found)))


@jit
def merged(peak, total, values, next_peak, next_total, next_values):
    """The splits so far and the next one."""
    top = tl.maximum(peak, next_peak)
    base = tl.where(top == NOTHING, 0.0, top)
    a, b = tl.exp(peak - base), tl.exp(next_peak - base)
    return top, total * a + next_total * b, values * a[:, None] + next_values * b[:, None]


@jit
def normalised(peak, total, values, sinks, head, live):
    """Σw·v / (Σw + exp(sink − peak)): a sink is a key without a value."""
    if sinks is not None:
        above = tl.load(sinks + head, mask=live, other=0.0) - peak
        total += tl.where(above > 88.0, float("inf"), exp(tl.where(above > 88.0, 0.0, above)))
    return tl.div_rn(values, tl.zeros_like(values) + total[:, None])


@jit(do_not_specialize=COUNTS)
def attend(
    q, k, v, table, cu, lens, sinks, out, peaks, totals, parts, same, shared,
    strides, sequences, page_size, scale, softcap, window, kept, each,
    TILE: tl.constexpr, BLOCK: tl.constexpr, LEAVES: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    BY: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One tile of queries over its keys, or over ``each`` splits of them where it LEAVES their numbers.

    Those are in ``parts`` [T·H, kept, Dv], peaks and totals. A tile is a BLOCK of sequences, over the splits that they
    share, which it counts in ``shared`` [S]; or it is of one sequence, and what a block has left of it is read.
    """
    if BLOCK:
        s, first = tl.program_id(0), 0
        start = tl.load(cu + s)
        new, common = block_of(same, sequences, s, TILE.tokens, TILE.rows)  # a new token a sequence
        common = tl.minimum(common, kept)
        if tl.program_id(1) + tl.program_id(2) == 0:
            i = tl.arange(0, TILE.rows)
            tl.store(shared + s + i, tl.zeros_like(i) + common, mask=i < new)
        new = tl.where(common > 0, new, 0)  # one that shares nothing may have no new token
    else:
        block = tl.program_id(0)
        s = last_at_most(cu, sequences, block, TILE.tokens, True)
        start = tl.load(cu + s)
        new = tl.load(cu + s + 1) - start
        first = (block - (start // TILE.tokens + s)) * TILE.tokens
        common = tl.cast(0, tl.int32) if same is None else tl.load(shared + s)
    if first >= new:
        return
    chunks: tl.constexpr = (TILE.group + TILE.heads - 1) // TILE.heads
    key_head, chunk = (tl.program_id(1) // chunks).to(tl.int64), tl.program_id(1) % chunks
    r = tl.arange(0, TILE.rows)
    token, member = first + r // TILE.heads, chunk * TILE.heads + r % TILE.heads
    live = (r < TILE.tokens * TILE.heads) & (token < new) & (member < TILE.group)
    head, at = key_head * TILE.group + member, (start + token).to(tl.int64)
    d, e = tl.arange(0, D), tl.arange(0, E)
    query = q + at * strides.q_token + head * strides.q_head
    queries = tl.load(query[:, None] + d[None, :], mask=live[:, None] & (d < TILE.width)[None, :], other=0.0)
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    row = at * (tl.num_programs(1) // chunks * TILE.group) + head
    inside = live[:, None] & (e < TILE.value_width)[None, :]

    # what any row of the tile sees
    if BLOCK:
        position = tl.load(lens + s + token, mask=live, other=NEVER) - 1
        nearest, highest = tl.min(position), common * TILE.split
    else:
        length = tl.load(lens + s)
        position, nearest = length - new + token, length - new + first
        highest = length - new + tl.minimum(first + TILE.tokens, new)
    lowest = tl.where(window > 0, tl.maximum(nearest - window + 1, 0), 0)
    begin, end = lowest // TILE.split, (highest + TILE.split - 1) // TILE.split
    if LEAVES:
        begin = tl.maximum(begin, tl.program_id(2) * each)
        end = tl.minimum(end, (tl.program_id(2) + 1) * each)
    peak, total = tl.full([TILE.rows], NOTHING, tl.float32), tl.zeros([TILE.rows], tl.float32)
    values = tl.zeros([TILE.rows, E], tl.float32)
    if not BLOCK and same is not None:
        if not LEAVES:
            for split in range(begin, common):
                own = row * kept + split
                left = tl.load(parts + own[:, None] * TILE.value_width + e[None, :], mask=inside, other=0.0)
                own_peak = tl.load(peaks + own, mask=live, other=NOTHING)
                own_total = tl.load(totals + own, mask=live, other=0.0)
                peak, total, values = merged(peak, total, values, own_peak, own_total, left)
        begin = tl.maximum(begin, common)
    for split in range(begin, end):
        j = split * TILE.split + tl.arange(0, TILE.split)
        there = (j >= lowest) & (j < highest)
        page = tl.load(table + s.to(tl.int64) * strides.table_row + j // page_size, mask=there, other=0).to(tl.int64)
        slot = (j % page_size).to(tl.int64)
        key = k + page * strides.k_page + slot * strides.k_slot + key_head * strides.k_head
        keys = tl.load(key[None, :] + d[:, None], mask=there[None, :] & (d < TILE.width)[:, None], other=0.0)
        y = scores_of(queries, keys, BY) * scale
        if CAPPED:
            y = softcap * tanh(tl.div_rn(y, tl.zeros_like(y) + softcap))
        seen = j[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (j[None, :] > position[:, None] - window)
        y = tl.where(seen, y, NOTHING)
        own_peak = tl.max(y, 1)
        w = tl.exp(y - tl.where(own_peak == NOTHING, 0.0, own_peak)[:, None])
        value = v + page * strides.v_page + slot * strides.v_slot + key_head * strides.v_head
        held = there[:, None] & (e < TILE.value_width)[None, :]
        own_total = row_sums(w)
        own_values = weighted(w, tl.load(value[:, None] + e[None, :], mask=held, other=0.0), BY)
        if LEAVES:
            own = row * kept + split
            tl.store(peaks + own, own_peak, mask=live)
            tl.store(totals + own, own_total, mask=live)
            tl.store(parts + own[:, None] * TILE.value_width + e[None, :], own_values, mask=inside)
        else:
            peak, total, values = merged(peak, total, values, own_peak, own_total, own_values)
    if not LEAVES:
        found = normalised(peak, total, values, sinks, head, live)
        to = out + row[:, None] * TILE.value_width + e[None, :]
        tl.store(to, found.to(out.dtype.element_ty), mask=inside)


@jit(do_not_specialize=("sequences", "window", "splits"))
def merge(
    peaks, totals, parts, cu, lens, sinks, out, sequences, window, splits,
    SPLIT: tl.constexpr, VALUE_WIDTH: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """What the parts left of one head of one token, in ascending order."""
    token, head, e = tl.program_id(0), tl.program_id(1), tl.arange(0, E)
    s = last_at_most(cu, sequences, token, 1, False)
    position = tl.load(lens + s) - (tl.load(cu + s + 1) - token)
    lowest = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
    row = token.to(tl.int64) * tl.num_programs(1) + head
    one = tl.arange(0, 1)
    peak, total = tl.full([1], NOTHING, tl.float32), tl.zeros([1], tl.float32)
    values = tl.zeros([1, E], tl.float32)
    inside = (e < VALUE_WIDTH)[None, :]
    for split in range(lowest // SPLIT, position // SPLIT + 1):
        at = row * splits + split + one
        own = tl.load(parts + at[:, None] * VALUE_WIDTH + e[None, :], mask=inside, other=0.0)
        peak, total, values = merged(peak, total, values, tl.load(peaks + at), tl.load(totals + at), own)
    found = normalised(peak, total, values, sinks, head + one, one == 0)
    tl.store(out + (row + one)[:, None] * VALUE_WIDTH + e[None, :], found.to(out.dtype.element_ty), mask=inside)


def tile_of(dtype: torch.dtype, group: int, width: int, value_width: int) -> Tile:
    """The tile of a call: what 8 warps hold without a spill. float16 values are two numbers, float32 needs more."""
    wide = padded(max(width, value_width))
    rows = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 64 if wide <= 128 else 32}[dtype]
    heads = min(group, rows)
    return Tile(group, heads, rows // heads, rows, width, value_width, 16 if dtype == torch.float32 else 32)


def padded(width: int) -> int:
    """A power of two, 16 at least: what a product takes."""
    return 1 << max(width - 1, 15).bit_length()


def parts_of(programs: int, splits: int, scratch: int) -> int:
    """How many programs share the keys of a tile."""
    if programs >= BUSY or splits < 2 * SPLITS_EACH or scratch > SCRATCH_BYTES:
        return 1
    return min(-(-BUSY // programs), splits // SPLITS_EACH)


def forward(x: Inputs, o: Options) -> torch.Tensor:
    """See ``rlfast/ops/paged_attention.py``."""
    q, k, v, table, cu, lens, sinks = x
    out = allocate(x)
    if not out.numel():
        return out
    (tokens, heads, width), (_, page_size, kv_heads, _), value_width = q.shape, k.shape, v.shape[3]
    sequences, group = lens.shape[0], heads // kv_heads
    tile = tile_of(q.dtype, group, width, value_width)
    splits = -(-table.shape[1] * page_size // tile.split)
    grid = (tokens // tile.tokens + sequences, kv_heads * -(-group // tile.heads))
    parts = parts_of(grid[0] * grid[1], splits, 4 * tokens * heads * splits * value_width)
    strides = Strides(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], table.stride(0))
    e = padded(value_width)
    together = o.shared_prefix and sequences > 1 and tile.tokens > 1
    kept = min(splits, SCRATCH_BYTES // (4 * tokens * heads * value_width)) if together else splits
    peaks = totals = scratch = same = shared = None
    if parts > 1 or together:
        peaks, totals = torch.empty((2, tokens * heads, kept), dtype=torch.float32, device=q.device)
        scratch = torch.empty((tokens * heads, kept, value_width), dtype=torch.float32, device=q.device)
    by = FLOAT32 if q.dtype == torch.float32 else TENSOR_CORES
    by = INTERPRETED if backends.interpreting() else by  # which multiplies no bfloat16 either
    options = {
        "TILE": tile, "CAPPED": o.softcap != 0.0, "WINDOWED": o.window > 0, "BY": by, "D": padded(width), "E": e,
        "num_warps": WARPS, **OPTIONS,
    }  # fmt: skip

    def launch(first: int, parts: int, **how) -> None:
        attend[(first, grid[1], parts)](
            q, k, v, table, cu, lens, sinks, out, peaks, totals, scratch, same, shared, strides, sequences, page_size,
            o.scale, o.softcap, o.window, kept, -(-kept // parts), **how, **options,
        )  # fmt: skip

    with torch.cuda.device_of(q):
        if together:
            same, shared = leading_splits(table, cu, lens, page_size, tile.split), torch.empty_like(lens)
            launch(sequences, parts_of(-(-sequences // tile.tokens) * grid[1], kept, 0), BLOCK=True, LEAVES=True)
        launch(grid[0], parts, BLOCK=False, LEAVES=parts > 1)
        if parts > 1:
            merge[(tokens, heads)](
                peaks, totals, scratch, cu, lens, sinks, out, sequences, o.window, splits, VALUE_WIDTH=value_width,
                SPLIT=tile.split, E=e, num_warps=1, **OPTIONS,
            )  # fmt: skip
    return out


class CompileCase(NamedTuple):
    """One call whose launches ``make compile`` compiles."""

    dtype: torch.dtype
    width: int = 64
    value_width: int = 64
    tokens: int = 5000  # few: the keys are shared out over parts
    page_size: int = 16
    full: bool = False  # soft-cap, window and sinks
    shared: bool = False  # a prefix

    def __str__(self) -> str:
        words = str(self.dtype).removeprefix("torch."), "attention", f"D={self.width}", f"Dv={self.value_width}"
        words += ("in parts",) if self.tokens < 100 else ()
        return " ".join((*words, f"pages of {self.page_size}", *(["all options"] if self.full else []),
                         *(["shared prefix"] if self.shared else [])))  # fmt: skip


_WIDTHS = ((64, 64), (80, 80), (128, 128), (256, 256), (192, 128))
COMPILE = (
    *(
        CompileCase(dtype, *widths, tokens)
        for dtype in (torch.bfloat16, torch.float32)
        for widths in _WIDTHS
        for tokens in (5000, 4)
    ),
    CompileCase(torch.float16),
    CompileCase(torch.bfloat16, page_size=1),
    *(CompileCase(torch.bfloat16, 128, 128, tokens, shared=True) for tokens in (5000, 4)),
    CompileCase(torch.float32, full=True, shared=True),
    *(
        CompileCase(dtype, 128, 128, tokens, full=True)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for tokens in (5000, 4)
    ),
)


def launch_to_compile(case: CompileCase) -> None:
    """The launches of a case, for a driver that compiles and does not run."""
    sequences, heads, pages = 4, 8, 4096 // case.page_size
    q = torch.zeros(case.tokens, heads, case.width, dtype=case.dtype)
    k = torch.zeros(pages, case.page_size, 2, case.width, dtype=case.dtype)
    v = torch.zeros(pages, case.page_size, 2, case.value_width, dtype=case.dtype)
    table, lens = torch.zeros(sequences, pages, dtype=torch.int32), torch.zeros(sequences, dtype=torch.int32)
    sinks = torch.zeros(heads) if case.full else None
    x = Inputs(q, k, v, table, torch.zeros(sequences + 1, dtype=torch.int32), lens, sinks)
    forward(x, Options(0.125, 30.0 if case.full else 0.0, 1024 if case.full else 0, case.shared))
