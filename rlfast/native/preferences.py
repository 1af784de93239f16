"""The arguments of the preference losses, as ``csrc/bindings_preference.h`` lists them."""

from __future__ import annotations

import functools

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address, extension_of
from rlfast.native.token_loss import scratch_of
from rlfast.ops.preference_records import SUM, Output, Rest, Side, Term, rows_of


@functools.cache
def _formulas(name: str) -> frozenset[str]:
    return frozenset(backends.extension(name).preference_formulas())


def why_not(formulas) -> str | None:
    """Why the C++ kernels have not got one of these scores and links; None if they have."""
    known = _formulas("cuda" if backends.why_not("cpu") else "cpu")
    missing = [name for name in (*formulas[0], *formulas[1][1:]) if name not in known]
    return f"{missing[0]} has no C++ formula" if missing else None


def _tokens(x: torch.Tensor | None, packed: bool):
    """(address, dtype, stride of a row, stride of a token); of sums the stride is from one to the next."""
    if x is None:
        return None
    return x.data_ptr(), DTYPES[x.dtype], 0 if packed else x.stride(0), 1


def has_tokens(x: Side) -> bool:
    """Whether a side has tokens, and not their sums."""
    return x.logp.dim() == 2 or x.cu_seqlens is not None


def side(x: Side) -> tuple:
    """A side."""
    packed = x.cu_seqlens is not None
    mask = None if x.mask is None else (x.mask.data_ptr(), 0 if packed else x.mask.stride(0))
    fields = _tokens(x.logp, packed), _tokens(x.ref_logp, packed)
    return (*fields, mask, address(x.cu_seqlens), address(x.lengths), x.logp.shape[-1], int(has_tokens(x)))


def launch(op: str, x: Side, *given) -> None:
    """The extension's kernel of ``op`` on these arguments, the number of rows, and what it needs beside them."""
    extension, last = extension_of(x.logp)
    rows = rows_of(x)
    if x.logp.is_cuda:
        doubles = getattr(extension, f"{op}_scratch")(rows, has_tokens(x))
        scratch, counter = scratch_of(x.logp, doubles, last[1])
        last = (scratch.data_ptr(), counter.data_ptr(), *last)
    getattr(extension, op)(*given, rows, *last)


def arguments(sides, rest: Rest, terms: list[Term], settings, reduce: int, out: Output) -> tuple:
    """(sides, rest, scores, links, means, numbers, settings, sum, outputs)."""
    gradients, numbers = out[2:4], [x for term in terms for x in term.numbers()]
    per_side = [place for i in range(len(sides)) for place in (_written(gradients[i]), _written(out.rewards[i]))]
    fields = [None if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride(0), 0) for x in rest[:4]]
    return (
        [side(x) for x in sides], (*fields, address(rest.num_items)), [t.score for t in terms],
        [t.link for t in terms], [int(t.mean) for t in terms], numbers, settings, int(reduce == SUM),
        (out.loss.data_ptr(), out.metrics.data_ptr(), _written(out.losses), *per_side),
    )  # fmt: skip


def _written(x: torch.Tensor) -> int:
    return x.data_ptr() if x.numel() else 0
