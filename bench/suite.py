"""The cases: one row each of what must be reached, with its inputs, its traffic or arithmetic, and its targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """A ratio that an arm of ours must reach."""

    arm: str
    over: str  # another arm, or "plain": the fastest of the plain-torch baselines
    bound: float
    # speed: time(over) ÷ time(arm) ≥ bound; cost: time(arm) ÷ time(over) ≤ bound; memory: extra ÷ logits ≤ bound
    kind: str = "speed"

    @property
    def text(self) -> str:
        """How the README names it."""
        name = OVER.get(self.over, self.over)
        if self.kind == "memory":
            return f"{self.arm}: extra memory ≤ {self.bound:g}× {name}"
        if self.over in ("read", "copy"):
            return f"{self.arm}: ≥ {self.bound:.0%} of the {self.over} bandwidth"
        return f"{self.arm}: {'≥' if self.kind == 'speed' else '≤'} {self.bound:g}× {name}"


OVER = {
    "eager": "eager torch",
    "compile": "torch.compile",
    "trl": "TRL",
    "liger": "Liger",
    "gemms keep": "its three bare GEMMs",
    "gemms recompute": "its four bare GEMMs",
    "logits": "the logits in float32",
    "rlfast logp": "logp alone",
}


@dataclass(frozen=True)
class Case:
    """One benchmark: shapes, what is computed, and what must be reached."""

    name: str
    op: str
    rows: int
    vocab: int
    width: int  # 0: from logits
    dtype: str
    entropy: bool = False  # with entropy and log Σp²
    backward: bool = False
    targets: tuple[Target, ...] = ()
    budget_s: float = 40.0  # time for the interleaved loop on the machine below; every arm gets a sample at least
    gpu_targets: tuple[Target, ...] = ()  # in place of ``targets`` on a GPU
    isas: bool = True  # also with the instruction set forced to avx2 and to baseline

    @property
    def logits_bytes(self) -> int:
        """The logits in float32: what the extra memory of a linear op is measured against."""
        return 4 * self.rows * self.vocab

    @property
    def traffic(self) -> int:
        """Bytes that must move from logits: one read; with a backward a second read and a write."""
        itemsize = DTYPES[self.dtype].itemsize
        return 0 if self.width else self.rows * self.vocab * itemsize * (3 if self.backward else 1)

    @property
    def gemm_flops(self) -> int:
        """Floating-point operations of one GEMM of a linear op."""
        return 2 * self.rows * self.width * self.vocab


LOGITS_ON_GPU = (Target("rlfast", "copy", 0.85), Target("rlfast", "trl", 1.0), Target("rlfast", "liger", 1.0))
HEAD_ON_GPU = (
    Target("rlfast keep", "gemms keep", 1.1, "cost"),
    Target("rlfast recompute", "gemms recompute", 1.1, "cost"),
    Target("rlfast keep", "trl", 1.0),
)


def inputs(case: Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Seeded leaves, targets and the upstream gradient of ``logp``. Logits of a few nats, as a trained head gives."""
    draw = torch.Generator(device=device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape, scale=1.0):
        x = torch.empty(shape, dtype=dtype, device=device)
        for part in x.split(256):  # in pieces: no float32 copy of the whole beside it
            part.copy_(torch.randn(part.shape, generator=draw, device=device) * scale)
        return x

    data = {"targets": torch.randint(case.vocab, (case.rows,), generator=draw, device=device)}
    if case.width:
        data["hidden"] = normal(case.rows, case.width)
        data["weight"] = normal(case.vocab, case.width, scale=2.0 / case.width**0.5)
    else:
        data["logits"] = normal(case.rows, case.vocab, scale=2.0)
    data["g_logp"] = torch.randn(case.rows, generator=draw, device=device)
    return data


def _forward(dtype: str, reach: float) -> Case:
    isa = (Target("rlfast avx2", "eager", 3.0), Target("rlfast avx2", "compile", 1.0))
    ours = (
        Target("rlfast", "eager", 6.0),
        Target("rlfast", "compile", 1.3),
        Target("rlfast", "read", reach),
        Target("rlfast", "plain", 1.2),
    )
    name = f"token_logps forward {dtype}"
    return Case(name, "token_logps", 1024, 49152, 0, dtype, targets=ours + isa, gpu_targets=LOGITS_ON_GPU)


def _statistics(dtype: str) -> Case:
    ours = (Target("rlfast", "rlfast logp", 1.3, "cost"), Target("rlfast", "plain", 1.2))
    isa = (Target("rlfast avx2", "eager", 3.0), Target("rlfast avx2", "compile", 1.0))
    name = f"token_logps forward with entropy and log Σp² {dtype}"
    return Case(name, "token_logps", 1024, 49152, 0, dtype, entropy=True, targets=ours + isa)


def _backward(dtype: str) -> Case:
    ours = (Target("rlfast", "eager", 4.0), Target("rlfast", "plain", 1.2))
    isa = (Target("rlfast avx2", "eager", 3.0), Target("rlfast avx2", "compile", 1.0))
    return Case(
        f"token_logps forward+backward {dtype}", "token_logps", 1024, 49152, 0, dtype, backward=True, targets=ours + isa
    )


def _linear(rows: int, width: int, vocab: int, dtype: str, budget_s: float, isas: bool) -> Case:
    low = dtype == "bfloat16"
    gemms = 1.5 if low else 1.25
    keep = (
        Target("rlfast keep", "trl", 4.0 if low else 2.5),
        Target("rlfast keep", "gemms keep", gemms, "cost"),
        Target("rlfast keep", "logits", 1.1, "memory"),
        Target("rlfast keep", "plain", 1.2),
    )
    recompute = (
        Target("rlfast recompute", "trl", 3.0 if low else 2.0),
        Target("rlfast recompute", "gemms recompute", gemms, "cost"),
        Target("rlfast recompute", "logits", 0.1, "memory"),
    )
    isa = (Target("rlfast keep avx2", "eager", 3.0), Target("rlfast keep avx2", "compile", 1.0))
    name = f"linear_token_logps forward+backward {rows}×{width}×{vocab} {dtype}"
    return Case(
        name, "linear_token_logps", rows, vocab, width, dtype, backward=True, targets=keep + recompute + isa,
        budget_s=budget_s, gpu_targets=HEAD_ON_GPU, isas=isas,
    )  # fmt: skip


CASES = (
    _forward("float32", 0.6),
    _forward("bfloat16", 0.5),
    _statistics("float32"),
    _statistics("bfloat16"),
    _backward("float32"),
    _backward("bfloat16"),
    _linear(512, 576, 49152, "float32", 75.0, isas=True),
    _linear(512, 576, 49152, "bfloat16", 75.0, isas=True),
    # every forced instruction set would add minutes here: `--every-isa` does it
    _linear(2048, 896, 151936, "float32", 100.0, isas=False),
    _linear(2048, 896, 151936, "bfloat16", 100.0, isas=False),
)


def small(case: Case) -> Case:
    """The same case at a size that takes milliseconds: for the tests and for pytest-benchmark."""
    return replace(case, rows=min(case.rows, 64), vocab=4099, width=min(case.width, 96), budget_s=0.2)


def selected(ops=None, names=None) -> list[Case]:
    """Cases of these ops whose names contain one of these words; all of them by default."""
    known = {case.op for case in CASES}
    for op in ops or ():
        if op not in known:
            raise ValueError(f"op: expected one of {sorted(known)}, got {op!r}")
    return [c for c in CASES if (not ops or c.op in ops) and (not names or any(n in c.name for n in names))]
