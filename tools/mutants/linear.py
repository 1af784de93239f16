"""Of the linear layer."""

from __future__ import annotations

from mutants.mutant import cpp, python

CPP = [
    *cpp(
        "csrc/cpu/linear.cpp",
        ("c[j] = «more ? c[j] + found[j] : found[j]»;", "found[j]"),
        ("if (const int left = «static_cast<int>(depth % P::kElements)»)", "0"),
        ("block_ = ceil_div(vectors, «ceil_div(vectors, kSteps)») * kElements;", "ceil_div(in.rows + vectors, kSteps)"),
        ("w.data + «j * w.stride», w.stride};", "j * in_.depth"),
        ("x_.data + «(row + i) * x_.stride» + k,", "(row + i) * in_.depth"),
        ("const int64_t depth = std::min(«block_», in_.depth - k), shares", "block_ - 1"),
        ("from_float(«sums[j] + bias[j]», y + j);", "sums[j]"),
        ("bias[j] = to_float(bias_[«column + j»]);", "j"),
        ("tiles_ * «(group + 1)» / groups);", "group"),
        ("std::min(panel_, «in_.rows - row»),", "in_.rows - row - (row > 0)"),
        ("weight_.data + t * kLaneSums * «weight_.stride»;", "in_.depth"),
    ),
]  # fmt: skip

PYTHON = [
    *python(
        "torch", "rlfast/fallback/linear.py",
        ("return linear(x.float(), weight.float(), None if bias is None else bias.float())",
         "return linear(x, weight, bias).float()"),
        ("g.T @ x if needs[1]", "(g.T @ x).mul(x.shape[0] / max(x.shape[0] - 1, 1)) if needs[1]"),
        ("g.sum(0) if needs[2]", "g[0] if needs[2]"),
        ("g_x.addmm_(part, weight[columns].float())", "g_x.addmm_(part.to(x.dtype).float(), weight[columns].float())"),
        ("g_x.addmm_(part, weight[columns].float())", "g_x = part @ weight[columns].float()"),
        ("out[1][columns] = part.T @ wide", "out[1][columns] = -part.T @ wide"),
        ("out[2].copy_(g.sum(0))", "out[2].copy_(g.to(x.dtype).sum(0) * 2)"),
        ("if g.dtype != x.dtype:", "if False:"),
    ),
    *python(
        "ops", "rlfast/ops/linear.py",
        ("dtype=torch.float32 if wide and narrow else x.dtype)", "dtype=x.dtype)"),
        ("found = op_backward(*ctx.saved_tensors, g, needs, ctx.backend)",
         "found = op_backward(*ctx.saved_tensors, g.detach() * 2, needs, ctx.backend)"),
    ),
    *python(
        "ops", "rlfast/linear.py",
        ("y.view(*lead, weight.shape[0])", "y"),
    ),
]  # fmt: skip
