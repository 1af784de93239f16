"""The ``reference`` backend of ``ranked_loss``: the oracle behind a kernel's interface, by autograd alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.ops.preference_records import MEAN
from rlfast.ops.ranked_records import METRICS, Groups, Output, Settings
from rlfast.reference.ranked_loss import ranked_loss as oracle


def words(form: str, settings: Settings) -> dict:
    """A form and its numbers in the oracle's words."""
    return {"form": form} | settings._asdict()


def padded(groups: Groups) -> tuple:
    """(a function that pads packed candidates with zeros, the mask of the padded ones)."""
    if groups.cu_seqlens is None:
        return (lambda x: x), groups.mask
    ends = groups.cu_seqlens
    lengths = ends.diff()
    width = int(lengths.max()) if lengths.numel() else 0
    real = torch.arange(width, device=ends.device) < lengths.unsqueeze(1)

    def pad(x):
        return x if x is None else x.new_zeros(real.shape).masked_scatter(real, x[ends[0] : ends[-1]])

    return pad, real if groups.mask is None else real & pad(groups.mask)


def _forward(groups: Groups, form: str, settings: Settings, reduce: int, most: int, out: Output) -> None:
    dtype = out.loss.dtype
    pad, mask = padded(groups)
    n = 1.0 if groups.num_items is None and reduce != MEAN else groups.num_items
    if groups.num_items is not None:
        n = torch.where(n > 0, n, torch.ones_like(n)).to(dtype)
    with torch.enable_grad():
        leaf = groups.scores.detach().to(dtype).requires_grad_()
        fields = [x if x is None else pad(x.to(dtype)) for x in groups[1:4]]
        weights = groups.weights if groups.weights is None else groups.weights.to(dtype)
        loss, metrics = oracle(pad(leaf), *fields, mask, weights, n=n, **words(form, settings))
        if out.d_scores.numel():
            g = torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)
            out.d_scores.copy_(g)
    out.loss.copy_(loss.detach())
    out.metrics.copy_(torch.stack([metrics[name].to(dtype) for name in METRICS]))
    if out.losses.numel():
        out.losses.copy_(metrics["losses"])


ranked_loss = SimpleNamespace(forward=_forward)
