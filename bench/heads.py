"""What the cases of a loss over a head share: their GEMMs, and what memory is measured against."""

from __future__ import annotations

from typing import ClassVar

import torch

from bench.case import Case


def makes_logits_twice(arm: str) -> bool:
    """Whether an arm's backward has a GEMM for the logits too."""
    return arm.startswith(("rlfast recompute", "trl"))


def true_gradients(wide: dict, lse, g, columns) -> tuple:
    """(∂hidden, ∂weight of some of the vocabulary) in float64, a response at a time, from ∂loss/∂logp."""
    d_weight, d_hidden = 0.0, []
    for h, t, log_sum, by_logp in zip(wide["hidden"], wide["targets"], lse, g, strict=True):
        d = -(h @ wide["weight"].T - log_sum[:, None]).exp_()
        d.scatter_add_(-1, t[:, None], torch.ones_like(t[:, None], dtype=d.dtype)).mul_(by_logp[:, None])
        d_hidden.append(d @ wide["weight"])
        d_weight = d_weight + d[:, columns].T @ h
    return torch.stack(d_hidden), d_weight


class HeadCase(Case):
    """A case with fields or properties ``rows``, ``width`` and ``vocab``; each GEMM is of these."""

    FORWARDS: ClassVar = 1  # GEMMs that make logits, before any is repeated

    def flops(self, arm: str) -> int:
        count = 1 if arm.startswith("gemm ") else self.FORWARDS + 2 + makes_logits_twice(arm)
        return count * 2 * self.rows * self.width * self.vocab

    def floors(self, arm: str) -> dict[str, dict[str, float]]:
        once = {"gemm forward": self.FORWARDS, "gemm dHidden": 1, "gemm dWeight": 1}
        keep, recompute = ("gemms keep", once), ("gemms recompute", once | {"gemm forward": self.FORWARDS + 1})
        return dict((recompute, keep) if makes_logits_twice(arm) else (keep, recompute))

    def sizes(self) -> dict[str, int]:
        return {"logits": 4 * self.rows * self.vocab}

    def allowed_bytes(self) -> int:
        """Where the weight is not float32, its gradient's float32 accumulator."""
        return 4 * self.vocab * self.width if self.dtype != "float32" else 0
