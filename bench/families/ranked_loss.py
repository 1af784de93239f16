"""ranked_loss: losses of groups of candidates, with the gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms
from bench.baselines import ranked_loss as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import even, generator, normal
from rlfast.reference.ranked_loss import ranked_loss as reference


@dataclass(frozen=True, kw_only=True)
class Ranked(Case):
    """Reads the scores, the rewards and perhaps log π_ref of [groups, size]; writes the gradient."""

    op: str = "ranked_loss"
    loss: str
    groups: int
    size: int

    NAMES: ClassVar = {"eager": "eager torch, sorted", "plain pairs": "torch on [P, K, K], nothing sorted"}

    def small(self) -> Ranked:
        return replace(self, groups=min(self.groups, 64), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """No two rewards of a group are equal: ties are another loss for those that sort."""
        draw, shape = generator(device), (self.groups, self.size)
        data = {"scores": normal(draw, *shape, dtype=DTYPES[self.dtype], scale=2.0)}
        data["rewards"] = torch.rand(shape, generator=draw, device=device).argsort(1).float()
        if self.loss == "exo":
            data["ref_scores"] = normal(draw, *shape, dtype=DTYPES[self.dtype], scale=2.0)
        return data

    def _arms(self, functions: dict, data: dict) -> dict:
        rest = tuple(x for name, x in data.items() if name != "scores")
        upstream = torch.ones((), device=data["scores"].device)
        leaf = {"scores": data["scores"]}
        return {name: arms.arm(f, leaf, rest, ("loss",), upstream) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        objective, names = rlfast.ranked_loss(self.loss), list(data)[1:]

        def run(scores, *fields):
            return objective(scores, **dict(zip(names, fields, strict=True))).loss

        return self._arms({"rlfast": run}, data)

    def plain(self, data: dict) -> dict:
        """The loss and its gradient alone; ours makes the metrics too."""
        function, unsorted = baselines.LOSSES[self.loss], baselines.UNSORTED.get(self.loss)
        found = {"eager": function, "compile": torch.compile(function, dynamic=False)}
        if unsorted:
            found |= {"plain pairs": unsorted, "plain pairs compile": torch.compile(unsorted, dynamic=False)}
        return self._arms(found, data)

    def truth(self, data: dict) -> dict:
        """The gradient of some groups by the oracle, the loss by the baseline in float64."""
        rows, row = even(self.groups).to(data["scores"].device), rlfast.RANKED[self.loss]
        whole = baselines.LOSSES[self.loss](*(x.double() for x in data.values()))
        some = {name: x[rows].double() for name, x in data.items()}
        with torch.enable_grad():
            leaf = some.pop("scores").requires_grad_()
            loss, _ = reference(leaf, **some, form=row.form, beta=row.beta, n=self.groups)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return {"loss": (None, whole), "grad_scores": (rows, gradient)}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(torch.ones(self.traffic("read") // 4, device=device))

    def traffic(self, arm: str) -> int:
        """Fields read, gradient written; a copy moves each of those bytes twice."""
        fields = 3 if self.loss == "exo" else 2
        once = self.groups * self.size * (fields * DTYPES[self.dtype].itemsize + 4)
        return 2 * once if arm == "copy" else once


TARGETS = (Target("rlfast", "eager", 3.0), Target("rlfast", "plain", 1.2))
ON_GPU = (Target("rlfast", "compile", 1.0),)


def _case(loss: str, groups: int, size: int, **rest) -> Ranked:
    name = f"ranked_loss {loss} forward+backward, {groups} groups of {size}"
    return Ranked(
        name=name, loss=loss, groups=groups, size=size, targets=TARGETS, gpu_targets=ON_GPU, budget_s=8.0, **rest
    )


CASES = (
    *(_case(loss, 16384, 8) for loss in baselines.LOSSES),
    _case("plackett_luce", 1024, 64, isas=False),
)
