"""A Hugging Face decoder as the engine sees it: packed tokens to hidden states, hidden states to logits.

The model is not changed. For the duration of a call its configs name rlfast's attention, and its plain ``nn.Linear``
modules run on rlfast's kernel. Whether that is what the model computes by itself is found out once, on a few tokens:

    probe(model)   a ``Decoder``, or the reason why the model has to generate by itself
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from rlfast.linear import linear
from rlfast.rollout import attention, linears

# The probe's sequences are longer than a page and than the windows of tiny models.
PROBE_LENGTHS = (23, 9)
# What a model raises that takes other arguments.
UNLIKE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)
# Of the largest logit, by dtype: the model's own path rounds every product of a narrow dtype, and so does ours.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-6}


@dataclass(frozen=True)
class Head:
    """logits = softcap·tanh(scale·(h·Wᵀ + b)/softcap); no soft-cap where it is 0."""

    module: torch.nn.Module
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [M, V] of hidden states [M, D], by the linear that scores and rollouts share."""
        x = linear(hidden, self.module.weight, self.module.bias, wide=True)
        if self.scale != 1.0:
            x = x * self.scale
        return self.softcap * torch.tanh(x / self.softcap) if self.softcap else x


class Decoder:
    """A model's body and head.

    Args:
        model: a causal language model of transformers, or a PEFT model of one.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.body = self.causal.base_model
        self.config = self.causal.config.get_text_config(decoder=True)
        self.configs = list({id(m.config): m.config for m in self.body.modules() if hasattr(m, "config")}.values())
        self.head = Head(self.causal.get_output_embeddings())
        self.parameters = tuple(model.parameters())
        self.bytes_of_token = 0
        self.modules = tuple(model.modules())
        self.linears = [m for m in self.modules if type(m) is torch.nn.Linear and m is not self.head.module]

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def vocab(self) -> int:
        return self.head.module.weight.shape[0]

    @property
    def context(self) -> int:
        """Positions that the model has."""
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    @property
    def bitwise(self) -> bool:
        """Whether a token's hidden state has the same bits whatever it is batched with: every product with a weight is
        on rlfast's linear."""
        matrices = (m for m in self.modules if any(p.dim() > 1 for p in m.parameters(recurse=False)))
        return all(type(m) is torch.nn.Embedding or linears.swappable(m) for m in matrices)

    def weights(self) -> int:
        """Changes whenever a parameter does, in place or by another tensor."""
        return hash(tuple((p._version, p.data_ptr()) for p in self.parameters))

    def places(self) -> int:
        """Changes when a parameter lies elsewhere."""
        return hash(tuple(p.data_ptr() for p in self.parameters))

    @contextlib.contextmanager
    def installed(self, name: str = attention.ROLLOUT):
        """Within it, the model attends by ``name``, on rlfast's linears, in evaluation mode if it is a rollout."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.implementation(self.configs, name))
            stack.enter_context(linears.swapped(self.linears))
            if name == attention.ROLLOUT:
                stack.enter_context(evaluating(self.modules))
            yield

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, how) -> torch.Tensor:
        """Hidden states [T, D] of packed tokens [T], attending as ``how`` says; inside ``installed()``."""
        with torch.no_grad(), attention.running(how):
            out = self.body(
                input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), attention_mask=None, use_cache=False
            )
        return out.last_hidden_state[0]


@contextlib.contextmanager
def evaluating(modules):
    """Within it, none of the modules is in training mode."""
    training = [m for m in modules if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def probe(model) -> tuple[Decoder | None, str]:
    """(the decoder, "") if rlfast computes what the model does; else (None, why not)."""
    attention.register()
    try:
        decoder = Decoder(model)
    except (AttributeError, TypeError) as error:
        return None, f"{type(model).__name__} is no decoder that rlfast knows: {error}"
    if decoder.head.module is None or not isinstance(getattr(decoder.head.module, "weight", None), torch.Tensor):
        return None, f"{type(model).__name__} has no linear head"
    if getattr(decoder.config, "attention_chunk_size", None):
        return None, f"{type(model).__name__} attends within chunks"
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(decoder.vocab, (n,), generator=generator).to(decoder.device) for n in PROBE_LENGTHS]
    try:
        hidden, truth, how = _both(decoder, prompts)
    except UNLIKE as error:
        return None, f"{type(model).__name__} does not take packed tokens: {type(error).__name__}: {error}"
    layers = decoder.config.num_hidden_layers
    if how.calls != layers:
        return (
            None,
            f"{how.calls} of the {layers} layers of {type(model).__name__} ask transformers for their attention",
        )
    decoder.bytes_of_token = how.bytes_of_token
    for head in _heads(decoder, hidden, truth):
        decoder.head = head
        if _close(head.logits(hidden), truth, hidden.dtype):
            return decoder, ""
    return None, f"{type(model).__name__} gives other logits than its hidden states and its head"


def _both(decoder: Decoder, prompts: list) -> tuple:
    """(hidden states of packed prompts, the model's own logits, how its layers attended)."""
    ends = torch.tensor([0, *(len(p) for p in prompts)], device=decoder.device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(len(p), device=decoder.device) for p in prompts])
    how = attention.Packed(ends)
    with decoder.installed():
        hidden = decoder.forward(torch.cat(prompts), positions, how)
    with torch.no_grad(), evaluating(decoder.modules):
        truth = [decoder.causal(input_ids=p.unsqueeze(0), use_cache=False).logits[0].float() for p in prompts]
    return hidden, torch.cat(truth), how


def _heads(decoder: Decoder, hidden, truth):
    """Heads to try: the plain one, a scaled one, and those with the soft-cap of the config."""
    plain = decoder.head
    yield plain
    raw = plain.logits(hidden)
    cap = getattr(decoder.config, "final_logit_softcapping", None)
    capped = float(cap or 0.0)
    wanted = capped * torch.atanh(truth / capped) if capped else truth
    scale = (wanted.double() * raw.double()).sum() / raw.double().square().sum()
    if capped:
        yield Head(plain.module, 1.0, capped)
    yield Head(plain.module, float(f"{scale.item():.6g}"), capped)


def _close(got, truth, dtype: torch.dtype) -> bool:
    return bool((got - truth).abs().max() <= CLOSE[dtype] * truth.abs().max().clamp(min=1.0))
