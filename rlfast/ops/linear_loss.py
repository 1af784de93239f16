"""A loss of log-probs fused with the head: each chunk's gradients are taken while its logits are there.

Of a token, ∂loss/∂logp is known as soon as the log-probs of its chunk are, if a chunk holds whatever the loss reads
together, as a pair. So per chunk of rows

    z = hidden·weightᵀ + bias                  kept for the chunk alone
    logp                                       the statistics of linear_token_logps
    g = ∂loss/∂logp                            the loss's own kernel
    ∂z = g·(onehot − softmax(z))·…             and from it ∂hidden, ∂weight += ∂zᵀ·hidden, ∂bias += Σ ∂z

which is three GEMMs where a backward that comes later has four, unless it has kept all logits. The sums over chunks
are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlfast.fallback.token_logps import compute_dtype
from rlfast.ops.linear_token_logps import op, op_accumulate
from rlfast.ops.records import ENTROPY, Outputs, Wanted


class Rows(NamedTuple):
    """A head over its rows, as ``rlfast::linear_token_logps`` takes them."""

    hidden: torch.Tensor  # [N, D]
    weight: torch.Tensor  # [V, D]
    bias: torch.Tensor | None  # [V]
    targets: torch.Tensor  # [N]
    mask: torch.Tensor | None  # [N]
    temperatures: torch.Tensor | None  # [N]
    options: tuple  # temperature, softcap, logit_scale

    def part(self, chunk: tuple[slice, ...]) -> tuple:
        """The op's first arguments for the rows of a chunk."""
        hidden, targets, mask, temperatures = (
            x if x is None else _joined([x[rows] for rows in chunk])
            for x in (self.hidden, self.targets, self.mask, self.temperatures)
        )
        return hidden, self.weight, self.bias, targets, mask, temperatures, *self.options


def chunked(
    rows: Rows, chunks: list, coefficients: Callable, needs: tuple, backend: str, entropy: bool = False
) -> tuple:
    """The log-probs of all rows, their entropies if asked for, and the loss's gradients by the head.

    Args:
        rows: the head and its rows.
        chunks: of each chunk the slices of rows that it consists of; every row that counts is in one of them.
        coefficients: of a chunk's number, its log-probs and its entropies: (∂loss/∂logp, ∂loss/∂entropy or None).
        needs: whether hidden, weight and bias need a gradient.
        backend: that was asked for.
        entropy: whether the entropies are computed; they are None otherwise.

    Returns:
        logp [N] and entropies in the compute dtype, 0 in rows of no chunk; the three gradients, None where not needed,
        those of the weight and the bias in the compute dtype.
    """
    hidden, acc = rows.hidden, compute_dtype(rows.hidden)
    wanted = Wanted(ENTROPY if entropy else 0, 0)
    found = [hidden.new_zeros(hidden.shape[0], dtype=acc) if asked else None for asked in (True, entropy)]
    d_hidden = torch.zeros_like(hidden) if needs[0] else None
    sums = [torch.zeros(x.shape, dtype=acc, device=x.device) if need else None
            for x, need in zip(rows[1:3], needs[1:], strict=True)]  # fmt: skip
    for number, chunk in enumerate(chunks):
        head = rows.part(chunk)
        *asked, kept = op(*head, *wanted, True, backend)
        out = Outputs.named(asked, wanted)
        part = out.logp, out.entropy
        d = op_accumulate(*head, out.aux, kept, *coefficients(number, *part), *sums, needs[0], backend)
        at = 0
        for place in chunk:
            end = at + place.stop - place.start
            for whole, some in zip(found, part, strict=True):
                if whole is not None:
                    whole[place] = some[at:end]
            if needs[0]:
                d_hidden[place] = d[at:end]
            at = end
    return *found, (d_hidden, *sums)


def _joined(parts: list) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
