"""Of the losses of ranked groups."""

from __future__ import annotations

from mutants.mutant import cpp, python

CPP = [
    *cpp(
        "csrc/cpu/ranked_forms.h",
        ("store(z + j * kLanes, z_j), peak = select(g.valid(j), «max(peak, z_j)», peak);", "peak"),
        ("log1p_of(«select(equal(own, peak), away, sub(total, one))»)", "away"),
        ("g.gain(i, negative(mul(t, «lost.value()»)));", "away"),
        ("{add(max(zero, z), log1p_of(e)), div(«select(greater(zero, z), e, one)», add(one, e))}", "one"),
        ("g.gain(i, mul(load(p + i * kLanes), «sub(gap(i), value)»));", "gap(i)"),
    ),
    *cpp(
        "csrc/cpu/ranked_loss.cpp",
        ("const float others = «t.count[lane] - 1.0f»;", "t.count[lane]"),
        ("for (; j > 0 && «key(a) > key(c[j - 1])»; --j)", "key(a) >= key(c[j - 1])"),
    ),
]  # fmt: skip

PYTHON = [
    *python(
        "torch", "kernels/formulas/ranked.py",
        ("tl.where(n > 0.0, (1.0 + rest) * tl.exp2(-n) - 1.0, rest)", "rest * tl.exp2(-n)", "test_every_row"),
        ("tl.where(own >= peak, rest, (here + rest) - 1.0)", "rest", "test_every_row"),
        ("g.valid & (g.place < h.top)", "g.valid", "test_every_row or option"),
        ("tl.sum(p * t, 1) - «most» * tl.sum(p, 2)", "1.0", "test_every_row"),
        ("better = g.ahead & («g.reward[:, :, None] > g.reward[:, None, :]»)\n",
         "g.reward[:, :, None] == g.reward[:, :, None]", "test_every_row or ties"),
        ("p * («gap - value[:, None]»)", "gap", "test_every_row"),
        ("each * logistic(g.x) - q * «logistic(-g.x)»", "logistic(g.x)", "test_every_row"),
    ),
    *python(
        "torch", "rlfast/fallback/ranked_loss.py",
        ("ahead = (i > j) | ((i == j) & (slot.unsqueeze(1) «<» slot))", ">", "test_every_row or ties"),
        ("used = (weights != 0) & (group.count > 1)", "used = weights != 0", "small"),
        ("torch.where(y == y, 0.0, y)", "torch.where(y == y, 0.0, 0.0)", "nan"),
    ),
    *python(
        "torch", "rlfast/ops/response_sums.py",
        ("d = d if mask is None else torch.where(mask, d, 0.0)", "d = d", "every_row"),
        ("d = by_sum + by_ratio", "d = by_sum", "every_row or every_option"),
        ("return «-out.losses», out.rewards[0]", "out.losses", "every_row or every_option"),
    ),
    *python(
        "torch", "rlfast/ranked.py",
        ("(self.unreferenced if ref is None else self)(", "self(", "every_row"),
        ("(total, «(total - ratio).detach()»)", "total", "every_option"),
        ("return side.mask.sum(-1)«.clamp(min=1)»", "", "without_tokens"),
    ),
    *python(
        "triton", "kernels/ranked_loss.py",
        ("(i == j) & (slot[None, :, None] «<» slot[None, None, :])", ">", "test_every_row or ties"),
        ("bad = tl.where(tile.size > K, float(\"nan\"), bad)", "bad = bad", "bound"),
        ("(g.count - 1.0) * (g.count - 1.0)", "(g.count - 1.0)", "test_every_row or option"),
        ("used = (group < rows) & (weights != 0.0) & («g.count > 1.0»)", "g.count > 0.0", "small"),
    ),
]  # fmt: skip
