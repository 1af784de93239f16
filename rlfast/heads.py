"""A head under a loss: the arguments that say what it is, and how many of its rows fit a budget."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch

from rlfast import backends, logps, validate
from rlfast.distributed.gather import Gathered, Partitioned
from rlfast.ops.linear_loss import Numbers, Rows, numbers_of
from rlfast.ops.linear_token_logps import NAME as HEAD

# Bytes of logits at once where nothing is said: that many, or, up to the second number, those of the rows that a loss
# has to see together. The second is what ``linear_token_logps`` keeps for its backward.
MEMORY_BUDGET, LARGEST_BUDGET = 512 << 20, 2 << 30
# A chunk reads the weight again and adds to its gradient: with fewer rows that costs more than the GEMM that it saves
# (chunks of 256 rows are 1.1× slower than making the logits again, of 1280 rows 1.1× faster; 576×49152, two cores).
FEWEST_ROWS = 512


class Head(NamedTuple):
    """The head's arguments as they came."""

    weight: object
    bias: object
    temperature: object
    softcap: object
    logit_scale: object
    memory_budget: object
    accumulate_grad: object = False  # whether the weight's gradient is added to its own
    process_group: object = None  # of the ranks that its rows are shared out over

    def options(self) -> tuple[float, float]:
        """(soft-cap, 0.0 for none; logit scale), checked."""
        softcap = 0.0 if self.softcap is None else validate.positive("softcap", self.softcap)
        return softcap, validate.finite("logit_scale", self.logit_scale)

    def asked(self, loss: str) -> dict:
        """What ranks that share it have to ask for alike, of a loss of that name."""
        budget = self.budget()
        budget = -1 if budget is None else int(min(budget, 1 << 62))
        return {"loss": zlib.crc32(loss.encode()), "memory_budget": budget}

    def budget(self) -> float | None:
        """The memory budget, checked; None where nothing is said."""
        return None if self.memory_budget is None else validate.at_least("memory_budget", self.memory_budget, 0)

    def accumulated(self) -> torch.Tensor | None:
        """The weight, if its gradient is added straight to its own."""
        if not validate.flag("accumulate_grad", self.accumulate_grad) or not torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling():
            validate.fail("accumulate_grad", "False in compiled code, which changes no parameter", "True")
        validate.tensor("weight", self.weight)
        if isinstance(self.process_group, Gathered | Partitioned):
            wanted = f"False with {type(self.process_group).__name__}, whose gradient is not the parameter's yet"
            validate.fail("accumulate_grad", wanted, "True")
        if not (self.weight.is_leaf and self.weight.requires_grad):
            validate.fail("weight", "a leaf that needs a gradient, with accumulate_grad", validate.shape(self.weight))
        return self.weight


def logits_bytes(rows: Rows) -> int:
    """Bytes of one row of logits, float32 or float64, the reference's among them; the same on every rank of a group."""
    columns = rows.weight.shape[0] if rows.shards is None else rows.shards.widest
    return (1 if rows.reference is None else 2) * max(4, rows.hidden.element_size()) * columns


def room(rows: Rows, budget: float | None, together: int) -> float:
    """Bytes of logits at once: what was said; else enough for the rows that belong together and for as many as pay."""
    if budget is not None:
        return budget
    return max(MEMORY_BUDGET, min(LARGEST_BUDGET, max(together, FEWEST_ROWS) * logits_bytes(rows)))


def live_before(rows: Rows) -> list[int] | None:
    """How many of the rows before each one, and before the end, count, where only those are projected; else None."""
    if rows.compact or (validate.looked_at(rows.mask) and compacts(rows.hidden)):
        return [0, *rows.mask.cumsum(0).tolist()]
    return None


def compacts(hidden) -> bool:
    """Whether the head's kernels leave out masked rows by themselves."""
    return backends.select(HEAD, hidden.device.type, hidden.dtype, backends.requested()) == "cpu"


def most_rows(rows: Rows, budget: float) -> int:
    """The rows of a chunk; 0 where they would be too few to pay."""
    most = int(budget // logits_bytes(rows))
    return most if most >= FEWEST_ROWS else 0


def unit_strides(rows: Rows) -> Rows:
    """With the depth of hidden states and weights contiguous."""
    ref = rows.reference
    if ref is not None:
        ref = ref._replace(hidden=logps.unit_stride(ref.hidden), weight=logps.unit_stride(ref.weight))
    return rows._replace(hidden=logps.unit_stride(rows.hidden), weight=logps.unit_stride(rows.weight), reference=ref)


def numbers(rows: Rows, needs_grad: bool, budget: float, outputs: int = 0) -> Numbers:
    """Those of all rows, with gradient; their backward keeps the logits if the budget allows."""
    keep = needs_grad and logits_bytes(rows) * rows.hidden.shape[0] <= budget
    return numbers_of(rows.widened(), outputs, keep, backends.requested())[0]
