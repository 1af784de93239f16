"""Neighbours that begin with the same pages read them once on Triton: which they are, and that no bit depends on it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from rlfast.kernels import paged_attention as kernel
from rlfast.kernels import shared_prefix
from rlfast.kernels.lang import jit, tl
from rlfast.rollout import attention as rollout_attention
from tests.attention_cases import Case, laid, run
from tests.cases import few
from tests.numerics import assert_same_bits
from tests.test_paged_attention import OPTIONS

OP = "paged_attention"
pytestmark = pytest.mark.backends("triton")

# Six samples of one prompt, of other lengths; the prompt is two splits of float32, one of bfloat16, and a bit
SAMPLES = Case((47, 60, 41, 45, 90, 44), (1,) * 6, heads=4, kv_heads=2, width=16, value_width=16, prefix=40)


def both(case: Case, device: str, arguments: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The call without the hint, and with it."""
    x = arguments or laid(case)
    return tuple(run(case, "triton", device, x | {"shared_prefix": hint}) for hint in (False, True))


@pytest.mark.parametrize("options", list(OPTIONS)[:: few(1, 2)])
@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
def test_bits_do_not_depend_on_the_hint(backend, device, dtype, options):
    for size in (1, 8):
        case = replace(SAMPLES, dtype=dtype, page_size=size, **OPTIONS[options])
        assert_same_bits(f"pages of {size}", *both(case, device))


@pytest.mark.parametrize("new", ((1, 1, 2, 1, 1, 0), (1, 0, 1, 1, 1, 1), (3, 3, 3, 3, 3, 3)))
def test_chunks_among_decode_steps(backend, device, new):
    assert_same_bits("chunks", *both(replace(SAMPLES, new=new, page_size=8), device))


def test_groups_and_system_prompts(backend, device):
    """Two prompts of three samples each with a common beginning, and sequences that share with nobody between them."""
    case = replace(SAMPLES, lengths=(50, 49, 60, 70, 55, 52, 80), new=(1,) * 7, prefix=16, page_size=8)
    x = laid(case)
    table = x["block_table"]
    for group in ((0, 1, 2), (4, 5, 6)):
        for s in group[1:]:
            table[s, :6] = table[group[0], :6]
    assert_same_bits("groups", *both(case, device, x))
    same = shared_prefix.leading_splits(table, x["cu_q"], x["kv_lens"], 8, 16)
    assert same.tolist() == [0, 3, 3, 1, 1, 3, 3]


@pytest.mark.parametrize("limits", ({"BUSY": 1}, {"BUSY": 64, "SPLITS_EACH": 1}, {"SCRATCH_BYTES": 6144}), ids=str)
def test_bits_do_not_depend_on_parts(backend, device, monkeypatch, limits):
    """Shared splits walked by one program or by several; memory for some of them only."""
    case = replace(SAMPLES, lengths=tuple(n + 90 for n in SAMPLES.lengths), prefix=130, page_size=16)
    expected, _ = both(case, device)
    for name, value in limits.items():
        monkeypatch.setattr(kernel, name, value)
    for found in both(case, device):
        assert_same_bits(str(limits), found, expected)


def test_what_a_block_left_is_what_is_read(backend, device, monkeypatch):
    """Told that sequences share what they do not, the kernel takes the first one's keys for all."""
    case = replace(SAMPLES, prefix=0, page_size=8)
    expected, found = both(case, device)
    assert_same_bits("nothing shared", found, expected)
    monkeypatch.setattr(
        kernel, "leading_splits", lambda table, cu, lens, *_: (torch.arange(len(lens)) > 0).int().to(lens) * 2
    )
    x = laid(case)
    _, found = both(case, device, x)
    x["block_table"][1:, :4] = x["block_table"][:1, :4]  # two splits of 16
    expected, _ = both(case, device, x)
    assert_same_bits("the first one's keys", found, expected)


def rows_read(memory: torch.Tensor, monkeypatch) -> set[int]:
    """The rows of a tensor that the interpreter loads from, from now on."""
    from triton.runtime.interpreter import InterpreterBuilder

    found, load = set(), InterpreterBuilder.create_masked_load
    first, size = memory.data_ptr(), memory[0].nbytes

    def watched(self, pointers, mask, *rest):
        at = pointers.data[mask.data.astype(bool)]
        found.update(((at[(at >= first) & (at < first + memory.nbytes)] - first) // size).tolist())
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    return found


@pytest.mark.parametrize("new", ((1, 1, 2, 1, 1, 0), (0, 0, 0, 1, 1, 0)))
def test_nothing_is_read_behind_the_queries(backend, device, monkeypatch, new):
    """Where the token would be of a last sequence that has none. On a GPU it is the bits that are compared."""
    case, tokens = replace(SAMPLES, new=new, page_size=8), sum(new)
    x = laid(case)
    room = torch.full((tokens + 1, *x["q"].shape[1:]), torch.nan)
    room[:tokens] = x["q"]
    found = rows_read(room, monkeypatch) if device == "cpu" else set(range(tokens))
    assert_same_bits("no token", *both(case, device, x | {"q": room[:tokens]}))
    assert found == set(range(tokens))


@jit
def blocks(same, counts, shared, sequences, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    s = tl.program_id(0)
    count, common = shared_prefix.block_of(same, sequences, s, TOKENS, ROWS)
    tl.store(counts + s, count)
    tl.store(shared + s, common)


def by_the_text(same: list[int], tokens: int) -> tuple[list[int], list[int]]:
    """``block_of`` for every sequence."""
    around = [0, *same, 0]
    starts = [
        s
        for s, own in enumerate(same)
        if s % tokens == 0 or own == 0 or own < max(around[s], around[s + 2] if s + 1 < len(same) else 0)
    ]
    counts, shared = [0] * len(same), [0] * len(same)
    for begin, end in itertools.pairwise([*starts, len(same)]):
        counts[begin] = end - begin
        shared[begin] = min(same[begin + 1 : end], default=0)
    return counts, shared


@pytest.mark.parametrize("tokens", (2, 3, 4, 16))
@pytest.mark.parametrize("seed", range(3))
def test_blocks(backend, device, tokens, seed):
    rng = torch.Generator().manual_seed(seed)
    same = torch.randint(0, 3 + seed, (few(41, 23),), generator=rng, dtype=torch.int32)
    same[0] = 0
    found = torch.full((2, len(same)), -1, dtype=torch.int32, device=device)
    blocks[(len(same),)](same.to(device), *found, len(same), TOKENS=tokens, ROWS=16)
    assert (found[0].tolist(), found[1].tolist()) == by_the_text(same.tolist(), tokens)


@pytest.mark.parametrize("page_size", (1, 3, 16))
def test_leading_splits(backend, device, page_size):
    """Longer than what is compared at a time; a page that differs anywhere; lengths that end before it."""
    most = 300
    table = torch.arange(most, dtype=torch.int32).repeat(6, 1)
    table[2, 131], table[3, 0], table[5, 299] = -1, -1, -1
    lens = torch.tensor([300, 290, 299, 280, 280, 130], dtype=torch.int32) * page_size
    cu = torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.int32)
    found = shared_prefix.leading_splits(table.to(device), cu.to(device), lens.to(device), page_size, 16)
    wanted = [0, 290 * page_size // 16, 131 * page_size // 16, 0, 0, 130 * page_size // 16]
    assert found.tolist() == wanted


def test_the_engine_gives_the_hint(backend, device):
    assert rollout_attention.shares_prefix([[3, 1], [3, 2], [4]]) and rollout_attention.shares_prefix([[5], [3], [3]])
    assert not rollout_attention.shares_prefix([[3, 1], [4, 1], [3]]) and not rollout_attention.shares_prefix([[1]])
