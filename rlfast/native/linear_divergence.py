"""Divergences of two heads by the compiled kernels: the ``cpu`` backend.

The arguments are listed in ``csrc/bindings_divergence.h``. ``kept`` holds the float32 logits, before the transform, of
the rows that count, one after the other from its first row on.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native.divergence import option_arguments
from rlfast.native.linear_token_logps import row_stride
from rlfast.native.token_logps import DTYPES, address
from rlfast.ops.divergence_records import Head, Measure, Saved, allocate


def _dense(head: Head) -> Head:
    return head if head.bias is None else head._replace(bias=head.bias.contiguous())


def _inputs(head: Head, other: Head, targets, mask, transform, other_transform, measure) -> tuple:
    matrices = (head.hidden, head.weight, other.hidden, other.weight)
    return (
        *map(address, (*head, *other)), DTYPES[head.hidden.dtype], *head.hidden.shape, other.hidden.shape[1],
        head.weight.shape[0], *map(row_stride, matrices),
        *option_arguments(targets, mask, transform, other_transform, measure, 1),
    )  # fmt: skip


def forward(head: Head, ref_head: Head, targets, mask, transform, ref_transform, measure: Measure, outputs, keep):
    """See ``rlfast/ops/linear_divergence.py``."""
    n, vocab = head.hidden.shape[0], head.weight.shape[0]
    head, ref_head = _dense(head), _dense(ref_head)
    out = allocate(head.hidden, (n,), targets, outputs)
    kept = [torch.empty((n, vocab) if keep else (0,), dtype=torch.float32) for _ in range(2)]
    backends.extension("cpu").linear_divergence_forward(
        *_inputs(head, ref_head, targets, mask, transform, ref_transform, measure),
        *map(address, (out.value, out.logp, out.lse, out.entropy, out.ref_lse, out.aux, *kept)),
        backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out, *kept


def backward(
    own: Head, other: Head, targets, mask, transform, other_transform, measure: Measure, saved: Saved, grads, needs,
    kept, other_kept, sums, dtype,
):  # fmt: skip
    """See ``rlfast/ops/linear_divergence.py``."""
    own, other = _dense(own), _dense(other)
    returned = [need and (i == 0 or sums is None) for i, need in enumerate(needs)]
    out = tuple(torch.empty(x.shape if there else (0,), dtype=dtype) for x, there in zip(own, returned, strict=True))
    written = out if sums is None else (out[0], *sums)
    backends.extension("cpu").linear_divergence_backward(
        *_inputs(own, other, targets, mask, transform, other_transform, measure),
        *map(address, (*saved, *grads, kept, other_kept, *written)), dtype == torch.float32, sums is not None,
        backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out
