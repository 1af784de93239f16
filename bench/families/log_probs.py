"""token_logps and linear_token_logps: log-probs of tokens, from logits and from hidden states."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms, gemms
from bench.baselines import log_probs as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import even, generator, normal
from bench.heads import HeadCase
from rlfast.reference.token_logps import token_logps as reference

OUTPUTS = ("logp", "entropy", "log_sum_sq_probs")


@dataclass(frozen=True, kw_only=True)
class Logits(Case):
    """From logits [rows, vocab]: one read of them; with a backward a second read and a write."""

    op: str = "token_logps"
    rows: int
    vocab: int
    entropy: bool = False  # with entropy and log Σp²
    backward: bool = False

    NAMES: ClassVar = {"rlfast logp": "logp alone"}

    def small(self) -> Logits:
        return replace(self, rows=min(self.rows, 64), vocab=4099, budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits of a few nats, as a trained head gives."""
        draw = generator(device)
        targets = torch.randint(self.vocab, (self.rows,), generator=draw, device=device)
        logits = normal(draw, self.rows, self.vocab, dtype=DTYPES[self.dtype], scale=2.0)
        g = torch.randn(self.rows, generator=draw, device=device)
        return {"targets": targets, "logits": logits, "g_logp": g}

    def _arm(self, function, data: dict):
        upstream = data["g_logp"] if self.backward else None
        return arms.arm(function, {"logits": data["logits"]}, (data["targets"],), OUTPUTS, upstream)

    def ours(self, data: dict) -> dict:
        def with_outputs(names):
            def run(logits, targets):
                out = rlfast.token_logps(logits, targets, outputs=names)
                return tuple(getattr(out, name) for name in names)

            return self._arm(run, data)

        if self.entropy:
            return {"rlfast": with_outputs(OUTPUTS), "rlfast logp": with_outputs(("logp",))}
        return {"rlfast": with_outputs(("logp",))}

    def plain(self, data: dict) -> dict:
        compile_ = torch.compile(dynamic=False)
        eager = baselines.eager_statistics if self.entropy else baselines.eager
        found = {"eager": eager, "compile": compile_(eager)}
        if self.backward:
            found["plain chunked"] = baselines.ChunkedLogps.apply
        else:
            part = baselines.chunk_statistics if self.entropy else baselines.chunk_logps
            found["plain chunked"] = baselines.chunked(part)
            found["plain chunked, compiled"] = baselines.chunked(compile_(part))
        return {name: self._arm(function, data) for name, function in found.items()}

    def peers(self, data: dict, device: str) -> dict:
        found = {}
        if arms.has("trl"):
            trl = importlib.import_module("trl.trainer.utils")
            function = trl.selective_log_softmax_and_entropy if self.entropy else trl.selective_log_softmax

            def run(logits, targets):
                out = function(logits.unsqueeze(0), targets.unsqueeze(0))
                return tuple(x.squeeze(0) for x in out) if self.entropy else out.squeeze(0)

            found["trl"] = run
        if arms.has("liger_kernel") and device == "cuda" and not self.entropy:
            liger = importlib.import_module("liger_kernel.transformers.grpo_loss")

            def run_liger(logits, targets):
                # it takes [B, L + 1, V] and leaves out the last position: one row of the case is not computed
                return liger.fused_selective_log_softmax(logits.unsqueeze(0), targets[None, :-1], 1.0).squeeze(0)

            found["liger"] = run_liger
        return {name: self._arm(function, data) for name, function in found.items()}

    def truth(self, data: dict) -> dict:
        rows = _some(data["targets"], self.rows)
        leaf = data["logits"][rows].double().requires_grad_()
        return _row_truth(leaf, leaf, rows, data, "grad_logits")

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(data["logits"])

    def traffic(self, arm: str) -> int:
        passes = {"read": 1, "copy": 2}.get(arm, 3 if self.backward else 1)
        return passes * self.rows * self.vocab * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Head(HeadCase):
    """From hidden [rows, width] and weight [vocab, width], forward and backward: three GEMMs, four when the logits are
    made twice."""

    op: str = "linear_token_logps"
    rows: int
    vocab: int
    width: int

    OURS: ClassVar = ("rlfast keep", "rlfast recompute")
    NAMES: ClassVar = {
        "gemms keep": "its three bare GEMMs",
        "gemms recompute": "its four bare GEMMs",
        "logits": "the logits in float32",
    }

    def small(self) -> Head:
        return replace(self, rows=min(self.rows, 64), vocab=4099, width=min(self.width, 96), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits of a few nats, as a trained head gives."""
        draw, dtype = generator(device), DTYPES[self.dtype]
        targets = torch.randint(self.vocab, (self.rows,), generator=draw, device=device)
        hidden = normal(draw, self.rows, self.width, dtype=dtype)
        weight = normal(draw, self.vocab, self.width, dtype=dtype, scale=2.0 / self.width**0.5)
        g = torch.randn(self.rows, generator=draw, device=device)
        return {"targets": targets, "hidden": hidden, "weight": weight, "g_logp": g}

    def _arms(self, functions: dict, data: dict) -> dict:
        leaves, rest = {name: data[name] for name in ("hidden", "weight")}, (data["targets"],)
        return {name: arms.arm(f, leaves, rest, ("logp",), data["g_logp"]) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        def with_budget(budget):
            return lambda h, w, t: rlfast.linear_token_logps(h, w, t, memory_budget=budget).logp

        return self._arms({"rlfast keep": with_budget(1 << 40), "rlfast recompute": with_budget(0)}, data)

    def plain(self, data: dict) -> dict:
        linear = baselines.LinearLogps.apply
        found = {
            "eager": baselines.linear_eager,
            "compile": torch.compile(baselines.linear_eager, dynamic=False),
            "plain in place": lambda h, w, t: linear(h, w, t, gemms.mm),
        }
        if self.dtype == "float32" and gemms.onednn_works():
            found["plain in place, oneDNN"] = lambda h, w, t: linear(h, w, t, gemms.onednn)
        return self._arms(found, data)

    def peers(self, data: dict, device: str) -> dict:
        found = {}
        if arms.has("trl"):
            kernel = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
            chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
            found["trl"] = lambda h, w, t: kernel.apply(h, w, None, t, 1.0, chunk, None, 1.0, ())[0]
        if arms.has("cut_cross_entropy") and device == "cuda":
            cce = importlib.import_module("cut_cross_entropy")
            found["cce"] = lambda h, w, t: -cce.linear_cross_entropy(h, w, t, reduction="none")
        if arms.has("verl") and device == "cuda":
            verl = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
            found["verl"] = lambda h, w, t: verl.linear_cross_entropy(h, w, t, 1.0, "none")[0]
        return self._arms(found, data)

    def truth(self, data: dict) -> dict:
        rows = _some(data["targets"], self.rows)
        leaf = data["hidden"][rows].double().requires_grad_()
        with torch.enable_grad():
            logits = leaf @ data["weight"].double().T
        found = _row_truth(logits, leaf, rows, data, "grad_hidden")
        columns = torch.cat((_some(data["targets"], self.vocab), data["targets"][: len(rows)])).unique()
        with torch.no_grad():
            return found | {"grad_weight": (columns, _weight_truth(data, columns))}

    def ceilings(self, data: dict, device: str) -> dict:
        return gemms.ceilings(data["hidden"], data["weight"])


def _some(targets: torch.Tensor, n: int) -> torch.Tensor:
    return even(n).to(targets.device)


def _row_truth(logits, leaf, rows, data: dict, name: str) -> dict:
    """Outputs and the gradient of the leaf, of some rows."""
    with torch.enable_grad():
        found = reference(logits, data["targets"][rows], dtype=torch.float64)
        (grad,) = torch.autograd.grad((found["logp"] * data["g_logp"][rows].double()).sum(), leaf)
    return {output: (rows, found[output].detach()) for output in OUTPUTS} | {name: (rows, grad)}


def _weight_truth(data: dict, columns: torch.Tensor) -> torch.Tensor:
    """dWeight of some vocabulary rows: needs every row's log-sum-exp, taken from float32 logits a chunk at a time."""
    hidden, weight = data["hidden"], data["weight"]
    some = weight[columns].double()
    total = torch.zeros_like(some)
    for h, t, g in zip(hidden.split(256), data["targets"].split(256), data["g_logp"].split(256), strict=True):
        lse = torch.logsumexp(h.float() @ weight.float().T, -1).double()
        p = torch.exp(h.double() @ some.T - lse.unsqueeze(-1))
        total += (((t.unsqueeze(-1) == columns).double() - p) * g.double().unsqueeze(-1)).T @ h.double()
    return total


ISA = (Target("rlfast avx2", "eager", 3.0), Target("rlfast avx2", "compile", 1.0))
PLAIN = Target("rlfast", "plain", 1.2)
LOGITS_ON_GPU = (Target("rlfast", "copy", 0.85), Target("rlfast", "trl", 1.0), Target("rlfast", "liger", 1.0))
HEAD_ON_GPU = (
    Target("rlfast keep", "gemms keep", 1.1, "cost"),
    Target("rlfast recompute", "gemms recompute", 1.1, "cost"),
    Target("rlfast keep", "trl", 1.0),
)


def _logits(what: str, dtype: str, *targets: Target, on_gpu: tuple = (), **options) -> Logits:
    name = f"token_logps {what} {dtype}"
    return Logits(name=name, rows=1024, vocab=49152, dtype=dtype, targets=targets + ISA, gpu_targets=on_gpu, **options)


def _forward(dtype: str, reach: float) -> Logits:
    eager, compiled = Target("rlfast", "eager", 6.0), Target("rlfast", "compile", 1.3)
    return _logits("forward", dtype, eager, compiled, Target("rlfast", "read", reach), PLAIN, on_gpu=LOGITS_ON_GPU)


def _statistics(dtype: str) -> Logits:
    beside = Target("rlfast", "rlfast logp", 1.3, "cost")
    return _logits("forward with entropy and log Σp²", dtype, beside, PLAIN, entropy=True)


def _backward(dtype: str) -> Logits:
    return _logits("forward+backward", dtype, Target("rlfast", "eager", 4.0), PLAIN, backward=True)


def _head(rows: int, width: int, vocab: int, dtype: str, budget_s: float, isas: bool) -> Head:
    low = dtype == "bfloat16"
    gemm_cost = 1.5 if low else 1.25
    keep = (
        Target("rlfast keep", "trl", 4.0 if low else 2.5),
        Target("rlfast keep", "gemms keep", gemm_cost, "cost"),
        Target("rlfast keep", "logits", 1.1, "memory"),
        Target("rlfast keep", "plain", 1.2),
    )
    recompute = (
        Target("rlfast recompute", "trl", 3.0 if low else 2.0),
        Target("rlfast recompute", "gemms recompute", gemm_cost, "cost"),
        Target("rlfast recompute", "logits", 0.1, "memory"),
    )
    isa = (Target("rlfast keep avx2", "eager", 3.0), Target("rlfast keep avx2", "compile", 1.0))
    name = f"linear_token_logps forward+backward {rows}×{width}×{vocab} {dtype}"
    return Head(
        name=name, rows=rows, width=width, vocab=vocab, dtype=dtype, targets=keep + recompute + isa,
        budget_s=budget_s, gpu_targets=HEAD_ON_GPU, isas=isas,
    )  # fmt: skip


CASES = (
    _forward("float32", 0.6),
    _forward("bfloat16", 0.5),
    _statistics("float32"),
    _statistics("bfloat16"),
    _backward("float32"),
    _backward("bfloat16"),
    _head(512, 576, 49152, "float32", 75.0, isas=True),
    _head(512, 576, 49152, "bfloat16", 75.0, isas=True),
    # a forced instruction set takes half a minute a call here: `--lower-isas` times them, in a loop of their own
    _head(2048, 896, 151936, "float32", 100.0, isas=False),
    _head(2048, 896, 151936, "bfloat16", 100.0, isas=False),
)
