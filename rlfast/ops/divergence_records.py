"""What the divergence ops pass to their backends and save for their backward.

A divergence seen from the other side is another one: KL(T‖S) is the reverse KL of T to S, JSD_β(S, T) = JSD_{1−β}(T,
S).
So a backward knows one gradient, that of its ``own`` side, and is called once for each side that needs one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.ops.records import ENTROPY, LSE

REF_LSE = 32  # beside the bits of records.py
KINDS = ("forward_kl", "reverse_kl", "jsd")
FORWARD, REVERSE, JSD = range(3)


class Measure(NamedTuple):
    """Which divergence of S (own) and T (other)."""

    kind: int  # FORWARD: KL(T‖S), REVERSE: KL(S‖T), JSD: β·KL(T‖M) + (1 − β)·KL(S‖M)
    beta: float  # of the JSD: 0 < β < 1

    def swapped(self) -> Measure:
        """The same number as a function of (T, S)."""
        return Measure((REVERSE, FORWARD, JSD)[self.kind], 1.0 - self.beta)


class Head(NamedTuple):
    """logits = hidden·weightᵀ + bias."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]


class Outputs(NamedTuple):
    """The tensors of a forward, as a backend fills them, float32 (float64 for float64); None: not asked for.

    ``aux`` [·, *lead] begins as that of ``token_logps`` for the student (peak, log_sum, logp of each candidate, entropy
    if asked for); then come peak and log_sum of the teacher, and two centres, the student's and the teacher's, each
    as a sum
    of two numbers: where p is near 1 a gradient is the difference of a centre and a number like it. The centre of p
    beside q
    is KL(p‖M) for a JSD; for a KL it is E_p[gap], gap = (z_p − peak_p) − (z_q − peak_q); a gradient S − T needs none,
    and the room is a backend's own.
    """

    value: torch.Tensor  # [*lead]
    aux: torch.Tensor
    logp: torch.Tensor | None  # shaped like targets
    lse: torch.Tensor | None  # [*lead]
    entropy: torch.Tensor | None  # [*lead]
    ref_lse: torch.Tensor | None  # [*lead]

    def asked(self) -> list[torch.Tensor]:
        """What the op returns."""
        return [x for x in self if x is not None]

    @staticmethod
    def named(asked, targets: bool, outputs: int) -> Outputs:
        """The inverse of ``asked``."""
        rest = iter(asked[2:])
        there = (targets, outputs & LSE, outputs & ENTROPY, outputs & REF_LSE)
        return Outputs(*asked[:2], *(next(rest) if x else None for x in there))


class Saved(NamedTuple):
    """What a backward knows of each row, from its own side."""

    aux: torch.Tensor  # [2 + candidates (+ 1), *lead]: peak, log_sum, logp of each candidate, entropy
    other: torch.Tensor  # [2, *lead]: peak, log_sum
    centre: torch.Tensor  # [2, *lead]: high and low part


def candidates_of(targets: torch.Tensor | None, lead: int) -> int:
    """How many targets a row has."""
    return 0 if targets is None else targets.shape[-1] if targets.dim() > lead else 1


def student_rows(candidates: int, outputs: int) -> int:
    """Rows of ``aux`` before the teacher's."""
    return 2 + candidates + (1 if outputs & ENTROPY else 0)


def saved_of(aux: torch.Tensor, candidates: int, outputs: int, teacher: bool) -> Saved:
    """Views of ``aux`` from the side of the student or of the teacher."""
    s = student_rows(candidates, outputs)
    if teacher:
        return Saved(aux[s : s + 2], aux[:2], aux[s + 4 : s + 6])
    return Saved(aux[:s], aux[s : s + 2], aux[s + 2 : s + 4])


def allocate(like: torch.Tensor, lead: tuple, targets: torch.Tensor | None, outputs: int) -> Outputs:
    """Uninitialised outputs on the device of ``like``."""
    acc = torch.float64 if like.dtype == torch.float64 else torch.float32
    rows = student_rows(candidates_of(targets, len(lead)), outputs) + 6

    def empty(shape, there=True):
        return torch.empty(shape, dtype=acc, device=like.device) if there else None

    return Outputs(
        empty(lead),
        empty((rows, *lead)),
        None if targets is None else empty(targets.shape),
        *(empty(lead, outputs & bit) for bit in (LSE, ENTROPY, REF_LSE)),
    )
