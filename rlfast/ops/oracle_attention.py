"""The ``reference`` backend of ``paged_attention``: its oracle behind a kernel's interface."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.ops.attention_records import Inputs, Options, allocate
from rlfast.reference import paged_attention as oracle


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _formula(o: Options) -> dict:
    """The options that are in the formula."""
    return {"scale": o.scale, "softcap": o.softcap, "window": o.window}


def _forward(x: Inputs, o: Options) -> torch.Tensor:
    out = allocate(x)
    return out.copy_(oracle.paged_attention(*x, **_formula(o), dtype=_wide(x.q)))


def _gradients(g, q, k, v, cu_seqlens, sinks, o: Options) -> tuple:
    """See ``rlfast/fallback/paged_attention.py``."""
    given = [x.detach().to(_wide(q)).requires_grad_() for x in (q, k, v, sinks) if x is not None]
    with torch.enable_grad():
        out = oracle.packed_attention(*given[:3], cu_seqlens, *given[3:], **_formula(o))
        found = torch.autograd.grad(out, given, g.to(out.dtype), materialize_grads=True)
    g_sinks = found[3] if sinks is not None else q.new_empty(0, dtype=_wide(q))
    return (*(x.to(q.dtype) for x in found[:3]), g_sinks)


paged_attention = SimpleNamespace(forward=_forward, gradients=_gradients)
