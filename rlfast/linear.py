"""A linear layer whose rows do not depend on each other: what a rollout and a training forward share, to the bit."""

from __future__ import annotations

from rlfast import backends, validate
from rlfast.logps import transformed, unit_stride
from rlfast.ops import linear as linear_op
from rlfast.row_inputs import checked_head


def linear(x, weight, bias=None, *, wide=False):
    """``torch.nn.functional.linear``: y = x·weightᵀ + bias, with float32 sums that are rounded once.

    On the C++ backend a row of y has the same bits whatever the other rows, their number and the number of threads:
    those of a decode step are those of a training forward. torch's GEMMs do not promise that, so neither does the torch
    backend; ``rlfast.ops.linear.batch_invariant`` says it of a backend. The weight is read where it lies: no copy of it
    is kept, so an update in place is never missed.

    Args:
        x: [*, K] float32, bfloat16 or float16 (float64 runs on the torch backend), rows of any stride.
        weight: [N, K] of x's dtype.
        bias: [N] of x's dtype, or None.
        wide: y is float32 (float64 for float64) whatever x's dtype: for logits, which a narrower dtype would round.

    Returns:
        y [*, N] of x's dtype, or float32 if ``wide``. Differentiable in x, weight and bias, once.
        Under autocast, x, weight and bias are cast as ``torch.nn.functional.linear`` casts them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype or device.

    Example:
        >>> layer = torch.nn.Linear(16, 4)
        >>> rlfast.linear(torch.randn(2, 5, 16), layer.weight, layer.bias).shape
        torch.Size([2, 5, 4])
    """
    y = linear_op.usual(x, weight, bias, wide)
    if y is not None:
        return y
    x, weight, bias = checked_head(x, weight, bias, hidden_name="x", sizes="NK")
    validate.flag("wide", wide)
    lead = x.shape[:-1]
    rows = x if x.dim() == 2 else x.reshape(lead.numel(), x.shape[-1])
    y = linear_op.call(unit_stride(rows), unit_stride(weight), bias, wide, backends.requested())
    return y if x.dim() == 2 else y.view(*lead, weight.shape[0])


def head_logits(hidden, weight, bias=None, softcap: float = 0.0, logit_scale: float = 1.0):
    """float32 logits [*, V] of hidden states, which rollouts, scores and the training head share, to the bit."""
    return transformed(linear(hidden, weight, bias, wide=True), softcap, logit_scale)
