"""Losses of ranked groups by the compiled kernels."""

from __future__ import annotations

import torch

from rlfast.native.preferences import DTYPES, _written
from rlfast.native.token_logps import address, extension_of
from rlfast.ops.preference_records import SUM
from rlfast.ops.ranked_records import Groups, Output, Settings, rows_of


def _field(x: torch.Tensor | None):
    """(address, dtype, stride of a group, stride of a candidate)."""
    if x is None:
        return None
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0) if x.dim() == 2 else 0, x.stride(-1)


def _flags(x: torch.Tensor):
    """(address, stride of a group)."""
    return x.data_ptr(), x.stride(0) if x.dim() == 2 else 0


def forward(groups: Groups, form: str, settings: Settings, reduce: int, most: int, out: Output) -> None:
    """See ``rlfast/ops/ranked_loss.py``."""
    extension, last = extension_of(groups.scores)
    mask, weights = groups.mask, groups.weights
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    fields = (
        *map(_field, groups[:4]), None if mask is None else _flags(mask), address(groups.cu_seqlens),
        None if weights is None else (weights.data_ptr(), DTYPES[weights.dtype], weights.stride(0), 0),
        address(groups.num_items), rows_of(groups), groups.scores.shape[-1],
    )  # fmt: skip
    outputs = (out.loss.data_ptr(), out.metrics.data_ptr(), _written(out.d_scores), _written(out.losses))
    extension.ranked_loss(fields, form, settings, int(reduce == SUM), outputs, *last)
