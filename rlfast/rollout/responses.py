"""What ends a response, and what becomes of it."""

from __future__ import annotations

import torch

from rlfast.rollout.api import Rollout, SamplingParams
from rlfast.rollout.scheduler import Sample


def ending(sample: Sample, token: int, eos: frozenset, tokenizer, context: int) -> str:
    """Why a sample ends with this token, its last; an empty string if it does not."""
    params, n = sample.params, len(sample.tokens)
    if token in params.stop_token_ids or (token in eos and not params.ignore_eos):  # not drawn before min_tokens
        return "stop"
    if stopped(sample.tokens, params, tokenizer):
        return "stop"
    return "length" if n >= params.max_tokens or sample.length >= context else ""


def stopped(tokens: list[int], params: SamplingParams, tokenizer) -> bool:
    """Whether a stop string is in the text of the last tokens, of which each adds a byte at least, and ends after those
    that ``min_tokens`` protects."""
    if not params.stop or len(tokens) <= params.min_tokens:
        return False
    begin = max(len(tokens) - max(len(stop.encode()) for stop in params.stop) - 8, 0)
    text = tokenizer.decode(tokens[begin:])
    return _cut(text, params.stop, tokenizer.decode(tokens[begin : params.min_tokens])) < len(text)


def _cut(text: str, stops, protected: str) -> int:
    """Where the first stop string begins that ends after the protected text; the text's length if there is none."""
    places = (text.find(stop, max(len(protected) - len(stop) + 1, 0)) for stop in stops)
    return min((at for at in places if at >= 0), default=len(text))


def certain(tokens: list[int], params: SamplingParams, tokenizer) -> tuple[str, bool]:
    """(The text of the first tokens of a response, but for an end that later ones may change: a character that is not
    whole, the beginning of a stop string; whether there is no such end)."""
    if tokenizer is None:
        return "", True
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    whole = text.rstrip("\ufffd")
    begun = (n for stop in params.stop for n in range(1, len(stop)) if whole.endswith(stop[:n]))
    sure = whole[: len(whole) - max(begun, default=0)]
    return sure, len(sure) == len(text)


def rollout_of(sample: Sample, tokenizer) -> Rollout:
    """As far as the sample has come."""
    text, params = "", sample.params
    if tokenizer is not None:
        text = tokenizer.decode(sample.tokens, skip_special_tokens=True)
        if sample.finish == "stop":
            protected = tokenizer.decode(sample.tokens[: params.min_tokens], skip_special_tokens=True)
            text = text[: _cut(text, params.stop, protected)]
    *numbers, versions = zip(*sample.records, strict=True) if sample.records else ((), (), (), (), ())
    return Rollout(
        sample.request, sample.index, list(sample.prompt), list(sample.tokens), text,
        *(torch.tensor(x, dtype=torch.float32) for x in numbers), torch.tensor(versions, dtype=torch.int64),
        sample.finish or "paused",
    )  # fmt: skip
