"""verl's functions for ``bench.trainers``."""

from __future__ import annotations

import functools
import importlib

import numpy as np
import torch

from bench.trainers import Row, pulled
from rlfast.integrations.verl import CORE, FUNCTIONAL, FUSED, replacements
from rlfast.integrations.verl_losses import POLICIES

ROWS, VOCAB, DEPTH = 256, 65536, 896
CHOICES = {"dro_beta": 0.3}


@functools.cache
def both(module: str, name: str) -> tuple:
    """(verl's function, ours): what ``rlfast.patch("verl")`` would swap."""
    original = getattr(importlib.import_module(module), name)
    swaps, *_ = replacements(untested=False)
    return original, next(s.replacement for s in swaps() if s.original is original)


def logits(small: bool):
    """Log-probs and entropies of one batch of logits, as verl's engine asks for them."""
    torch.manual_seed(0)
    rows, vocab = (4, 512) if small else (ROWS, VOCAB)
    data, labels = {"logits": torch.randn(rows, vocab)}, torch.randint(vocab, (rows,))
    weights = {"logp": torch.randn(rows), "entropy": torch.randn(rows)}

    def call(logp, entropy):
        return lambda logits: {"logp": logp(logits, labels, inplace_backward=False), "entropy": entropy(logits)}

    pairs = zip(both(FUNCTIONAL, "logprobs_from_logits"), both(FUNCTIONAL, "entropy_from_logits"), strict=True)
    return tuple(pulled(call(*pair), data, weights) for pair in pairs)


def head(small: bool):
    """The fused head."""
    torch.manual_seed(0)
    rows, vocab, depth = (4, 512, 32) if small else (ROWS, VOCAB, DEPTH)
    data = {"hidden": torch.randn(rows, depth), "weight": torch.randn(vocab, depth) * depth**-0.5}
    ids = torch.randint(vocab, (rows,))
    weights = {"logp": torch.randn(rows), "entropy": torch.randn(rows)}

    def call(function):
        return lambda hidden, weight: dict(zip(("logp", "entropy"), function.apply(hidden, weight, ids), strict=True))

    return tuple(pulled(call(f), data, weights) for f in both(FUSED, "FusedLinearForPPOFunction"))


def _mask(rows: int, length: int, dtype) -> torch.Tensor:
    """Answers of half the length to all of it."""
    return (torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))).to(dtype)


def gae(small: bool):
    """GAE, whitened."""
    torch.manual_seed(0)
    rows, length = (4, 32) if small else (64, 4096)
    rewards, values = torch.randn(rows, length), torch.randn(rows, length)
    mask = _mask(rows, length, torch.int64)  # as verl's driver has it

    def call(function):
        return lambda: dict(zip(("advantages", "returns"), function(rewards, values, mask, 1.0, 0.95), strict=True))

    return tuple(call(f) for f in both(CORE, "compute_gae_advantage_return"))


def grpo(small: bool):
    """GRPO's advantages of eight answers a prompt."""
    torch.manual_seed(0)
    rows, length = (16, 32) if small else (512, 1024)
    rewards, mask = torch.zeros(rows, length), _mask(rows, length, torch.int64)
    rewards[:, -1] = torch.rand(rows)
    names = np.array([f"{i // 8:08x}-2f1c-4d7e" for i in range(rows)], dtype=object)

    def call(function):
        return lambda: {"advantages": function(rewards, mask, names)[0]}

    return tuple(call(f) for f in both(CORE, "compute_grpo_outcome_advantage"))


def policy(name: str):
    """A policy loss, with verl's metrics."""

    def build(small: bool):
        from verl.workers.config import ActorConfig, PolicyLossConfig

        torch.manual_seed(0)
        rows, length = (8, 64) if small else (256, 4096)
        config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
        object.__setattr__(config, "policy_loss", PolicyLossConfig(**CHOICES))
        logp, mask = -torch.rand(rows, length) * 3, _mask(rows, length, torch.bool)
        old = (logp + 0.1 * torch.randn(rows, length)).clamp(max=-1e-3)
        adv = torch.randn(rows, 1).expand(rows, length).contiguous()

        def call(function):
            def run(logp):
                if name == "clip_cov":
                    torch.manual_seed(1)  # it draws
                return {"loss": function(old, logp, adv, mask, "token-mean", config)[0]}

            return run

        return tuple(pulled(call(f), {"logp": logp}) for f in both(CORE, f"compute_policy_loss_{name}"))

    return build


def rows() -> list[Row]:
    """Every row, and what it must reach."""
    found = [
        Row("verl", f"logprobs_from_logits + entropy_from_logits, {ROWS} × {VOCAB}, float32", 4.0, logits),
        Row("verl", f"FusedLinearForPPO, {ROWS} × {DEPTH} × {VOCAB}, float32", 3.0, head, budget_s=60.0),
        Row("verl", "compute_gae_advantage_return, 64 × 4096", 100.0, gae),
        Row("verl", "compute_grpo_outcome_advantage, 512 rows of 1024", 10.0, grpo),
    ]
    losses = [f"compute_policy_loss_{name}" for name in POLICIES if name != "reinforce"]
    return found + [
        Row("verl", f"{name}, 256 × 4096", 4.0, policy(name.removeprefix("compute_policy_loss_"))) for name in losses
    ]
