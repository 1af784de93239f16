"""divergence and linear_divergence: KL(ref‖policy) and the JSD of two models, from logits and from hidden states."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms, gemms
from bench.baselines import divergences as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import even, generator, normal
from rlfast.reference.divergence import divergence as reference


@dataclass(frozen=True, kw_only=True)
class Pair(Case):
    """From two logits [rows, vocab], forward and the student's gradient: two reads of both, one write."""

    op: str = "divergence"
    rows: int
    vocab: int
    kind: str = "forward_kl"

    def small(self) -> Pair:
        return replace(self, rows=min(self.rows, 64), vocab=4099, budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits of a few nats, as a trained head gives, and those of a student that is a nat or so away."""
        draw, dtype = generator(device), DTYPES[self.dtype]
        ref = normal(draw, self.rows, self.vocab, dtype=dtype, scale=2.0)
        logits = normal(draw, self.rows, self.vocab, dtype=dtype).add_(ref)
        return {"logits": logits, "ref_logits": ref, "g_value": torch.randn(self.rows, generator=draw, device=device)}

    def _arms(self, functions: dict, data: dict) -> dict:
        leaves, rest = {"logits": data["logits"]}, (data["ref_logits"],)
        return {name: arms.arm(f, leaves, rest, ("value",), data["g_value"]) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        return self._arms({"rlfast": lambda x, y: rlfast.divergence(x, y, kind=self.kind).value}, data)

    def plain(self, data: dict) -> dict:
        if self.kind == "jsd":
            found = {"eager": baselines.eager_jsd, "compile": torch.compile(baselines.eager_jsd, dynamic=False)}
        else:
            found = {"eager": baselines.eager, "compile": torch.compile(baselines.eager, dynamic=False)}
            found["plain chunked"] = baselines.ChunkedKL.apply
        return self._arms(found, data)

    def truth(self, data: dict) -> dict:
        rows = even(self.rows)
        leaf = data["logits"][rows].double().requires_grad_()
        with torch.enable_grad():
            value = reference(leaf, data["ref_logits"][rows].double(), kind=self.kind, dtype=torch.float64)["value"]
            (grad,) = torch.autograd.grad((value * data["g_value"][rows].double()).sum(), leaf)
        return {"value": (rows, value.detach()), "grad_logits": (rows, grad)}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(data["logits"])

    def traffic(self, arm: str) -> int:
        passes = {"read": 1, "copy": 2}.get(arm, 5)
        return passes * self.rows * self.vocab * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Heads(Case):
    """From two heads of different widths, forward and the student's gradients: four GEMMs, six when logits are made
    twice."""

    op: str = "linear_divergence"
    rows: int
    vocab: int
    widths: tuple[int, int]  # student's and teacher's
    kind: str = "forward_kl"

    OURS: ClassVar = ("rlfast keep", "rlfast recompute")
    NAMES: ClassVar = {"gemms keep": "its four bare GEMMs", "logits": "both logits in float32"}

    def small(self) -> Heads:
        return replace(self, rows=min(self.rows, 64), vocab=4099, widths=(48, 96), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits of a few nats on both sides."""
        draw, dtype, data = generator(device), DTYPES[self.dtype], {}
        for prefix, width in zip(("", "ref_"), self.widths, strict=True):
            data[prefix + "hidden"] = normal(draw, self.rows, width, dtype=dtype)
            data[prefix + "weight"] = normal(draw, self.vocab, width, dtype=dtype, scale=2.0 / width**0.5)
        return data | {"g_value": torch.randn(self.rows, generator=draw, device=device)}

    def _arms(self, functions: dict, data: dict) -> dict:
        leaves, rest = {name: data[name] for name in ("hidden", "weight")}, (data["ref_hidden"], data["ref_weight"])
        return {name: arms.arm(f, leaves, rest, ("value",), data["g_value"]) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        def with_budget(budget):
            def run(h, w, ref_h, ref_w):
                return rlfast.linear_divergence(h, w, ref_h, ref_w, kind=self.kind, memory_budget=budget).value

            return run

        return self._arms({"rlfast keep": with_budget(1 << 40), "rlfast recompute": with_budget(0)}, data)

    def plain(self, data: dict) -> dict:
        linear = baselines.LinearKL.apply
        if self.kind == "jsd":
            eager = baselines.linear_eager_jsd
            return self._arms({"eager": eager, "compile": torch.compile(eager, dynamic=False)}, data)
        found = {
            "eager": baselines.linear_eager,
            "compile": torch.compile(baselines.linear_eager, dynamic=False),
            "plain in place": lambda *heads: linear(*heads, gemms.mm),
        }
        if self.dtype == "float32" and gemms.onednn_works():
            found["plain in place, oneDNN"] = lambda *heads: linear(*heads, gemms.onednn)
        return self._arms(found, data)

    def peers(self, data: dict, device: str) -> dict:
        if not arms.has("trl"):
            return {}
        kernel = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[self.kind]
        return self._arms({"trl": lambda h, w, rh, rw: kernel.apply(h, w, None, rh, rw, None, beta)[0]}, data)

    def truth(self, data: dict) -> dict:
        rows = even(self.rows)
        leaf = data["hidden"][rows].double().requires_grad_()
        ref_logits = data["ref_hidden"][rows].double() @ data["ref_weight"].double().T
        with torch.enable_grad():
            logits = leaf @ data["weight"].double().T
            value = reference(logits, ref_logits, kind=self.kind, dtype=torch.float64)["value"]
            (grad,) = torch.autograd.grad((value * data["g_value"][rows].double()).sum(), leaf)
        columns = even(self.vocab)
        found = {"value": (rows, value.detach()), "grad_hidden": (rows, grad)}
        return found | {"grad_weight": (columns, self._weight_truth(data, columns))}

    def _weight_truth(self, data: dict, columns: torch.Tensor) -> torch.Tensor:
        """dWeight of some vocabulary rows, from float64 logits of 32 tokens at a time."""
        total = 0.0
        fields = (data["hidden"], data["ref_hidden"], data["g_value"])
        for h, ref_h, g in zip(*(x.split(32) for x in fields), strict=True):
            h = h.double()
            logits = (h @ data["weight"].double().T).requires_grad_()
            ref = ref_h.double() @ data["ref_weight"].double().T
            with torch.enable_grad():
                value = reference(logits, ref, kind=self.kind, dtype=torch.float64)["value"]
                (d,) = torch.autograd.grad((value * g.double()).sum(), logits)
            total = total + d[:, columns].T @ h
        return total

    def ceilings(self, data: dict, device: str) -> dict:
        """The bare GEMMs of the student; the teacher's one at the rate of the student's."""
        return gemms.ceilings(data["hidden"], data["weight"])

    def flops(self, arm: str) -> int:
        own, ref = self.widths
        width = own if arm.startswith("gemm ") else 3 * own + ref
        if arm.startswith(("rlfast recompute", "trl")):
            width += own + ref
        return 2 * self.rows * self.vocab * width

    def floors(self, arm: str) -> dict[str, dict[str, float]]:
        own, ref = self.widths
        once = {"gemm forward": 1 + ref / own, "gemm dHidden": 1, "gemm dWeight": 1}
        keep = ("gemms keep", once)
        recompute = ("gemms recompute", once | {"gemm forward": 2 + 2 * ref / own})
        return dict((recompute, keep) if arm.startswith(("rlfast recompute", "trl")) else (keep, recompute))

    def sizes(self) -> dict[str, int]:
        return {"logits": 8 * self.rows * self.vocab}

    def allowed_bytes(self) -> int:
        """Where the weight is not float32, its gradient's float32 accumulator."""
        return 4 * self.vocab * self.widths[0] if self.dtype != "float32" else 0


PLAIN = Target("rlfast", "plain", 1.2)
EAGER, COMPILED = Target("rlfast", "eager", 5.0), Target("rlfast", "compile", 1.2)


def _pair(kind: str, dtype: str, *targets: Target) -> Pair:
    name = f"divergence {kind} forward+backward 512×49152 {dtype}"
    on_gpu = (Target("rlfast", "copy", 0.85),)
    return Pair(
        name=name, rows=512, vocab=49152, kind=kind, dtype=dtype, targets=targets, gpu_targets=on_gpu, isas=False
    )


def _heads(kind: str, dtype: str, *targets: Target) -> Heads:
    name = f"linear_divergence {kind} forward+backward 256×(576, 896)×49152 {dtype}"
    return Heads(
        name=name, rows=256, vocab=49152, widths=(576, 896), kind=kind, dtype=dtype, targets=targets, isas=False,
        gpu_targets=(Target("rlfast keep", "trl", 1.0),), budget_s=60.0,
    )  # fmt: skip


TRL = Target("rlfast keep", "trl", 2.0)
CASES = (
    _pair("forward_kl", "float32", EAGER, COMPILED, PLAIN),
    _pair("forward_kl", "bfloat16", EAGER, COMPILED, PLAIN),
    _pair("jsd", "float32", EAGER, COMPILED),
    _heads("forward_kl", "float32", TRL, Target("rlfast keep", "plain", 1.2)),
    _heads("forward_kl", "bfloat16", TRL),
    _heads("jsd", "float32", TRL),
)
