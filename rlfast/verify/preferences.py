"""The preference losses: pairs whose sums are given and pairs of packed tokens, and single responses."""

from __future__ import annotations

import torch

from rlfast.kernels.formulas import PAIRS, SINGLES
from rlfast.ops.oracle_preference import words
from rlfast.ops.preference_records import METRICS, SINGLE_METRICS, terms_of
from rlfast.preference import PreferenceLoss
from rlfast.preference_table import PREFERENCES
from rlfast.reference.pair_loss import pair_loss
from rlfast.reference.unpaired_loss import unpaired_loss
from rlfast.unpaired import UNPAIRED, UnpairedLoss
from rlfast.verify.subject import Problem, Subject

SIZES = {True: (6, 40), False: (300, 200)}  # pairs and tokens, few where the interpreter runs
CALLS = {name: PREFERENCES[name] for name in ("dpo", "ipo", "exo_pair", "bco_pair", "simpo", "mpo")}
SINGLE_CALLS = {name: UNPAIRED[name] for name in ("kto", "npo_retain")}


def _sides(dtype: torch.dtype, device: str, small: bool) -> tuple[dict, dict]:
    pairs, _ = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    refs = [-150 * torch.rand(pairs, generator=draw) - 5 for _ in range(2)]
    ours = [x + 3 * torch.randn(pairs, generator=draw) for x in refs]
    lengths = [torch.randint(5, 200, (pairs,), generator=draw) for _ in range(2)]

    def there(tensors, to=dtype):
        return [x.to(device, to) for x in tensors]

    leaves = dict(zip(("chosen_logps", "rejected_logps"), there(ours), strict=True))
    rest = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), there(refs), strict=True))
    return leaves, rest | dict(zip(("chosen_lengths", "rejected_lengths"), there(lengths, torch.int64), strict=True))


def _problem(dtype: torch.dtype, device: str, small: bool) -> Problem:
    return Problem(*_sides(dtype, device, small), {"loss": torch.ones((), device=device)})


def _single_problem(dtype: torch.dtype, device: str, small: bool) -> Problem:
    leaves, rest = _sides(dtype, device, small)
    desirable = torch.arange(leaves["chosen_logps"].shape[0], device=device) % 3 != 0
    given = {"ref_logps": rest["ref_chosen_logps"], "lengths": rest["chosen_lengths"], "desirable": desirable}
    return Problem({"logps": leaves["chosen_logps"]}, given, {"loss": torch.ones((), device=device)})


def _named(loss, metrics, names) -> dict:
    return {name: metrics[name] for name in names} | {"loss": loss}


def _public(objective: PreferenceLoss):
    def call(leaves, rest):
        out = objective(**leaves, **rest)
        return _named(out.loss, out.metrics, METRICS)

    return call


def _reference(objective: PreferenceLoss):
    terms = words(terms_of(*objective.prepared.terms), PAIRS)

    def call(leaves, rest, dtype):
        sides = [
            (leaves[f"{side}_logps"], rest[f"ref_{side}_logps"].to(dtype), rest[f"{side}_lengths"].to(dtype))
            for side in ("chosen", "rejected")
        ]
        loss, metrics = pair_loss(*sides, **terms)
        return _named(loss, metrics, METRICS) | {"sizes": metrics["sizes"]}

    return call


def _shared(objective: UnpairedLoss, value) -> dict:
    """The number that KTO calls z, where a loss reads one."""
    return {"shared": value} if "shared" in objective.prepared.reads else {}


def _public_single(objective: UnpairedLoss):
    def call(leaves, rest):
        out = objective(**leaves, **rest, **_shared(objective, 0.5))
        return _named(out.loss, out.metrics, SINGLE_METRICS)

    return call


def _reference_single(objective: UnpairedLoss):
    terms = words(terms_of(*objective.prepared.terms), SINGLES)

    def call(leaves, rest, dtype):
        sums = leaves["logps"], rest["ref_logps"].to(dtype), rest["lengths"].to(dtype)
        half = torch.full((), 0.5, dtype=dtype, device=sums[0].device)
        loss, metrics = unpaired_loss(sums, rest["desirable"], **_shared(objective, half), **terms)
        return _named(loss, metrics, SINGLE_METRICS) | {"sizes": metrics["sizes"]}

    return call


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The responses in another order."""
    draw = torch.Generator().manual_seed(seed)
    first = next(iter(problem.leaves.values()))
    order = torch.randperm(first.shape[0], generator=draw).to(first.device)
    back = order.argsort()
    leaves = {name: x[order] for name, x in problem.leaves.items()}
    rest = {name: x[order] for name, x in problem.rest.items()}
    return problem._replace(leaves=leaves, rest=rest), dict.fromkeys(leaves, lambda x: x[back])


SUBJECTS = {
    "pair_loss": tuple(
        Subject(_problem, _public(objective), _reference(objective), METRICS, _reordered, name)
        for name, objective in CALLS.items()
    ),
    "unpaired_loss": tuple(
        Subject(_single_problem, _public_single(objective), _reference_single(objective), SINGLE_METRICS, _reordered, n)
        for n, objective in SINGLE_CALLS.items()
    ),
}
