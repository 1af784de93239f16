"""The advantage ops: GAE with holes, ends and bootstrap values, V-trace, the bare scan; groups of any size."""

from __future__ import annotations

import torch

from rlfast import advantages
from rlfast.reference import affine_scan as reference
from rlfast.reference.group_advantage import group_advantage as group_reference
from rlfast.verify.subject import Problem, Subject

BOTH = ("advantages", "returns")
# Rows and tokens; samples.
SIZES = {True: (3, 70), False: (17, 700)}
SAMPLES = {True: 48, False: 4096}
RATES = {"gamma": 0.99, "lam": 0.95}


def _rows(names, dtype: torch.dtype, device: str, small: bool, outputs=()) -> Problem:
    """Normal numbers a token, three of ten tokens masked, and an upstream gradient for each of the outputs."""
    shape, draw = SIZES[small], torch.Generator().manual_seed(0)
    leaves = {name: torch.randn(shape, generator=draw).to(device, dtype) for name in names}
    mask = (torch.rand(shape, generator=draw) > 0.3).to(device)
    upstream = {name: torch.randn(shape, generator=draw).to(device) for name in outputs}
    return Problem(leaves, {"mask": mask}, upstream)


def _gae(dtype, device, small) -> Problem:
    problem = _rows(("rewards", "values"), dtype, device, small, BOTH)
    draw, shape = torch.Generator().manual_seed(1), SIZES[small]
    ends = {"done": torch.rand(shape, generator=draw) < 0.05, "truncated": torch.rand(shape, generator=draw) < 0.05}
    ends["bootstrap"] = torch.randn(shape, generator=draw)
    return problem._replace(rest=problem.rest | RATES | {name: x.to(device) for name, x in ends.items()})


def _vtrace(dtype, device, small) -> Problem:
    problem = _rows(("rewards", "values", "log_ratio"), dtype, device, small)
    return problem._replace(rest=problem.rest | RATES)


def _scan(dtype, device, small) -> Problem:
    problem = _rows(("a", "b"), dtype, device, small, ("state",))
    return problem._replace(leaves=problem.leaves | {"a": problem.leaves["a"].sigmoid()})


def _group(dtype, device, small) -> Problem:
    n, draw = SAMPLES[small], torch.Generator().manual_seed(0)
    rewards = torch.randn(n, generator=draw)
    ids = torch.randint(n // 7, (n,), generator=draw)
    rest = {"group_ids": ids.to(device), "mask": (torch.rand(n, generator=draw) > 0.1).to(device)}
    return Problem({"rewards": rewards.to(device, dtype)}, rest, {})


def _gae_reference(leaves, rest, dtype) -> dict:
    x = {name: torch.where(rest["mask"], y.to(dtype), 0.0) for name, y in leaves.items()}
    more = {k: v for k, v in rest.items() if k != "bootstrap"} | {"next_values": rest["bootstrap"].to(dtype)}
    return dict(zip(BOTH, reference.gae(**x, **more), strict=True))


def _vtrace_reference(leaves, rest, dtype) -> dict:
    return dict(zip(BOTH, reference.vtrace(**{name: x.to(dtype) for name, x in leaves.items()}, **rest), strict=True))


def _scan_reference(leaves, rest, dtype) -> dict:
    return {"state": reference.affine_scan(leaves["a"].to(dtype), leaves["b"].to(dtype), rest["mask"])}


def _group_reference(leaves, rest, dtype) -> dict:
    rewards = leaves["rewards"].to(dtype)
    found, _ = group_reference(rewards, ids=rest["group_ids"], mask=rest["mask"], scale="std", eps=1e-4)
    return {"advantages": found}


SUBJECTS = {
    "affine_scan": (
        Subject(_gae, lambda x, rest: dict(zip(BOTH, advantages.gae(**x, **rest), strict=True)), _gae_reference, BOTH,
                name="gae"),
        Subject(_vtrace, lambda x, rest: dict(zip(BOTH, advantages.vtrace(**x, **rest), strict=True)),
                _vtrace_reference, BOTH, name="vtrace"),
        Subject(_scan, lambda x, rest: {"state": advantages.affine_scan(**x, **rest)}, _scan_reference, ("state",),
                name="scan"),
    ),
    "group_advantage": (
        Subject(_group, lambda x, rest: {"advantages": advantages.group_advantage(**x, **rest)}, _group_reference,
                ("advantages",)),
    ),
}  # fmt: skip
