"""token_loss: policy losses of [rows, length] tokens, with the gradient."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms
from bench.baselines import token_loss as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import even, generator, normal

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


@dataclass(frozen=True, kw_only=True)
class FromLogits(Case):
    """GRPO with k3 of ``rows`` responses from their logits, with the gradient by the logits: what Liger's kernel does.

    Liger takes [rows, length + 1, vocab] and leaves out the last position; so does every arm.
    """

    op: str = "token_loss"
    rows: int
    length: int
    vocab: int

    OURS: ClassVar = ()
    GATES: ClassVar = {"bfloat16": 0.1}
    NAMES: ClassVar = {"eager": "eager torch, as TRL writes it"}

    def small(self) -> FromLogits:
        return replace(self, rows=2, length=9, vocab=129, budget_s=0.2)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        draw, shape = generator(device), (self.rows, self.length)
        logits = normal(draw, self.rows, self.length + 1, self.vocab, dtype=DTYPES[self.dtype])
        targets = torch.randint(self.vocab, shape, generator=draw, device=device)
        near = rlfast.token_logps(logits[:, :-1], targets).logp
        old, ref = (near + normal(draw, *shape, dtype=torch.float32, scale=scale) for scale in (0.15, 0.2))
        adv = torch.randn(self.rows, generator=draw, device=device)
        mask = torch.ones(shape, dtype=torch.bool, device=device)
        return {"logits": logits, "targets": targets, "old_logp": old, "adv": adv, "mask": mask, "ref_logp": ref}

    def _arms(self, functions: dict, data: dict) -> dict:
        leaf, rest = {"logits": data["logits"]}, tuple(data.values())[1:]
        upstream = torch.ones((), device=data["logits"].device)
        return {name: arms.arm(f, leaf, rest, ("loss",), upstream) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        objective = rlfast.loss("grpo")

        def run(logits, targets, old_logp, adv, mask, ref_logp):
            logp = rlfast.token_logps(logits[:, :-1], targets, mask=mask).logp
            return objective(logp, old_logp=old_logp, adv=adv, mask=mask, ref_logp=ref_logp).loss

        return self._arms({"rlfast": run}, data)

    @staticmethod
    def _eager(logits, targets, *fields):
        logp = logits[:, :-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        return baselines.alone(baselines.grpo)(logp, *fields)

    def plain(self, data: dict) -> dict:
        return self._arms({"eager": self._eager, "compile": torch.compile(self._eager, dynamic=False)}, data)

    def peers(self, data: dict, device: str) -> dict:
        if device != "cuda" or not arms.has("liger_kernel"):
            return {}
        liger = importlib.import_module("liger_kernel.transformers.grpo_loss")

        def run(logits, targets, old_logp, adv, mask, ref_logp):
            found = liger.triton_grpo_loss(
                logits, old_logp, ref_logp, targets, adv, mask, temperature=1.0, beta=0.04, eps_low=0.2, eps_high=0.2,
                inplace=False, loss_type="grpo", reduce=True,
            )  # fmt: skip
            return found[0] if isinstance(found, tuple) else found

        return self._arms({"liger": run}, data)

    def truth(self, data: dict) -> dict:
        """A response at a time: float64 logits of all of them would not fit."""
        total, gradients, chosen = 0.0, [], even(self.rows, 4).tolist()
        for row in range(self.rows):
            leaf = data["logits"][row : row + 1].double().requires_grad_()
            rest = (data["targets"][row : row + 1], *(x[row : row + 1].double() for x in tuple(data.values())[2:]))
            with torch.enable_grad():
                loss = self._eager(leaf, *rest) / self.rows
            total += loss.detach()
            if row in chosen:
                gradients += torch.autograd.grad(loss, leaf)
        where = torch.tensor(chosen, device=data["logits"].device)
        return {"loss": (None, total), "grad_logits": (where, torch.cat(gradients))}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(data["logits"])

    def traffic(self, arm: str) -> int:
        """Read for the log-probs, read and written for the gradient; a copy moves each byte twice."""
        passes = {"read": 1, "copy": 2}.get(arm, 3)
        return passes * self.rows * (self.length + 1) * self.vocab * DTYPES[self.dtype].itemsize


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


FROM_LOGITS = FromLogits(
    name="token_loss grpo from logits, 32 × 512 × 49152 bfloat16", rows=32, length=512, vocab=49152, dtype="bfloat16",
    gpu_targets=(Target("rlfast", "liger", 1.0), Target("rlfast", "compile", 1.0)), gpu_only=True, isas=False,
)  # fmt: skip

CASES = (
    *(_case(loss) for loss in baselines.LOSSES),
    *(_call(loss) for loss in baselines.LOSSES),
    *(_large(loss) for loss in baselines.LOSSES),
    FROM_LOGITS,
)
