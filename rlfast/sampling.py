"""A token sampled from each row of logits, with its log-probs; and the penalties that change logits before."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch

from rlfast import backends, validate
from rlfast.linear import head_logits
from rlfast.ops import sample as sample_op
from rlfast.row_inputs import checked_head
from rlfast.validate import LEAST, MOST, Limit

ROWS = 64  # of logits at once where they come of hidden states: 12 MB at 49152 columns
_INTS = (torch.int64, torch.int32)
_TEMPERATURE = Limit(f"0 or a float from {LEAST} to {MOST}", LEAST, MOST)
_POSITIVE = Limit(f"a float from {LEAST} to {MOST}", LEAST, MOST)
_FINITE = Limit("a finite float", -validate.FLOAT32_MAX, validate.FLOAT32_MAX)
_TOP_K = Limit("an int from 0 to 2147483647", 0, 2**31 - 1)
_SHARE = Limit("a float from 0 to 1", 0.0, 1.0)
_WORD = Limit("an int from -2**63 to 2**63 - 1", -(2**63), 2**63 - 1)


class Sampled(NamedTuple):
    """One of each a row; float32, or float64 for float64 logits. In a row that has no token −1 and NaN."""

    tokens: torch.Tensor  # int64 [M]
    logp_raw: torch.Tensor  # [M]: log softmax(logits) of the token, the bits of ``token_logps``
    logp: torch.Tensor  # [M]: its log-prob under the distribution that it was sampled from
    kept: torch.Tensor  # [M]: the mass that top-k, top-p and min-p left of the tempered distribution
    entropy: torch.Tensor  # [M]: of softmax(logits), in nats, the bits of ``token_logps``


class Edits(NamedTuple):
    """Logits that are replaced: row i's are ids and values [ends[i], ends[i + 1]); of equal ids the last counts."""

    ends: torch.Tensor  # int [M + 1]
    ids: torch.Tensor  # int [E], in [0, V)
    values: torch.Tensor  # float [E]; −inf takes an id away


def sample(
    logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds, positions, edits=None, allowed=None
) -> Sampled:
    """A token of each row, its raw and its processed log-prob, the mass that was kept, and the raw entropy.

    token = argmax over what is kept of (w_v − max w)/T − log(−log u_v);  w: logits with edits, −inf where not allowed;
    kept: w ≥ the k-th largest, of those the most probable whose mass reaches top_p, of those p ≥ min_p·max p

    The noise u_v is Philox4x32-10 of (seed, position, token id): a row's token depends on its own logits, options, seed
    and position, and on nothing else: not on the batch, its place in it, threads or the backend, but where two
    perturbed logits are within float32's rounding of one another.

    Args:
        logits: [M, V] float32, bfloat16 or float16 (float64 runs on the torch backend), any row stride.
        temperature: a float or one a row [M]. 0 takes the first of the largest logits: ``logp`` is 0, and ``kept`` is
            its probability at a temperature of 1.
        top_k: an int or one a row; 0, or at least V, is off. Ties with the k-th largest stay.
        top_p: a float in [0, 1] or one a row; 1 is off. Counts in what top-k left, renormalised. The most probable
            stays, and so do ties with the last that does.
        min_p: a float in [0, 1] or one a row; 0 is off.
        seeds: an int or one a row, all 64 bits of it.
        positions: an int or one a row: which token of its sequence a row samples.
        edits: ``Edits``, or (ends, ids, values): logits that are replaced first, as ``penalty_edits`` makes them.
        allowed: None, bool [M, V], or int32 [M, ⌈V/32⌉] whose bit v % 32 of word v // 32 allows id v.

    Returns:
        Sampled. Nothing is differentiable. A row with NaN or +inf, or with nothing allowed that is finite, has token −1
        and NaN, and the others are unharmed.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range. On a GPU values are not
            looked at, which would synchronise: a row with an edit of an id that is none has no token.

    Reference:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; docs/numerics.md.

    Example:
        >>> out = rlfast.sample(torch.zeros(2, 100), top_k=7, seeds=1, positions=torch.tensor([5, 6]))
        >>> out.logp_raw.exp()
        tensor([0.0100, 0.0100])
    """
    validate.tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        validate.fail("logits", "shape [M, V] with V > 0", validate.shape(logits))
    logits = logits.detach()
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    options = _options(logits, temperature, top_k, top_p, min_p, seeds, positions)
    edits = (None, None, None) if edits is None else _edits("edits", edits, logits)
    return Sampled(*sample_op.call(logits, *options, *edits, _allowed(allowed, logits), backends.requested()))


def linear_sample(
    hidden, weight, bias=None, *, softcap=None, logit_scale=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds,
    positions, edits=None, allowed=None,
) -> Sampled:  # fmt: skip
    """``sample(logits)`` of logits = softcap·tanh(logit_scale·(hidden·weightᵀ + bias) / softcap), a few rows at a time.

    The logits are those of ``rlfast.linear(hidden, weight, bias, wide=True)``, in float32, of at most 64 rows at once:
    the result has the bits of the two calls.

    Args:
        hidden: [M, D] float32, bfloat16 or float16 (float64 runs on the torch backend): the last hidden states.
        weight: [V, D] of hidden's dtype: the head.
        bias: [V] of hidden's dtype, or None.
        softcap: None, or a float > 0 (Gemma 2).
        logit_scale: a float that multiplies the logits first (Cohere, Granite).
        temperature, top_k, top_p, min_p, seeds, positions, allowed: as in ``sample``.
        edits: as in ``sample``; or a function of the logits [m, V] of some rows and of the slice that those rows are,
            which gives their ``Edits`` or None, as ``penalty_edits`` makes them of logits.

    Returns:
        Sampled. Nothing is differentiable. Under autocast, hidden, weight and bias are cast as
        ``torch.nn.functional.linear`` casts them.

    Raises:
        TypeError, ValueError: as in ``sample``.

    Example:
        >>> out = rlfast.linear_sample(torch.zeros(2, 16), torch.randn(100, 16), top_k=7, seeds=1, positions=5)
        >>> out.logp_raw.exp()
        tensor([0.0100, 0.0100])
    """
    if isinstance(hidden, torch.Tensor) and hidden.dim() != 2:
        validate.fail("hidden", "shape [M, D]", validate.shape(hidden))
    hidden, weight, bias = checked_head(hidden, weight, bias)
    hidden, weight, bias = (x if x is None else x.detach() for x in (hidden, weight, bias))
    softcap = 0.0 if softcap is None else validate.positive("softcap", softcap)
    logit_scale = validate.finite("logit_scale", logit_scale)
    shape = hidden.new_zeros(()).expand(hidden.shape[0], weight.shape[0])  # of the logits, for what looks at no more
    options = _options(shape, temperature, top_k, top_p, min_p, seeds, positions)
    made = edits if callable(edits) else None
    ends, *values = (None, None, None) if edits is None or made else _edits("edits", edits, shape)
    allowed, parts = _allowed(allowed, shape), []
    for start in range(0, max(hidden.shape[0], 1), ROWS):
        rows = slice(start, start + ROWS)
        logits = head_logits(hidden[rows], weight, bias, softcap, logit_scale)
        own = made(logits, rows) if made else None
        if own is not None:
            own = _edits("edits", own, logits)
        elif ends is not None:
            own = ends[start : start + ROWS + 1], *values
        bits = None if allowed is None else allowed[rows]
        per_row = (x[rows] for x in options)
        parts.append(sample_op.call(logits, *per_row, *(own or (None, None, None)), bits, backends.requested()))
    return Sampled(*(x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts, strict=True)))


def _options(logits, temperature, top_k, top_p, min_p, seeds, positions) -> tuple:
    """One of each a row, checked."""
    return (
        _temperatures(temperature, logits),
        _by_row("top_k", top_k, logits, torch.int32, _TOP_K),
        _by_row("top_p", top_p, logits, torch.float32, _SHARE),
        _by_row("min_p", min_p, logits, torch.float32, _SHARE),
        _by_row("seeds", seeds, logits, torch.int64, _WORD),
        _by_row("positions", positions, logits, torch.int64, _WORD),
    )


def _by_row(name: str, x, logits, dtype: torch.dtype, limit: Limit):
    """A number or a tensor [M] as a tensor [M] of this dtype; a number and what may be looked at within its range."""
    whole = not dtype.is_floating_point
    if not isinstance(x, torch.Tensor):
        if isinstance(x, bool) or not isinstance(x, numbers.Integral if whole else numbers.Real):
            validate.fail(name, f"{'an int' if whole else 'a float'} or a tensor of one a row", repr(x), TypeError)
        x = validate.number(name, x, limit) if not whole else _whole(name, x, limit)
        return torch.full((logits.shape[0],), x, dtype=dtype, device=logits.device)
    validate.tensor(name, x, _INTS if whole else (*validate.FLOATS, *_INTS))
    if x.shape != logits.shape[:1]:
        validate.fail(name, f"shape {tuple(logits.shape[:1])} like the rows of logits", validate.shape(x))
    validate.same_device(name, x, "logits", logits)
    if limit is not _WORD and validate.looked_at(x):
        wrong = ~((x >= limit.low) & (x <= limit.high))
        if wrong.any():
            validate.fail(name, limit.words.replace("a float", "floats").replace("an int", "ints"), x[wrong][0].item())
    return x.detach().to(dtype).contiguous()


def _whole(name: str, x, limit: Limit) -> int:
    if not limit.low <= x <= limit.high:
        validate.fail(name, limit.words, repr(x))
    return int(x)


def _temperatures(temperature, logits):
    """Those of the rows; 0 is one of them."""
    if not isinstance(temperature, torch.Tensor):
        if not isinstance(temperature, bool) and isinstance(temperature, numbers.Real) and temperature == 0:
            return torch.zeros(logits.shape[0], dtype=torch.float32, device=logits.device)
        return _by_row("temperature", temperature, logits, torch.float32, _TEMPERATURE)
    validate.tensor("temperature", temperature, (*validate.FLOATS, *_INTS))
    if validate.looked_at(temperature):
        _by_row("temperature", torch.where(temperature == 0, 1.0, temperature), logits, torch.float32, _TEMPERATURE)
    return _by_row("temperature", temperature, logits, torch.float32, Limit("", -torch.inf, torch.inf))


def _ragged(name: str, ends, ids, rows: int, logits) -> None:
    """Ends [M + 1] and flat ids: their dtypes and shapes, and where they may be looked at that they lie inside."""
    vocab = logits.shape[1]
    for part, x, dtypes in ((f"{name} ends", ends, _INTS), (f"{name} ids", ids, _INTS)):
        validate.tensor(part, x, dtypes)
        if x.dim() != 1:
            validate.fail(part, "one dimension", validate.shape(x))
        validate.same_device(part, x, "logits", logits)
    if ends.shape[0] != rows + 1:
        validate.fail(f"{name} ends", f"shape ({rows + 1},): one more than the rows of logits", validate.shape(ends))
    if not validate.looked_at(ends):
        return
    steps = ends.diff(prepend=ends.new_zeros(1), append=ends.new_full((1,), ids.shape[0]))
    if bool((steps < 0).any()):
        validate.fail(f"{name} ends", f"numbers that ascend from 0 to {ids.shape[0]}", ends.tolist())
    wrong = (ids < 0) | (ids >= vocab)
    if bool(wrong.any()):
        validate.fail(f"{name} ids", f"values in [0, {vocab})", ids[wrong][0].item())


def _edits(name: str, edits, logits) -> tuple:
    """(ends int32, ids int32, values float32), checked."""
    if not isinstance(edits, tuple) or len(edits) != 3:
        validate.fail(name, "rlfast.Edits, or a tuple (ends, ids, values)", type(edits).__name__, TypeError)
    ends, ids, values = edits
    _ragged(name, ends, ids, logits.shape[0], logits)
    validate.tensor(f"{name} values", values)
    if values.shape != ids.shape:
        validate.fail(f"{name} values", f"shape {validate.shape(ids)} like its ids", validate.shape(values))
    validate.same_device(f"{name} values", values, "logits", logits)
    return ends.int().contiguous(), ids.int().contiguous(), values.detach().float().contiguous()


def _allowed(allowed, logits):
    """The bits, int32 [M, ⌈V/32⌉]; None stays None."""
    if allowed is None:
        return None
    rows, vocab = logits.shape
    validate.tensor("allowed", allowed, (torch.bool, torch.int32))
    bits = (rows, (vocab + 31) // 32)
    if tuple(allowed.shape) != ((rows, vocab) if allowed.dtype == torch.bool else bits):
        wanted = f"bool of shape {(rows, vocab)}, or int32 of shape {bits}"
        validate.fail("allowed", wanted, f"{allowed.dtype} of shape {validate.shape(allowed)}")
    validate.same_device("allowed", allowed, "logits", logits)
    if allowed.dtype == torch.int32:
        return allowed.contiguous()
    padded = torch.nn.functional.pad(allowed, (0, -vocab % 32)).view(rows, bits[1], 32)
    words = (padded.long() << torch.arange(32, device=allowed.device)).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).int()


def penalty_edits(
    logits,
    prompt_ids=None,
    prompt_ends=None,
    output_ids=None,
    output_ends=None,
    *,
    repetition=1.0,
    presence=0.0,
    frequency=0.0,
    bias=None,
) -> Edits:
    """What bias and penalties make of the logits of the ids that they touch, for ``sample(edits=...)``.

    x ← x + bias;  x ← x/r if x > 0 else x·r, of ids in prompt or output;  x ← x − f·count − p·[count > 0], count in the
    output. The order of transformers and vLLM: the bias is penalised too.

    Args:
        logits: [M, V], those that will be sampled from.
        prompt_ids, prompt_ends: int [P] and int [M + 1]: row i's prompt is
            prompt_ids[prompt_ends[i]:prompt_ends[i + 1]]; None: no prompts.
        output_ids, output_ends: the same of what has been generated.
        repetition: a float > 0 or one a row; above 1 discourages.
        presence, frequency: floats or one a row; above 0 discourage.
        bias: ``Edits`` whose values are added; those of equal ids are summed.

    Returns:
        Edits of as many ids as were given: an id that occurs n times is edited n times alike. Each call sorts them all.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.

    Reference:
        Keskar et al., CTRL, 2019 (repetition); the OpenAI API (presence, frequency).

    Example:
        >>> ids, ends = torch.tensor([3, 3, 5]), torch.tensor([0, 2, 3])
        >>> edits = rlfast.penalty_edits(torch.ones(2, 9), output_ids=ids, output_ends=ends, frequency=0.25)
        >>> edits.values
        tensor([0.5000, 0.5000, 0.7500])
    """
    validate.tensor("logits", logits)
    if logits.dim() != 2 or logits.shape[1] == 0:
        validate.fail("logits", "shape [M, V] with V > 0", validate.shape(logits))
    logits, (rows, vocab) = logits.detach(), logits.shape
    repetition = _by_row(
        "repetition", repetition, logits, torch.float32, Limit(f"a float from {LEAST} to {MOST}", LEAST, MOST)
    )
    finite = Limit("a finite float", -validate.FLOAT32_MAX, validate.FLOAT32_MAX)
    presence = _by_row("presence", presence, logits, torch.float32, finite)
    frequency = _by_row("frequency", frequency, logits, torch.float32, finite)
    none = logits.new_zeros(rows + 1, dtype=torch.int64), logits.new_zeros(0, dtype=torch.int64)
    lists = [_listed("prompt", prompt_ends, prompt_ids, logits) or none]
    lists += [_listed("output", output_ends, output_ids, logits) or none]
    ends, ids, values = (*none, logits.new_zeros(0)) if bias is None else _edits("bias", bias, logits)
    lists += [(ends, ids)]
    places = torch.cat([_places(ends, ids, vocab) for ends, ids in lists])
    sizes = [len(ids) for _, ids in lists]
    zero = torch.zeros(len(places), device=logits.device)
    places, order = torch.sort(places, stable=True)
    begin = torch.searchsorted(places, places)  # where its equals begin

    def summed(parts):
        """Σ over the equals of each."""
        x = torch.cat([part.float().expand(n) for part, n in zip(parts, sizes, strict=True)])[order]
        return zero.index_add(0, begin, x)[begin]

    one, nothing = zero.new_ones(1), zero.new_zeros(1)
    seen, count = summed((one, one, nothing)) > 0, summed((nothing, one, nothing))
    at = places.clamp(0, rows * vocab - 1)
    row = at // vocab
    x = logits[row, at % vocab].float() + summed((nothing, nothing, values))
    x = torch.where(seen, torch.where(x > 0, x / repetition[row], x * repetition[row]), x)
    x = x - frequency[row] * count - presence[row] * (count > 0)
    bounds = torch.arange(rows + 1, device=logits.device) * vocab
    return Edits(torch.searchsorted(places, bounds).int(), (at % vocab).int(), x)


def _listed(name: str, ends, ids, logits):
    """(ends, ids), checked; None if there are none."""
    if (ends is None) != (ids is None):
        given, missing = ("ids", "ends") if ends is None else ("ends", "ids")
        validate.fail(f"{name}_{missing}", f"a tensor, since {name}_{given} is given", "None")
    if ids is None:
        return None
    _ragged(name, ends, ids, logits.shape[0], logits)
    return ends, ids


def _places(ends, ids, vocab: int):
    """row·V + id of each; outside of [0, M·V) what belongs to no row."""
    index = torch.arange(len(ids), device=ids.device, dtype=ends.dtype)
    return (torch.searchsorted(ends, index, right=True) - 1) * vocab + ids
