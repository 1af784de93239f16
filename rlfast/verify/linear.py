"""The linear layer, in its own dtype and wide."""

from __future__ import annotations

from functools import partial

import torch

from rlfast.linear import linear
from rlfast.reference.linear import linear as reference
from rlfast.verify.subject import Problem, Subject

# Rows, depth, columns.
SIZES = {True: (16, 24, 40), False: (130, 576, 1537)}


def _problem(wide: bool, dtype: torch.dtype, device: str, small: bool) -> Problem:
    """The upstream gradient is one that y's dtype holds: what it would lose by rounding is no error of the backward."""
    (rows, depth, columns), draw = SIZES[small], torch.Generator().manual_seed(0)
    leaves = {
        "x": torch.randn(rows, depth, generator=draw),
        "weight": torch.randn(columns, depth, generator=draw) * depth**-0.5,
        "bias": torch.randn(columns, generator=draw),
    }
    g = torch.randn(rows, columns, generator=draw).to(device)
    upstream = {"y": g if wide else g.to(dtype).float()}
    return Problem({name: x.to(device, dtype) for name, x in leaves.items()}, {"wide": wide}, upstream)


def reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The same by another order of every sum: rows, columns and depth shuffled, which shuffles the gradients."""
    draw = torch.Generator().manual_seed(seed)
    x, weight, bias = (problem.leaves.get(name) for name in ("x", "weight", "bias"))
    sizes = {"rows": x.shape[0], "depth": x.shape[1], "columns": weight.shape[0]}
    at = {name: torch.randperm(n, generator=draw).to(x.device) for name, n in sizes.items()}
    home = {name: order.argsort() for name, order in at.items()}
    rows, depth, columns = at.values()
    moved = {"x": x[rows][:, depth], "weight": weight[columns][:, depth]}
    moved |= {} if bias is None else {"bias": bias[columns]}
    upstream = {name: g[rows][:, columns] for name, g in problem.upstream.items()}
    back = {
        "y": lambda y: y[home["rows"]][:, home["columns"]],
        "x": lambda g: g[home["rows"]][:, home["depth"]],
        "weight": lambda g: g[home["columns"]][:, home["depth"]],
        "bias": lambda g: g[home["columns"]],
    }
    return problem._replace(leaves=moved, upstream=upstream), back


def _public(leaves, rest) -> dict:
    return {"y": linear(**leaves, **rest)}


def _reference(leaves, rest, dtype) -> dict:
    return {"y": reference(**leaves, dtype=dtype)}


SUBJECTS = {
    "linear": tuple(
        Subject(partial(_problem, wide), _public, _reference, ("y",), reordered, name="wide" if wide else "")
        for wide in (False, True)
    )
}
