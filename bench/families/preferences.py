"""pair_loss and unpaired_loss: preference losses of sums and of packed tokens, with the gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms
from bench.baselines import preferences as baselines
from bench.case import Case, Target
from bench.draws import generator

ROWS = {"dpo": "dpo", "ipo": "ipo", "simpo": "simpo"}
FIELDS = ("ref_chosen_logps", "ref_rejected_logps", "chosen_lengths", "rejected_lengths")


@dataclass(frozen=True, kw_only=True)
class Pairs(Case):
    """Reads the sums of both sides and of the reference; or their packed tokens and a mask. Writes the gradients."""

    op: str = "pair_loss"
    loss: str
    pairs: int
    tokens: int = 0  # of all responses, packed; 0: sums

    NAMES: ClassVar = {"eager": "eager torch, as TRL writes it"}

    def small(self) -> Pairs:
        return replace(self, pairs=64, tokens=min(self.tokens, 4096), budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Log-ratios of some nats; packed responses of even length, a tenth of the tokens masked."""
        draw = generator(device)

        def normal(*shape, scale=1.0):
            return torch.randn(shape, generator=draw, device=device) * scale

        if self.tokens:
            ref = -normal(self.tokens).abs()
            length = self.tokens // (2 * self.pairs)
            mask = torch.rand(self.tokens, generator=draw, device=device) < 0.9
            ends = torch.arange(0, self.tokens + 1, length, device=device)
            return {"logps": ref + normal(self.tokens, scale=0.1), "ref_logps": ref, "mask": mask, "cu_seqlens": ends}
        refs = [-50 - normal(self.pairs, scale=9.0) for _ in range(2)]
        sums = [x + normal(self.pairs, scale=3.0) for x in refs]
        lengths = [50 + normal(self.pairs, scale=9.0).round().clamp(-40, 40) for _ in range(2)]
        names = ("chosen_logps", "rejected_logps", *FIELDS)
        return dict(zip(names, (*sums, *refs, *lengths), strict=True))

    def _arm(self, function, data: dict, rest: tuple):
        names = ("logps",) if self.tokens else ("chosen_logps", "rejected_logps")
        leaves = {name: data[name] for name in names}
        return arms.arm(function, leaves, rest, ("loss",), torch.ones((), device=data[names[0]].device))

    def ours(self, data: dict) -> dict:
        objective = rlfast.preference_loss(self.loss, **({"mean": True} if self.loss == "ipo" else {}))
        if self.tokens:
            rest = {name: data[name] for name in ("ref_logps", "mask", "cu_seqlens")}
            return {"rlfast": self._arm(lambda x: objective.rows(x, **rest).loss, data, ())}
        rest = {name: data[name] for name in FIELDS}
        return {"rlfast": self._arm(lambda w, l_: objective(w, l_, **rest).loss, data, ())}

    def plain(self, data: dict) -> dict:
        """ "eager" and "compile" make what TRL logs too, as ours does; "plain ..." only the loss and its gradient."""
        function = baselines.LOSSES[self.loss]
        made, rest = (
            (baselines.logged(function), baselines.alone(function)),
            tuple(data[n] for n in FIELDS if n in data),
        )
        if self.tokens:
            made = [baselines.of_packed(f) for f in made]
            ends = data["cu_seqlens"]
            rows = torch.repeat_interleave(torch.arange(len(ends) - 1, device=ends.device), ends.diff())
            rest = data["ref_logps"], data["mask"].to(data["logps"].dtype), rows, len(ends) - 1
        logged, alone = made
        found = {"eager": logged, "compile": torch.compile(logged, dynamic=False)}
        found |= {"plain eager": alone, "plain compile": torch.compile(alone, dynamic=False)}
        return {name: self._arm(f, data, rest) for name, f in found.items()}

    def truth(self, data: dict) -> dict:
        wide = {k: x.double() if x.is_floating_point() else x for k, x in data.items()}
        names = [k for k in ("logps", "chosen_logps", "rejected_logps") if k in wide]
        leaves = [wide[k].requires_grad_() for k in names]
        alone = baselines.alone(baselines.LOSSES[self.loss])
        with torch.enable_grad():
            if self.tokens:
                length = self.tokens // (2 * self.pairs)
                shaped = (x.view(-1, length) for x in (leaves[0], wide["ref_logps"], wide["mask"].double()))
                loss = baselines.of_tokens(alone)(*shaped)
            else:
                loss = alone(*leaves, *(wide[k] for k in FIELDS))
            gradients = torch.autograd.grad(loss, leaves)
        found = {f"grad_{k}": (None, g) for k, g in zip(names, gradients, strict=True)}
        return {"loss": (None, loss.detach())} | found

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(torch.ones(self.traffic("read") // 4, device=device))

    def traffic(self, arm: str) -> int:
        """Of tokens: both log-probs and the mask read, the gradient written; of sums all six fields."""
        once = self.tokens * 13 if self.tokens else self.pairs * 8 * 4
        return 2 * once if arm == "copy" else once


@dataclass(frozen=True, kw_only=True)
class Singles(Case):
    """Reads the sums of log π and log π_ref and what is desirable; writes the gradient."""

    op: str = "unpaired_loss"
    rows: int

    NAMES: ClassVar = {"eager": "eager torch, as TRL writes it"}

    def small(self) -> Singles:
        return replace(self, rows=64, budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        draw = generator(device)
        ref = -50 - torch.randn(self.rows, generator=draw, device=device) * 9
        logps = ref + torch.randn(self.rows, generator=draw, device=device) * 3
        desirable = torch.rand(self.rows, generator=draw, device=device) < 0.5
        return {"logps": logps, "ref_logps": ref, "desirable": desirable, "z": torch.tensor(0.5, device=device)}

    def _arm(self, function, data: dict):
        rest = tuple(data[name] for name in ("ref_logps", "desirable", "z"))
        upstream = torch.ones((), device=data["logps"].device)
        return arms.arm(function, {"logps": data["logps"]}, rest, ("loss",), upstream)

    def ours(self, data: dict) -> dict:
        kto = rlfast.unpaired_loss("kto")
        return {"rlfast": self._arm(lambda x, ref, good, z: kto(x, good, ref_logps=ref, shared=z).loss, data)}

    def plain(self, data: dict) -> dict:
        compiled = torch.compile(baselines.kto_where, dynamic=False)
        found = {"eager": baselines.kto, "compile": compiled, "plain where": baselines.kto_where}
        return {name: self._arm(f, data) for name, f in found.items()}

    def truth(self, data: dict) -> dict:
        leaf = data["logps"].double().requires_grad_()
        with torch.enable_grad():
            loss = baselines.kto_where(leaf, data["ref_logps"].double(), data["desirable"], data["z"].double())[0]
            (g,) = torch.autograd.grad(loss, leaf)
        return {"loss": (None, loss.detach()), "grad_logps": (None, g)}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(torch.ones(self.traffic("read") // 4, device=device))

    def traffic(self, arm: str) -> int:
        once = self.rows * 13
        return 2 * once if arm == "copy" else once


TARGETS = (Target("rlfast", "eager", 8.0), Target("rlfast", "compile", 1.5))
ON_GPU = (Target("rlfast", "compile", 1.0),)


def _pairs(loss: str) -> Pairs:
    name = f"pair_loss {loss} forward+backward, 64K pairs"
    return Pairs(name=name, loss=loss, pairs=1 << 16, targets=TARGETS, gpu_targets=ON_GPU, budget_s=6.0)


def _packed(loss: str) -> Pairs:
    name = f"pair_loss {loss} forward+backward, packed rows of 1M tokens"
    return Pairs(name=name, loss=loss, pairs=1024, tokens=1 << 20, targets=TARGETS, gpu_targets=ON_GPU, budget_s=10.0)


CASES = (
    *(_pairs(loss) for loss in baselines.LOSSES),
    *(_packed(loss) for loss in ("dpo", "ipo")),
    Singles(
        name="unpaired_loss kto forward+backward, 64K responses",
        rows=1 << 16,
        targets=TARGETS,
        gpu_targets=ON_GPU,
        budget_s=6.0,
    ),
)
