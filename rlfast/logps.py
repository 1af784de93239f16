"""Per-token log-probs and their companions, from logits or straight from hidden states."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from rlfast import backends, validate
from rlfast.ops import linear as gemm_op
from rlfast.ops import linear_token_logps as linear_op
from rlfast.ops import token_logps as logits_op
from rlfast.ops.records import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, LSE, MEAN_LOGITS, Outputs, Row, Wanted

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
_PLAIN = (torch.Tensor, torch.nn.Parameter)  # tensors with values to look at: a fake one has none
_INTS = (torch.int64, torch.int32)


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
    validate.tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        validate.fail("logits", "shape [*, V] with V > 0", validate.shape(logits))
    lead, vocab = logits.shape[:-1], logits.shape[-1]
    wanted = _wanted(outputs, top_k, vocab)
    targets, mask, temperatures, temperature = _rows(lead, vocab, targets, mask, temperature, ("logits", logits))
    softcap = 0.0 if softcap is None else validate.positive("softcap", softcap)
    logit_scale = validate.finite("logit_scale", logit_scale)
    candidates = targets.shape[-1] if targets.dim() > len(lead) else 0
    if len(lead) not in (1, 2):
        logits, targets, mask, temperatures = _rows_flattened(logits, len(lead), targets, mask, temperatures)
    if logits.stride(-1) != 1 and vocab > 1:
        logits = logits.contiguous()
    asked = logits_op.call(
        logits, targets, mask, temperatures, temperature, softcap, logit_scale, *wanted,
        bool(inplace_backward) and not _overlaps(logits), backends.requested(),
    )  # fmt: skip
    return _named(asked, lead, wanted, candidates)


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
    hidden, weight, bias = checked_head(hidden, weight, bias)
    lead, vocab = hidden.shape[:-1], weight.shape[0]
    wanted = _wanted(outputs, top_k, vocab)
    targets, mask, temperatures, temperature = _rows(lead, vocab, targets, mask, temperature, ("hidden", hidden))
    softcap = 0.0 if softcap is None else validate.positive("softcap", softcap)
    logit_scale = validate.finite("logit_scale", logit_scale)
    budget = validate.at_least("memory_budget", memory_budget, 0)
    candidates = targets.shape[-1] if targets.dim() > len(lead) else 0
    if len(lead) != 1:
        hidden, targets, mask, temperatures = _rows_flattened(hidden, len(lead), targets, mask, temperatures)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    keep = needs_grad and max(4, hidden.element_size()) * hidden.shape[0] * vocab <= budget
    if batch_invariant:
        transform = temperature, softcap, logit_scale
        asked = _invariant(hidden, weight, bias, targets, mask, temperatures, transform, wanted, needs_grad)
        return _named(asked, lead, wanted, candidates)
    asked = linear_op.op(
        unit_stride(hidden), unit_stride(weight), bias, targets, mask, temperatures, temperature, softcap,
        logit_scale, *wanted, keep, backends.requested(),
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


def checked_targets(lead, vocab: int, targets, source, own: str = "targets"):
    """Targets, called ``own``, checked against the rows [*lead] of ``source``: int64 and contiguous."""
    name, x = source
    validate.tensor(own, targets, _INTS)
    if targets.shape[: len(lead)] != lead or targets.dim() > len(lead) + 1:
        validate.fail(own, f"shape {tuple(lead)} or {(*lead, 'K')} like the rows of {name}", validate.shape(targets))
    if targets.dim() > len(lead) and targets.shape[-1] == 0:
        validate.fail(own, "at least one candidate a row", validate.shape(targets))
    validate.same_device(own, targets, name, x)
    if targets.dtype != torch.int64:
        targets = targets.long()
    if not targets.is_contiguous():
        targets = targets.contiguous()
    if x.device.type == "cpu" and type(targets) in _PLAIN and not torch.compiler.is_compiling():
        _in_range(targets, vocab, own)
    return targets


def checked_mask(lead, mask, source):
    """A mask checked against the rows [*lead] of ``source``: bool and contiguous; None stays None."""
    if mask is None:
        return None
    name, x = source
    validate.tensor("mask", mask, validate.MASKS)
    if mask.shape != lead:
        validate.fail("mask", f"shape {tuple(lead)} like the rows of {name}", validate.shape(mask))
    validate.same_device("mask", mask, name, x)
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()


def checked_temperature(argument: str, lead, temperature, source):
    """(None, a float), or (one a row of ``source``, contiguous, 1.0)."""
    if not isinstance(temperature, torch.Tensor):
        return None, validate.positive(argument, temperature)
    name, x = source
    validate.tensor(argument, temperature)
    if temperature.dim() == 0:
        temperature = temperature.expand(lead)
    if temperature.shape != lead:
        validate.fail(argument, f"shape {tuple(lead)} like the rows of {name}", validate.shape(temperature))
    validate.same_device(argument, temperature, name, x)
    if temperature.requires_grad:
        validate.fail(argument, "a tensor that needs no gradient", "requires_grad=True")
    if temperature.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((temperature >= validate.LEAST) & (temperature <= validate.MOST))
        if wrong.any():
            wanted = f"values from {validate.LEAST} to {validate.MOST}"
            validate.fail(argument, wanted, temperature[wrong][0].item())
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return temperature.to(wide).contiguous(), 1.0


def _in_range(targets, vocab: int, own: str) -> None:
    if targets.numel() == 0:
        return
    if targets.numel() <= 32:  # a quarter of the time
        ids = targets.flatten().tolist()
        low, high = min(ids), max(ids)
    else:
        low, high = (int(x) for x in torch.aminmax(targets))
    if high >= vocab or low < 0:
        wrong = ((targets < 0) & (targets != validate.IGNORE_INDEX)) | (targets >= vocab)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            wanted = f"values in [0, {vocab}) or {validate.IGNORE_INDEX}"
            validate.fail(own, wanted, f"{targets[at].item()} at {at}")


def checked_head(
    hidden, weight, bias, prefix: str = "", hidden_name: str | None = None, sizes: str = "VD",
    weight_name: str | None = None,
):  # fmt: skip
    """A head checked, and cast by autocast; ``prefix`` is that of its arguments' names, ``sizes`` are of its weight."""
    h, w, b = (prefix + name for name in ("hidden", "weight", "bias"))
    columns, depth = sizes
    h, w = hidden_name or h, weight_name or w
    for name, x in ((h, hidden), (w, weight), *(((b, bias),) if bias is not None else ())):
        validate.tensor(name, x)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dim() < 1 or hidden.shape[-1] == 0:
        validate.fail(h, f"shape [*, {depth}] with {depth} > 0", validate.shape(hidden))
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        validate.fail(w, f"shape ({columns}, {hidden.shape[-1]}) to match {h}", validate.shape(weight))
    if bias is not None and bias.shape != weight.shape[:1]:
        validate.fail(b, f"shape {tuple(weight.shape[:1])} like the rows of {w}", validate.shape(bias))
    for name, x in ((w, weight), (b, bias)):
        if x is not None:
            validate.same_device(name, x, h, hidden)
            if x.dtype != hidden.dtype:
                validate.fail(name, f"dtype {hidden.dtype} like {h}", str(x.dtype), TypeError)
    return hidden, weight, bias


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
