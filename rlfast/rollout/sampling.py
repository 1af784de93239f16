"""From the last hidden states of some samples to their next tokens, by the parameters of each."""

from __future__ import annotations

import logging
import math

import torch

from rlfast.rollout.api import checked_ids
from rlfast.sampling import Edits, penalty_edits

logger = logging.getLogger("rlfast.rollout")

OPTIONS = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}


def draw(head, hidden: torch.Tensor, samples: list, eos: frozenset) -> list[list]:
    """Columns: the tokens drawn, their raw and processed log-probs, the kept masses, the entropies.

    Args:
        head: the model's (``rlfast.rollout.hf.Head``).
        hidden: [M, D].
        samples: M ``Sample``.
        eos: ids that would end a response.
    """
    device = hidden.device
    options = {
        name: torch.tensor([getattr(s.params, name) for s in samples], dtype=dtype, device=device)
        for name, dtype in OPTIONS.items()
    }
    found = head.sample(
        hidden, **options, seeds=torch.tensor([s.key for s in samples], device=device),
        positions=torch.tensor([s.length for s in samples], device=device),
        edits=lambda logits, rows: _edits(logits, samples[rows], eos),
        allowed=_allowed(head.module.weight.shape[0], device, samples),
    )  # fmt: skip
    return [x.tolist() for x in found]


def _ragged(rows: list, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ends [M + 1], what the rows hold, one after the other)."""
    ends = torch.tensor([0, *map(len, rows)], device=device).cumsum(0)
    return ends, torch.tensor([x for row in rows for x in row], dtype=dtype, device=device)


def _edits(logits, samples, eos) -> Edits | None:
    """Logits that penalties and biases change, and −inf for what must not end a response yet."""
    biases = [_bias(s, eos) for s in samples]
    penalised = [s.params.penalises for s in samples]
    if not any(biases) and not any(penalised):
        return None
    params, device = [s.params for s in samples], logits.device

    def column(name: str):
        return torch.tensor([getattr(p, name) for p in params], dtype=torch.float32, device=device)

    ends, ids = _ragged(biases, torch.int64, device)
    _, values = _ragged([b.values() for b in biases], torch.float32, device)
    prompt_ends, prompt_ids = _ragged(
        [s.prompt if s.params.repetition_penalty != 1.0 else () for s in samples], torch.int64, device
    )
    output_ends, output_ids = _ragged(
        [s.tokens if on else () for s, on in zip(samples, penalised, strict=True)], torch.int64, device
    )
    return penalty_edits(
        logits, prompt_ids, prompt_ends, output_ids, output_ends, repetition=column("repetition_penalty"),
        presence=column("presence_penalty"), frequency=column("frequency_penalty"), bias=Edits(ends, ids, values),
    )  # fmt: skip


def _bias(sample, eos) -> dict[int, float]:
    """{id: what is added to its logit} of a sample's next token."""
    params = sample.params
    if len(sample.tokens) >= params.min_tokens:
        return params.logit_bias
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else eos)
    return params.logit_bias | dict.fromkeys(ends, -math.inf)


def _allowed(vocab: int, device, samples) -> torch.Tensor | None:
    """Bool [M, V], where a sample may not have every token."""
    wanted = [s.params.allowed_token_ids for s in samples]
    if all(ids is None for ids in wanted):
        return None
    allowed = torch.ones(len(samples), vocab, dtype=torch.bool)
    for row, (sample_, ids) in enumerate(zip(samples, wanted, strict=True)):
        if ids is not None:
            allowed[row] = False
            allowed[row, _ids(sample_, vocab) if callable(ids) else list(ids)] = True
    return allowed.to(device)


def _ids(sample, vocab: int) -> torch.Tensor:
    """What the caller's function allows; nothing if it fails, whatever it raises: the others of the batch go on."""
    try:
        return checked_ids("allowed_token_ids", sample.params.allowed_token_ids(list(sample.tokens)), vocab)
    except Exception:
        logger.exception("request %d: its allowed_token_ids failed", sample.request)
        sample.failed = True
        return torch.empty(0, dtype=torch.int64)
