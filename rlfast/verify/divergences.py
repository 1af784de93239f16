"""The divergence ops: each kind, with soft-caps, a temperature a row, a mask and targets; a student near its
teacher."""

from __future__ import annotations

import torch

from rlfast import divergences
from rlfast.reference.divergence import divergence as logits_reference
from rlfast.reference.linear_divergence import linear_divergence as linear_reference
from rlfast.verify.subject import Problem, Subject

OUTPUTS = ("value", "logp", "lse", "entropy", "ref_lse")
KINDS = {"forward_kl": 0.5, "reverse_kl": 0.5, "jsd": 0.25}
# Rows, hidden widths, vocabulary: few where the interpreter runs.
SIZES = {True: (64, (24, 40), 2053), False: (65, (160, 96), 50257)}


def _problem(leaves: dict, kind: str, rows: int, vocab: int, draw, dtype: torch.dtype, device: str) -> Problem:
    targets = torch.randint(vocab, (rows,), generator=draw)
    targets[1] = -100
    mask = torch.ones(rows, dtype=torch.bool)
    mask[2] = False
    rest = {
        "kind": kind,
        "beta": KINDS[kind],
        "targets": targets.to(device),
        "temperature": (torch.rand(rows, generator=draw) + 0.5).to(device),
        "ref_temperature": 1.25,
        "softcap": 30.0,
        "ref_logit_scale": 1.25,
        "mask": mask.to(device),
    }
    upstream = {name: torch.randn(rows, generator=draw).to(device) for name in ("value", "logp", "entropy", "ref_lse")}
    return Problem({name: x.to(device, dtype) for name, x in leaves.items()}, rest, upstream)


def _logits(kind: str):
    def inputs(dtype: torch.dtype, device: str, small: bool) -> Problem:
        rows, _, vocab = SIZES[small]
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(rows, vocab, generator=draw) * 4
        leaves = {"logits": x, "ref_logits": x + torch.randn(rows, vocab, generator=draw)}
        return _problem(leaves, kind, rows, vocab, draw, dtype, device)

    return inputs


def _heads(kind: str):
    def inputs(dtype: torch.dtype, device: str, small: bool) -> Problem:
        rows, widths, vocab = SIZES[small]
        draw, leaves = torch.Generator().manual_seed(0), {}
        for prefix, width in zip(("", "ref_"), widths, strict=True):
            leaves[prefix + "hidden"] = torch.randn(rows, width, generator=draw)
            leaves[prefix + "weight"] = torch.randn(vocab, width, generator=draw) * (4 / width**0.5)
            leaves[prefix + "bias"] = torch.randn(vocab, generator=draw)
        return _problem(leaves, kind, rows, vocab, draw, dtype, device)

    return inputs


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The vocabulary and both hidden dimensions shuffled, and what puts each gradient in order again."""
    draw, leaves, back = torch.Generator().manual_seed(seed), {}, {}
    targets = problem.rest["targets"]
    logits = problem.leaves.get("logits")
    vocab = logits.shape[-1] if logits is not None else problem.leaves["weight"].shape[0]
    ids = torch.randperm(vocab, generator=draw).to(targets.device)
    place = ids.argsort()
    for prefix in ("", "ref_"):
        if logits is not None:
            leaves[prefix + "logits"] = problem.leaves[prefix + "logits"][..., ids]
            back[prefix + "logits"] = lambda g: g[..., place]
            continue
        width = problem.leaves[prefix + "weight"].shape[1]
        columns = torch.randperm(width, generator=draw).to(targets.device)
        order = columns.argsort()
        leaves[prefix + "hidden"] = problem.leaves[prefix + "hidden"][..., columns]
        leaves[prefix + "weight"] = problem.leaves[prefix + "weight"][ids][:, columns]
        leaves[prefix + "bias"] = problem.leaves[prefix + "bias"][ids]
        back[prefix + "hidden"] = lambda g, order=order: g[..., order]
        back[prefix + "weight"] = lambda g, order=order: g[place][:, order]
        back[prefix + "bias"] = lambda g: g[place]
    moved = torch.where(targets == -100, -100, place[targets.clamp(min=0)])
    return problem._replace(leaves=leaves, rest=problem.rest | {"targets": moved}), back


def _public(function):
    return lambda leaves, rest: function(**leaves, **rest, outputs=OUTPUTS)._asdict()


def _reference(function):
    return lambda leaves, rest, dtype: function(**leaves, **rest, dtype=dtype)


def _subjects(inputs, public, reference) -> tuple[Subject, ...]:
    return tuple(
        Subject(inputs(kind), _public(public), _reference(reference), OUTPUTS, _reordered, kind) for kind in KINDS
    )


SUBJECTS = {
    "divergence": _subjects(_logits, divergences.divergence, logits_reference),
    "linear_divergence": _subjects(_heads, divergences.linear_divergence, linear_reference),
}
