"""From the logits of some samples' next tokens to the tokens, by the parameters of each."""

from __future__ import annotations

import torch

from rlfast.sampling import sample

WORD = 32  # bits of a word of the mask of allowed ids


def draw(logits: torch.Tensor, samples: list, eos: frozenset) -> list[list]:
    """Columns: the tokens drawn, their raw and processed log-probs, the kept masses, the entropies.

    Args:
        logits: [M, V] float32.
        samples: M ``Sample``.
        eos: ids that would end a response.
    """
    params = [s.params for s in samples]

    def column(name: str, dtype):
        return torch.tensor([getattr(p, name) for p in params], dtype=dtype, device=logits.device)

    edits = _edits(logits, samples, eos)
    found = sample(
        logits, temperature=column("temperature", torch.float32), top_k=column("top_k", torch.int32),
        top_p=column("top_p", torch.float32), min_p=column("min_p", torch.float32),
        seeds=column("seed", torch.int64),
        positions=torch.tensor([s.length for s in samples], dtype=torch.int64, device=logits.device),
        edits=edits, allowed=_allowed(logits, samples),
    )  # fmt: skip
    return [x.tolist() for x in found]
