"""Of attention over a paged cache."""

from __future__ import annotations

from mutants.mutant import cpp, python

CPP = [
    *cpp(
        "csrc/cpu/attention_plan.h",
        ("const int64_t to = in.kv_lens[s] - («in.cu[s + 1] - token») + 1;", "in.cu[s + 1] - token - 1"),
        ("std::max<int64_t>(0, «to - in.window»)", "to - in.window + 1"),
        ("return «std::min(same * in.page_size, keys)» / kSplit;", "keys"),
        ("(s > first + 1 && «shared < block.common»)", "false"),
    ),
    *cpp(
        "csrc/cpu/attention_tile.h",
        ("const bool all = «seen.from <= 0 && seen.to >= columns»;", "true"),
        ("c(softcap ? «cap» : scale)", "scale"),
        ("return select(«equal(peak, set1(kNothing))», set1(0.0f), peak);", "greater(set1(kNothing), peak)"),
        ("store(b + i, decayed(sub(«own», base), c));", "before"),
        ("so_far.sum[r] * a[r] + next.sum[r] * «b[r]»", "a[r]"),
        ("mul(load(from + i), «young»)", "old"),
    ),
    *cpp(
        "csrc/cpu/paged_attention.cpp",
        ("sum += std::exp(in_.sinks[h] - scale_.c * «all.peak[row]»);", "0.0f"),
        ("walk(s, head, row, count, «block.common», ceil_div", "int64_t{0}"),
        ("if (++slot == in_.page_size) «slot = 0, ++page»;", "slot = 0"),
    ),
]

PYTHON = [
    *python(
        "torch", "rlfast/fallback/paged_attention.py",
        ("(distance < window)", "(distance <= window)", "test_values and window"),
        ("values = v.masked_fill(~seen.any(1)[:, None, :, None], 0.0)", "values = v", "garbage"),
        ("(dp - mean.unsqueeze(-1))", "dp", "test_gradients"),
        ("ds * (1.0 - w.capped.square())", "ds", "test_gradients"),
        ("g_sinks -= ", "g_sinks += ", "test_gradients"),
        ("totals[1][keys] «+=» ", "=", "test_gradients_in_chunks"),
    ),
    *python(
        "triton", "kernels/paged_attention.py",
        ("j[None, :] «<=» position[:, None]", "<", "test_values and decode and plain"),
        ("(j[None, :] > position[:, None] - «window»)", "window - 1", "test_values and decode and all"),
        ("above = tl.load(sinks + head, mask=live, other=0.0) «- peak»", "", "test_values and decode and all"),
        ("next_values * «b[:, None]»", "a[:, None]", "test_values and decode and plain"),
        ("base = tl.where(top == NOTHING, «0.0», top)", "top", "minus_infinity"),
        ("«position // SPLIT + 1»", "position // SPLIT", "parts"),
    ),
]  # fmt: skip
