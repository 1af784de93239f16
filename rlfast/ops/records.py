"""What the log-prob ops pass to their backends and save for their backward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# The optional outputs of a log-prob op, as bits of its `outputs` argument. Top-k is asked for by top_k > 0.
ENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1, LSE = 1, 2, 4, 8, 16


class Transform(NamedTuple):
    """z = softcap·tanh(logit_scale·logits / softcap) / temperature."""

    temperature: float | torch.Tensor  # a float, or float32 [*lead], contiguous
    softcap: float  # 0.0: none
    logit_scale: float


class Wanted(NamedTuple):
    """What a forward computes beside logp."""

    outputs: int  # the bits above
    top_k: int  # 0: no top-k


class Row(NamedTuple):
    """Indices into ``aux`` [rows, *lead] float32: what the backward needs, then what is only returned.

    The log-sum-exp is kept as ``peak`` + ``log_sum`` (the row's maximum and log Σ exp(z − peak)), so that
    p = exp((z − peak) − log_sum) keeps its digits under a large common offset. The log-probs and the entropy are
    copies, because callers change the returned ones in place.
    """

    peak: int  # 0
    log_sum: int  # 1
    logp: int  # 2: the first of K
    entropy: int  # -1: not there
    log_sum_sq_probs: int
    mean_logits: int
    tail_mass: int
    rows: int

    @staticmethod
    def of(candidates: int, wanted: Wanted) -> Row:
        """The layout for K candidates a row and the wanted outputs."""
        at, where = 2 + candidates, []
        for there in (
            wanted.outputs & ENTROPY,
            wanted.outputs & LOG_SUM_SQ_PROBS,
            wanted.outputs & MEAN_LOGITS,
            wanted.top_k,
        ):
            where.append(at if there else -1)
            at += 1 if there else 0  # not a bool: torch 2.11 adds that to a symbolic size as a sympy truth
        return Row(0, 1, 2, *where, at)


def aux_rows(candidates: int, wanted: Wanted) -> int:
    """``Row.of(candidates, wanted).rows``, without the µs that the layout takes."""
    kept = wanted.outputs & (ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS)
    return 2 + candidates + kept.bit_count() + (1 if wanted.top_k else 0)


class Outputs(NamedTuple):
    """The tensors of a forward, as a backend fills them. What was not asked for has no elements."""

    logp: torch.Tensor  # shaped like targets: [*lead] or [*lead, K]
    aux: torch.Tensor  # [Row.rows, *lead]
    lse: torch.Tensor  # [*lead]
    entropy: torch.Tensor  # [*lead]
    is_top1: torch.Tensor  # shaped like targets, bool
    topk_logp: torch.Tensor  # [*lead, top_k], descending
    topk_ids: torch.Tensor  # [*lead, top_k] int64; -1 in skipped rows

    def asked(self, wanted: Wanted) -> list[torch.Tensor]:
        """What the op returns: an output that nobody wants is neither allocated nor wrapped (1.3 µs each)."""
        out = list(self[:2])
        if wanted.outputs & LSE:
            out.append(self.lse)
        if wanted.outputs & ENTROPY:
            out.append(self.entropy)
        if wanted.outputs & IS_TOP1:
            out.append(self.is_top1)
        if wanted.top_k:
            out += self[5:]
        return out

    @staticmethod
    def named(asked, wanted: Wanted) -> Outputs:
        """The inverse of ``asked``, with None for what was not asked for."""
        rest = iter(asked[2:])
        lse = next(rest) if wanted.outputs & LSE else None
        entropy = next(rest) if wanted.outputs & ENTROPY else None
        is_top1 = next(rest) if wanted.outputs & IS_TOP1 else None
        topk = (next(rest), next(rest)) if wanted.top_k else (None, None)
        return Outputs(*asked[:2], lse, entropy, is_top1, *topk)


_NOTHING = torch.empty(0)


def allocate(like: torch.Tensor, lead: tuple, targets: torch.Tensor, wanted: Wanted) -> Outputs:
    """Uninitialised outputs on the device of ``like``: float32, or float64 for float64."""
    device, acc = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
    candidates = targets.shape[-1] if targets.dim() > len(lead) else 1
    nothing = _NOTHING if device.type == "cpu" else torch.empty(0, device=device)
    topk = (*lead, wanted.top_k)
    # new_empty without a dtype to parse takes half the time: 1.4 µs a tensor
    empty = like.new_empty if like.dtype == acc else functools.partial(torch.empty, dtype=acc, device=device)
    return Outputs(
        empty(targets.shape),
        empty((aux_rows(candidates, wanted), *lead)),
        empty(lead) if wanted.outputs & LSE else nothing,
        empty(lead) if wanted.outputs & ENTROPY else nothing,
        torch.empty(targets.shape, dtype=torch.bool, device=device) if wanted.outputs & IS_TOP1 else nothing,
        empty(topk) if wanted.top_k else nothing,
        torch.empty(topk, dtype=torch.int64, device=device) if wanted.top_k else nothing,
    )
