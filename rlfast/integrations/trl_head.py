"""Where a loss of TRL's and the fused head meet: within a trainer's loss the head may make it with its log-probs."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

import torch

_current: ContextVar[Fusion | None] = ContextVar("rlfast_trl_fusion", default=None)


class Fusion:
    """A loss that the head makes when the model calls it; what the models return then has no gradient."""

    loss: torch.Tensor | None = None  # with gradient, as soon as it is made

    def __init__(self, scored: torch.Tensor):
        self.scored = scored  # bool [B, T]: the tokens that the head is asked for, one row after the other
        ends = scored.sum(1).cumsum(0)
        self.cu_seqlens = torch.cat((ends.new_zeros(1), ends))

    def takes(self, hidden) -> bool:
        """Whether this call of the head is the loss's."""
        return self.loss is None and torch.is_grad_enabled() and int(self.cu_seqlens[-1]) == hidden.shape[0]

    def packed(self, x):
        """The scored tokens of [B, T]; [B, 1] and [B] as [B]."""
        if x is None or x.dim() == 1:
            return x
        return x[self.scored] if x.shape == self.scored.shape else x.squeeze(1)

    def head(self, hidden, weight, bias, targets, outputs, **options) -> tuple:
        """What TRL's head returns: (log-probs, entropies, log Σp², mean logits, is_top1), None where not asked for."""
        raise NotImplementedError


@contextlib.contextmanager
def fusing(fusion: Fusion | None):
    """Within it, the fused head makes the loss."""
    token = _current.set(fusion)
    try:
        yield fusion
    finally:
        _current.reset(token)


def current(hidden) -> Fusion | None:
    """The fusion that a call of the head belongs to."""
    fusion = _current.get()
    return fusion if fusion is not None and fusion.takes(hidden) else None
