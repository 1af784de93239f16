"""Helpers for a family's inputs and for its truth."""

from __future__ import annotations

import torch

SAMPLES = 64  # rows, or columns, that are compared with float64


def generator(device: str) -> torch.Generator:
    """The seed of every case."""
    return torch.Generator(device=device).manual_seed(0)


def normal(draw: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Scaled normal numbers, drawn in pieces: no float32 copy of the whole beside it."""
    x = torch.empty(shape, dtype=dtype, device=draw.device)
    for part in x.split(256):
        part.copy_(torch.randn(part.shape, generator=draw, device=draw.device) * scale)
    return x


def even(n: int, count: int = SAMPLES) -> torch.Tensor:
    """Some of n indices, evenly spaced."""
    return torch.linspace(0, n - 1, min(n, count)).long()
