"""What the tests feed the divergence ops, and how a result is held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

import rlfast
from rlfast.reference.divergence import divergence as reference
from rlfast.reference.linear_divergence import linear_divergence as linear_reference
from tests.cases import DTYPES, f32, few, head_of, label, logits_of, pairwise, strided, targets_of
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero, by_name

ALL = ("logp", "lse", "entropy", "ref_lse")
ROWWISE = ("logits", "ref_logits", "hidden", "ref_hidden")
KINDS = ("forward_kl", "reverse_kl", "jsd")


@dataclass(frozen=True)
class Pair:
    """One call of a divergence op; ``inputs`` are on the CPU."""

    inputs: dict  # logits and ref_logits, or two heads
    options: dict = field(default_factory=dict)  # every keyword that the oracle knows, targets among them
    outputs: tuple = ()  # beside value, and logp where there are targets
    grads: tuple = ("value",)
    needs: tuple = ("logits", "ref_logits", "hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
    call: dict = field(default_factory=dict)  # memory_budget: no meaning for the oracle

    @property
    def linear(self) -> bool:
        return "hidden" in self.inputs

    @property
    def lead(self) -> tuple:
        return tuple(self.inputs.get("logits", self.inputs.get("hidden")).shape[:-1])

    def names(self) -> tuple:
        """The outputs that come back."""
        return ("value", *(("logp",) if self.options.get("targets") is not None else ()), *self.outputs)

    def differentiated(self) -> list[str]:
        return [name for name, x in self.inputs.items() if x is not None and name in self.needs] if self.grads else []

    def skipped(self) -> torch.Tensor:
        """[*lead]: rows that are masked, or whose targets are all −100."""
        mask, targets = self.options.get("mask"), self.options.get("targets")
        out = torch.zeros(self.lead, dtype=torch.bool) if mask is None else mask == 0
        if targets is not None:
            ignored = targets == -100
            out = out | (ignored.all(-1) if ignored.dim() > len(self.lead) else ignored)
        return out


def cotangents(values: list) -> list:
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=rng).double() for x in values]


def oracle(pair: Pair, dtype: torch.dtype, order: int = 0) -> tuple[dict, dict]:
    """(values, gradients) by the reference, garbage in skipped rows replaced by zeros; ``order`` > 0: another order."""
    leaves = {}
    for name, x in pair.inputs.items():
        if x is not None:
            x = x.detach().to(dtype).clone()
            if name in ROWWISE:
                x[pair.skipped()] = 0.0
            x.requires_grad_(name in pair.needs)
        leaves[name] = x
    options = dict(pair.options)
    inputs = leaves
    if order:
        inputs, options = _reordered(leaves, options, order)
    function = linear_reference if pair.linear else reference
    values = function(**inputs, **options, dtype=dtype)
    names, gradients = pair.differentiated(), {}
    if names:
        chosen = [values[name] for name in pair.grads]
        upstream = [g.to(dtype) for g in cotangents(chosen)]
        pulled = torch.autograd.grad(chosen, [leaves[name] for name in names], upstream, allow_unused=True)
        zeros = (torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, pulled, strict=True))
        gradients = dict(zip(names, zeros, strict=True))
    return {name: x.detach() for name, x in values.items()}, gradients


def _reordered(leaves: dict, options: dict, seed: int) -> tuple[dict, dict]:
    """The vocabulary and both hidden dimensions shuffled, differentiably."""
    draw = torch.Generator().manual_seed(seed)
    vocab = leaves["logits"].shape[-1] if "logits" in leaves else leaves["weight"].shape[0]
    ids = torch.randperm(vocab, generator=draw)
    if "logits" in leaves:
        moved = {name: x[..., ids] for name, x in leaves.items()}
    else:
        moved = {}
        for prefix in ("", "ref_"):
            columns = torch.randperm(leaves[prefix + "weight"].shape[1], generator=draw)
            moved[prefix + "hidden"] = leaves[prefix + "hidden"][..., columns]
            moved[prefix + "weight"] = leaves[prefix + "weight"][ids][:, columns]
            bias = leaves.get(prefix + "bias")
            moved[prefix + "bias"] = None if bias is None else bias[ids]
    targets = options.get("targets")
    if targets is not None:
        place = ids.argsort()
        options = options | {"targets": torch.where(targets == -100, -100, place[targets.long().clamp(min=0)])}
    return moved, options


def run(pair: Pair, backend: str, device: str = "cpu") -> tuple[rlfast.Divergence, dict]:
    """(outputs, gradients) of the op on this backend."""
    leaves = {}
    for name, x in pair.inputs.items():
        if x is not None:
            x = x.detach() if device == "cpu" else x.detach().to(device)
            x = x.requires_grad_(bool(pair.grads) and name in pair.needs)
        leaves[name] = x
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in pair.options.items()}
    function = rlfast.linear_divergence if pair.linear else rlfast.divergence
    with rlfast.use_backend(backend):
        out = function(**leaves, **options, **pair.call, outputs=pair.outputs)
    names, gradients = pair.differentiated(), {}
    if names:
        chosen = [getattr(out, name) for name in pair.grads]
        upstream = [g.to(v) for g, v in zip(cotangents(chosen), chosen, strict=True)]
        pulled = torch.autograd.grad(chosen, [leaves[name] for name in names], upstream, allow_unused=True)
        zeros = (torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(names, pulled, strict=True))
        gradients = dict(zip(names, zeros, strict=True))
    return out, gradients


def solved(pair: Pair) -> tuple:
    """The truth, and PyTorch's float32 results by which a result is held to it."""
    return oracle(pair, torch.float64), by_name(lambda order: oracle(pair, torch.float32, order))


def check(pair: Pair, backend: str, device: str = "cpu", solution: tuple | None = None) -> None:
    """Every output and gradient of one call against the oracle, which may be ``solved`` already."""
    hold(pair, *run(pair, backend, device), solution or solved(pair))


def hold(pair: Pair, out, gradients, solution: tuple) -> None:
    """Assert the contract for one run."""
    (truth, truth_gradients), (own, own_gradients) = solution
    skipped, wide = pair.skipped(), pair.inputs.get("logits", pair.inputs.get("hidden")).dtype == torch.float64
    for name in rlfast.Divergence._fields:
        got = getattr(out, name)
        if name not in pair.names():
            assert got is None, f"{name}: was not asked for"
            continue
        got = got.detach().cpu()
        assert got.dtype == (torch.float64 if wide else torch.float32), f"{name}: {got.dtype}"
        assert_zero(f"{name} of skipped rows", got[skipped])
        assert_value(name, got, truth[name], own[name])
    assert not (out.value < 0).any(), "a divergence below 0"
    for name, got in gradients.items():
        assert got.dtype == pair.inputs[name].dtype, f"gradient of {name}: {got.dtype}"
        got = got.detach().cpu()
        if name in ROWWISE:
            assert_zero(f"gradient of skipped {name}", got[skipped])
        assert_gradient(f"gradient of {name}", got, truth_gradients[name], own_gradients[name])


def same_run(got, expected) -> None:
    """Outputs and gradients of two runs, to the bit."""
    for name in rlfast.Divergence._fields:
        a, b = getattr(got[0], name), getattr(expected[0], name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert_same_bits(name, a.detach(), b.detach())
    for name, gradient in got[1].items():
        assert_same_bits(f"gradient of {name}", gradient, expected[1][name])


def logits_pair(n, vocab: int, dtype=torch.float32, seed: int = 0, spread: float = 2.0, apart: float = 1.0) -> dict:
    """Logits of a student and of a teacher that resembles it: as far apart as ``apart`` times the spread."""
    x, y = logits_of(n, vocab, torch.float32, seed, spread), logits_of(n, vocab, torch.float32, seed + 100, spread)
    return {"logits": x.to(dtype), "ref_logits": (x + apart * y).to(dtype)}


def heads_of(n, dims: tuple[int, int], vocab: int, dtype=torch.float32, bias: bool = False, seed: int = 0) -> dict:
    """Two heads of different widths."""
    own, ref = head_of(n, dims[0], vocab, dtype, bias, seed), head_of(n, dims[1], vocab, dtype, bias, seed + 7)
    return own | {f"ref_{name}": x for name, x in ref.items()}


def as_heads(logits: dict) -> dict:
    """Heads whose logits are the given ones: one-hot hidden states."""
    found = {}
    for prefix, x in (("", logits["logits"]), ("ref_", logits["ref_logits"])):
        finite = x.isfinite()
        column = torch.where(finite.all(0), 0.0, -torch.inf).to(x.dtype)
        found |= {
            f"{prefix}hidden": torch.eye(x.shape[0], dtype=x.dtype),
            f"{prefix}weight": torch.where(finite, x, torch.zeros((), dtype=x.dtype)).T.contiguous(),
            f"{prefix}bias": column,
        }
    return found


# The first value of each is the default.
AXES = {
    "dtype": ("f32", "bf16", "f16"),
    "vocab": (1000, 1, 17, 1025, 2051),
    "kind": KINDS,
    "beta": (0.5, f32(0.1), 0.0, 1.0),
    "temperature": (1.0, f32(0.6), "rows"),
    "ref_temperature": (None, f32(1.3), "rows"),
    "softcap": (None, 3.0),
    "ref_softcap": (None, 5.0),
    "logit_scale": (1.0, f32(0.3), -0.5),
    "ref_logit_scale": (1.0, f32(1.7)),
    "targets": (None, "one", "many", "ignored"),
    "mask": (None, "bool", "float"),
    "top_k": (None, None, "renormalize", "bucket"),
    "outputs": ((), ("lse", "entropy"), ("ref_lse",), ("lse", "entropy", "ref_lse")),
    "grads": (("value",), "all"),
}
LOGITS_AXES = AXES | {
    "layout": ("rows", "batch", "shifted", "swapped", "expanded", "columns", "four_dims", "one_row"),
    "needs": (("logits",), ("logits", "ref_logits"), ("ref_logits",)),
}
LINEAR_AXES = AXES | {
    "dims": ("64×48", "3×20", "129×33"),
    "bias": (False, True),
    "needs": (
        ("hidden", "weight", "bias"), ("hidden",), ("weight",), ("ref_hidden", "ref_weight", "ref_bias"),
        ("hidden", "weight", "ref_hidden", "ref_weight"),
    ),
    "memory_budget": (2 << 30, 0),
}  # fmt: skip
LEADS = {
    "rows": (few(64, 5),),
    "batch": (few(4, 2), few(40, 2)),
    "shifted": (few(3, 2), few(21, 2)),
    "swapped": (few(21, 2), few(3, 2)),
    "expanded": (few(3, 2), few(21, 2)),
    "columns": (few(63, 4),),
    "four_dims": (2, 1, 2, few(16, 1)),
    "one_row": (1,),
}


def combination_label(combination: dict) -> str:
    """A test id: what differs from the defaults of both ops."""
    axes = LOGITS_AXES | LINEAR_AXES
    return label({k: v for k, v in combination.items() if v != axes[k][0]}) or "defaults"


def pair_of(combination: dict, linear: bool) -> Pair:
    """The call that a combination of the axes names."""
    axes = LINEAR_AXES if linear else LOGITS_AXES
    c = {name: values[0] for name, values in axes.items()} | combination
    dtype, vocab = DTYPES[c["dtype"]], c["vocab"]
    lead = LEADS["batch"] if linear else LEADS[c["layout"]]
    if linear:
        inputs, call = (
            heads_of(lead, tuple(map(int, c["dims"].split("×"))), vocab, dtype, c["bias"]),
            {"memory_budget": c["memory_budget"]},
        )
    else:
        x = strided(c["layout"], lead, vocab, dtype, 2.0)
        inputs, call = {"logits": x, "ref_logits": logits_of(lead, vocab, dtype, 9)}, {}
        inputs["ref_logits"] = inputs["ref_logits"] if c["layout"] == "rows" else torch.roll(x, 1, 0)
    options = _options(c, lead, vocab)
    outputs = c["outputs"]
    grads = c["grads"] if c["grads"] != "all" else ("value", *outputs)
    if c["grads"] == "all" and options.get("targets") is not None:
        grads = (*grads, "logp")
    learns = [any(name.startswith("ref_") is ref for name in c["needs"]) for ref in (False, True)]
    grads = tuple(g for g in grads if g == "value" or learns[g == "ref_lse"])
    return Pair(inputs, options, outputs, grads, c["needs"], call)


def _options(c: dict, lead: tuple, vocab: int) -> dict:
    rng = torch.Generator().manual_seed(11)
    same = ("kind", "beta", "softcap", "ref_softcap", "logit_scale", "ref_logit_scale")
    options = {name: c[name] for name in same}
    for name in ("temperature", "ref_temperature"):
        options[name] = torch.rand(lead, generator=rng) + 0.5 if c[name] == "rows" else c[name]
    if c["targets"]:
        targets = targets_of(lead, vocab, 3 if c["targets"] == "many" else 0)
        if c["targets"] == "ignored":
            targets = torch.where(torch.rand(lead, generator=rng) < 0.3, -100, targets)
        options["targets"] = targets
    if c["mask"]:
        mask = torch.rand(lead, generator=rng) < 0.7
        options["mask"] = mask if c["mask"] == "bool" else mask.float()
    if c["top_k"]:
        options |= {"top_k": min(40, vocab), "tail": c["top_k"]}
    return options


def combinations(linear: bool) -> list[dict]:
    """Every pair of values of two axes, with the top-k where the logits that it orders are the given ones."""
    found = []
    for c in pairwise(LINEAR_AXES if linear else LOGITS_AXES):
        # rounding decides a tie of soft-capped or projected logits, and so which outcomes are compared
        tied = linear or c["softcap"] or c["ref_softcap"] or c["dtype"] != "f32" or c["vocab"] < 41
        found.append(c | {"top_k": None} if tied else c)
    return found


def _infinite(kind: str) -> Pair:
    """Disjoint supports, and a teacher's outcome that the student excludes."""
    x = logits_pair(8, 2100)
    x["logits"][0, 7] = x["logits"][1, :1500] = x["ref_logits"][2, 2000] = -torch.inf
    x["logits"][3, :1000] = x["ref_logits"][3, 1000:] = -torch.inf
    return Pair(x, {"kind": kind}, ("entropy",), () if kind != "jsd" else ("value",))


def _half_possible(kind: str) -> Pair:
    """−inf on both sides, and where an outcome counts for nothing."""
    x = logits_pair(8, 3000)
    away = torch.rand(8, 3000, generator=torch.Generator().manual_seed(4)) < 0.5
    away[:, 1024:2048] = True
    for side in x.values():
        side[away] = -torch.inf
    x["ref_logits" if kind == "forward_kl" else "logits"][:, 2100:2200] = -torch.inf
    return Pair(x, {"kind": kind, "targets": torch.tensor([5, 2300] * 4)}, ALL[1:], ("value",))


def _far(kind: str) -> Pair:
    """Finite logits whose probability is 0 in float32: their log-ratio still counts."""
    x = logits_pair(few(12, 6), 1500)
    x["logits"][:, 3] -= 1e4
    x["ref_logits"][:, 700] -= 3e3
    return Pair(x, {"kind": kind})


def _one_outcome(kind: str) -> Pair:
    """Nearly certain on one side and open on the other."""
    x = logits_pair(few(64, 8), 1500)
    x["logits" if kind == "reverse_kl" else "ref_logits"][:, 1300] += 12.0
    return Pair(x, {"kind": kind})


def _moved(offset: float, dtype=torch.float32, spread: float = 2.0):
    def build(kind: str) -> Pair:
        x = logits_pair(few(12, 6), 3000, torch.float32, spread=spread)
        return Pair({k: (v + offset).to(dtype) for k, v in x.items()}, {"kind": kind}, ("lse", "ref_lse"))

    return build


def _nan_row(kind: str) -> Pair:
    x = logits_pair(few(24, 12), 3000)
    x["logits"][2, 17] = x["ref_logits"][5, 2990] = torch.nan
    return Pair(x, {"kind": kind})


def _impossible_row(kind: str) -> Pair:
    x = logits_pair(6, 2100)
    x["logits"][1] = x["ref_logits"][3] = -torch.inf
    return Pair(x, {"kind": kind}, (), ())


def _garbage_in_masked_rows(kind: str) -> Pair:
    x = logits_pair(6, 2100)
    mask = torch.tensor([False, True, True, False, True, True])
    x["logits"][0], x["ref_logits"][3] = torch.nan, torch.inf
    targets = torch.tensor([1, 2, 3, 4, -100, 6])
    x["logits"][4] = x["ref_logits"][4] = torch.nan
    options = {
        "kind": kind,
        "mask": mask,
        "targets": targets,
        "softcap": 20.0,
        "temperature": torch.linspace(0.5, 1.5, 6),
    }
    return Pair(x, options, ALL[1:], ("value", "logp", "entropy", "ref_lse"))


def _all_masked(kind: str) -> Pair:
    return Pair(logits_pair(6, 300), {"kind": kind, "mask": torch.zeros(6)}, ALL[1:], ("value",))


def _near(kind: str) -> Pair:
    """Two models that have hardly moved apart."""
    return Pair(logits_pair(few(32, 8), 2500, apart=1e-3), {"kind": kind})


def _wide(kind: str) -> Pair:
    return Pair(logits_pair(few(12, 6), 3000, torch.bfloat16, spread=6.0), {"kind": kind, "temperature": f32(0.7)})


def _odd(vocab: int):
    def build(kind: str) -> Pair:
        return Pair(logits_pair(few(4, 1), vocab, torch.bfloat16), {"kind": kind}, ("entropy",))

    return build


ROWS = {
    "infinite": _infinite, "half_possible": _half_possible, "far": _far, "one_outcome": _one_outcome,
    "offset_1e6": _moved(1e6), "below_zero": _moved(-1e4), "offset_3e4_bf16": _moved(3e4, torch.bfloat16, 300.0),
    "nan_row": _nan_row, "impossible_row": _impossible_row, "garbage_in_masked_rows": _garbage_in_masked_rows,
    "all_masked": _all_masked, "near": _near, "wide": _wide, "vocabulary_50257": _odd(50257),
    "vocabulary_32003": _odd(32003),
}  # fmt: skip
# Those whose logits a head of one-hot states gives: the others hold NaN, or −inf in some rows of a column alone.
PROJECTED = ("far", "one_outcome", "offset_1e6", "below_zero", "offset_3e4_bf16", "near", "wide")


def row_of(name: str, kind: str, linear: bool = False) -> Pair:
    """An adversarial call."""
    pair = ROWS[name](kind)
    return replace(pair, inputs=as_heads(pair.inputs)) if linear else pair
