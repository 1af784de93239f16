"""The checks that a loss makes of its fields, once, and the layout that its op wants."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from rlfast import validate
from rlfast.ops.loss_records import Fields

_INTS = (torch.int32, torch.int64)


class Given(NamedTuple):
    """The arguments of a loss as they came."""

    logp: object
    old_logp: object
    ref_logp: object
    rollout_logp: object
    adv: object
    entropy: object
    weights: object
    extra: object
    mask: object
    keep: object
    cu_seqlens: object
    num_items: object
    full_kl: object = None


def checked(
    given: Given, name: str, needs: tuple[str, ...], idle: tuple[str, ...], coefs: tuple, first: str = "logp"
) -> Fields:
    """The op's fields, or an error that names the argument.

    Args:
        given: the call's arguments.
        name: of the loss, for its messages.
        needs: names of the fields that this loss cannot do without.
        idle: names of those that it would not read.
        coefs: (beta, entropy_coef), numbers or 0-dim tensors.
        first: what the caller knows as the tokens, where that is not ``logp``.
    """
    for field in needs:
        if getattr(given, field) is None:
            validate.fail(field, f"a tensor: {name} needs it", "None")
    for field in idle:
        if getattr(given, field) is not None:
            validate.fail(field, f"None: {name} reads none", type(getattr(given, field)).__name__)
    logp = given.logp
    validate.tensor("logp", logp)
    if logp.dim() not in (1, 2):
        validate.fail("logp", "shape [B, T], or [N] with cu_seqlens", validate.shape(logp))
    cu_seqlens = boundaries(given.cu_seqlens, logp, first)
    adv = given.adv
    if adv is None:
        adv = torch.zeros((), dtype=torch.float32, device=logp.device).expand(logp.shape)
    weights = _by_sequence("weights", given.weights, logp, cu_seqlens, first)
    old, ref, rollout, extra = (
        _constant(field, getattr(given, field), logp, first)
        for field in ("old_logp", "ref_logp", "rollout_logp", "extra")
    )
    mask, keep = (_flags(field, getattr(given, field), logp, first) for field in ("mask", "keep"))
    return Fields(
        in_rows(logp), old, ref, rollout, _by_sequence("adv", adv, logp, cu_seqlens, first),
        like_first("entropy", given.entropy, logp, first), weights if weights is None else weights.contiguous(), extra,
        mask, keep, cu_seqlens, counted(given.num_items, logp), _coefs(coefs, logp),
    )  # fmt: skip


def in_rows(x):
    """With the last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _float(x, logp):
    """float64 beside a logp of another dtype becomes float32; beside float64 all are float64."""
    if (x.dtype == torch.float64) == (logp.dtype == torch.float64):
        return x
    return x.to(torch.float64 if logp.dtype == torch.float64 else torch.float32)


def like_first(name: str, x, logp, other: str = "logp"):
    """A float tensor of the shape, the device and, as to float64, the dtype of another."""
    if x is None:
        return None
    validate.tensor(name, x)
    if x.shape != logp.shape:
        validate.fail(name, f"shape {tuple(logp.shape)} like {other}", validate.shape(x))
    validate.same_device(name, x, other, logp)
    return in_rows(_float(x, logp))


def _constant(name: str, x, logp, first: str):
    return x if x is None else like_first(name, _without_gradient(name, x), logp, first)


def _without_gradient(name: str, x):
    if isinstance(x, torch.Tensor) and x.requires_grad:
        validate.fail(name, "a tensor that needs no gradient", "requires_grad=True")
    return x


def _by_sequence(name: str, x, logp, cu_seqlens, first: str):
    """A field of tokens, from one of tokens or of sequences."""
    if x is None:
        return None
    validate.tensor(name, _without_gradient(name, x))
    validate.same_device(name, x, first, logp)
    x = _float(x, logp)
    if x.shape == logp.shape:
        return x if x.stride(-1) in (0, 1) or x.shape[-1] <= 1 else x.contiguous()
    rows = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is None and logp.dim() == 2 and tuple(x.shape) in ((rows,), (rows, 1)):
        return x.reshape(rows, 1).expand(logp.shape)
    if cu_seqlens is not None and tuple(x.shape) == (rows,):
        return torch.repeat_interleave(x, cu_seqlens.diff(), output_size=logp.shape[0])
    validate.fail(name, f"shape {tuple(logp.shape)} like {first}, or ({rows},), one a sequence", validate.shape(x))


def _flags(name: str, x, logp, first: str):
    x = validate.mask_like(x, first, logp, name)
    return x if x is None else in_rows(x)


def boundaries(cu_seqlens, logp, name: str = "logp", own: str = "cu_seqlens"):
    """Where packed rows begin and end, int64; None stays None."""
    if cu_seqlens is None:
        return None
    validate.tensor(own, cu_seqlens, _INTS)
    if logp.dim() != 1:
        validate.fail(name, f"shape [N] with {own}", validate.shape(logp))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        validate.fail(own, "shape [B + 1]", validate.shape(cu_seqlens))
    if cu_seqlens.device.type != "cpu":  # on the host it can be looked at, beside tokens on any device
        validate.same_device(own, cu_seqlens, name, logp)
    if validate.looked_at(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != logp.shape[0] or any(b < a for a, b in pairwise(ends)):
            validate.fail(own, f"0 = c[0] <= c[1] <= … <= c[B] = {logp.shape[0]}", str(ends[:8]))
    return cu_seqlens.to(logp.device, torch.int64, non_blocking=True).contiguous()


def counted(num_items, logp):
    """float32 []: a number that replaces the batch's own count; None stays None."""
    if not isinstance(num_items, torch.Tensor):
        return number_of("num_items", None if num_items is None else validate.positive("num_items", num_items), logp)
    number = number_of("num_items", num_items, logp)
    if validate.looked_at(number):
        validate.positive("num_items", number.item())
    return number


def number_of(name: str, x, logp):
    """float32 []: a number or a 0-dim tensor; None stays None."""
    if x is None:
        return None
    if not isinstance(x, torch.Tensor):
        # a fill, which a CUDA graph captures; a copy from the host it does not
        return torch.full((), validate.finite(name, x), dtype=torch.float32, device=logp.device)
    if x.dim() != 0:
        validate.fail(name, "a number or a 0-dim tensor", validate.shape(x))
    return x.detach().to(device=logp.device, dtype=torch.float32)


def _coefs(coefs: tuple, logp):
    """float32 [2]: factors of beta and entropy_coef; None if both are numbers."""
    if not (isinstance(coefs[0], torch.Tensor) or isinstance(coefs[1], torch.Tensor)):
        return None
    for name, x in zip(("beta", "entropy_coef"), coefs, strict=True):
        if isinstance(x, torch.Tensor) and (x.dim() != 0 or x.requires_grad):
            validate.fail(name, "a number or a 0-dim tensor without gradient", validate.shape(x))
    one = torch.ones((), dtype=torch.float32, device=logp.device)
    return torch.stack([x.to(one) if isinstance(x, torch.Tensor) else one for x in coefs])
