"""What the tests feed ``ranked_loss``, and how a result is held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

import rlfast
from rlfast.ops.oracle_ranked import words
from rlfast.ops.ranked_records import METRICS, Settings
from rlfast.reference.ranked_loss import ranked_loss as reference
from tests.cases import DTYPES, f32, few
from tests.numerics import assert_gradient, assert_value, assert_zero, by_name

FORMS = ("padded", "packed")
FIELDS = ("scores", "ref_scores", "rewards", "lengths", "mask")


@dataclass(frozen=True)
class RankedCase:
    """One call. ``groups`` are [P, K] each; a run may pack them."""

    objective: rlfast.RankedLoss
    groups: dict
    rest: dict = field(default_factory=dict)  # weights, num_items, world_size, accumulation
    form: str = "padded"
    upstream: float = 1.0


def drawn(rows: int, size: int, dtype: str = "f32", seed: int = 0) -> dict:
    """Groups of log-probs, with equal rewards among them, one of them empty and one of a single candidate."""
    rng = torch.Generator().manual_seed(seed)
    kinds = iter(("f32", "bf16", "f16") if dtype == "mixed" else (dtype,) * 3)
    scores = -6 - 2 * torch.rand(rows, size, generator=rng) - torch.randn(rows, size, generator=rng).abs()
    mask = torch.rand(rows, size, generator=rng) < 0.8
    mask[:1], mask[1:2] = False, torch.arange(size) == size - 1
    return {
        "scores": scores.to(DTYPES[next(kinds)]),
        "ref_scores": (scores + torch.randn(rows, size, generator=rng)).to(DTYPES[next(kinds)]),
        "rewards": (torch.randn(rows, size, generator=rng) * 2).round().div(2).to(DTYPES[next(kinds)]),
        "lengths": torch.randint(1, 20, (rows, size), generator=rng),
        "mask": mask,
    }


def weights_of(rows: int, dtype: str = "f32") -> torch.Tensor:
    """Positive but for one."""
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(1)) + 0.5
    weights[2:3] = 0.0
    return weights.to(DTYPES["f32" if dtype == "mixed" else dtype])


def ranked_case(objective, form: str = "padded", dtype: str = "f32", size: int = 6, **rest) -> RankedCase:
    """A case of a row's name, or of a loss, with every field that it reads."""
    if isinstance(objective, str):
        row = rlfast.RANKED[objective]
        objective = row.with_options(beta=f32(row.beta * 1.3), tau=f32(0.7), nll=f32(row.nll * 1.1))
    rows = few(37, 7)
    groups = drawn(rows, size, dtype)
    if not objective.referenced:
        del groups["ref_scores"]
    return RankedCase(objective, groups, {"weights": weights_of(rows, dtype)} | rest, form)


def real_of(case: RankedCase) -> torch.Tensor:
    """The candidates that are packed: those that count, and some that are masked."""
    mask = case.groups.get("mask")
    mask = torch.ones_like(case.groups["scores"], dtype=torch.bool) if mask is None else mask
    return mask | (torch.arange(mask.shape[1]) % 3 == 0)


def arguments(case: RankedCase) -> dict:
    """The groups as the call has them."""
    if case.form == "padded":
        return case.groups
    real = real_of(case)
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), real.sum(1).cumsum(0)))
    return {k: x[real] for k, x in case.groups.items()} | {"cu_seqlens": ends}


def run(case: RankedCase, backend: str, device: str = "cpu") -> tuple[rlfast.RankedOutput, torch.Tensor]:
    """(output, gradient by the scores as the call had them)."""
    given = {k: x.to(device) for k, x in arguments(case).items()}
    rest = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.rest.items()}
    leaf = given.pop("scores").detach().requires_grad_()
    with rlfast.use_backend(backend):
        out = case.objective(leaf, per_group=True, **given, **rest)
    return out, torch.autograd.grad(out.loss * case.upstream, leaf)[0]


def settings_of(objective: rlfast.RankedLoss, factor: float = 1.0) -> Settings:
    """The op's numbers."""
    o = objective
    return Settings(o.beta, o.tau, float("inf") if o.top is None else o.top, o.nll, o.nll_by_size, factor)


def oracle(case: RankedCase, dtype: torch.dtype, order=None) -> tuple[dict, torch.Tensor]:
    """(loss and metrics, gradient) by the reference; ``order`` shuffles the groups."""
    rows = case.groups["scores"].shape[0]
    order = torch.arange(rows) if order is None else order
    g = {k: x[order] if k == "mask" else x[order].to(dtype) for k, x in case.groups.items()}
    leaf = g["scores"].detach().requires_grad_()
    rest = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in case.rest.items()}
    n = rest.get("num_items", 1.0 if case.objective.reduce == "sum" else None)
    settings = settings_of(case.objective, rest.get("world_size", 1) / rest.get("accumulation", 1))
    divisor = g["lengths"] ** case.objective.alpha if case.objective.alpha and "lengths" in g else None
    rewards = -g["ranks"] if "ranks" in g else g.get("rewards")
    weights = rest["weights"][order] if "weights" in rest else None
    loss, metrics = reference(
        leaf, g.get("ref_scores"), rewards, divisor, g.get("mask"), weights, n=n,
        **words(case.objective.form, settings),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss * case.upstream, leaf) if loss.requires_grad else (torch.zeros_like(leaf),)
    back = order.argsort()
    metrics["losses"] = metrics["losses"][back]
    metrics["sizes"]["losses"] = metrics["sizes"]["losses"][back]
    gradient = gradient[back]
    return metrics, gradient if case.form == "padded" else gradient[real_of(case)]


def yardsticks(case: RankedCase) -> tuple[dict, dict]:
    """(values, the gradient) by PyTorch in float32, in several orders of the groups."""
    rows = case.groups["scores"].shape[0]

    def make(seed: int):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)) if seed else None
        values, gradient = oracle(case, torch.float32, order)
        return values, {"gradient": gradient}

    return by_name(make)


def check(case: RankedCase, backend: str, device: str = "cpu") -> None:
    """Loss, metrics and gradient of one call against the oracle."""
    out, gradient = run(case, backend, device)
    (truth, truth_gradient), (own, own_gradient) = oracle(case, torch.float64), yardsticks(case)
    assert out.loss.dim() == 0 and out.loss.dtype == out.metrics.values.dtype
    sizes = truth["sizes"]
    assert_value("loss", out.loss.detach().cpu(), truth["loss"], own["loss"], sizes["loss"])
    for name in METRICS:
        assert_value(name, out.metrics[name].cpu(), truth[name], own[name], sizes.get(name))
    assert_value("losses", out.losses.cpu(), truth["losses"], own["losses"], sizes["losses"])
    assert_gradient("gradient", gradient.cpu(), truth_gradient, own_gradient["gradient"])
    mask = arguments(case).get("mask")
    if mask is not None:
        assert_zero("gradient of masked candidates", gradient.cpu()[~mask])


def with_groups(case: RankedCase, **groups) -> RankedCase:
    """With some fields changed; None leaves one out."""
    found = {k: x for k, x in (case.groups | groups).items() if x is not None}
    return replace(case, groups=found)
