"""OpenRLHF's code without what its trainers need, and draws for its functions."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from rlfast.compare.openrlhf_code import MAKER, STAND_INS, load, stand_ins

__all__ = ["MAKER", "STAND_INS", "B", "T", "V", "drawn", "fields", "load", "stand_ins"]
B, T, V = 6, 24, 37  # of the draws


@functools.cache
def drawn():
    torch.manual_seed(0)
    logp = torch.randn(B, T).mul(0.5) - 1.5
    mask = torch.rand(B, T) > 0.3
    mask[:, :2], mask[2] = False, False  # an empty row, and holes
    old = logp + 0.4 * torch.randn(B, T)
    pair = -20.0 + 4.0 * torch.randn(4, B)
    return {
        "logits": 2 * torch.randn(B, T, V), "labels": torch.randint(V, (B, T)), "logp": logp, "old": old,
        "ref": logp + torch.randn(B, T) * torch.tensor([0.3, 3.0, 15.0])[torch.randint(3, (B, T))],
        "rollout": old + 0.3 * torch.randn(B, T), "adv": torch.randn(B, T), "mask": mask, "score": torch.randn(B),
        "kl": torch.randn(B, T), "values": torch.randn(B, T), "rewards": torch.randn(B, T), "pair": pair,
        "margin": torch.rand(B),
    }  # fmt: skip


def fields(dtype, mask=torch.bool) -> SimpleNamespace:
    """The draws, each a leaf of its own."""
    made = {name: x.clone().to(dtype) if x.is_floating_point() else x.clone() for name, x in drawn().items()}
    return SimpleNamespace(**made | {"mask": made["mask"].to(mask)})
