"""The log-prob ops, with a soft-cap, a temperature a row, a mask and an ignored target."""

from __future__ import annotations

import torch

from rlfast import logps
from rlfast.reference.linear_token_logps import linear_token_logps as linear_reference
from rlfast.reference.token_logps import token_logps as logits_reference
from rlfast.verify.subject import Problem, Subject

OUTPUTS = ("logp", "lse", "entropy", "log_sum_sq_probs", "mean_logits")
# Rows, hidden width, vocabulary: rows enough that the largest error is no accident, few where the interpreter runs.
SIZES = {True: (64, 24, 2053), False: (65, 160, 50257)}


def _problem(leaves: dict, rows: int, vocab: int, draw, dtype: torch.dtype, device: str) -> Problem:
    targets = torch.randint(vocab, (rows,), generator=draw)
    targets[1] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2] = False
    rest = {
        "targets": targets.to(device),
        "temperature": (torch.rand(rows, generator=draw) + 0.5).to(device),
        "softcap": 30.0,
        "logit_scale": 1.25,
        "mask": mask.to(device),
    }
    upstream = {name: torch.randn(rows, generator=draw).to(device) for name in ("logp", "lse", "entropy")}
    return Problem({name: x.to(device, dtype) for name, x in leaves.items()}, rest, upstream)


def _logits(dtype: torch.dtype, device: str, small: bool) -> Problem:
    rows, _, vocab = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    leaves = {"logits": torch.randn(rows, vocab, generator=draw) * 4}
    return _problem(leaves, rows, vocab, draw, dtype, device)


def _head(dtype: torch.dtype, device: str, small: bool) -> Problem:
    rows, width, vocab = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    leaves = {
        "hidden": torch.randn(rows, width, generator=draw),
        "weight": torch.randn(vocab, width, generator=draw) * (4 / width**0.5),
        "bias": torch.randn(vocab, generator=draw),
    }
    return _problem(leaves, rows, vocab, draw, dtype, device)


def reordered(leaves: dict, targets, seed: int) -> tuple[dict, torch.Tensor, dict]:
    """The same log-probs by another order of summation: the vocabulary and the hidden dimension shuffled.

    Args:
        leaves: ``logits`` [*, V], or ``hidden`` [*, D], ``weight`` [V, D] and perhaps ``bias`` [V].
        targets: ids, −100 for none.

    Returns:
        The shuffled leaves, the targets' new ids, and for each leaf the function that puts its gradient in order.
    """
    draw = torch.Generator().manual_seed(seed)
    vocab = leaves["logits"].shape[-1] if "logits" in leaves else leaves["weight"].shape[0]
    ids = torch.randperm(vocab, generator=draw).to(targets.device)
    place = ids.argsort()
    moved, back = dict(leaves), {"logits": lambda g: g[..., place], "bias": lambda g: g[place]}
    if "logits" in leaves:
        moved["logits"] = leaves["logits"][..., ids]
    else:
        columns = torch.randperm(leaves["weight"].shape[1], generator=draw).to(targets.device)
        order = columns.argsort()
        back |= {"hidden": lambda g: g[..., order], "weight": lambda g: g[place][:, order]}
        moved |= {"hidden": leaves["hidden"][..., columns], "weight": leaves["weight"][ids][:, columns]}
        if leaves.get("bias") is not None:
            moved["bias"] = leaves["bias"][ids]
    return moved, torch.where(targets == -100, -100, place[targets.long().clamp(min=0)]), back


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    leaves, targets, back = reordered(problem.leaves, problem.rest["targets"], seed)
    return problem._replace(leaves=leaves, rest=problem.rest | {"targets": targets}), back


def _public(function):
    return lambda leaves, rest: function(**leaves, **rest, outputs=OUTPUTS)._asdict()


def _reference(function):
    return lambda leaves, rest, dtype: function(**leaves, **rest, dtype=dtype)


SUBJECTS = {
    "token_logps": (Subject(_logits, _public(logps.token_logps), _reference(logits_reference), OUTPUTS, _reordered),),
    "linear_token_logps": (
        Subject(_head, _public(logps.linear_token_logps), _reference(linear_reference), OUTPUTS, _reordered),
    ),
}
