"""The arguments of the head's functions, checked: a vocabulary's rows, whether it is shared out or not."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection

import torch

from rlfast import validate
from rlfast.distributed import groups

_PLAIN = (torch.Tensor, torch.nn.Parameter)  # tensors with values to look at: a fake one has none
_INTS = (torch.int64, torch.int32)


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
    weight_name: str | None = None, least: int = 1,
):  # fmt: skip
    """A head checked, and cast by autocast; ``prefix`` is that of its arguments' names, ``sizes`` are of its weight.

    ``least`` is the number of columns that it has at least.
    """
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
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < least:
        validate.fail(w, f"shape ({columns}, {hidden.shape[-1]}) to match {h}", validate.shape(weight))
    if bias is not None and bias.shape != weight.shape[:1]:
        validate.fail(b, f"shape {tuple(weight.shape[:1])} like the rows of {w}", validate.shape(bias))
    for name, x in ((w, weight), (b, bias)):
        if x is not None:
            validate.same_device(name, x, h, hidden)
            if x.dtype != hidden.dtype:
                validate.fail(name, f"dtype {hidden.dtype} like {h}", str(x.dtype), TypeError)
    return hidden, weight, bias


def columns_of(process_group, logits, asked: Callable[[], dict]) -> tuple:
    """(the shards, or None; this rank's logits; the columns of all ranks).

    ``asked`` gives what ranks have to ask for alike, as integers by name; it is called where a vocabulary is shared.
    """
    share = None
    if process_group is not None or type(logits) not in _PLAIN:
        share, logits = groups.resolved(process_group, logits, -1, "logits")
    validate.tensor("logits", logits)
    if logits.dim() < 1 or (logits.shape[-1] == 0 and share is None):
        validate.fail("logits", "shape [*, V] with V > 0", validate.shape(logits))
    if share is None:
        return None, logits, logits.shape[-1]
    shards = groups.agreed_logits(share, logits, asked())
    return shards, logits, shards.vocab


def shared_head(process_group, hidden, weight, bias, asked: Callable[[], dict], **names) -> tuple:
    """(the shards, or None; this rank's hidden, weight and bias, as ``checked_head`` checks them).

    ``asked``: as in ``columns_of``.
    """
    share = None
    if process_group is not None or any(type(x) not in _PLAIN for x in (hidden, weight)):
        share, weight = groups.resolved(process_group, weight, 0, "weight")
        hidden = groups.local(hidden, names.get("hidden_name", "hidden"))
        bias = groups.alike(share or process_group, bias, "bias")
    head = checked_head(hidden, weight, bias, least=1 if share is None else 0, **names)
    return None if share is None else groups.agreed_head(share, *head, asked()), *head


FUNCTIONS = ("log-probs", "divergence", "policy loss", "preference loss")


def to_agree(
    function: str, x, targets, top_k, outputs, other: tuple = (), numbers: dict | None = None, **choices
) -> dict:
    """What ranks that share a vocabulary have to ask for alike, as integers by name.

    Args:
        function: one of ``FUNCTIONS``.
        x: logits or hidden states, whose rows those of the targets are.
        targets, top_k, outputs: as they came; outputs may be any names.
        other: the reference's logits, or its hidden states and its head.
        numbers: more of them.
        choices: by name, (one, of which).
    """
    names = outputs if isinstance(outputs, Collection) and not isinstance(outputs, str) else ()
    found = {
        "function": FUNCTIONS.index(function),
        "outputs": zlib.crc32(repr(sorted(map(str, set(names) - {"logp", "value"}))).encode()),
        "top_k": top_k if isinstance(top_k, int) else 0,
        "number of targets a row": groups.candidates(targets, x),
        **(numbers or {}),
    }
    for name, (one, among) in choices.items():
        found[name] = among.index(validate.one_of(name, one, among))
    if other:
        found["gradients of the reference"] = groups.learning(*other)
        found["depth of the reference"] = other[0].shape[-1] if len(other) > 1 and hasattr(other[0], "shape") else 0
    return found


def counted(*tensors) -> dict:
    """The fact which tokens count, by masks and the ends of sequences: they say where a loss's chunks end."""
    there = [x for x in tensors if isinstance(x, torch.Tensor)]
    if not all(validate.looked_at(x) for x in there):
        return {groups.COUNTED: 0}
    found = [x.long() if x.dtype in _INTS else x != 0 for x in there]
    return {groups.COUNTED: zlib.crc32(b"".join(x.detach().contiguous().numpy().tobytes() for x in found))}


def laid_out(process_group, hidden, weight, bias) -> tuple:
    """A reference's head, whose rows lie on the ranks as those of the policy's."""
    rows = groups.local(hidden, "ref_hidden")
    return rows, *(groups.alike(process_group, x, name) for x, name in ((weight, "ref_weight"), (bias, "ref_bias")))


def vocabulary(weight, shards) -> int:
    """Columns of a head, or of all its shards."""
    return weight.shape[0] if shards is None else shards.vocab
