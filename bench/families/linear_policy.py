"""linear_policy_loss: GRPO from hidden states and the head, with the gradients."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

import rlfast
from bench import arms, gemms
from bench.baselines import linear_policy as baselines
from bench.case import DTYPES, Target
from bench.draws import even, generator, normal
from bench.heads import HeadCase, true_gradients

BETA = 0.04
FIELDS = ("targets", "old_logp", "adv", "mask", "ref_logp")


def _away(shape, draw, device: str) -> torch.Tensor:
    """Log-ratios of which a third is clipped, none so near a bound that logits rounded to bfloat16 cross it."""
    steps = torch.tensor([-0.4, -0.08, 0.08, 0.1, 0.05, 0.4], device=device)
    chosen = steps[torch.randint(len(steps), shape, generator=draw, device=device)]
    return chosen + 0.01 * torch.randn(shape, generator=draw, device=device)


@dataclass(frozen=True, kw_only=True)
class Rows(HeadCase):
    """``sequences`` of ``length`` tokens: log-probs, GRPO with its KL, ∂hidden and, if the head learns, ∂weight.

    Three GEMMs where the gradients are taken while the logits are there, four where they are made again; a frozen
    head's two and three. Only tokens that count, a ``live`` share of them, need any.
    """

    op: str = "linear_policy_loss"
    sequences: int
    length: int
    vocab: int
    width: int
    live: float = 1.0
    frozen: bool = False

    OURS: ClassVar = ("rlfast", "rlfast recompute")
    NAMES: ClassVar = {
        "eager": "eager torch",
        "gemms keep": "its bare GEMMs",
        "gemms recompute": "its bare GEMMs, logits twice",
        "logits": "the logits in float32",
    }

    def small(self) -> Rows:
        return replace(self, sequences=4, length=16, vocab=4099, width=min(self.width, 96), budget_s=0.2)

    @property
    def rows(self) -> int:
        """Rows of logits that count."""
        return int(self.sequences * self.length * self.live)

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Logits of a few nats; an old policy and a reference a few tenths of a nat away."""
        draw, dtype, shape = generator(device), DTYPES[self.dtype], (self.sequences, self.length)
        hidden = normal(draw, *shape, self.width, dtype=dtype)
        weight = normal(draw, self.vocab, self.width, dtype=dtype, scale=2.0 / self.width**0.5)
        targets = torch.randint(self.vocab, shape, generator=draw, device=device)
        with torch.no_grad():
            logp = rlfast.linear_token_logps(hidden, weight, targets).logp
        near = [logp + _away(shape, draw, device) for _ in range(2)]
        mask = torch.zeros(shape, device=device)
        mask[:, : int(self.length * self.live)] = 1.0
        adv = torch.randn(self.sequences, generator=draw, device=device)
        return {"hidden": hidden, "weight": weight, "targets": targets, "old_logp": near[0], "adv": adv, "mask": mask,
                "ref_logp": near[1]}  # fmt: skip

    def _arms(self, functions: dict, data: dict) -> dict:
        learned = ("hidden",) if self.frozen else ("hidden", "weight")
        leaves, upstream = {name: data[name] for name in learned}, torch.ones((), device=data["hidden"].device)
        rest = tuple(data[name] for name in ((*FIELDS,) if not self.frozen else ("weight", *FIELDS)))
        return {name: arms.arm(f, leaves, rest, ("loss",), upstream) for name, f in functions.items()}

    def ours(self, data: dict) -> dict:
        grpo = rlfast.loss("grpo", beta=BETA)

        def with_budget(budget):
            def run(hidden, weight, targets, old_logp, adv, mask, ref_logp):
                return grpo.linear(
                    hidden, weight, targets, old_logp=old_logp, adv=adv, mask=mask, ref_logp=ref_logp, **budget
                ).loss

            return run

        logits = 4 * self.rows * self.vocab
        budgets = {"rlfast": None, "rlfast keep": 1 << 40, "rlfast tenth": logits // 10, "rlfast recompute": 0}
        if self.gpu_only:  # a curve of time over memory
            budgets |= {"rlfast half": logits // 2, "rlfast quarter": logits // 4}
        return self._arms({name: with_budget({"memory_budget": budget}) for name, budget in budgets.items()}, data)

    def plain(self, data: dict) -> dict:
        few = max(1, 512 // self.length)
        found = {
            "eager": baselines.eager,
            "compile": torch.compile(baselines.eager, dynamic=False),
            "plain chunked": lambda *given: baselines.Chunked.apply(*given, gemms.mm, few),
        }
        if self.dtype == "float32" and gemms.onednn_works():
            found["plain chunked, oneDNN"] = lambda *given: baselines.Chunked.apply(*given, gemms.onednn, few)
        return self._arms(found, data)

    def peers(self, data: dict, device: str) -> dict:
        found = {}
        if arms.has("trl"):
            kernel = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
            chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE

            def run_trl(hidden, weight, targets, *fields):
                flat = kernel.apply(hidden.flatten(0, 1), weight, None, targets.flatten(), 1.0, chunk, None, 1.0, ())[0]
                return baselines.loss_of(flat.view(targets.shape), *fields)

            found["trl"] = run_trl
        if arms.has("liger_kernel"):
            fused = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
            for name, compiled in (("liger", True), ("liger, not compiled", False)):
                found[name] = self._liger(fused(beta=BETA, loss_type="grpo", compiled=compiled, use_ref_model=True))
        return self._arms(found, data)

    def _liger(self, loss):
        def run(hidden, weight, targets, old_logp, adv, mask, ref_logp):
            return loss(hidden, weight, targets, mask, adv, ref_per_token_logps=ref_logp, old_per_token_logps=old_logp)[
                0
            ]

        return run

    def truth(self, data: dict) -> dict:
        """In float64: the loss, ∂hidden, ∂weight of some of the vocabulary."""
        wide = {k: x.double() if x.is_floating_point() else x for k, x in data.items()}
        lse, logp = [], []
        for h, t in zip(wide["hidden"], wide["targets"], strict=True):
            z = h @ wide["weight"].T
            lse.append(z.logsumexp(-1))
            logp.append(z.gather(-1, t[:, None]).squeeze(-1) - lse[-1])
        leaf = torch.stack(logp).requires_grad_()
        with torch.enable_grad():
            loss = baselines.loss_of(leaf, *(wide[k] for k in FIELDS[1:]))
            (g,) = torch.autograd.grad(loss, leaf)
        columns = torch.cat((even(self.vocab), data["targets"].flatten()[:64].cpu())).unique().to(g.device)
        d_hidden, d_weight = true_gradients(wide, lse, g, columns)
        found = {"loss": (None, loss.detach()), "grad_hidden": (None, d_hidden)}
        return found if self.frozen else found | {"grad_weight": (columns, d_weight)}

    def flops(self, arm: str) -> int:
        spared = 2 * self.rows * self.width * self.vocab if self.frozen and not arm.startswith("gemm ") else 0
        return super().flops(arm) - spared

    def allowed_bytes(self) -> int:
        return 0 if self.frozen else super().allowed_bytes()

    def ceilings(self, data: dict, device: str) -> dict:
        live = data["mask"].flatten() != 0
        return gemms.ceilings(data["hidden"].flatten(0, 1)[live], data["weight"])

    def floors(self, arm: str) -> dict[str, dict[str, float]]:
        found = super().floors(arm)
        return {k: {gemm: n for gemm, n in by.items() if not (self.frozen and gemm == "gemm dWeight")}
                for k, by in found.items()}  # fmt: skip


def _targets(dtype: str, live: float, frozen: bool) -> tuple[Target, ...]:
    low = dtype == "bfloat16"
    cost = Target("rlfast", "gemms keep", 1.5 if low and not frozen else 1.2, "cost")
    if frozen:
        return (cost,)
    over = 1.0 if live == 1.0 else 2.0
    trl = {1.0: 4.0 if low else 2.7, 2.0: 6.0 if low else 4.5}[over]
    half = () if live < 1.0 else (Target("rlfast", "liger", 2.5), Target("rlfast tenth", "logits", 0.1, "memory"))
    return (cost, Target("rlfast", "trl", trl), *half, Target("rlfast", "plain", 1.2))


ON_GPU = (Target("rlfast", "liger", 1.0), Target("rlfast", "trl", 1.0))
# Of an H200, where three GEMMs of this shape take 33.4 ms and four 44.5.
CURVE = (Target("rlfast half", "", 38_000, "us"), Target("rlfast tenth", "", 44_000, "us"))


def _case(sequences: int, length: int, width: int, vocab: int, dtype: str, live: float = 1.0, frozen: bool = False):
    what = "".join((f", {live:.0%} of the tokens" if live < 1.0 else "", ", frozen head" if frozen else ""))
    return Rows(
        name=f"linear_policy_loss grpo forward+backward {sequences}×{length}×{width}×{vocab} {dtype}{what}",
        sequences=sequences, length=length, vocab=vocab, width=width, dtype=dtype, live=live, frozen=frozen,
        targets=_targets(dtype, live, frozen), gpu_targets=ON_GPU, isas=live == 1.0 and not frozen and vocab < 100_000,
        budget_s=60.0 if vocab < 100_000 else 150.0,
    )  # fmt: skip


CASES = (
    *(_case(4, 128, 576, 49152, dtype, live, frozen) for dtype in DTYPES
      for live, frozen in ((1.0, False), (0.5, False), (1.0, True))),
    _case(8, 256, 896, 151936, "bfloat16"),
    replace(_case(16, 512, 4096, 131072, "bfloat16"), gpu_only=True, gpu_targets=(*ON_GPU, *CURVE)),
)  # fmt: skip
