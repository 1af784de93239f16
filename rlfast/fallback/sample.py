"""Sampled tokens in plain PyTorch, a few rows at a time.

The statistics of the raw distribution are those of ``token_logps``, by its own function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.fallback import token_logps
from rlfast.fallback.token_logps import chunks, compute_dtype, target_logp
from rlfast.kernels.formulas.noise import gumbel
from rlfast.kernels.lang import torch_version
from rlfast.ops.records import ENTROPY, Transform, Wanted
from rlfast.ops.sample_records import Inputs, Outputs, SortedEdits, allocate, sorted_edits

WORD = 0xFFFFFFFF


def philox(counter: tuple, key: tuple) -> tuple:
    """Philox4x32-10: words of 32 bits in int64, whose products wrap modulo 2⁶⁴."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for round_ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = ((b >> 32) & WORD) ^ c1 ^ ((k0 + round_ * 0x9E3779B9) & WORD)
        c2 = ((a >> 32) & WORD) ^ c3 ^ ((k1 + round_ * 0xBB67AE85) & WORD)
        c1, c3 = b & WORD, a & WORD
    return c0, c1, c2, c3


def numbers(seeds: torch.Tensor, positions: torch.Tensor, vocab: int) -> torch.Tensor:
    """The upper 24 bits of every token's word, int64 [n, V]."""
    seeds, positions = seeds.unsqueeze(-1), positions.unsqueeze(-1)
    block = torch.arange(-(-vocab // 4), device=seeds.device).expand(seeds.shape[0], -1)
    counter = (positions & WORD, (positions >> 32) & WORD, block, torch.zeros_like(block))
    words = philox(counter, (seeds & WORD, (seeds >> 32) & WORD))
    return torch.stack(words, -1).flatten(1)[:, :vocab] >> 8


class Rows(NamedTuple):
    """A chunk of rows: w, its maximum, (w − peak)/T and e to that."""

    w: torch.Tensor  # [n, V]
    peak: torch.Tensor  # [n, 1]; 0 in a row that has no token
    d: torch.Tensor
    e: torch.Tensor
    lost: torch.Tensor  # [n]


def processed(z: torch.Tensor, x: Inputs, rows: slice, edits: SortedEdits | None) -> torch.Tensor:
    """w of a chunk of rows z [n, V]."""
    n, vocab = z.shape
    if edits is not None:
        places = edits.places - rows.start * vocab
        # every one of equal ids brings the value of the last, so that their order does not count
        values = edits.values[torch.searchsorted(edits.places, edits.places, right=True) - 1]
        places = torch.where((places >= 0) & (places < n * vocab), places, n * vocab)  # a place that is cut off again
        flat = torch.cat((z.reshape(-1), z.new_zeros(1)))
        z = flat.scatter(0, places, values.to(z.dtype))[:-1].view(n, vocab)
    if x.allowed is not None:
        bit = torch.arange(32, dtype=torch.int32, device=z.device)
        allowed = ((x.allowed[rows].unsqueeze(-1) >> bit) & 1).flatten(1)[:, :vocab] != 0
        z = torch.where(allowed | z.isnan(), z, -torch.inf)
    return z


def rows_of(z: torch.Tensor, w: torch.Tensor, temperature: torch.Tensor) -> Rows:
    """What a chunk of rows is known by; T = 1 where it is 0."""
    raw, peak = z.amax(-1), w.amax(-1, keepdim=True)
    lost = ~peak.squeeze(-1).isfinite() | raw.isnan() | (raw == torch.inf)
    peak = torch.where(lost.unsqueeze(-1), 0.0, peak)
    d = (w - peak) / torch.where(temperature > 0, temperature, 1.0).unsqueeze(-1).to(w.dtype)
    return Rows(w, peak, d, d.exp(), lost)


def kept(r: Rows, x: Inputs, rows: slice) -> torch.Tensor:
    """Which columns top-k, then top-p, then min-p leave, bool [n, V]."""
    vocab = r.w.shape[1]
    top_k, top_p = x.top_k[rows].long().unsqueeze(-1), x.top_p[rows].double().unsqueeze(-1)
    order, at = torch.sort(r.w, dim=-1, descending=True)
    least = order.gather(-1, torch.where((top_k > 0) & (top_k < vocab), top_k, vocab) - 1)
    mass = torch.where(order >= least, r.e.gather(-1, at), 0.0).double().cumsum(-1)
    last = (mass < top_p * mass[:, -1:]).sum(-1, keepdim=True).clamp(max=vocab - 1)
    least = torch.where(top_p < 1, torch.maximum(least, order.gather(-1, last)), least)
    return (r.w >= least) & (r.e >= x.min_p[rows].unsqueeze(-1).to(r.e.dtype))


def cuts(x: Inputs) -> bool:
    """Whether a row may be cut; a GPU is not asked, which would synchronise."""
    if x.logits.is_cuda:
        return True
    return bool(((x.top_k > 0) | (x.top_p < 1) | (x.min_p > 0)).any())


def first(value: torch.Tensor) -> torch.Tensor:
    """The first column that holds a row's maximum [n]."""
    column = torch.arange(value.shape[1], device=value.device)
    return torch.where(value == value.amax(-1, keepdim=True), column, value.shape[1] - 1).amin(-1)


def draw(r: Rows, keep: torch.Tensor | None, x: Inputs, rows: slice) -> tuple:
    """(tokens, logp, kept) of a chunk of rows."""
    greedy = x.temperature[rows] == 0
    noise = torch_version(gumbel)(numbers(x.seeds[rows], x.positions[rows], r.w.shape[1]).to(r.d.dtype))
    value, e = r.d + noise, r.e
    if keep is not None:
        keep = keep | greedy.unsqueeze(-1)
        value, e = torch.where(keep, value, -torch.inf), torch.where(keep, e, 0.0)
    tokens = first(torch.where(greedy.unsqueeze(-1), r.w, value))
    at = tokens.unsqueeze(-1)
    logp = target_logp(e.scatter(-1, at, 0.0).sum(-1), r.d.gather(-1, at).squeeze(-1))
    mass = e.sum(-1) / r.e.sum(-1)
    return tokens, torch.where(greedy, 0.0, logp), torch.where(greedy, logp.exp(), mass)


def forward(x: Inputs) -> Outputs:
    """See ``rlfast/ops/sample.py``."""
    out, edits, cut = allocate(x), sorted_edits(x), cuts(x)
    for rows, part in chunks(x.logits):
        z = part.to(compute_dtype(part))
        r = rows_of(z, processed(z, x, rows, edits), x.temperature[rows])
        tokens, logp, mass = draw(r, kept(r, x, rows) if cut else None, x, rows)
        out.tokens[rows] = torch.where(r.lost, -1, tokens)
        out.logp[rows] = torch.where(r.lost, torch.nan, logp)
        out.kept[rows] = torch.where(r.lost, torch.nan, mass)
    wanted, lost = Wanted(ENTROPY, 0), out.tokens < 0
    raw = token_logps.forward(x.logits, out.tokens.clamp(min=0), None, Transform(1.0, 0.0, 1.0), wanted)
    out.logp_raw.copy_(torch.where(lost, torch.nan, raw.logp))
    out.entropy.copy_(torch.where(lost, torch.nan, raw.entropy))
    return out
