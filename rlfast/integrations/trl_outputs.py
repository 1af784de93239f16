"""What the models of TRL's preference trainers return within one call of a loss, and what a loss makes of it."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from rlfast.integrations.patching import tensor_unsupported


class Seen(NamedTuple):
    """What the models returned within one call of a trainer's loss, in the order of the calls."""

    policy: list
    reference: list


@contextlib.contextmanager
def watched(trainer, model):
    """Within it, ``Seen``. A PEFT model is its own reference, and adds to both."""
    seen = Seen([], [])
    reference = getattr(trainer, "ref_model", None)
    if reference is None and not getattr(trainer, "precompute_ref_logps", True):
        reference = trainer.model
    modules = ((model, seen.policy), (reference, seen.reference))
    hooks = [
        module.register_forward_hook(lambda _, __, out, to=outputs: to.append(out))
        for module, outputs in modules
        if module is not None
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def scored(outputs: list) -> list:
    """Those of the fused head; the deprecated ``return_outputs`` adds one with logits alone."""
    return [out for out in outputs if getattr(out, "log_probs", None) is not None]


def scores_unsupported(trainer, seen: Seen, calls: int) -> str | None:
    """Of a trainer that calls the policy ``calls`` times, the reference too unless its log-probs are precomputed."""
    policy, reference = scored(seen.policy), scored(seen.reference)
    if len(policy) < calls or not (trainer.precompute_ref_logps or reference):
        return "its models were not called as rlfast knows"
    return tensor_unsupported(log_probs=policy[calls - 1].log_probs)


def with_router(trainer, loss, out):
    """And the load-balancing loss of a mixture of experts."""
    return loss + trainer.router_aux_loss_coef * out.aux_loss if trainer.aux_loss_enabled else loss


def tokens(out, mask):
    """Log-probs [B, T] of tokens 1 to T; prompt-learning PEFT puts virtual tokens before them."""
    return out.log_probs[:, 1 - mask.shape[1] :]


def sums(logps, counted=None, tail: float | None = None):
    """Σ over each response, its tokens beyond the length of the pair's shorter one times ``tail``; as the kernels do
    it, in float64 and then float32.
    """
    if tail is not None:
        shorter = torch.minimum(*counted.sum(1).chunk(2)).repeat(2)
        logps = torch.where(counted.cumsum(1) > shorter[:, None], tail * logps, logps)
    return logps.sum(1, dtype=torch.float64).float()
