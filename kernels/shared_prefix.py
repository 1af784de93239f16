"""Which sequences of a decode step read their first pages together: the samples of one prompt.

A block is neighbours of one new token each whose tables begin with the same pages, at most a tile of them, found on the
device: nobody waits for a table. ``leading`` counts the leading splits of keys that a sequence has in the same pages as
the one before it. A sequence that has fewer of them than a neighbour has begins a block of its own: two prompts with a
common beginning do not take it from their samples to share all the rest.
"""

import torch

from rlfast.kernels.lang import jit, tl

PAGES = 128  # compared at a time
NONE = tl.constexpr(1 << 30)


@jit(do_not_specialize=("page_size",))
def leading(table, cu, lens, out, table_row, page_size, SPLIT: tl.constexpr, PAGES: tl.constexpr):
    """out[s] = whole splits that sequences s − 1 and s begin with in the same pages; 0 unless each has one new token.

    Tables are compared PAGES at a time.
    """
    s = tl.program_id(0)
    found = tl.cast(0, tl.int32)
    if s > 0:
        before, start, end = tl.load(cu + s - 1), tl.load(cu + s), tl.load(cu + s + 1)
        if (start - before == 1) & (end - start == 1):
            keys = tl.minimum(tl.load(lens + s - 1), tl.load(lens + s))
            same, at = (keys + page_size - 1) // page_size, tl.cast(0, tl.int32)
            row = table + s.to(tl.int64) * table_row
            while at < same:
                p = at + tl.arange(0, PAGES)
                there = p < same
                own, other = tl.load(row + p, mask=there, other=0), tl.load(row - table_row + p, mask=there, other=0)
                same = tl.min(tl.where(there & (own != other), p, same))
                at += PAGES
            found = tl.minimum(same * page_size, keys) // SPLIT
    tl.store(out + s, found)


@jit
def block_of(same, sequences, s, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """(Sequences of the block that begins with s, 0 if none does; leading splits that all of them share)."""
    window = s // TOKENS * TOKENS
    i = window + tl.arange(0, ROWS)
    stop = tl.minimum(window + TOKENS, sequences)
    own = tl.load(same + i, mask=i < stop, other=0)
    near = tl.maximum(
        tl.load(same + i - 1, mask=(i > 0) & (i < stop), other=0),
        tl.load(same + i + 1, mask=i + 1 < sequences, other=0),
    )
    begins = (i == window) | (own == 0) | (own < near)
    end = tl.min(tl.where((i > s) & (i < stop) & begins, i, stop))
    count = tl.where(tl.max(tl.where((i == s) & begins, 1, 0)) == 1, end - s, 0)
    shared = tl.min(tl.where((i > s) & (i < end), own, NONE))
    return count, tl.where(count > 1, shared, 0)


def leading_splits(table: torch.Tensor, cu: torch.Tensor, lens: torch.Tensor, page_size: int, split: int):
    """int32 [S], by ``leading``."""
    same = torch.empty_like(lens)
    leading[(len(lens),)](
        table, cu, lens, same, table.stride(0), page_size, SPLIT=split, PAGES=PAGES, num_warps=1,
    )  # fmt: skip
    return same
