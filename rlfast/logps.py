"""Per-token log-probs and their companions, from logits or straight from hidden states."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from rlfast import backends, validate
from rlfast.distributed import vocab
from rlfast.distributed.gather import within
from rlfast.ops import linear as gemm_op
from rlfast.ops import linear_token_logps as linear_op
from rlfast.ops import token_logps as logits_op
from rlfast.ops.records import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, LSE, MEAN_LOGITS, Outputs, Row, Wanted
from rlfast.row_inputs import (
    checked_mask,
    checked_targets,
    checked_temperature,
    columns_of,
    shared_head,
    to_agree,
    vocabulary,
)

# The float32 logits that a backward may find again instead of recomputing them (three GEMMs instead of four).
MEMORY_BUDGET = 2 << 30
LOGITS_AT_ONCE = 64 << 20  # bytes of them where rows are not to depend on one another


class TokenLogps(NamedTuple):
    """What was asked for; the other fields are None. All float32 (float64 for float64 inputs) unless said otherwise."""

    logp: torch.Tensor  # shaped like targets: log p of each target, in nats; differentiable
    lse: torch.Tensor | None = None  # [*]: log Σ exp(z); differentiable
    entropy: torch.Tensor | None = None  # [*]: −Σ p log p, in nats; differentiable
    log_sum_sq_probs: torch.Tensor | None = None  # [*]: log Σ p²
    mean_logits: torch.Tensor | None = None  # [*]: mean of z over the vocabulary
    is_top1: torch.Tensor | None = None  # shaped like targets, bool: the target is the first argmax
    topk_logp: torch.Tensor | None = None  # [*, top_k], descending; ties by the lower id
    topk_ids: torch.Tensor | None = None  # [*, top_k] int64; −1 in skipped rows
    tail_mass: torch.Tensor | None = None  # [*]: the probability outside the top-k


_BITS = {
    "logp": 0,
    "lse": LSE,
    "entropy": ENTROPY,
    "log_sum_sq_probs": LOG_SUM_SQ_PROBS,
    "mean_logits": MEAN_LOGITS,
    "is_top1": IS_TOP1,
}
_TOPK = ("topk_logp", "topk_ids", "tail_mass")


def token_logps(
    logits,
    targets,
    *,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    mask=None,
    outputs=("logp",),
    inplace_backward=False,
    top_k=None,
    process_group=None,
) -> TokenLogps:
    """Log-probability of each target under softmax(logits), and companions, in one read of the logits.

    z = softcap·tanh(logit_scale·logits / softcap) / temperature;  logp = z_target − log Σ_v exp z_v

    Args:
        logits: [*, V] float32, bfloat16 or float16 (float64 runs on the torch backend), any strides.
        targets: [*] or [*, K] int32 or int64 in [0, V), under the mask too; −100 marks a token to skip.
        temperature: a float > 0, or a tensor of them shaped like the rows [*].
        softcap: None, or a float > 0 (Gemma 2).
        logit_scale: a float that multiplies the logits first (Cohere, Granite).
        mask: [*], zero where a row is skipped: its outputs are 0 and its gradient is 0.
        outputs: what to compute: "logp", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"; with ``top_k``
            also "topk_logp", "topk_ids", "tail_mass" (all three come together).
        inplace_backward: write the gradient over the logits, not to be used afterwards: a second backward, or another
            one that saved them, raises. Logits that share memory among rows get a gradient of their own all the same.
        top_k: how many of the largest log-probs to return.
        process_group: the ranks that the vocabulary is shared out over: the logits are this rank's columns, everything
            else is the same on every rank. A ``ProcessGroup``, a ``DeviceMesh`` of one dimension, a
            ``rlfast.distributed.VocabParallel``; of logits that are a ``DTensor`` with Shard(-1), None is its mesh.

    Returns:
        TokenLogps, float32. ``logp``, ``lse`` and ``entropy`` are differentiable with respect to the logits.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range. On a GPU a target out of
            range is not looked for (that would synchronise), nor in compiled code: its row is NaN.

    Reference:
        The numerics contract in docs/numerics.md; −softplus(lse_others − z_t) keeps log p ≤ 0 and exact as p → 1.

    Example:
        >>> out = rlfast.token_logps(torch.randn(2, 5, 100), torch.randint(100, (2, 5)), outputs=("logp", "entropy"))
        >>> out.logp.shape
        torch.Size([2, 5])
    """
    said = functools.partial(to_agree, "log-probs", logits, targets, top_k, outputs)
    shards, logits, columns = columns_of(process_group, logits, said)
    lead = logits.shape[:-1]
    wanted = _wanted(outputs, top_k, columns)
    targets, mask, temperatures, temperature = _rows(lead, columns, targets, mask, temperature, ("logits", logits))
    softcap = 0.0 if softcap is None else validate.positive("softcap", softcap)
    logit_scale = validate.finite("logit_scale", logit_scale)
    candidates = targets.shape[-1] if targets.dim() > len(lead) else 0
    if len(lead) not in (1, 2):
        logits, targets, mask, temperatures = _rows_flattened(logits, len(lead), targets, mask, temperatures)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        logits = logits.contiguous()
    if shards is not None:
        rows = vocab.rows_like(
            shards, logits.shape[:-1], targets, mask, temperatures, (temperature, softcap, logit_scale)
        )
        inplace = bool(inplace_backward) and not _overlaps(logits)
        return _named(vocab.token_logps(logits, rows, wanted, inplace, backends.requested()), lead, wanted, candidates)
    asked = logits_op.call(
        logits, targets, mask, temperatures, temperature, softcap, logit_scale, *wanted,
        bool(inplace_backward) and not _overlaps(logits), backends.requested(),
    )  # fmt: skip
    return _named(asked, lead, wanted, candidates)


@within
def linear_token_logps(
    hidden,
    weight,
    targets,
    bias=None,
    *,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    mask=None,
    outputs=("logp",),
    inplace_backward=False,
    top_k=None,
    memory_budget=MEMORY_BUDGET,
    batch_invariant=False,
    process_group=None,
) -> TokenLogps:
    """``token_logps(hidden @ weight.T + bias, targets)``, in tiles that stay in the cache.

    The logits are in memory only where a backward will want them and they fit ``memory_budget``; 0 never has them.

    Args:
        hidden: [*, D] float32, bfloat16 or float16: the last hidden states.
        weight: [V, D] of hidden's dtype: the head. Frozen if it needs no gradient; then its gradient costs nothing.
        targets: [*] or [*, K] int32 or int64 in [0, V); −100 marks a token to skip. Skipped tokens are not projected on
            the CPU.
        bias: [V] of hidden's dtype, or None.
        memory_budget: bytes that the forward may keep for the backward. If the logits fit (4·N·V in
            float32), they are kept and the backward has two GEMMs; else it recomputes them in tiles and has three. 0
            always recomputes.
        batch_invariant: a row has the same bits whatever the other rows are, those of ``rlfast.rollout`` too, where
            ``rlfast.linear`` promises it. The backward makes the logits again, a few rows at a time, by torch's GEMMs.
        temperature, softcap, logit_scale, mask, outputs, top_k: as in ``token_logps``.
        inplace_backward: as in ``token_logps``, so that a call can be swapped; there are no logits to write over.
        process_group: as in ``token_logps``; weight and bias are this rank's rows. Of a weight that is a ``DTensor``
            with Shard(0), None is its mesh; ``rlfast.distributed.Gathered()`` says that the ranks have tokens of their
            own instead, as under FSDP2, and gathers it.

    Returns:
        TokenLogps, float32. ``logp``, ``lse`` and ``entropy`` are differentiable in hidden, weight and bias.
        Under autocast, hidden, weight and bias are cast as ``torch.nn.functional.linear`` casts them.

    Raises:
        TypeError, ValueError: as in ``token_logps``.

    Example:
        >>> out = rlfast.linear_token_logps(torch.randn(2, 5, 16), torch.randn(100, 16), torch.randint(100, (2, 5)))
        >>> out.logp.shape
        torch.Size([2, 5])
    """
    said = functools.partial(to_agree, "log-probs", hidden, targets, top_k, outputs)
    shards, hidden, weight, bias = shared_head(process_group, hidden, weight, bias, said)
    lead, columns = hidden.shape[:-1], vocabulary(weight, shards)
    wanted = _wanted(outputs, top_k, columns)
    targets, mask, temperatures, temperature = _rows(lead, columns, targets, mask, temperature, ("hidden", hidden))
    softcap = 0.0 if softcap is None else validate.positive("softcap", softcap)
    logit_scale = validate.finite("logit_scale", logit_scale)
    budget = validate.at_least("memory_budget", memory_budget, 0)
    candidates = targets.shape[-1] if targets.dim() > len(lead) else 0
    if len(lead) != 1:
        hidden, targets, mask, temperatures = _rows_flattened(hidden, len(lead), targets, mask, temperatures)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    widest = weight.shape[0] if shards is None else shards.widest
    keep = needs_grad and max(4, hidden.element_size()) * hidden.shape[0] * widest <= budget
    transform = temperature, softcap, logit_scale
    if shards is not None:
        if batch_invariant:
            validate.fail("batch_invariant", "False with a process_group", "True")
        rows = vocab.rows_like(shards, hidden.shape[:1], targets, mask, temperatures, transform)
        given = unit_stride(hidden), unit_stride(weight), bias, rows, wanted, keep, backends.requested()
        return _named(vocab.linear_token_logps(*given), lead, wanted, candidates)
    if batch_invariant:
        asked = _invariant(hidden, weight, bias, targets, mask, temperatures, transform, wanted, needs_grad)
        return _named(asked, lead, wanted, candidates)
    asked = linear_op.op(
        unit_stride(hidden), unit_stride(weight), bias, targets, mask, temperatures, *transform, *wanted, keep,
        backends.requested(),
    )  # fmt: skip
    return _named(asked[:-1], lead, wanted, candidates)


def _invariant(hidden, weight, bias, targets, mask, temperatures, transform, wanted: Wanted, needs_grad: bool):
    """The op's outputs by ``linear`` and ``token_logps``, a few rows at a time; a backward makes the logits again."""
    backend, (temperature, *transform) = backends.requested(), transform

    def some(x, w, b, t, m, warm):
        logits = transformed(gemm_op.call(unit_stride(x), unit_stride(w), b, True, backend), *transform)
        return tuple(logits_op.call(logits, t, m, warm, temperature, 0.0, 1.0, *wanted, False, backend))

    parts, rows = [], max(1, LOGITS_AT_ONCE // (4 * weight.shape[0]))
    for start in range(0, max(hidden.shape[0], 1), rows):
        per_row = (x if x is None else x[start : start + rows] for x in (targets, mask, temperatures))
        given = hidden[start : start + rows], weight, bias, *per_row
        parts.append(checkpoint(some, *given, use_reentrant=False) if needs_grad else some(*given))
    # of ``aux`` a column is a token, of the others a row
    return [torch.cat(x, dim=int(place == 1)) for place, x in enumerate(zip(*parts, strict=True))]


def transformed(logits, softcap: float, logit_scale: float):
    """softcap·tanh(logit_scale·logits / softcap); no soft-cap where it is 0."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _overlaps(x) -> bool:
    """Whether two elements may be in one place, as in an expanded tensor."""
    extent = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return True
            extent += stride * (size - 1)
    return False


def unit_stride(x):
    """x, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _wanted(outputs, top_k, vocab: int) -> Wanted:
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        validate.fail("outputs", 'a tuple of names such as ("logp",)', repr(outputs), TypeError)
    bits = 0
    for name in outputs:
        if name in _BITS:
            bits |= _BITS[name]
        elif name not in _TOPK:
            validate.fail("outputs", f"names among {(*_BITS, *_TOPK)}", repr(name))
        elif top_k is None:
            validate.fail("top_k", f"an int, since outputs asks for {name!r}", "None")
    if top_k is None:
        return Wanted(bits, 0)
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        validate.fail("top_k", "an int", repr(top_k), TypeError)
    if not 1 <= top_k <= vocab:
        validate.fail("top_k", f"1 to the vocabulary of {vocab}", top_k)
    return Wanted(bits, top_k)


def _rows(lead, vocab: int, targets, mask, temperature, source):
    """Targets, mask and temperature checked against the rows [*lead] of ``source``, as the op wants them."""
    targets, mask = checked_targets(lead, vocab, targets, source), checked_mask(lead, mask, source)
    return targets, mask, *checked_temperature("temperature", lead, temperature, source)


def _rows_flattened(x, lead: int, targets, mask, temperatures):
    """The leading dimensions merged into one."""
    n = math.prod(x.shape[:lead])
    candidates = targets.shape[lead:]
    flat = [y if y is None else y.reshape(n) for y in (mask, temperatures)]
    return x.reshape(n, x.shape[-1]), targets.reshape(n, *candidates), *flat


def _named(asked, lead, wanted: Wanted, candidates: int) -> TokenLogps:
    """What was asked for, by name, with the input's leading dimensions. ``candidates`` is 0 for targets [*lead]."""
    per_target = (*lead, candidates) if candidates else lead
    if wanted == (0, 0):
        return TokenLogps(asked[0] if asked[0].shape == per_target else asked[0].reshape(per_target))
    out, row = Outputs.named(asked, wanted), Row.of(candidates or 1, wanted)

    def shaped(x, shape):
        return x if x is None or x.shape == shape else x.reshape(shape)

    def saved(index):
        return shaped(out.aux[index], lead) if index >= 0 else None

    return TokenLogps(
        shaped(out.logp, per_target),
        shaped(out.lse, lead),
        shaped(out.entropy, lead),
        saved(row.log_sum_sq_probs),
        saved(row.mean_logits),
        shaped(out.is_top1, per_target),
        shaped(out.topk_logp, (*lead, wanted.top_k)),
        shaped(out.topk_ids, (*lead, wanted.top_k)),
        saved(row.tail_mass),
    )
