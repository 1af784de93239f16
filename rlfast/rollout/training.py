"""The training forward with the bits of the rollouts: the same attention, linears and head, with gradient.

``model(ids).logits`` are float32 there, whatever the model is. ``rlfast.token_logps`` of them has the bits, and so has
``rlfast.linear_token_logps(..., batch_invariant=True)`` of hidden states, which makes no logits.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

import torch

from rlfast.rollout.attention import TRAINING

_active: ContextVar[bool] = ContextVar("rlfast_training_mode", default=False)


def active() -> bool:
    """Whether a head that is called here has to be the rollouts'."""
    return _active.get()


@contextlib.contextmanager
def training_mode(decoder):
    """Within it, the decoder's model trains so; ``Engine.training_mode`` is what a caller types."""
    token = _active.set(True)
    hook = decoder.body.register_forward_pre_hook(_counted_positions, with_kwargs=True)
    try:
        with decoder.installed(TRAINING):
            yield
    finally:
        hook.remove()
        _active.reset(token)


def _counted_positions(_, args, kwargs):
    """Positions that count from a row's first real token, as a rollout's do, where the caller gave none."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is None and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return args, kwargs
