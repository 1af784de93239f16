"""linear_preference_loss: DPO from hidden states and the heads of policy and reference, with the gradients."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms, gemms
from bench.baselines import linear_preference as baselines
from bench.baselines.preferences import BETA
from bench.case import DTYPES, Target
from bench.draws import even, generator, normal
from bench.heads import HeadCase, true_gradients


@dataclass(frozen=True, kw_only=True)
class Rows(HeadCase):
    """2·pairs responses of ``length`` tokens: the reference's log-probs, the policy's, the loss, ∂hidden, ∂weight.

    Four GEMMs where the gradients are taken while the logits are there, five where they are made again.
    """

    op: str = "linear_preference_loss"
    pairs: int
    length: int
    vocab: int
    width: int

    FORWARDS: ClassVar = 2  # the reference's
    OURS: ClassVar = ("rlfast", "rlfast recompute")
    NAMES: ClassVar = {
        "eager": "eager torch",
        "gemms keep": "its four bare GEMMs",
        "gemms recompute": "its five bare GEMMs",
        "logits": "the logits in float32",
    }

    def small(self) -> Rows:
        return replace(self, pairs=2, length=8, vocab=4099, width=min(self.width, 96), budget_s=0.2)

    @property
    def rows(self) -> int:
        """Rows of logits."""
        return 2 * self.pairs * self.length

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits of a few nats; a reference that is a little away from the policy."""
        draw, dtype, shape = generator(device), DTYPES[self.dtype], (2 * self.pairs, self.length, self.width)
        hidden = normal(draw, *shape, dtype=dtype)
        weight = normal(draw, self.vocab, self.width, dtype=dtype, scale=2.0 / self.width**0.5)
        near = [x + normal(draw, *x.shape, dtype=dtype, scale=0.02 * float(x.std())) for x in (hidden, weight)]
        targets = torch.randint(self.vocab, shape[:2], generator=draw, device=device)
        return {"hidden": hidden, "weight": weight, "targets": targets, "ref_hidden": near[0], "ref_weight": near[1]}

    def _arms(self, functions: dict, data: dict) -> dict:
        leaves = {name: data[name] for name in ("hidden", "weight")}
        rest = tuple(data[name] for name in ("targets", "ref_hidden", "ref_weight"))
        upstream = torch.ones((), device=data["hidden"].device)
        return {name: arms.arm(f, leaves, rest, ("loss",), upstream) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        dpo = rlfast.preference_loss("dpo")

        def with_budget(budget):
            def run(hidden, weight, targets, ref_hidden, ref_weight):
                with torch.no_grad():
                    ref = rlfast.linear_token_logps(ref_hidden, ref_weight, targets).logp
                return dpo.linear_rows(hidden, weight, targets, ref_logps=ref, **budget).loss

            return run

        pair = 4 * 2 * self.length * self.vocab
        budgets = {"rlfast": {}, "rlfast by pairs": {"memory_budget": pair}, "rlfast recompute": {"memory_budget": 0}}
        return self._arms({name: with_budget(budget) for name, budget in budgets.items()}, data)

    def plain(self, data: dict) -> dict:
        chunked = baselines.Chunked.apply
        found = {
            "eager": baselines.eager,
            "compile": torch.compile(baselines.eager, dynamic=False),
            "plain by pairs": lambda *given: chunked(*given, gemms.mm),
        }
        if self.dtype == "float32" and gemms.onednn_works():
            found["plain by pairs, oneDNN"] = lambda *given: chunked(*given, gemms.onednn)
        return self._arms(found, data)

    def peers(self, data: dict, device: str) -> dict:
        found = {}
        if arms.has("trl"):
            kernel = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
            chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

            def sums(hidden, weight, targets):
                flat = kernel.apply(hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, chunk, None, 1.0, ())[0]
                return flat.view(targets.shape).sum(-1)

            def run_trl(hidden, weight, targets, ref_hidden, ref_weight):
                with torch.no_grad():
                    ref = sums(ref_hidden, ref_weight, targets)
                return baselines.LOSS(*sums(hidden, weight, targets).chunk(2), *ref.chunk(2))

            found["trl"] = run_trl
        if arms.has("liger_kernel"):
            fused = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss
            for name, compiled in (("liger", True), ("liger, not compiled", False)):
                found[name] = self._liger(fused(beta=BETA, compiled=compiled))
        return self._arms(found, data)

    def _liger(self, loss):
        def run(hidden, weight, targets, ref_hidden, ref_weight):
            return loss(weight, hidden, targets, ref_input=ref_hidden, ref_weight=ref_weight)[0]

        return run

    def truth(self, data: dict) -> dict:
        """In float64: the loss, ∂hidden of some tokens, ∂weight of some of the vocabulary."""
        wide = {k: x.double() if x.is_floating_point() else x for k, x in data.items()}
        logp, lse = (torch.stack(x) for x in zip(*(self._row(wide, i, "") for i in range(2 * self.pairs)), strict=True))
        ref = torch.stack([self._row(wide, i, "ref_")[0] for i in range(2 * self.pairs)])
        leaf = logp.requires_grad_()
        with torch.enable_grad():
            loss = baselines.LOSS(*leaf.sum(-1).chunk(2), *ref.sum(-1).chunk(2))
            (g,) = torch.autograd.grad(loss, leaf)
        columns = torch.cat((even(self.vocab), data["targets"].flatten()[:64].cpu())).unique().to(g.device)
        d_hidden, d_weight = true_gradients(wide, lse, g, columns)
        found = {"loss": (None, loss.detach()), "grad_hidden": (None, d_hidden)}
        return found | {"grad_weight": (columns, d_weight)}

    def _row(self, wide: dict, i: int, prefix: str):
        z = wide[prefix + "hidden"][i] @ wide[prefix + "weight"].T
        lse = z.logsumexp(-1)
        return z.gather(-1, wide["targets"][i][:, None]).squeeze(-1) - lse, lse

    def ceilings(self, data: dict, device: str) -> dict:
        return gemms.ceilings(data["hidden"].flatten(0, 1), data["weight"])


TARGETS = (
    Target("rlfast", "trl", 2.0),
    Target("rlfast", "liger", 2.0),
    Target("rlfast recompute", "trl", 2.0),
    Target("rlfast recompute", "liger", 2.0),
    Target("rlfast recompute", "logits", 0.1, "memory"),
    Target("rlfast recompute", "plain", 1.2),
)
ON_GPU = (Target("rlfast", "liger", 1.0), Target("rlfast", "trl", 1.0))

CASES = tuple(
    Rows(
        name=f"linear_preference_loss dpo forward+backward 2×8×128×576×49152 {dtype}",
        pairs=8,
        length=128,
        vocab=49152,
        width=576,
        dtype=dtype,
        targets=TARGETS,
        gpu_targets=ON_GPU,
    )
    for dtype in DTYPES
)
