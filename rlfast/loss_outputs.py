"""What a loss returns."""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.ops.loss_records import METRICS


class LossMetrics:
    """What a loss saw of its tokens: one float32 tensor on the device. Only reading a number synchronises.

    ``metrics["clip_low"]`` is a 0-dim tensor, ``metrics.as_dict()`` floats. ``rlfast.ops.loss_records.Metrics`` says
    what each is, and over what it is a mean.
    """

    __slots__ = ("names", "values")

    def __init__(self, values: torch.Tensor, names: tuple[str | None, ...] = METRICS):
        self.values, self.names = values, names  # None: of no meaning in this loss

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.keys():
            raise KeyError(f"metric: expected one of {', '.join(self.keys())}, got {name!r}")
        return self.values[self.names.index(name)]

    def keys(self) -> tuple[str, ...]:
        """The names."""
        return tuple(name for name in self.names if name)

    def as_dict(self) -> dict[str, float]:
        """Every metric as a float; one synchronisation."""
        return {name: x for name, x in zip(self.names, self.values.tolist(), strict=True) if name}


class LossOutput(NamedTuple):
    """The loss, with its gradient, and the metrics of the same launch."""

    loss: torch.Tensor  # []
    metrics: LossMetrics


class LinearLossOutput(NamedTuple):
    """The loss, with its gradient by hidden states and head, its metrics, and what else was asked for."""

    loss: torch.Tensor  # []
    metrics: LossMetrics
    logp: torch.Tensor  # like targets; without gradient, as the next
    entropy: torch.Tensor | None  # like targets, in nats
