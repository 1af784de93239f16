"""What ends a response, and what becomes of it."""

from __future__ import annotations

import torch

from rlfast.rollout.api import Rollout
from rlfast.rollout.scheduler import Sample


def ending(sample: Sample, token: int, eos: frozenset, tokenizer, context: int) -> str:
    """Why a sample ends with this token, its last; an empty string if it does not."""
    params, n = sample.params, len(sample.tokens)
    if n >= params.min_tokens:
        if token in params.stop_token_ids or (token in eos and not params.ignore_eos):
            return "stop"
        if params.stop and _stops(sample, tokenizer):
            return "stop"
    return "length" if n >= params.max_tokens or sample.length >= context else ""


def _stops(sample: Sample, tokenizer) -> bool:
    """Whether a stop string is in the text of the last tokens, of which each adds a character or is part of one."""
    longest = max(map(len, sample.params.stop))
    text = tokenizer.decode(sample.tokens[-(longest + 8) :])
    return any(stop in text for stop in sample.params.stop)


def rollout_of(sample: Sample, tokenizer) -> Rollout:
    """As far as the sample has come."""
    text = ""
    if tokenizer is not None:
        text = tokenizer.decode(sample.tokens, skip_special_tokens=True)
        cuts = [at for at in (text.find(stop) for stop in sample.params.stop) if at >= 0]
        text = text[: min(cuts)] if cuts and sample.finish == "stop" else text
    *numbers, versions = zip(*sample.records, strict=True) if sample.records else ((), (), (), (), ())
    return Rollout(
        sample.request, sample.index, list(sample.prompt), list(sample.tokens), text,
        *(torch.tensor(x, dtype=torch.float32) for x in numbers), torch.tensor(versions, dtype=torch.int64),
        sample.finish or "paused",
    )  # fmt: skip
