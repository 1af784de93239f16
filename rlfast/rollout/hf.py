"""A Hugging Face decoder as the engine sees it: packed tokens to hidden states, hidden states to logits.

The model is not changed. For the duration of a call its configs name rlfast's attention, and its plain ``nn.Linear``
modules run on rlfast's kernel. Whether that is what the model computes by itself is found out once, on a few tokens:

    probe(model)   a ``Decoder``, or the reason why the model has to generate by itself
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from itertools import chain

import torch

from rlfast.linear import head_logits
from rlfast.logps import transformed
from rlfast.rollout import attention, linears
from rlfast.rollout.weights import Weights
from rlfast.sampling import Sampled, linear_sample

# The probe's sequences are longer than a page and than the windows of tiny models.
PROBE_LENGTHS = (23, 9)
# What a model raises that takes other arguments.
UNLIKE = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError)
# Of the largest logit, by dtype: the model's own path rounds every product of a narrow dtype, and so does ours. The
# most that was seen, over 26 tiny families and SmolLM2, but for experts: 2e-6, 0.022 and 0.003.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-6}
# What configs call a factor of the logits; of the last one some models multiply by it and some divide.
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SAME = 1.01  # squared errors that are no further apart tell no two heads from one another


@dataclass(frozen=True)
class Head:
    """logits = softcap·tanh(scale·(h·Wᵀ + b)/softcap), no soft-cap where it is 0; under autocast to a dtype, if any."""

    module: torch.nn.Linear
    autocast: torch.dtype | None = None
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [M, V] of hidden states [M, D], by the routine that rollouts, scores and training share."""
        with precision(hidden.device, self.autocast):
            return head_logits(hidden, self.module.weight, self.module.bias, self.softcap, self.scale)

    def sample(self, hidden: torch.Tensor, **options) -> Sampled:
        """A token of each hidden state, by ``rlfast.linear_sample``."""
        transform = {"softcap": self.softcap or None, "logit_scale": self.scale}
        with precision(hidden.device, self.autocast):
            return linear_sample(hidden, self.module.weight, self.module.bias, **transform, **options)


def precision(device: torch.device, dtype: torch.dtype | None):
    """Autocast to a dtype, or none, whatever the caller's."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


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
        kind = next(model.parameters()).device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.head = Head(self.causal.get_output_embeddings(), autocast)
        self.layers: list[attention.Layer] = []  # as the probe saw them
        self._trained: Decoder | None = None
        self._read()

    def _read(self) -> None:
        """The modules and parameters that there are now."""
        self.modules, self.parameters = tuple(self.model.modules()), tuple(self.model.parameters())
        self.watched = Weights(self.model)
        self.configs = list({id(m.config): m.config for m in self.body.modules() if hasattr(m, "config")}.values())
        nn_linears = (m for m in self.modules if type(m) is torch.nn.Linear and m is not self.head.module)
        self.linears = {m: linears.forward_of(m) for m in nn_linears}
        tables = [table for m in self.modules for table in (m._modules, m._parameters)]
        self._tables, self._empty = [t for t in tables if t], [t for t in tables if not t]
        self._ids = self._now()
        self._odd = next((m for m in self.modules if not _exact(m)), None)
        self._activations = sorted({
            m.in_features
            for name, m in self.model.named_modules()
            if m in self.linears and m.out_features == getattr(self.config, "hidden_size", None)
            and "att" not in name and "lora_" not in name
        })  # fmt: skip

    def _now(self) -> list[int]:
        """Of every module and parameter; none of those that are known is freed, so no new one has its id."""
        return list(map(id, chain.from_iterable(map(dict.values, self._tables))))

    def refresh(self) -> None:
        """Look whether a module or a parameter has come or gone, as adapters do; 50 µs where there are 600 modules."""
        if any(self._empty) or self._now() != self._ids:
            head = self.causal.get_output_embeddings()
            if not linears.plain(head):
                raise RuntimeError(f"the model's head has become a {type(head).__name__}: make a new engine")
            self.head = replace(self.head, module=head)
            self._read()

    @property
    def inexact(self) -> str:
        """Why a token's hidden state may have other bits in another batch; nothing if it has not."""
        if self._odd is not None:
            return f"{type(self._odd).__name__} multiplies by its weights in its own way"
        threads = torch.get_num_threads()
        # torch gives up to so many threads a share each, and what is left of a share beside whole pairs of vectors
        # goes another way through SiLU and GELU
        unit = (32 if self.dtype == torch.float32 else 64) * math.lcm(*range(1, threads + 1))
        width = next((n for n in self._activations if n % unit), None)
        return "" if width is None else f"activations of {width} are no multiple of {unit}, with {threads} threads"

    def of(self, model) -> Decoder:
        """The decoder of a model that is trained in place of this one's; found out about once.

        Raises:
            RuntimeError: rlfast does not compute what that model does.
        """
        if model is None or model is self.model:
            return self
        if self._trained is None or self._trained.model is not model:
            self._trained, reason = probe(model)
            if self._trained is None:
                raise RuntimeError(f"training_mode: {reason}")
        return self._trained

    @property
    def bitwise(self) -> bool:
        """Whether a token's hidden state has the same bits whatever it is batched with."""
        return not self.inexact

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def dtype(self) -> torch.dtype:
        """Of products with weights."""
        return self.head.autocast or self.head.module.weight.dtype

    @property
    def vocab(self) -> int:
        return self.head.module.weight.shape[0]

    @property
    def context(self) -> int:
        """Positions that the model has."""
        return getattr(self.config, "max_position_embeddings", None) or 1 << 30

    @property
    def bytes_of_token(self) -> int:
        """Keys and values of a position, of all layers."""
        return sum(layer.bytes_of_token for layer in self.layers)

    def weights(self) -> int:
        """Changes whenever a parameter does, in place or by another tensor; ``Weights`` says what it does not see."""
        self.refresh()
        return self.watched.now()

    def places(self) -> int:
        """Changes when what a graph has captured is no longer what the model runs."""
        return self.watched.places()

    @contextlib.contextmanager
    def installed(self, name: str = attention.ROLLOUT):
        """Within it, the model attends by ``name``, on rlfast's linears. A rollout's is in evaluation mode too, and
        under the autocast that the decoder was made under; in training the head's own forward gives float32 logits, by
        the rollouts' routine.
        """
        self.refresh()
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.implementation(self.configs, name))
            stack.enter_context(linears.swapped(self.linears))
            if name == attention.TRAINING:
                stack.enter_context(
                    linears.swapped({self.head.module: linears.forward_of(self.head.module, wide=True)})
                )
            if name == attention.ROLLOUT:
                stack.enter_context(evaluating(self.modules))
                stack.enter_context(precision(self.device, self.head.autocast))
            yield

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, how) -> torch.Tensor:
        """Hidden states [T, D] of packed tokens [T], attending as ``how`` says; inside ``installed()``."""
        with torch.no_grad(), attention.running(how):
            out = self.body(
                input_ids=ids.unsqueeze(0), position_ids=positions.unsqueeze(0), attention_mask=None, use_cache=False
            )
        return out.last_hidden_state[0]


def _exact(module) -> bool:
    """Whether a module's products with its weights, if it has any, are on rlfast's linear."""
    if isinstance(module, torch.nn.Embedding) or linears.swappable(module):
        return True
    return not any(p.dim() > 1 for p in module.parameters(recurse=False))


@contextlib.contextmanager
def evaluating(modules):
    """Within it, none of the modules is in training mode."""
    training = [m.__dict__ for m in modules if m.training]
    for own in training:
        own["training"] = False
    try:
        yield
    finally:
        for own in training:
            own["training"] = True


def probe(model) -> tuple[Decoder | None, str]:
    """(the decoder, "") if rlfast computes what the model does; else (None, why not)."""
    attention.register()
    name = type(model).__name__
    try:
        decoder = Decoder(model)
    except (AttributeError, TypeError) as error:
        return None, f"{name} is no decoder that rlfast knows: {error}"
    if not linears.plain(decoder.head.module):
        return None, f"the head of {name} is no plain nn.Linear: {type(decoder.head.module).__name__}"
    if getattr(decoder.config, "attention_chunk_size", None):
        return None, f"{name} attends within chunks"
    if _long(decoder):
        return None, f"{name} has LongRoPE: one sequence beyond its short context turns all of the batch otherwise"
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(decoder.vocab, (n,), generator=generator).to(decoder.device) for n in PROBE_LENGTHS]
    try:
        hidden, truth, decoder.layers = _both(decoder, prompts)
    except UNLIKE as error:
        return None, f"{name} does not take packed tokens: {type(error).__name__}: {error}"
    asked, layers = len(decoder.layers), decoder.config.num_hidden_layers
    if asked != layers:
        return None, f"{asked} of the {layers} layers of {name} ask transformers for their attention"
    for layer in decoder.layers:
        window = attention.window_of(decoder.config, layer.index)
        if window and not layer.window:
            return None, f"{name} has a window of {window} positions in its mask alone"
    decoder.head = _fitted(decoder, hidden, truth)
    if _close(decoder.head.logits(hidden), truth, decoder.dtype):
        return decoder, ""
    return None, f"{name} gives other logits than its hidden states and its head"


def _long(decoder: Decoder) -> bool:
    """Whether the model has LongRoPE whose factors depend on the longest sequence of a batch: some fit in its context
    that are beyond the short one."""
    rope = getattr(decoder.config, "rope_parameters", None) or {}
    kinds = [rope, *(x for x in rope.values() if isinstance(x, dict))]  # of all layers, or by their type
    shorts = [x["original_max_position_embeddings"] for x in kinds if x.get("rope_type") == "longrope"]
    return any(short < decoder.context for short in shorts)


def _both(decoder: Decoder, prompts: list) -> tuple:
    """(hidden states of packed prompts, the model's own logits, how its layers attended)."""
    ends = torch.tensor([0, *(len(p) for p in prompts)], device=decoder.device).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(len(p), device=decoder.device) for p in prompts])
    how = attention.Packed(ends)
    with decoder.installed():
        hidden = decoder.forward(torch.cat(prompts), positions, how)
    with torch.no_grad(), evaluating(decoder.modules), precision(decoder.device, decoder.head.autocast):
        truth = [decoder.causal(input_ids=p.unsqueeze(0), use_cache=False).logits[0].float() for p in prompts]
    return hidden, torch.cat(truth), how.layers


def _fitted(decoder: Decoder, hidden, truth) -> Head:
    """Of the heads with what the config declares, the plain one and a scaled one, the first of those of least error."""
    cap = float(getattr(decoder.config, "final_logit_softcapping", None) or 0.0)
    caps = dict.fromkeys((cap, 0.0))
    declared = [float(x) for x in (getattr(decoder.config, name, None) for name in SCALES) if x]
    scales = dict.fromkeys((*declared, *(1 / x for x in declared), 1.0))
    raw, truth = decoder.head.logits(hidden).double(), truth.double()
    tried = [(scale, cap) for cap in caps for scale in scales]
    for cap in caps:
        wanted = cap * torch.atanh((truth / cap).clamp(-1 + 1e-6, 1 - 1e-6)) if cap else truth
        tried.append((float(f"{((wanted * raw).sum() / raw.square().sum()).item():.6g}"), cap))
    errors = [(transformed(raw, cap, scale) - truth).square().sum().item() for scale, cap in tried]
    best = next((x for x, e in zip(tried, errors, strict=True) if e <= SAME * min(errors)), (1.0, 0.0))
    return replace(decoder.head, scale=best[0], softcap=best[1])


def _close(got, truth, dtype: torch.dtype) -> bool:
    """In every row; of a narrow dtype in nine of ten, since rounding may send a token to another expert."""
    errors = (got - truth).abs().amax(-1)
    error = errors.quantile(0.9) if dtype in (torch.bfloat16, torch.float16) else errors.max()
    return bool(error <= CLOSE[dtype] * truth.abs().max().clamp(min=1.0))
