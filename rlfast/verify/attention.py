"""Attention over a paged cache, chunks and decode steps together; and over packed sequences, with the gradient."""

from __future__ import annotations

import torch

from rlfast import attention
from rlfast.reference.paged_attention import packed_attention as packed_reference
from rlfast.reference.paged_attention import paged_attention as paged_reference
from rlfast.verify.subject import Problem, Subject

# Positions of each sequence and new tokens among them, few where the interpreter runs.
SIZES = {True: ((70, 20), (20, 1)), False: ((200, 300, 64), (90, 1, 20))}
HEADS, KV_HEADS, WIDTH, PAGE = 6, 2, 64, 16
OPTIONS = {"scale": WIDTH**-0.5, "softcap": 20.0, "window": 150}


def _ends(counts) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def _paged(dtype: torch.dtype, device: str, small: bool) -> Problem:
    lengths, new = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    counts = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(counts), generator=draw).to(torch.int32)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for s, n in enumerate(counts):
        table[s, :n], order = order[:n], order[n:]
    shape = (sum(counts), PAGE, KV_HEADS, WIDTH)
    leaves = {
        "q": torch.randn(sum(new), HEADS, WIDTH, generator=draw) * 3,
        "k_cache": torch.randn(shape, generator=draw),
        "v_cache": torch.randn(shape, generator=draw),
    }
    rest = {"block_table": table, "cu_q": _ends(new), "kv_lens": torch.tensor(lengths, dtype=torch.int32)}
    rest |= {"sinks": torch.randn(HEADS, generator=draw)}
    rest = {k: x.to(device) for k, x in rest.items()} | OPTIONS
    return Problem({k: x.to(device, dtype) for k, x in leaves.items()}, rest, {})


def _packed(dtype: torch.dtype, device: str, small: bool) -> Problem:
    lengths = SIZES[small][0]
    draw, tokens = torch.Generator().manual_seed(0), sum(lengths)
    leaves = {
        "q": torch.randn(tokens, HEADS, WIDTH, generator=draw) * 3,
        "k": torch.randn(tokens, KV_HEADS, WIDTH, generator=draw),
        "v": torch.randn(tokens, KV_HEADS, WIDTH, generator=draw),
    }
    leaves = {k: x.to(device, dtype) for k, x in leaves.items()}
    leaves["sinks"] = torch.randn(HEADS, generator=draw).to(device)
    upstream = {"out": torch.randn(tokens, HEADS, WIDTH, generator=draw).to(device, dtype)}
    return Problem(leaves, {"cu_seqlens": _ends(lengths).to(device)} | OPTIONS, upstream)


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The scores by another order of their sums: the width of q and k shuffled."""
    keys = "k" if "k" in problem.leaves else "k_cache"
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(seed)).to(problem.leaves["q"].device)
    moved = problem.leaves | {name: problem.leaves[name][..., order] for name in ("q", keys)}
    return problem._replace(leaves=moved), dict.fromkeys(("q", keys), lambda g: g[..., order.argsort()])


def _public(function):
    return lambda leaves, rest: {"out": function(**leaves, **rest)}


def _reference(function):
    return lambda leaves, rest, dtype: {"out": function(**leaves, **rest, dtype=dtype)}


SUBJECTS = {
    "paged_attention": (
        Subject(_paged, _public(attention.paged_attention), _reference(paged_reference), ("out",), _reordered, "paged"),
        Subject(
            _packed, _public(attention.packed_attention), _reference(packed_reference), ("out",), _reordered, "packed"
        ),
    ),
}
