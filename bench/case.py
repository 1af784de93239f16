"""What a benchmark is made of, whatever op it is of: a case and its targets.

A family of ops is one module of ``bench/families/``. It subclasses ``Case`` with the shape as fields and a method for
each thing that only the family knows; the loop, the tables and the command line ask nothing else.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """What an arm of ours must reach.

    speed   time(over) ÷ time(arm) ≥ bound
    cost    time(arm) ÷ time(over) ≤ bound
    memory  extra bytes ÷ the size of ``over`` ≤ bound
    us      the least time(arm) of the rounds ≤ bound µs
    """

    arm: str
    over: str  # another arm, a floor or a size of the case, or "plain": the fastest plain torch; "" for µs
    bound: float
    kind: str = "speed"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One benchmark. A result file holds its fields; one that is added later needs a default."""

    name: str
    op: str
    dtype: str = "float32"
    targets: tuple[Target, ...] = ()
    gpu_targets: tuple[Target, ...] = ()  # in place of ``targets`` on a GPU
    budget_s: float = 40.0  # time for the interleaved loop; every arm gets two samples at least
    isas: bool = True  # also with the instruction set forced to avx2 and to baseline
    gpu_only: bool = False

    OURS: ClassVar = ("rlfast",)  # arms that have a row in the README and run at every instruction set
    BANDWIDTHS: ClassVar = ("read", "copy")  # ceilings that move bytes; the first that was timed is the ceiling
    NAMES: ClassVar = {}  # how the tables call an arm, a ceiling, a sum of ceilings or a size
    # A gate against wrong answers, not the numerics contract (that is for the tests): |got − truth| ÷ max|truth|. An
    # arm that rounds its logits to bfloat16 is off by some 1e-2 and is still timed; its error stands beside its time.
    GATES: ClassVar = {"float32": 1e-3, "bfloat16": 0.1}

    def small(self) -> Case:
        """The same case at a size that takes milliseconds: for the tests and for pytest-benchmark."""
        raise NotImplementedError

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Seeded tensors."""
        raise NotImplementedError

    # An arm is a function of no arguments that returns {output: tensor}: all that it computed, so that it can be
    # checked before it is timed. ``bench.arms.arm`` makes one.

    def ours(self, data: dict) -> dict:
        """{name: arm} of rlfast on the best that is here; the names start with "rlfast"."""
        raise NotImplementedError

    def plain(self, data: dict) -> dict:
        """{name: arm} of plain torch: "eager", "compile", and the strongest we could write, "plain ..."."""
        raise NotImplementedError

    def peers(self, data: dict, device: str) -> dict:
        """{name: arm} of other libraries, where they are installed and where they run."""
        return {}

    def truth(self, data: dict) -> dict:
        """{output: (indices along its first dimension, float64 values there)}; indices None: all of it."""
        raise NotImplementedError

    def ceilings(self, data: dict, device: str) -> dict:
        """{name: function}: the least that the hardware can do for this case, timed in the same loop."""
        return {}

    def traffic(self, arm: str) -> int:
        """Bytes that an arm or a ceiling must move; 0 where arithmetic is what counts."""
        return 0

    def flops(self, arm: str) -> int:
        """Floating-point operations of an arm or a ceiling; 0 where bytes are what counts."""
        return 0

    def floors(self, arm: str) -> dict[str, dict[str, float]]:
        """{name: {ceiling: how often}}: sums of ceilings that ``arm`` cannot be faster than.

        The first one that was timed is what "of the ceiling" means; a target may name any.
        """
        return {name: {name: self.traffic(arm) / self.traffic(name)} for name in self.BANDWIDTHS if self.traffic(name)}

    def sizes(self) -> dict[str, int]:
        """{name: bytes}: what extra memory is measured against."""
        return {}

    def allowed_bytes(self) -> int:
        """Extra memory that does not count."""
        return 0

    @property
    def gate(self) -> float:
        """The largest error that is still timed."""
        return self.GATES[self.dtype]

    @classmethod
    def read(cls, fields: dict) -> Case:
        """The case of a result file; what this class no longer has is left out."""
        known = {f.name for f in dataclasses.fields(cls)}
        targets = {k: tuple(Target(**t) for t in fields.get(k, ())) for k in ("targets", "gpu_targets")}
        return cls(**{k: v for k, v in fields.items() if k in known} | targets)
