"""Exact divergences of two distributions over the vocabulary, from logits or straight from two models' hidden
states."""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import NamedTuple

import torch

from rlfast import backends, logps, row_inputs, validate
from rlfast.distributed import groups, pairs
from rlfast.distributed.gather import within
from rlfast.ops import divergence as logits_op
from rlfast.ops import linear_divergence as linear_op
from rlfast.ops.divergence_records import FORWARD, KINDS, REF_LSE, REVERSE, Measure, Outputs
from rlfast.ops.records import ENTROPY, LSE

REDUCTIONS = ("none", "mean", "sum", "batchmean")
TAILS = ("renormalize", "bucket")
SUPPORTS = (None, "teacher", "student")
# The tail's mass is 1 − Σ p of the float32 log-probs inside, whose own rounding is of this size.
LEAST_TAIL = 2.0**-26

_BITS = {"value": 0, "logp": 0, "lse": LSE, "entropy": ENTROPY, "ref_lse": REF_LSE}


class Divergence(NamedTuple):
    """The divergence and what was asked for beside it; the other fields are None. float32 (float64 for float64)."""

    value: torch.Tensor  # [*], or a scalar if reduced: in nats; differentiable on both sides
    logp: torch.Tensor | None = None  # shaped like targets: the student's log p of each; differentiable
    lse: torch.Tensor | None = None  # [*]: the student's log Σ exp(z); differentiable
    entropy: torch.Tensor | None = None  # [*]: the student's −Σ p log p; differentiable
    ref_lse: torch.Tensor | None = None  # [*]: the teacher's log Σ exp(z); differentiable


class _Call(NamedTuple):
    """The checked arguments of a call, rows as they came."""

    source: tuple  # ("logits", logits)
    lead: tuple
    vocab: int
    measure: Measure
    targets: torch.Tensor | None
    mask: torch.Tensor | None  # the rows that count: not masked, and with a target if there are any
    options: tuple  # temperatures, ref_temperatures, temperature, ref_temperature, softcaps, scales
    bits: int
    reduce: str


def divergence(
    logits,
    ref_logits,
    *,
    kind="forward_kl",
    beta=0.5,
    temperature=1.0,
    ref_temperature=None,
    softcap=None,
    ref_softcap=None,
    logit_scale=1.0,
    ref_logit_scale=1.0,
    targets=None,
    mask=None,
    outputs=(),
    reduce="none",
    top_k=None,
    tail="renormalize",
    support=None,
    process_group=None,
) -> Divergence:
    """The exact divergence of softmax(logits), S, and softmax(ref_logits), T, in one read of both.

        forward_kl   KL(T‖S) = Σ_v T_v (log T_v − log S_v)
        reverse_kl   KL(S‖T)
        jsd          β·KL(T‖M) + (1 − β)·KL(S‖M),  M = (1 − β)·S + β·T;  β = 0 is KL(T‖S), β = 1 is KL(S‖T)

    An outcome with p = 0 adds 0 to KL(p‖q); one with q = 0 < p makes it infinite.

    Args:
        logits: [*, V] float32, bfloat16 or float16 (float64 runs on the torch backend), any strides: the
            student, the policy.
        ref_logits: the same of the teacher, the reference. It gets a gradient if it needs one.
        kind: "forward_kl", "reverse_kl" or "jsd".
        beta: a float in [0, 1], of the JSD.
        temperature, softcap, logit_scale: of the student, as in ``token_logps``; a temperature may be one a row.
        ref_temperature: of the teacher; None: the student's.
        ref_softcap, ref_logit_scale: of the teacher, whose head may differ.
        targets: None, or [*] or [*, K] ids as in ``token_logps``: gives the student's ``logp`` of them in the same
            pass. A row whose targets are all −100 is skipped.
        mask: [*], zero where a row is skipped: its outputs and its gradients are 0, whatever it holds.
        outputs: more to return: "lse", "entropy" (the student's), "ref_lse".
        reduce: "none", "mean" (over the rows that count), "sum", or "batchmean" (the sum over the first dimension's
        size).
        top_k: None, or how many outcomes to compare: the largest of the distribution named by ``support``.
        tail: what becomes of the outcomes outside the top-k: "renormalize" leaves them out on both sides, "bucket"
            makes them one more outcome on both sides, of a mass of 2⁻²⁶ at least.
        support: "teacher" or "student"; None: the one that the expectation is under, the student for a reverse KL
            (and a JSD with β = 1), else the teacher.
        process_group: as in ``token_logps``: both logits are this rank's columns.

    Returns:
        Divergence. With ``top_k``, ``value`` alone is of the selected outcomes.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.

    Reference:
        Generalised JSD of on-policy distillation: arXiv 2306.13649. docs/numerics.md says how it is computed.

    Example:
        >>> out = rlfast.divergence(torch.zeros(2, 4), torch.eye(4)[:2] * 9, kind="reverse_kl")
        >>> out.value.shape
        torch.Size([2])
    """
    choices = {"kind": (kind, KINDS), "tail": (tail, TAILS), "support": (support, SUPPORTS)}
    asked = functools.partial(
        row_inputs.to_agree, "divergence", logits, targets, top_k, outputs, (ref_logits,), **choices
    )
    shards, logits, vocab = row_inputs.columns_of(process_group, logits, asked)
    ref_logits = groups.alike(shards or process_group, ref_logits, "ref_logits", -1)
    validate.tensor("ref_logits", ref_logits)
    if ref_logits.shape != logits.shape:
        validate.fail("ref_logits", f"shape {validate.shape(logits)} like logits", validate.shape(ref_logits))
    _alike("ref_logits", ref_logits, "logits", logits)
    transform = (temperature, ref_temperature, softcap, ref_softcap, logit_scale, ref_logit_scale)
    call = _checked(("logits", logits), vocab, kind, beta, transform, targets, mask, outputs, reduce)
    if _top_k(top_k, tail, support, call.vocab):
        return _of_top_k(
            call, top_k, tail, support, ref_logits.requires_grad,
            lambda ids, **more: logps.token_logps(logits, ids, process_group=shards, **more),
            lambda ids, **more: logps.token_logps(ref_logits, ids, process_group=shards, **more),
            (logits, ref_logits) if shards is None else None,
        )  # fmt: skip
    targets, mask, options = _flat_rows(call, keep_two=True)
    if len(call.lead) not in (1, 2):
        logits, ref_logits = (x.reshape(math.prod(call.lead), x.shape[-1]) for x in (logits, ref_logits))
    logits, ref_logits = (logps.unit_stride(x) for x in (logits, ref_logits))
    if shards is not None:
        given = shards, logits.shape[:-1], targets, mask, (*options, *call.measure), call.bits, backends.requested()
        return _named(pairs.divergence(logits, ref_logits, pairs.call_of(*given)), call)
    asked = logits_op.op(logits, ref_logits, targets, mask, *options, *call.measure, call.bits, backends.requested())
    return _named(asked, call)


@within
def linear_divergence(
    hidden,
    weight,
    ref_hidden,
    ref_weight,
    bias=None,
    ref_bias=None,
    *,
    kind="forward_kl",
    beta=0.5,
    temperature=1.0,
    ref_temperature=None,
    softcap=None,
    ref_softcap=None,
    logit_scale=1.0,
    ref_logit_scale=1.0,
    targets=None,
    mask=None,
    outputs=(),
    reduce="none",
    top_k=None,
    tail="renormalize",
    support=None,
    memory_budget=logps.MEMORY_BUDGET,
    process_group=None,
) -> Divergence:
    """``divergence(hidden @ weight.T + bias, ref_hidden @ ref_weight.T + ref_bias)``, in tiles that stay in the cache.

    The logits are in memory only where a backward will want them and both fit ``memory_budget``; 0 never has them.

    Args:
        hidden: [*, D] float32, bfloat16 or float16: the student's last hidden states.
        weight: [V, D] of hidden's dtype: its head.
        ref_hidden: [*, E] of hidden's dtype: the teacher's; E need not be D.
        ref_weight: [V, E] of hidden's dtype.
        bias, ref_bias: [V] of hidden's dtype, or None.
        memory_budget: bytes that the forward may keep: 8·N·V for both float32 logits. Else they are made again.
        kind, beta, temperature, ref_temperature, softcap, ref_softcap, logit_scale, ref_logit_scale, targets, mask,
            outputs, reduce, top_k, tail, support: as in ``divergence``.
        process_group: as in ``linear_token_logps``, of both heads.

    Returns:
        Divergence; differentiable in every tensor of both heads. What needs no gradient costs nothing. Under autocast,
        both heads are cast as ``torch.nn.functional.linear`` casts them.

    Raises:
        TypeError, ValueError: as in ``divergence``.

    Example:
        >>> student = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> teacher = torch.randn(2, 5, 24), torch.randn(100, 24)
        >>> rlfast.linear_divergence(*student, *teacher, kind="jsd", reduce="mean").value.shape
        torch.Size([])
    """
    choices = {"kind": (kind, KINDS), "tail": (tail, TAILS), "support": (support, SUPPORTS)}
    other = ref_hidden, ref_weight, ref_bias
    asked = functools.partial(row_inputs.to_agree, "divergence", hidden, targets, top_k, outputs, other, **choices)
    shards, hidden, weight, bias = row_inputs.shared_head(process_group, hidden, weight, bias, asked)
    reference = row_inputs.laid_out(shards or process_group, *other)
    ref_hidden, ref_weight, ref_bias = checked_reference(hidden, weight, *reference)
    lead, vocab = hidden.shape[:-1], row_inputs.vocabulary(weight, shards)
    transform = (temperature, ref_temperature, softcap, ref_softcap, logit_scale, ref_logit_scale)
    call = _checked(("hidden", hidden), vocab, kind, beta, transform, targets, mask, outputs, reduce)
    budget = validate.at_least("memory_budget", memory_budget, 0)
    if _top_k(top_k, tail, support, vocab):
        learns = any(x is not None and x.requires_grad for x in (ref_hidden, ref_weight, ref_bias))
        linear = functools.partial(logps.linear_token_logps, process_group=shards)
        return _of_top_k(
            call, top_k, tail, support, learns,
            lambda ids, **more: linear(hidden, weight, ids, bias, memory_budget=budget / 2, **more),
            lambda ids, **more: linear(ref_hidden, ref_weight, ids, ref_bias, memory_budget=budget / 2, **more),
        )  # fmt: skip
    targets, mask, options = _flat_rows(call, keep_two=False)
    n = math.prod(lead)
    hidden, ref_hidden = (x.reshape(n, x.shape[-1]) for x in (hidden, ref_hidden))
    heads = hidden, weight, bias, ref_hidden, ref_weight, ref_bias
    heads = tuple(x if x is None or x.dim() == 1 else logps.unit_stride(x) for x in heads)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in heads)
    widest = weight.shape[0] if shards is None else shards.widest
    keep = needs_grad and 2 * max(4, hidden.element_size()) * n * widest <= budget
    if shards is not None:
        given = shards, (n,), targets, mask, (*options, *call.measure), call.bits, backends.requested()
        return _named(pairs.linear_divergence(heads, pairs.call_of(*given), keep), call)
    *asked, _, _ = linear_op.op(*heads, targets, mask, *options, *call.measure, call.bits, keep, backends.requested())
    return _named(asked, call)


def checked_reference(hidden, weight, ref_hidden, ref_weight, ref_bias) -> tuple:
    """The head of a reference beside a checked head, or an error that names the argument."""
    ref_hidden, ref_weight, ref_bias = row_inputs.checked_head(ref_hidden, ref_weight, ref_bias, "ref_")
    lead, vocab = hidden.shape[:-1], weight.shape[0]
    if ref_hidden.shape[:-1] != lead:
        validate.fail("ref_hidden", f"shape {(*lead, 'E')} like the rows of hidden", validate.shape(ref_hidden))
    if ref_weight.shape[0] != vocab:
        wanted = f"shape ({vocab}, {ref_weight.shape[1]}) for the vocabulary of weight"
        validate.fail("ref_weight", wanted, validate.shape(ref_weight))
    _alike("ref_hidden", ref_hidden, "hidden", hidden)
    return ref_hidden, ref_weight, ref_bias


def _alike(name: str, x, other_name: str, other) -> None:
    if x.dtype != other.dtype:
        validate.fail(name, f"dtype {other.dtype} like {other_name}", str(x.dtype), TypeError)
    validate.same_device(name, x, other_name, other)


def _checked(source, vocab: int, kind, beta, transform, targets, mask, outputs, reduce) -> _Call:
    """The arguments that both forms share."""
    lead = source[1].shape[:-1]
    temperature, ref_temperature, softcap, ref_softcap, logit_scale, ref_logit_scale = transform
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    both = (
        row_inputs.checked_temperature("temperature", lead, temperature, source),
        row_inputs.checked_temperature("ref_temperature", lead, ref_temperature, source),
    )
    caps = (("softcap", softcap), ("ref_softcap", ref_softcap))
    scales = (("logit_scale", logit_scale), ("ref_logit_scale", ref_logit_scale))
    options = (
        *(x for x, _ in both),
        *(x for _, x in both),
        *(0.0 if x is None else validate.positive(name, x) for name, x in caps),
        *(validate.finite(name, x) for name, x in scales),
    )
    if targets is not None:
        targets = row_inputs.checked_targets(lead, vocab, targets, source)
    mask = row_inputs.checked_mask(lead, mask, source)
    validate.one_of("reduce", reduce, REDUCTIONS)
    if targets is not None:
        there = targets != validate.IGNORE_INDEX
        there = there.any(-1) if targets.dim() > len(lead) else there
        mask = there if mask is None else there & mask
    measure = _measure(kind, beta)
    return _Call(source, tuple(lead), vocab, measure, targets, mask, options, _bits(outputs, targets), reduce)


def _measure(kind, beta) -> Measure:
    validate.one_of("kind", kind, KINDS)
    beta = validate.finite("beta", beta)
    if not 0.0 <= beta <= 1.0:
        validate.fail("beta", "a float from 0 to 1", repr(beta))
    if kind == "jsd" and beta in (0.0, 1.0):
        return Measure(FORWARD if beta == 0.0 else REVERSE, 0.5)
    return Measure(KINDS.index(kind), beta if kind == "jsd" else 0.5)


def _bits(outputs, targets) -> int:
    if isinstance(outputs, str) or not isinstance(outputs, Collection):
        validate.fail("outputs", 'a tuple of names such as ("entropy",)', repr(outputs), TypeError)
    bits = 0
    for name in outputs:
        if name not in _BITS:
            validate.fail("outputs", f"names among {tuple(_BITS)}", repr(name))
        if name == "logp" and targets is None:
            validate.fail("targets", "a tensor, since outputs asks for 'logp'", "None")
        bits |= _BITS[name]
    return bits


def _top_k(top_k, tail, support, vocab: int) -> bool:
    """Whether outcomes are selected; the whole vocabulary is no selection."""
    validate.one_of("tail", tail, TAILS)
    validate.one_of("support", support, SUPPORTS)
    if top_k is None:
        return False
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        validate.fail("top_k", "an int", repr(top_k), TypeError)
    if not 1 <= top_k <= vocab:
        validate.fail("top_k", f"1 to the vocabulary of {vocab}", top_k)
    return top_k < vocab


def _flat_rows(call: _Call, keep_two: bool) -> tuple:
    """(targets, mask, options) with the leading dimensions merged into one, unless there are one or two that may
    stay."""
    if len(call.lead) == 1 or (keep_two and len(call.lead) == 2):
        return call.targets, call.mask, call.options
    n = math.prod(call.lead)
    targets = call.targets
    if targets is not None:
        targets = targets.reshape(n, *targets.shape[len(call.lead) :])
    mask, *temperatures = (x if x is None else x.reshape(n) for x in (call.mask, *call.options[:2]))
    return targets, mask, (*temperatures, *call.options[2:])


def _named(asked, call: _Call) -> Divergence:
    """What was asked for, by name, with the input's leading dimensions."""
    out = Outputs.named(asked, call.targets is not None, call.bits)
    logp = out.logp if out.logp is None else out.logp.reshape(call.targets.shape)
    rows = (x if x is None else x.reshape(call.lead) for x in (out.lse, out.entropy, out.ref_lse))
    return Divergence(_reduced(out.value.reshape(call.lead), call), logp, *rows)


def _reduced(value, call: _Call):
    """The value as ``reduce`` says, summed in float64."""
    if call.reduce == "none":
        return value
    total = value.sum(dtype=torch.float64)
    if call.reduce == "mean":
        count = value.numel() if call.mask is None else call.mask.sum()
        total = total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))
    elif call.reduce == "batchmean":
        total = total / max(call.lead[0] if call.lead else 1, 1)
    return total.to(value.dtype)


def _of_top_k(
    call: _Call, top_k: int, tail: str, support, teacher_learns: bool, student, teacher, logits=None
) -> Divergence:
    """The divergence at the top-k ids; ``student`` and ``teacher`` are log-prob ops of (ids, options).

    Renormalised, the outcomes of given logits are a softmax of those alone: their gradient is exactly 0 elsewhere.
    """
    mask, (t, ref_t, one, ref_one, cap, ref_cap, scale, ref_scale) = call.mask, call.options
    own = {"temperature": one if t is None else t, "softcap": cap or None, "logit_scale": scale, "mask": mask}
    ref = {"temperature": ref_one if ref_t is None else ref_t, "softcap": ref_cap or None, "logit_scale": ref_scale}
    ref["mask"] = mask
    by_teacher = (support or ("student" if call.measure.kind == REVERSE else "teacher")) == "teacher"
    some = torch.zeros(call.lead, dtype=torch.int64, device=call.source[1].device)
    with torch.no_grad():
        best = teacher(some, top_k=top_k, **ref) if by_teacher else student(some, top_k=top_k, **own)
    ids, gathered = best.topk_ids.clamp(min=0), logits is not None and tail == "renormalize"  # −1 in skipped rows
    wanted, names = [] if gathered else [ids], tuple(n for n in ("lse", "entropy") if call.bits & _BITS[n])
    if call.targets is not None:
        wanted.append(call.targets if call.targets.dim() > len(call.lead) else call.targets.unsqueeze(-1))
    out = logps.TokenLogps(None)
    if wanted or names:
        out = student(torch.cat(wanted, -1) if wanted else some, outputs=names, **own)
    other = logps.TokenLogps(best.topk_logp if by_teacher else None)
    if call.bits & REF_LSE or (not gathered and (teacher_learns or not by_teacher)):
        other = teacher(ids, outputs=("lse",) if call.bits & REF_LSE else (), **ref)
    plain = call._replace(targets=None, bits=0)
    if gathered:
        pair = [x.gather(-1, ids) for x in logits]
    else:
        pair = [_with_tail(x, tail) for x in (out.logp[..., :top_k], other.logp)]
        plain = plain._replace(options=(None, None, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0))
    _, rows, options = _flat_rows(plain, keep_two=False)
    pair = [x.reshape(math.prod(call.lead), x.shape[-1]) for x in pair]
    asked = logits_op.op(*pair, None, rows, *options, *call.measure, 0, backends.requested())
    n = 0 if call.targets is None else call.targets.numel() // max(math.prod(call.lead), 1)
    logp = None if call.targets is None else out.logp[..., out.logp.shape[-1] - n :].reshape(call.targets.shape)
    return _named(asked, plain)._replace(logp=logp, lse=out.lse, entropy=out.entropy, ref_lse=other.lse)


def _with_tail(logp, tail: str):
    """logp [*, K], for a bucket with log(1 − Σ p) beside it [*, K + 1]."""
    if tail == "renormalize":
        return logp.contiguous()
    inside = torch.logsumexp(logp.double(), -1, keepdim=True).clamp(max=-LEAST_TAIL)
    outside = torch.where(inside > -math.log(2), (-torch.expm1(inside)).log(), torch.log1p(-inside.exp()))
    return torch.cat((logp, outside.to(logp.dtype)), -1)
