"""The ``reference`` backend of the preference losses: the oracles behind a kernel's interface, by autograd alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from rlfast.kernels.formulas import PAIRS, SCORES, SINGLES
from rlfast.ops.preference_records import MEAN, METRICS, SINGLE_METRICS, Output, Rest, Side, Term
from rlfast.reference.pair_loss import pair_loss as pair_oracle
from rlfast.reference.sequences import sequence_sums
from rlfast.reference.unpaired_loss import unpaired_loss as single_oracle


def _named(table: dict, name: str, numbers) -> dict:
    fields = table[name].hyper._fields
    found = dict(zip(fields, numbers[: len(fields)], strict=True))
    found.pop("unused", None)
    return found


def words(terms: list[Term], links: dict) -> dict:
    """Terms in the oracle's words."""
    scored = [(t.weight, t.score, _named(SCORES, t.score, t.score_hyper), t.mean) for t in terms]
    linked = [(*s, t.link, _named(links, t.link, t.link_hyper)) for s, t in zip(scored[1:], terms[1:], strict=True)]
    return {"reward": scored[0], "terms": linked}


def padded(side: Side, x):
    """Packed tokens as [B, T], zeros behind them; anything else as it is."""
    if x is None or side.cu_seqlens is None:
        return x
    lengths = side.cu_seqlens.diff()
    width = int(lengths.max()) if lengths.numel() else 0
    real = torch.arange(width, device=lengths.device) < lengths.unsqueeze(1)
    return x.new_zeros(real.shape).masked_scatter(real, x[side.cu_seqlens[0] : side.cu_seqlens[-1]])


def sums_of(side: Side, leaf, dtype, other: Side | None, tail: float) -> tuple:
    """(S, S_ref, n) of a side, from the leaf in place of its logp."""
    if side.logp.dim() == 1 and side.cu_seqlens is None:
        ref = torch.zeros_like(leaf) if side.ref_logp is None else side.ref_logp.to(dtype)
        return leaf, ref, torch.ones_like(leaf) if side.lengths is None else side.lengths.to(dtype)
    mask = _mask(side)
    shared = None if other is None else torch.minimum(mask.sum(-1), _mask(other).sum(-1))
    ref = padded(side, side.ref_logp)
    return sequence_sums(padded(side, leaf), ref if ref is None else ref.to(dtype), mask, shared, tail)


def _mask(side: Side):
    mask = torch.ones_like(side.logp, dtype=torch.bool) if side.mask is None else side.mask
    return padded(side, mask)


def _run(sides, rest: Rest, reduce: int, out: Output, names, oracle) -> None:
    dtype = out.loss.dtype
    with torch.enable_grad():
        leaves = [side.logp.detach().to(dtype).requires_grad_() for side in sides]
        fields = {k: x if x is None else x.to(dtype) for k, x in rest._asdict().items()}
        n = fields.pop("num_items")
        if n is not None:
            n = torch.where(n > 0, n, torch.ones_like(n))
        loss, metrics = oracle(leaves, fields, 1.0 if n is None and reduce != MEAN else n)
        wanted = [i for i, g in enumerate(out[2:4]) if g.numel()]
        grads = torch.autograd.grad(loss, [leaves[i] for i in wanted], allow_unused=True) if wanted else ()
    for i, g in zip(wanted, grads, strict=True):
        side, to = sides[i], out[2 + i]
        if g is not None and side.cu_seqlens is not None:
            part = slice(int(side.cu_seqlens[0]), int(side.cu_seqlens[-1]))
            to[part] = g[part]
        else:
            to.copy_(torch.zeros_like(leaves[i]) if g is None else g)
    out.loss.copy_(loss.detach())
    out.metrics.copy_(torch.stack([metrics[name].to(dtype) for name in names]))
    if out.losses.numel():
        out.losses.copy_(metrics["losses"])
        out.rewards.copy_(torch.stack([x.detach() for x in metrics["rewards"]]))


def _pair(chosen: Side, rejected: Side, rest: Rest, terms, settings, reduce: int, out: Output) -> None:
    def oracle(leaves, fields, n):
        dtype = out.loss.dtype
        first = sums_of(chosen, leaves[0], dtype, rejected, settings.tail)
        second = sums_of(rejected, leaves[1], dtype, chosen, settings.tail)
        return pair_oracle(first, second, **words(terms, PAIRS), **fields, n=n, factor=settings.factor)

    _run((chosen, rejected), rest, reduce, out, METRICS, oracle)


def _single(side: Side, desirable, rest: Rest, terms, settings, reduce: int, out: Output) -> None:
    def oracle(leaves, fields, n):
        fields.pop("margin")
        sums = sums_of(side, leaves[0], out.loss.dtype, None, 1.0)
        return single_oracle(sums, desirable, **words(terms, SINGLES), **fields, n=n, factor=settings.factor)

    _run((side,), rest, reduce, out, SINGLE_METRICS, oracle)


pair_loss = SimpleNamespace(forward=_pair)
unpaired_loss = SimpleNamespace(forward=_single)
