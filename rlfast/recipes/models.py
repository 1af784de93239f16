"""The models of a recipe: the policy, its copies, and scalar heads on copies of its body."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from rlfast import validate
from rlfast.divergences import linear_divergence
from rlfast.logps import TokenLogps, linear_token_logps
from rlfast.rollout.hf import probe


class Batch(NamedTuple):
    """Prompts with responses, padded on the right.

    ids, attention: int64 [B, T].
    mask: bool [B, T − 1], where the next token is one of the response.
    """

    ids: torch.Tensor
    attention: torch.Tensor
    mask: torch.Tensor

    @property
    def lengths(self) -> torch.Tensor:
        """[B], tokens of each response."""
        return self.mask.sum(-1)

    @property
    def last(self) -> torch.Tensor:
        """[B], where the last token is."""
        return self.attention.sum(-1) - 1

    def rows(self, index) -> Batch:
        """Some of its rows."""
        return Batch(*(x[index] for x in self))


def batch_of(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device=None, skip: int = 0) -> Batch:
    """A batch of token ids; the first ``skip`` tokens of a response take no part."""
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    attention, mask = torch.zeros_like(ids), torch.zeros(len(prompts), longest - 1, dtype=torch.bool)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        whole = len(prompt) + len(response)
        ids[i, :whole] = torch.tensor([*prompt, *response])
        attention[i, :whole] = 1
        mask[i, len(prompt) - 1 + skip : whole - 1] = True
    return Batch(ids.to(device), attention.to(device), mask.to(device))


class Actor:
    """A causal language model whose log-probs come from its hidden states, by the fused head.

    Args:
        model: of transformers, or a PEFT model of one.

    Raises:
        ValueError: its logits are not those of its hidden states and its head.
    """

    def __init__(self, model: nn.Module):
        decoder, reason = probe(model)
        if decoder is None:
            validate.fail("model", "a causal language model with a plain head", reason)
        self.model, self.body, self.head = model, decoder.body, decoder.head

    def frozen(self) -> Actor:
        """A copy that does not learn."""
        return Actor(copy.deepcopy(self.model).requires_grad_(False))

    def hidden(self, batch: Batch) -> torch.Tensor:
        """[B, T − 1, D], before each next token."""
        out = self.body(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False)
        return out.last_hidden_state[:, :-1]

    def logps(self, batch: Batch, *, temperature: float = 1.0, outputs=("logp",)) -> TokenLogps:
        """Log-probs of the responses' tokens [B, T − 1], and what else is asked for; 0 where the mask is."""
        head = self.head
        return linear_token_logps(
            self.hidden(batch), head.module.weight, batch.ids[:, 1:], head.module.bias, mask=batch.mask,
            temperature=temperature, softcap=head.softcap or None, logit_scale=head.scale, outputs=outputs,
        )  # fmt: skip

    def divergence(self, batch: Batch, teacher: Actor, **options) -> torch.Tensor:
        """``linear_divergence`` from a teacher, a mean over the responses' tokens."""
        with torch.no_grad():
            ref_hidden = teacher.hidden(batch)
        head, other = self.head, teacher.head
        return linear_divergence(
            self.hidden(batch), head.module.weight, ref_hidden, other.module.weight, bias=head.module.bias,
            ref_bias=other.module.bias, softcap=head.softcap or None, ref_softcap=other.softcap or None,
            logit_scale=head.scale, ref_logit_scale=other.scale, mask=batch.mask, reduce="mean", **options,
        ).value  # fmt: skip


class Scorer(nn.Module):
    """A linear head on a copy of a policy's body: a reward model, or a critic. What is frozen there is so here.

    Args:
        actor: whose body is copied.
        outputs: of the head.
        generator: of the head's first weights.
    """

    def __init__(self, actor: Actor, outputs: int = 1, generator: torch.Generator | None = None):
        super().__init__()
        self.body = copy.deepcopy(actor.body)
        width = actor.head.module.weight.shape[1]
        first = torch.randn(outputs, width, generator=generator) / (width + 1) ** 0.5  # InstructGPT's deviation
        self.head = nn.Parameter(first.to(actor.head.module.weight))
        self.learns = [p.requires_grad for p in self.parameters()]

    def learning(self, on: bool) -> Scorer:
        """Itself, learning or not."""
        for p, learns in zip(self.parameters(), self.learns, strict=True):
            p.requires_grad_(on and learns)
        return self

    def _hidden(self, batch: Batch) -> torch.Tensor:
        return self.body(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).last_hidden_state

    def attributes(self, batch: Batch) -> torch.Tensor:
        """[B, outputs], at the last token."""
        hidden = self._hidden(batch)
        return hidden[torch.arange(len(hidden), device=hidden.device), batch.last] @ self.head.T

    def rewards(self, batch: Batch) -> torch.Tensor:
        """[B], the mean of the attributes."""
        return self.attributes(batch).mean(-1)

    def values(self, batch: Batch) -> torch.Tensor:
        """[B, T − 1], before each next token."""
        return (self._hidden(batch)[:, :-1] @ self.head.T)[..., 0]
