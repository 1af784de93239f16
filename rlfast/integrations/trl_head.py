"""Where a loss of TRL's and the fused head meet: within a trainer's loss the head may make it with its log-probs."""

from __future__ import annotations

import contextlib
from contextvars import ContextVar

import torch

_current: ContextVar[Fusion | None] = ContextVar("rlfast_trl_fusion", default=None)


class _Tied(torch.autograd.Function):
    """Log-probs that are a function of the loss, with a gradient of 0: what wraps a model looks for such a graph."""

    @staticmethod
    def forward(ctx, logp, loss):
        return logp.view_as(logp)

    @staticmethod
    def backward(ctx, g):
        return None, g.new_zeros(())


class Fusion:
    """A loss that the head makes when the model calls it; what the model returns then has a gradient of 0."""

    loss: torch.Tensor | None = None  # with gradient, as soon as it is made

    def __init__(self, scored: torch.Tensor):
        self.scored = scored  # bool [B, T]: the tokens that the head is asked for, one row after the other
        self.cu_seqlens = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)).cpu()

    def takes(self, hidden) -> bool:
        """Whether this call of the head is the loss's."""
        return self.loss is None and torch.is_grad_enabled() and int(self.cu_seqlens[-1]) == hidden.shape[0]

    def packed(self, x):
        """The scored tokens of [B, T], [B, 1] or [B], one after the other."""
        if x is None:
            return None
        x = x.unsqueeze(1) if x.dim() == 1 else x
        return x.expand(self.scored.shape)[self.scored]

    def made(self, loss, logp):
        """Keep the loss; the log-probs as the model is to return them."""
        self.loss = loss
        return _Tied.apply(logp, loss)

    def in_place_of(self, theirs):
        """The number that TRL has come to, with what its router has, and the gradient of the loss."""
        return theirs + (self.loss - self.loss.detach())

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
