"""token_loss: policy losses of [rows, length] tokens, with the gradient."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms
from bench.baselines import token_loss as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import generator

COLD_BYTES = 256 << 20  # what is read in turn; no cache holds it


@dataclass(frozen=True, kw_only=True)
class TokenLoss(Case):
    """Reads log π, log π_old, the mask and perhaps log π_ref; writes the gradient. One advantage a sequence."""

    op: str = "token_loss"
    loss: str
    rows: int
    length: int
    backward: bool = True  # False: the forward call alone, which makes the gradient too
    cold: bool = True  # every call reads fields that were last read COLD_BYTES ago, as in a trainer

    NAMES: ClassVar = {"eager": "eager torch, as TRL writes it"}

    @property
    def _copies(self) -> int:
        return -(-COLD_BYTES // self.traffic("read")) if self.cold else 1

    @staticmethod
    def _in_turn(runs: list):
        """One arm of many."""
        turn = itertools.cycle(runs)
        return lambda: next(turn)()

    def small(self) -> TokenLoss:
        return replace(self, rows=min(self.rows, 8), length=min(self.length, 128), budget_s=0.2, cold=False)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Ratios within a few tenths of 1, a tenth of the tokens masked at the end of their rows."""
        draw, shape = generator(device), (self.rows, self.length)

        def normal(*size, scale=1.0):
            return torch.randn(size, generator=draw, device=device) * scale

        old = -normal(*shape).abs()
        kept = self.length - torch.randint(self.length // 5 + 1, (self.rows, 1), generator=draw, device=device)
        data = {
            "logp": old + normal(*shape, scale=0.15),
            "old_logp": old,
            "adv": normal(self.rows),
            "mask": torch.arange(self.length, device=device) < kept,
        }
        if self.loss == "grpo":
            data["ref_logp"] = old + normal(*shape, scale=0.2)
        dtype = DTYPES[self.dtype]
        return {name: x if name in ("adv", "mask") else x.to(dtype) for name, x in data.items()}

    def _arms(self, functions: dict, data: dict, mask=None) -> dict:
        upstream = torch.ones((), device=data["logp"].device) if self.backward else None
        runs = {name: [] for name in functions}
        for _ in range(self._copies):
            fields = {name: x.clone() for name, x in (data if mask is None else data | {"mask": mask}).items()}
            leaf = {"logp": fields.pop("logp").requires_grad_()}
            for name, f in functions.items():
                runs[name].append(arms.arm(f, leaf, tuple(fields.values()), ("loss",), upstream))
        return {name: self._in_turn(each) for name, each in runs.items()}

    def ours(self, data: dict) -> dict:
        objective = rlfast.loss(self.loss)
        names = list(data)[1:]

        def run(logp, *fields):
            if self.backward:
                return objective(logp, **dict(zip(names, fields, strict=True))).loss
            with torch.enable_grad():  # as in training: the call records autograd and makes the gradient
                return objective(logp.requires_grad_(), **dict(zip(names, fields, strict=True))).loss.detach()

        return self._arms({"rlfast": run}, data)

    def plain(self, data: dict) -> dict:
        """ "eager" and "compile" make what TRL logs too, as ours does; "plain ..." only the loss and its gradient."""
        function = baselines.LOSSES[self.loss]
        logged, alone = baselines.logged(function), baselines.alone(function)
        found = {"eager": logged, "compile": torch.compile(logged, dynamic=False), "plain eager": alone}
        if self.backward:
            found |= {"plain compile": torch.compile(alone, dynamic=False)}
            found |= {"plain chunked": baselines.chunked(function), "plain joint": baselines.joint(function)}
        return self._arms(found, data, data["mask"].to(data["logp"].dtype))  # as the trainers keep it

    def truth(self, data: dict) -> dict:
        fields = [x.double() for name, x in data.items() if name != "logp"]
        leaf = data["logp"].double().requires_grad_()
        with torch.enable_grad():
            loss = baselines.alone(baselines.LOSSES[self.loss])(leaf, *fields)
            (gradient,) = torch.autograd.grad(loss, leaf)
        return {"loss": (None, loss.detach()), "grad_logp": (None, gradient)}

    def ceilings(self, data: dict, device: str) -> dict:
        parts = torch.ones(self._copies, self.traffic("read") // 4, device=device)
        each = [arms.bandwidth(part) for part in parts]
        return {name: self._in_turn([found[name] for found in each]) for name in each[0]}

    def traffic(self, arm: str) -> int:
        """Fields read, mask read, gradient written; a copy moves each of those bytes twice."""
        fields = 4 if self.loss == "grpo" else 3
        once = self.rows * self.length * (fields * DTYPES[self.dtype].itemsize + 1)
        return 2 * once if arm == "copy" else once


ISA = (Target("rlfast avx2", "eager", 3.0), Target("rlfast avx2", "compile", 1.0))
MILLION = (
    Target("rlfast", "eager", 8.0),
    Target("rlfast", "compile", 1.5),
    Target("rlfast", "read", 0.6),
    Target("rlfast", "plain", 1.2),
    *ISA,
)
ON_GPU = (Target("rlfast", "copy", 0.8), Target("rlfast", "compile", 1.0))


def _case(loss: str) -> TokenLoss:
    name = f"token_loss {loss} forward+backward, 1M tokens"
    return TokenLoss(name=name, loss=loss, rows=1024, length=1024, targets=MILLION, budget_s=15.0)


def _large(loss: str) -> TokenLoss:
    name = f"token_loss {loss} forward+backward, 4M tokens"
    return TokenLoss(name=name, loss=loss, rows=4096, length=1024, gpu_targets=ON_GPU, gpu_only=True)


def _call(loss: str) -> TokenLoss:
    name = f"token_loss {loss} call, 4K tokens"
    target = Target("rlfast", "", 80.0, "us")
    return TokenLoss(
        name=name,
        loss=loss,
        rows=8,
        length=512,
        backward=False,
        cold=False,
        targets=(target,),
        budget_s=4.0,
        isas=False,
    )


CASES = (
    *(_case(loss) for loss in baselines.LOSSES),
    *(_call(loss) for loss in baselines.LOSSES),
    *(_large(loss) for loss in baselines.LOSSES),
)
