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


def checked(given: Given, name: str, needs: tuple[str, ...], coefs: tuple) -> Fields:
    """The op's fields, or an error that names the argument.

    Args:
        given: the call's arguments.
        name: of the loss, for its messages.
        needs: names of the fields that this loss cannot do without.
        coefs: (beta, entropy_coef), numbers or 0-dim tensors.
    """
    for field in needs:
        if getattr(given, field) is None:
            validate.fail(field, f"a tensor: {name} needs it", "None")
    logp = given.logp
    validate.tensor("logp", logp)
    if logp.dim() not in (1, 2):
        validate.fail("logp", "shape [B, T], or [N] with cu_seqlens", validate.shape(logp))
    cu_seqlens = _boundaries(given.cu_seqlens, logp)
    adv = given.adv
    if adv is None:
        adv = torch.zeros((), dtype=torch.float32, device=logp.device).expand(logp.shape)
    weights = _by_sequence("weights", given.weights, logp, cu_seqlens)
    return Fields(
        _laid(logp), _constant("old_logp", given.old_logp, logp), _constant("ref_logp", given.ref_logp, logp),
        _constant("rollout_logp", given.rollout_logp, logp), _by_sequence("adv", adv, logp, cu_seqlens),
        _like("entropy", given.entropy, logp), weights if weights is None else weights.contiguous(),
        _constant("extra", given.extra, logp), _flags("mask", given.mask, logp), _flags("keep", given.keep, logp),
        cu_seqlens, _count(given.num_items, logp), _coefs(coefs, logp),
    )  # fmt: skip


def _laid(x):
    """The last dimension contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _float(x, logp):
    """float64 beside a logp of another dtype becomes float32; beside float64 all are float64."""
    if (x.dtype == torch.float64) == (logp.dtype == torch.float64):
        return x
    return x.to(torch.float64 if logp.dtype == torch.float64 else torch.float32)


def _like(name: str, x, logp):
    if x is None:
        return None
    validate.tensor(name, x)
    if x.shape != logp.shape:
        validate.fail(name, f"shape {tuple(logp.shape)} like logp", validate.shape(x))
    validate.same_device(name, x, "logp", logp)
    return _laid(_float(x, logp))


def _constant(name: str, x, logp):
    return x if x is None else _like(name, _without_gradient(name, x), logp)


def _without_gradient(name: str, x):
    if isinstance(x, torch.Tensor) and x.requires_grad:
        validate.fail(name, "a tensor that needs no gradient", "requires_grad=True")
    return x


def _by_sequence(name: str, x, logp, cu_seqlens):
    """A field of tokens, from one of tokens or of sequences."""
    if x is None:
        return None
    validate.tensor(name, _without_gradient(name, x))
    validate.same_device(name, x, "logp", logp)
    x = _float(x, logp)
    if x.shape == logp.shape:
        return x if x.stride(-1) in (0, 1) or x.shape[-1] <= 1 else x.contiguous()
    rows = logp.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if cu_seqlens is None and logp.dim() == 2 and tuple(x.shape) in ((rows,), (rows, 1)):
        return x.reshape(rows, 1).expand(logp.shape)
    if cu_seqlens is not None and tuple(x.shape) == (rows,):
        return torch.repeat_interleave(x, cu_seqlens.diff(), output_size=logp.shape[0])
    validate.fail(name, f"shape {tuple(logp.shape)} like logp, or ({rows},), one a sequence", validate.shape(x))


def _flags(name: str, x, logp):
    x = validate.mask_like(x, "logp", logp, name)
    return x if x is None else _laid(x)


def _boundaries(cu_seqlens, logp):
    if cu_seqlens is None:
        return None
    validate.tensor("cu_seqlens", cu_seqlens, _INTS)
    if logp.dim() != 1:
        validate.fail("logp", "shape [N] with cu_seqlens", validate.shape(logp))
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        validate.fail("cu_seqlens", "shape [B + 1]", validate.shape(cu_seqlens))
    validate.same_device("cu_seqlens", cu_seqlens, "logp", logp)
    if validate.looked_at(cu_seqlens):
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != logp.shape[0] or any(b < a for a, b in pairwise(ends)):
            validate.fail("cu_seqlens", f"0 = c[0] <= c[1] <= … <= c[B] = {logp.shape[0]}", str(ends[:8]))
    return cu_seqlens.long().contiguous()


def _count(num_items, logp):
    if num_items is None:
        return None
    if not isinstance(num_items, torch.Tensor):
        return torch.tensor(validate.positive("num_items", num_items), dtype=torch.float32, device=logp.device)
    if num_items.dim() != 0:
        validate.fail("num_items", "a number or a 0-dim tensor", validate.shape(num_items))
    if validate.looked_at(num_items):
        validate.positive("num_items", num_items.item())
    return num_items.to(device=logp.device, dtype=torch.float32)


def _coefs(coefs: tuple, logp):
    """float32 [2]: factors of beta and entropy_coef; None if both are numbers."""
    if not (isinstance(coefs[0], torch.Tensor) or isinstance(coefs[1], torch.Tensor)):
        return None
    for name, x in zip(("beta", "entropy_coef"), coefs, strict=True):
        if isinstance(x, torch.Tensor) and (x.dim() != 0 or x.requires_grad):
            validate.fail(name, "a number or a 0-dim tensor without gradient", validate.shape(x))
    one = torch.ones((), dtype=torch.float32, device=logp.device)
    return torch.stack([x.to(one) if isinstance(x, torch.Tensor) else one for x in coefs])
