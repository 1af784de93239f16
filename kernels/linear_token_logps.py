"""The ``triton`` backend of token log-probs from hidden states: cuBLAS tiles with float32 results, folded as they come.

Forward: a tile of logits is one GEMM, and ``fold`` keeps the statistics of its leaves; tiles are whole leaves wide,
so that ``merge`` sees what it would see of the whole tensor. Backward: a tile is found again (kept) or recomputed,
``gradient`` turns it into ∂L/∂logits, and two GEMMs use it up. dHidden accumulates in float32 over tiles, dWeight
within a tile of the vocabulary.

Precision. Logits are float32 accumulators, never rounded to the inputs' dtype. ∂L/∂logits goes into the GEMMs as
three bfloat16 numbers, which hold all 24 bits of a float32: with two, an error of 2⁻¹⁷ a term shows where a
gradient's terms cancel. That is three bfloat16 GEMMs where float32 would give up the tensor cores. float16 operands
are split in two, exactly, because their range would lose small probabilities; products below 2⁻²⁴ are left out: five
GEMMs. float32 inputs use float32 GEMMs, under the caller's own ``torch.backends.cuda.matmul`` precision.

Rows that are skipped cost their share of the GEMMs: gathering the others would synchronise with the host.
"""

import torch

from rlfast.kernels import token_logps
from rlfast.kernels.leaves import LEAF, Sizes, Tokens, allocate_scratch, place_of
from rlfast.kernels.token_logps import Saved, batch_of, launch_fold, launch_gradient, launch_merge
from rlfast.kernels.topk import allocate_heads
from rlfast.ops.records import Transform, Wanted, allocate

# A tile is at most this, and at most a 32nd of the logits: with ∂L/∂logits beside it (6 bytes for 4), under a tenth.
# 256 MiB is 4096 × 16384 float32, whose GEMM is long enough (0.5 TFLOP at D = 4096) to hide its launch and its tail.
TILE_BYTES = 256 << 20
TILE_ROWS = 4096
FEWEST_ROWS = 128  # one row of cuBLAS's own tiles


def tile_shape(rows: int, vocab: int) -> tuple[int, int]:
    """(rows, columns) of a tile; the columns are whole leaves."""
    room = min(TILE_BYTES, 4 * rows * vocab // 32) // 4
    tile_rows = min(rows, TILE_ROWS)
    columns = room // tile_rows // LEAF.value * LEAF.value
    if columns == 0:
        columns, tile_rows = LEAF.value, min(rows, max(FEWEST_ROWS, room // LEAF.value))
    return tile_rows, min(columns, vocab)


def product(a, b, out=None) -> torch.Tensor:
    """a·b accumulated in float32 and not rounded."""
    if a.dtype != torch.float32:
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def pieces(x) -> list[torch.Tensor]:
    """x as a sum of numbers that a GEMM takes exactly: itself, or two bfloat16 for float16."""
    if x.dtype != torch.float16:
        return [x]
    wide = x.float()
    high = wide.to(torch.bfloat16)
    return [high, (wide - high.float()).to(torch.bfloat16)]


def add_products(total, left, right) -> None:
    """total += Σ left_i·right_j, each part being 2⁻⁸ of the one before, without what is below 2⁻²⁴."""
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            if i + j <= 2:
                total += product(a, b)


def forward(hidden, weight, bias, targets, mask, transform: Transform, wanted: Wanted, keep: bool):
    """See ``rlfast/ops/linear_token_logps.py``."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    out = allocate(hidden, (rows,), targets, wanted)
    kept = hidden.new_empty((rows, vocab) if keep else (0,), dtype=torch.float32)
    if rows == 0:
        return out, kept
    tokens, sizes = batch_of(targets, mask, transform, bias, rows, vocab)
    scratch = allocate_scratch(sizes, hidden)
    heads = allocate_heads(sizes, wanted.top_k, hidden) if wanted.top_k else None
    tile_rows, tile_columns = (rows, vocab) if keep else tile_shape(rows, vocab)
    buffer = kept if keep else hidden.new_empty((tile_rows, tile_columns), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        for column in range(0, vocab, tile_columns):
            head = weight[column : column + tile_columns].T
            for row in range(0, rows, tile_rows):
                part = hidden[row : row + tile_rows]
                tile = product(part, head, out=buffer[: part.shape[0], : head.shape[1]])
                launch_fold(tile, place_of(tile, column, row), tokens, sizes, transform, scratch, heads, wanted)
        launch_merge(tokens, sizes, scratch, heads, out, wanted)
    return out, kept


def backward(hidden, weight, bias, targets, mask, transform: Transform, aux, grads, needs, kept, sums, dtype):
    """See ``rlfast/ops/linear_token_logps.py``."""
    rows, vocab = hidden.shape[0], weight.shape[0]
    like = (hidden, weight, bias)
    own = [need and (i == 0 or sums is None) for i, need in enumerate(needs)]
    g_hidden, g_weight, g_bias = (
        hidden.new_empty(x.shape if n else (0,), dtype=dtype) for x, n in zip(like, own, strict=True)
    )
    if rows == 0:
        return g_hidden, g_weight.zero_(), g_bias.zero_()
    tokens, sizes = batch_of(targets, mask, transform, bias, rows, vocab)
    saved = Saved(aux, *grads)
    total_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None
    hidden_pieces = pieces(without_skipped(hidden, targets, mask)) if needs[1] else []
    tile_rows, tile_columns = tile_shape(rows, vocab)
    buffers = allocate_tiles(hidden, tile_rows, tile_columns, kept)
    with torch.cuda.device_of(hidden):
        for column in range(0, vocab, tile_columns):
            columns = slice(column, min(column + tile_columns, vocab))
            head = weight[columns]
            head_pieces = pieces(head) if needs[0] else []
            total_weight = part_total(head, sums and sums[0], columns) if needs[1] else None
            total_bias = part_total(bias[columns], sums and sums[1], columns) if needs[2] else None
            for row in range(0, rows, tile_rows):
                part = slice(row, min(row + tile_rows, rows))
                tile = logits_tile(hidden, head, kept, buffers, part, columns)
                g = tile_gradient(tile, buffers, column, row, tokens, sizes, transform, saved)
                if needs[0]:
                    add_products(total_hidden[part], g, head_pieces)
                if needs[1]:
                    add_products(total_weight, [x.T for x in g], [x[part] for x in hidden_pieces])
                if needs[2]:
                    for x in g:
                        total_bias += x.sum(0, dtype=torch.float32)
            if own[1]:
                g_weight[columns] = total_weight
            if own[2]:
                g_bias[columns] = total_bias
    if needs[0]:
        g_hidden = total_hidden.to(dtype)
    return g_hidden, g_weight, g_bias


def part_total(like, total, part: slice) -> torch.Tensor:
    """The float32 sum that one part of a gradient is added to: its part of ``total``, or a new one."""
    return torch.zeros_like(like, dtype=torch.float32) if total is None else total[part]


def without_skipped(hidden, targets, mask) -> torch.Tensor:
    """hidden with zeros in skipped rows: in dWeight they meet a gradient of 0, and 0·NaN is NaN."""
    live = (targets != -100).view(hidden.shape[0], -1).any(-1)
    live = live if mask is None else live & mask
    return torch.where(live.unsqueeze(-1), hidden, torch.zeros((), dtype=hidden.dtype, device=hidden.device))


def allocate_tiles(hidden, rows: int, columns: int, kept) -> tuple:
    """(logits, [high, middle, low] or [gradient]): float32 gradients overwrite the logits unless those are kept."""
    logits = None if kept.numel() else hidden.new_empty((rows, columns), dtype=torch.float32)
    if hidden.dtype != torch.float32:
        return logits, [hidden.new_empty((rows, columns), dtype=torch.bfloat16) for _ in range(3)]
    return logits, [hidden.new_empty((rows, columns), dtype=torch.float32) if logits is None else logits]


def logits_tile(hidden, head, kept, buffers, rows: slice, columns: slice) -> torch.Tensor:
    """The float32 logits of a tile, without the bias: kept, or computed again."""
    if kept.numel():
        return kept[rows, columns]
    return product(hidden[rows], head.T, out=buffers[0][: rows.stop - rows.start, : columns.stop - columns.start])


def tile_gradient(tile, buffers, column: int, row: int, tokens: Tokens, sizes: Sizes, transform, saved: Saved) -> list:
    """∂L/∂logits of a tile, as one float32 tensor or as high, middle and low bfloat16."""
    g = [x[: tile.shape[0], : tile.shape[1]] for x in buffers[1]]
    place, rest = place_of(tile, column, row), g[1:] or (None, None)
    launch_gradient(tile, g[0], rest, place, tokens, sizes, transform, saved)
    return g


COMPILE = tuple(case for case in token_logps.COMPILE if case.full or case.dtype == torch.bfloat16)


def launch_to_compile(case: token_logps.CompileCase) -> None:
    """Forward and backward of a case, for a driver that compiles and does not run; with a bias where ``full``."""
    targets, mask, transform, wanted, grads = token_logps.batch_to_compile(case, rows=3)
    hidden, weight = torch.zeros(3, 16, dtype=case.dtype), torch.zeros(case.vocab, 16, dtype=case.dtype)
    bias = torch.zeros(case.vocab, dtype=case.dtype) if case.full else None
    out, kept = forward(hidden, weight, bias, targets, mask, transform, wanted, keep=True)
    needs = (True, True, bias is not None)
    backward(hidden, weight, bias, targets, mask, transform, out.aux, grads, needs, kept, None, hidden.dtype)
