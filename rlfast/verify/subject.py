"""What ``verify`` asks of an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """The inputs of one call."""

    leaves: dict[str, torch.Tensor]  # in the dtype under test; the truth and the yardsticks start from them as rounded
    rest: dict  # every other argument
    upstream: dict[str, torch.Tensor]  # output → its upstream gradient; empty: an op without a backward


class Subject(NamedTuple):
    """One way to call an op: its inputs, the public function, and the reference that says what it must compute."""

    inputs: Callable[[torch.dtype, str, bool], Problem]  # (dtype, device, small: few enough for the interpreter)
    public: Callable[[dict, dict], dict]  # (leaves, rest) → {output: tensor}
    # (leaves, rest, dtype of the arithmetic) → {output: tensor}; "sizes" may have Σ|terms| of outputs that are one sum
    reference: Callable[[dict, dict, torch.dtype], dict]
    outputs: tuple[str, ...]  # what is compared, beside the gradients of the leaves
    # (problem, seed) → the same by another order of its sums, and for each leaf or output that this moved the function
    # that puts it back. None: there is one order.
    reordered: Callable[[Problem, int], tuple[Problem, dict]] | None = None
    name: str = ""  # which way, where an op has several
