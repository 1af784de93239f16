"""A head under a loss: the arguments that say what it is, and how many of its rows fit a budget."""

from __future__ import annotations

from typing import NamedTuple

from rlfast import backends, logps, validate
from rlfast.ops import linear_token_logps as linear_op
from rlfast.ops.linear_loss import Rows
from rlfast.ops.records import ENTROPY, Outputs, Wanted

MEMORY_BUDGET = 256 << 20  # bytes of logits at once
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

    def options(self) -> tuple[float, float]:
        """(soft-cap, 0.0 for none; logit scale), checked."""
        softcap = 0.0 if self.softcap is None else validate.positive("softcap", self.softcap)
        return softcap, validate.finite("logit_scale", self.logit_scale)

    def budget(self) -> float:
        """The memory budget, checked."""
        return validate.at_least("memory_budget", self.memory_budget, 0)


def logits_bytes(rows: Rows) -> int:
    """Bytes of one row of logits, float32 or float64."""
    return max(4, rows.hidden.element_size()) * rows.weight.shape[0]


def most_rows(rows: Rows, budget: float) -> int:
    """The rows of a chunk; 0 where they would be too few to pay."""
    most = int(budget // logits_bytes(rows))
    return most if most >= FEWEST_ROWS else 0


def unit_strides(rows: Rows) -> Rows:
    """With the depth of hidden states and weight contiguous."""
    return rows._replace(hidden=logps.unit_stride(rows.hidden), weight=logps.unit_stride(rows.weight))


def log_probs(rows: Rows, needs_grad: bool, budget: float, entropy: bool = False) -> tuple:
    """(log-probs, entropies or None) of all rows; their backward keeps the logits if the budget allows."""
    keep = needs_grad and logits_bytes(rows) * rows.hidden.shape[0] <= budget
    wanted = Wanted(ENTROPY if entropy else 0, 0)
    asked = linear_op.op(*rows[:6], *rows.options, *wanted, keep, backends.requested())
    out = Outputs.named(asked[:-1], wanted)
    return out.logp, out.entropy
