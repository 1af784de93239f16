"""What the public attention functions say of wrong arguments."""

from __future__ import annotations

import pytest
import torch

import rlfast
from tests.attention_cases import Case, laid, packed, starts


def i32(*x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32)


# What is put in the place of an argument of ``Case()``, and what is said.
WRONG = {
    "q as a list": ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    "q of two dimensions": ({"q": torch.zeros(11, 128)}, ValueError, r"q: expected shape \(T, H, D\)"),
    "integer q": ({"q": torch.zeros(11, 4, 32).long()}, TypeError, "q: expected dtype"),
    "cache of another dtype": (
        {"k_cache": torch.zeros(3, 16, 2, 32).bfloat16()}, TypeError, "k_cache: expected dtype torch.float32 like q"),
    "width of keys": ({"k_cache": torch.zeros(17, 16, 2, 8)}, ValueError, "k_cache: expected a width of 32 like q"),
    "pages of values": (
        {"v_cache": torch.zeros(3, 16, 2, 32)}, ValueError,
        r"v_cache: expected shape \(17, 16, 2, width\) like k_cache"),
    "heads": ({"q": torch.zeros(11, 3, 32)}, ValueError, "q: expected a multiple of the 2 heads of k_cache, got 3"),
    "a cache that would be copied": (
        {"k_cache": torch.zeros(17, 16, 32, 2).transpose(2, 3)}, ValueError, "k_cache: expected a contiguous last"),
    "table of another dtype": ({"block_table": torch.zeros(3, 9).long()}, TypeError, "block_table: expected dtype"),
    "table of other sequences": ({"block_table": i32([0], [0])}, ValueError, r"block_table: expected shape \(3, "),
    "ends of other sequences": ({"cu_q": i32(0, 1, 11)}, ValueError, r"cu_q: expected shape \(4,\)"),
    "ends that go down": ({"cu_q": i32(0, 8, 1, 11)}, ValueError, "cu_q: expected ascending numbers from 0 to the 11"),
    "ends that stop before": ({"cu_q": i32(0, 1, 8, 10)}, ValueError, "cu_q: expected ascending numbers"),
    "fewer positions than new tokens": (
        {"kv_lens": i32(130, 6, 64)}, ValueError, "kv_lens: expected 7 new tokens to 144, .* for sequence 1, got 6"),
    "more positions than the table has": (
        {"kv_lens": i32(145, 7, 64)}, ValueError, "kv_lens: expected 1 new tokens to 144, .* for sequence 0, got 145"),
    "scale 0": ({"scale": 0.0}, ValueError, "scale: expected a finite float > 0, got 0.0"),
    "softcap below 0": ({"softcap": -1.0}, ValueError, "softcap: expected a float ≥ 0, got -1.0"),
    "window as a float": ({"window": 1.5}, TypeError, "window: expected an int, got 1.5"),
    "window below 0": ({"window": -1}, ValueError, "window: expected 0 for none"),
    "sinks of other heads": ({"sinks": torch.zeros(3)}, ValueError, r"sinks: expected shape \(4,\) for the heads of q"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what):
    given, kind, message = WRONG[what]
    with pytest.raises(kind, match=message):
        rlfast.paged_attention(**laid(Case()) | {"scale": 0.2} | given)


@pytest.mark.parametrize("page", (-1, 10_000))
def test_a_page_that_is_not_there_is_named(page):
    x = laid(Case())
    x["block_table"][1, 0] = page
    with pytest.raises(ValueError, match=rf"block_table: expected pages from 0 to \d+, got {page} at \(1, 0\)"):
        rlfast.paged_attention(**x, scale=0.2)
    x["cu_q"], x["q"] = starts((1, 0, 10)), x["q"]  # a sequence without new tokens looks at no page
    rlfast.paged_attention(**x, scale=0.2)


def test_what_is_wrong_with_packed_sequences_is_named():
    x = packed(Case())
    for given, kind, message in (
        ({"k": x["k"][:5]}, ValueError, r"v: expected shape \(5, 2, width\) like k"),
        ({"k": x["k"][:5], "v": x["v"][:5]}, ValueError, "k: expected 201 tokens like q"),
        ({"v": x["v"].double()}, TypeError, "v: expected dtype torch.float32 like q"),
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "cu_seqlens: expected ascending numbers from 0 to the 201"),
        ({"cu_seqlens": torch.tensor([0.0, 201.0])}, TypeError, "cu_seqlens: expected dtype int32 or int64"),
    ):
        with pytest.raises(kind, match=message):
            rlfast.packed_attention(**x | {"scale": 0.2} | given)
