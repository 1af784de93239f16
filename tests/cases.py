"""What the tests feed the log-prob ops, and how a result is held to the oracle."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace

import numpy as np
import torch

import rlfast
from rlfast import backends
from rlfast.reference.linear_token_logps import linear_token_logps as linear_reference
from rlfast.reference.token_logps import token_logps as reference
from rlfast.reference.token_logps import transform
from rlfast.verify.log_probs import reordered
from tests.numerics import Orders, assert_gradient, assert_value, assert_zero, by_name

DIFFERENTIABLE = ("logp", "lse", "entropy")
VALUES = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logits")
ALL = (*VALUES, "is_top1")
KERNELS = ("cpu", "triton", "cuda")  # the backends that keep row statistics per leaf of the vocabulary
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def f32(x: float) -> float:
    """The nearest float32: options are inputs too, and the truth starts from the rounded ones."""
    return float(np.float32(x))


@dataclass(frozen=True)
class Problem:
    """One call of an op. ``inputs`` are on the CPU; a run moves them."""

    inputs: dict  # logits, or hidden, weight and perhaps bias
    targets: torch.Tensor
    options: dict = field(default_factory=dict)  # temperature, softcap, logit_scale, mask, top_k
    outputs: tuple = ("logp",)
    grads: tuple = ("logp",)  # the outputs that the loss reads
    needs: tuple = ("logits", "hidden", "weight", "bias")  # the inputs that need a gradient
    upstream: str = "random"  # or "ones": what `.sum().backward()` sends, an expanded scalar
    call: dict = field(default_factory=dict)  # inplace_backward, memory_budget: no meaning for the oracle
    every: int = 1  # the loss reads one row of so many

    @property
    def op(self) -> str:
        return "token_logps" if "logits" in self.inputs else "linear_token_logps"

    @property
    def lead(self) -> tuple:
        return tuple(self.inputs.get("logits", self.inputs.get("hidden")).shape[:-1])

    def differentiated(self) -> list[str]:
        return [name for name, x in self.inputs.items() if x is not None and name in self.needs] if self.grads else []

    def skipped(self) -> torch.Tensor:
        """[*lead]: rows that are masked, or have no target."""
        ignored = self.targets == -100
        ignored = ignored.all(-1) if ignored.dim() > len(self.lead) else ignored
        mask = self.options.get("mask")
        return ignored if mask is None else ignored | (mask == 0)


def cotangents(problem: Problem, values: list) -> list:
    """∂L/∂ of each output in ``grads``: random with a fixed seed, or what `.sum()` sends."""
    rng = torch.Generator().manual_seed(3)
    if problem.upstream == "ones":
        return [torch.ones((), dtype=torch.float64).expand(x.shape) for x in values]
    random = [torch.randn(x.shape, generator=rng).double() for x in values]
    for g in random if problem.every > 1 else ():
        unread = torch.arange(g.shape[0]) % problem.every != 0
        g[unread] = 0.0
    return random


def oracle(problem: Problem, dtype: torch.dtype, upstream: list | None = None, pad: int = 0) -> tuple[dict, dict]:
    """(values, gradients) by the reference in ``dtype`` on the CPU, with garbage in skipped rows replaced by zeros.

    ``pad`` rows are added to the head for the projection, and its logits left out again.
    """
    leaves = {}
    for name, x in problem.inputs.items():
        if x is not None and name in ("logits", "hidden"):
            x = torch.where(problem.skipped().unsqueeze(-1), torch.zeros((), dtype=x.dtype), x)
        leaves[name] = None if x is None else x.detach().to(dtype).clone().requires_grad_(name in problem.needs)
    options = problem.options | _best_two(problem)
    if problem.op == "token_logps":
        values = reference(leaves["logits"], problem.targets, dtype=dtype, **options)
    elif pad:
        wide = torch.nn.functional.pad(leaves["weight"], (0, 0, 0, pad))
        logits = (leaves["hidden"] @ wide.T)[..., :-pad]
        logits = logits if leaves.get("bias") is None else logits + leaves["bias"]
        values = reference(logits, problem.targets, dtype=dtype, **options)
    else:
        values = linear_reference(
            leaves["hidden"], leaves["weight"], problem.targets, leaves.get("bias"), dtype=dtype, **options
        )
    names = problem.differentiated()
    gradients = {}
    if names:
        outputs = [values[name] for name in problem.grads]
        upstream = [g.to(dtype) for g in upstream or cotangents(problem, outputs)]
        pulled = torch.autograd.grad(outputs, [leaves[name] for name in names], upstream)
        gradients = dict(zip(names, pulled, strict=True))
    return {name: x.detach() for name, x in values.items()}, gradients


def yardsticks(problem: Problem) -> tuple[dict, dict]:
    """(values, gradients) by PyTorch in float32, in several orders of the sums."""
    return by_name(lambda seed: _reordered(problem, seed) if seed else oracle(problem, torch.float32))


def _reordered(problem: Problem, seed: int) -> tuple[dict, dict]:
    """The float32 oracle in another order of its sums.

    A head is padded, since for a handful of columns torch takes dot products, which round less than its GEMM.
    """
    inputs, targets, back = reordered(problem.inputs, problem.targets, seed)
    pad = 0 if problem.op == "token_logps" else 64
    values, gradients = oracle(replace(problem, inputs=inputs, targets=targets), torch.float32, pad=pad)
    return values, {name: back[name](g) for name, g in gradients.items()}


def moved(problem: Problem, device: str) -> dict:
    """The inputs on the device with their strides, as leaves where they need a gradient."""
    leaves = {}
    for name, x in problem.inputs.items():
        if x is not None:
            x = x.detach() if device == "cpu" else x.detach().to(device)
            x = x.requires_grad_(bool(problem.grads) and name in problem.needs)
        leaves[name] = x
    return leaves


def call(problem: Problem, leaves: dict, device: str) -> rlfast.TokenLogps:
    """The op's public function on these leaves."""
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in problem.options.items()}
    options |= {"outputs": problem.outputs} | problem.call
    targets = problem.targets.to(device)
    if problem.op == "token_logps":
        logits = leaves["logits"]
        if options.get("inplace_backward"):
            logits = _copy_with_strides(logits)  # autograd gives a leaf's own storage to nobody
        return rlfast.token_logps(logits, targets, **options)
    return rlfast.linear_token_logps(leaves["hidden"], leaves["weight"], targets, leaves.get("bias"), **options)


def _copy_with_strides(x):
    if any(s == 0 for s in x.stride()):
        return x.view_as(x)  # no backward may write over rows that share memory
    flat = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return flat.copy_(x)


def run(problem: Problem, backend: str, device: str = "cpu") -> tuple[rlfast.TokenLogps, dict]:
    """(outputs, gradients) of the op on this backend."""
    leaves = moved(problem, device)
    with rlfast.use_backend(backend):
        out = call(problem, leaves, device)
    names, gradients = problem.differentiated(), {}
    if names:
        chosen = [getattr(out, name) for name in problem.grads]
        upstream = [g.to(v) for g, v in zip(cotangents(problem, chosen), chosen, strict=True)]
        if problem.upstream == "ones":
            upstream = [torch.ones((), device=device, dtype=v.dtype).expand(v.shape) for v in chosen]
        pulled = torch.autograd.grad(chosen, [leaves[name] for name in names], upstream)
        gradients = dict(zip(names, pulled, strict=True))
    return out, gradients


def solution_of(problem: Problem) -> tuple:
    """The truth, PyTorch's float32 results by which a result is held to it, and the sizes of sums."""
    return oracle(problem, torch.float64), yardsticks(problem), {"mean_logits": _mean_size(problem)}


def check(problem: Problem, backend: str, device: str = "cpu", solution: tuple | None = None) -> None:
    """Every output and gradient of one call against the oracle, by a solution that there may be already."""
    out, gradients = run(problem, backend, device)
    hold(problem, out, gradients, *(solution or solution_of(problem)))


def _mean_size(problem: Problem):
    """The mean of |z|: that of z is one sum, whose terms cancel."""
    x = {k: None if v is None else v.detach().double() for k, v in problem.inputs.items()}
    logits = x["logits"] if "logits" in x else x["hidden"] @ x["weight"].T
    logits = logits if x.get("bias") is None else logits + x["bias"]
    words = {k: v for k, v in problem.options.items() if k in ("temperature", "softcap", "logit_scale")}
    return torch.where(problem.skipped(), 0.0, transform(logits, **words).abs().mean(-1))


def hold(problem: Problem, out, gradients, truths, yardsticks, sizes=None) -> None:
    """Assert the contract for one run: values, their dtypes and shapes, gradients, skipped rows."""
    (truth, truth_gradients), (own, own_gradients) = truths, yardsticks
    skipped, top_k = problem.skipped(), problem.options.get("top_k")
    asked = {"logp", *problem.outputs} | ({"topk_logp", "topk_ids", "tail_mass"} if top_k else set())
    for name in rlfast.TokenLogps._fields:
        got = getattr(out, name)
        if name not in asked:
            assert got is None, f"{name}: was not asked for"
            continue
        got = got.detach().cpu()
        assert not skipped.any() or name == "topk_ids" or assert_zero(f"{name} of skipped rows", got[skipped]) is None
        if name in ("is_top1", "topk_ids"):
            continue
        wide = torch.float64 if _input(problem).dtype == torch.float64 else torch.float32
        assert got.dtype == wide, f"{name}: {got.dtype}"
        assert_value(name, got, truth[name], own[name], (sizes or {}).get(name))
    assert not (out.logp > 0).any(), "logp > 0"
    if "is_top1" in asked:
        _hold_top1(problem, out, truth, own)
    if top_k:
        _hold_topk(problem, out, truth, skipped)
    for name, got in gradients.items():
        source = problem.inputs[name]
        assert got.dtype == source.dtype, f"gradient of {name}: dtype {got.dtype}, expected {source.dtype}"
        got = got.detach().cpu()
        if name in ("logits", "hidden"):
            assert_zero(f"gradient of skipped {name}", got[skipped])
        assert_gradient(f"gradient of {name}", got, truth_gradients[name], own_gradients[name])


def _input(problem: Problem):
    return problem.inputs.get("logits", problem.inputs.get("hidden"))


def _exact_order(problem: Problem) -> bool:
    """Whether float32 orders the logits as the truth does: they are given, and only scaled."""
    return problem.op == "token_logps" and not problem.options.get("softcap")


def _best_two(problem: Problem) -> dict:
    """The option by which an oracle also gives the two best log-probs of a row, for ``_hold_top1``."""
    if "is_top1" not in problem.outputs or problem.options.get("top_k") or _exact_order(problem):
        return {}
    vocab = _input(problem).shape[-1] if problem.op == "token_logps" else problem.inputs["weight"].shape[0]
    return {"top_k": min(2, vocab)}


def _hold_top1(problem: Problem, out, truth, own) -> None:
    """The truth's answer, or another one whose log-prob is the best within the contract: rounding may break a tie."""
    got = out.is_top1.cpu()
    assert got.dtype == torch.bool and got.shape == truth["is_top1"].shape
    if _exact_order(problem):
        assert torch.equal(got, truth["is_top1"]), "is_top1"
        return

    def place(x, k):
        x = x[..., k] if x.shape[-1] > k else torch.full_like(x[..., 0], -torch.inf)
        return x.unsqueeze(-1).expand(got.shape) if got.dim() > x.dim() else x

    best, runner_up = (place(truth["topk_logp"], k) for k in (0, 1))
    named = torch.where(got, truth["logp"], torch.where(truth["is_top1"], runner_up, best))
    yardstick = own["topk_logp"]
    yardstick = yardstick.map(lambda x: place(x, 0)) if isinstance(yardstick, Orders) else place(yardstick, 0)
    assert_value("log p of the top-1", named, best, yardstick)


def _hold_topk(problem: Problem, out, truth, skipped) -> None:
    ids = out.topk_ids.cpu()
    assert ids.dtype == torch.int64 and bool((ids[skipped] == -1).all()), "topk_ids of skipped rows"
    assert bool((out.topk_logp.diff(dim=-1) <= 0).all()), "topk_logp is not descending"
    live = ids[~skipped]
    assert all(len(set(row)) == len(row) for row in live.reshape(-1, ids.shape[-1]).tolist()), "topk_ids: duplicates"
    if _exact_order(problem):
        assert torch.equal(ids, truth["topk_ids"]), "topk_ids"
        return
    options = problem.options | {"top_k": None}
    chosen = replace(problem, targets=ids.where(ids >= 0, -100), outputs=("logp",), grads=(), options=options)
    (at_ids, _), (own_ids, _) = oracle(chosen, torch.float64), yardsticks(chosen)
    assert_value("log p of topk_ids", out.topk_logp.cpu(), at_ids["logp"], own_ids["logp"])


def logits_of(n, vocab: int, dtype=torch.float32, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    """[*n, vocab] normal logits, like those of a language model in spread."""
    lead = n if isinstance(n, tuple) else (n,)
    return (torch.randn(*lead, vocab, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def targets_of(lead, vocab: int, candidates: int = 0, seed: int = 1) -> torch.Tensor:
    """[*lead] or [*lead, candidates] targets in [0, vocab)."""
    lead = lead if isinstance(lead, tuple) else (lead,)
    shape = (*lead, candidates) if candidates else lead
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def head_of(n, dim: int, vocab: int, dtype=torch.float32, bias: bool = False, seed: int = 0) -> dict:
    """hidden, weight and perhaps bias, whose logits have a spread of about 2."""
    lead = n if isinstance(n, tuple) else (n,)
    rng = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden": torch.randn(*lead, dim, generator=rng).to(dtype),
        "weight": (torch.randn(vocab, dim, generator=rng) * (2.0 / dim**0.5)).to(dtype),
    }
    return inputs | ({"bias": torch.randn(vocab, generator=rng).to(dtype)} if bias else {})


def as_head(logits: torch.Tensor) -> dict:
    """A head whose logits are those of a given [N, V]: one-hot hidden states; −inf goes into the bias of its column."""
    finite = logits.isfinite()
    column = torch.where(finite.all(0), 0.0, -torch.inf).to(logits.dtype)
    weight = torch.where(finite, logits, torch.zeros((), dtype=logits.dtype)).T.contiguous()
    return {"hidden": torch.eye(logits.shape[0], dtype=logits.dtype), "weight": weight, "bias": column}


# The axes of the options; the first value of each is the default. Layouts and inputs are built in the test modules.
COMMON_AXES = {
    "dtype": ("f32", "bf16", "f16"),
    "vocab": (1000, 1, 2, 17, 1025, 2051),
    "temperature": (1.0, f32(0.6), "rows"),
    "softcap": (None, 3.0),
    "logit_scale": (1.0, f32(0.3)),
    "mask": (None, "bool", "float"),
    "ignored": (False, True),
    "targets": ("int64", "int32"),
    "candidates": (0, 1, 3),
    "top_k": (None, 1, 4),
    "outputs": (("logp",), ("lse", "entropy"), ALL),
    "grads": (("logp",), ("entropy",), ("lse",), ("logp", "entropy"), DIFFERENTIABLE, ()),
    "upstream": ("random", "ones"),
}
LOGITS_AXES = COMMON_AXES | {
    "layout": ("rows", "batch", "shifted", "swapped", "expanded", "columns", "four_dims", "one_row"),
    "inplace": (False, True),
}
LINEAR_AXES = COMMON_AXES | {
    "vocab": (1000, 1, 17, 1025, 2051),  # of two columns there are too few errors to compare their maxima
    "layout": ("rows", "batch", "shifted", "swapped", "columns", "four_dims"),
    "dim": (64, 3, 20, 129),
    "bias": (False, True),
    "needs": (("hidden", "weight", "bias"), ("hidden",), ("weight",), ("bias",)),
    "memory_budget": (2 << 30, 0),
}


def interpreted() -> bool:
    """Whether this is the run of Triton's interpreter, where sizes are small."""
    return backends.interpreting() and not torch.cuda.is_available()


def few(n: int, small: int) -> int:
    """n rows, or a small number under Triton's interpreter, where a row takes 10 to 50 ms."""
    return small if interpreted() else n


# Enough rows that the largest of torch's own errors is no accident, few enough for the interpreter.
LEADS = {
    "rows": (few(64, 5),),
    "batch": (few(3, 2), few(21, 2)),
    "shifted": (few(3, 2), few(21, 2)),
    "swapped": (few(21, 2), few(3, 2)),
    "expanded": (few(3, 2), few(21, 2)),
    "columns": (few(63, 4),),
    "four_dims": (2, 1, 2, few(16, 1)),
    "one_row": (1,),
}
# What can interact inside a kernel, for the full product; the other axes keep their defaults or follow.
PRODUCT_AXES = {
    "temperature": (1.0, f32(0.6), "rows"),
    "softcap": (None, 3.0),
    "mask": (None, "bool"),
    "ignored": (False, True),
    "candidates": (0, 3),
    "top_k": (None, 4),
    "outputs": (("logp",), ALL),
    "grads": (("logp",), ("entropy",), ("logp", "entropy"), DIFFERENTIABLE),
}


def pairwise(axes: dict, seed: int = 20) -> list[dict]:
    """Combinations such that every pair of values of two axes occurs in one: greedy, with a fixed seed.

    Written out because the tests also run in bare GPU images, where nothing can be installed.
    """
    rng = random.Random(seed)
    names = list(axes)
    todo = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    chosen = []
    while todo:
        best, best_gain = None, -1
        for _ in range(30):
            a, i, b, j = rng.choice(sorted(todo))
            row = [rng.randrange(len(axes[name])) for name in names]
            row[a], row[b] = i, j
            for c in rng.sample(range(len(names)), len(names)):
                if c not in (a, b):
                    row[c] = max(range(len(axes[names[c]])), key=lambda v, c=c, row=row: _gain(row, c, v, todo))
            gain = len(_pairs(row) & todo)
            if gain > best_gain:
                best, best_gain = row, gain
        todo -= _pairs(best)
        chosen.append({name: axes[name][v] for name, v in zip(names, best, strict=True)})
    return chosen


def _pairs(row: list) -> set:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}


def _gain(row: list, c: int, v: int, todo: set) -> int:
    return sum(((a, row[a], c, v) if a < c else (c, v, a, row[a])) in todo for a in range(len(row)) if a != c)


def product(axes: dict) -> list[dict]:
    """Every combination."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def label(combination: dict) -> str:
    """A test id: what differs from the defaults."""
    parts = []
    for name, value in combination.items():
        axis = (LOGITS_AXES | LINEAR_AXES).get(name, (None,))
        if value != axis[0]:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            shown = "+".join(value) or "none" if isinstance(value, tuple) else shown
            parts.append(name if value is True else f"{name}={shown}")
    return ",".join(parts) or "defaults"


def problem_of(op: str, combination: dict) -> Problem:
    """The problem that a combination of the axes names."""
    axes = LOGITS_AXES if op == "token_logps" else LINEAR_AXES
    c = {name: values[0] for name, values in axes.items()} | combination
    dtype, vocab = DTYPES[c["dtype"]], c["vocab"]
    lead = LEADS[c["layout"]]
    width = vocab if op == "token_logps" else c["dim"]
    spread = 2.0 if op == "token_logps" else 1.0
    source = strided(c["layout"], lead, width, dtype, spread)
    if op == "token_logps":
        inputs = {"logits": source}
    else:
        head = head_of(1, c["dim"], vocab, dtype, c["bias"], seed=5)
        inputs = {"hidden": source} | {name: x for name, x in head.items() if name != "hidden"}
    options, targets = _options_of(c, lead, vocab)
    outputs = tuple(dict.fromkeys((*c["outputs"], *c["grads"])))
    needs = c.get("needs", ("logits",))
    if not any(name in inputs for name in needs):
        needs = ("hidden",)
    keywords = {"inplace_backward": c["inplace"]} if op == "token_logps" else {"memory_budget": c["memory_budget"]}
    return Problem(inputs, targets, options, outputs, c["grads"], needs, c["upstream"], keywords)


def strided(layout: str, lead: tuple, width: int, dtype, spread: float) -> torch.Tensor:
    """[*lead, width] in a memory layout: a shifted slice, swapped or expanded leading dimensions, strided columns."""
    if layout == "shifted":
        return logits_of((lead[0], lead[1] + 1), width, dtype, spread=spread)[:, :-1]
    if layout == "swapped":
        return logits_of(lead[::-1], width, dtype, spread=spread).transpose(0, 1)
    if layout == "expanded":
        return logits_of((1, lead[1]), width, dtype, spread=spread).expand(*lead, width)
    if layout == "columns":
        return logits_of(width, lead[0], dtype, spread=spread).T
    return logits_of(lead, width, dtype, spread=spread)


def _options_of(c: dict, lead: tuple, vocab: int) -> tuple[dict, torch.Tensor]:
    rng = torch.Generator().manual_seed(11)
    targets = targets_of(lead, vocab, c["candidates"])
    if c["candidates"] == 3:
        targets[..., 2] = targets[..., 0]  # a duplicate
    if c["ignored"]:
        targets = torch.where(torch.rand(targets.shape, generator=rng) < 0.3, -100, targets)
    targets = targets.to(getattr(torch, c["targets"]))
    options = {"temperature": c["temperature"], "softcap": c["softcap"], "logit_scale": c["logit_scale"]}
    if c["temperature"] == "rows":
        options["temperature"] = torch.rand(lead, generator=rng) + 0.5
    if c["mask"]:
        mask = torch.rand(lead, generator=rng) < 0.7
        options["mask"] = mask if c["mask"] == "bool" else mask.float()
    if c["top_k"]:
        options["top_k"] = min(c["top_k"], vocab)
    return options, targets
