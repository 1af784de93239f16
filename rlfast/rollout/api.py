"""What a caller and a rollout backend say to each other: parameters, requests, rollouts, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from rlfast import validate
from rlfast.validate import Limit

MODES = ("keep", "recompute", "abort")
PROMPTS = "strings or of lists of token ids"
_RANGES = {
    "temperature": Limit("a float ≥ 0 (0 is greedy)", 0.0, validate.MOST),
    "top_p": Limit("a float in (0, 1]", 1e-30, 1.0),
    "min_p": Limit("a float in [0, 1]", 0.0, 1.0),
    "repetition_penalty": Limit("a float > 0", validate.LEAST, validate.MOST),
    "presence_penalty": Limit("a finite float", -validate.FLOAT32_MAX, validate.FLOAT32_MAX),
    "frequency_penalty": Limit("a finite float", -validate.FLOAT32_MAX, validate.FLOAT32_MAX),
}
_COUNTS = {"top_k": (0, 2**31 - 1), "max_tokens": (1,), "min_tokens": (0,), "n": (1,)}


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn, and when a response ends.

    Args:
        temperature: the logits are divided by it; 0 is greedy.
        top_p: the smallest set of the most probable tokens with at least this mass stays; 1 is off.
        top_k: so many of the most probable tokens stay; 0 is off.
        min_p: tokens stay whose probability is at least this share of the largest; 0 is off.
        max_tokens: a response has at most so many.
        min_tokens: neither a stop id nor the end of sequence is among its first so many, and no stop string ends there.
        n: samples of each prompt; its prefill is shared.
        seed: of the first sample; sample i has seed + i. The tokens of a sample depend on its prompt, parameters and
            seed alone, not on what it is batched with.
        stop: strings, one of which ends a response; the text is cut before it.
        stop_token_ids: ids, one of which ends a response and is its last token.
        ignore_eos: the model's end-of-sequence ids do not end it.
        repetition_penalty: logits of tokens of prompt and response are divided by it where positive, else multiplied.
        presence_penalty: subtracted from the logits of the tokens of the response.
        frequency_penalty: subtracted for each time that a token is in the response.
        logit_bias: {id: what is added to its logit}.
        allowed_token_ids: ids; or a function of the response's tokens that gives the ids allowed next. None is all.
            A function that raises, or gives what are no ids, ends its response, and no other.
        priority: where memory or the token budget is short, larger ones come first.

    Raises:
        ValueError, TypeError: an argument is not one of the above; the message names it.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 64
    min_tokens: int = 0
    n: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | Callable[[list[int]], Iterable[int]] | None = None
    priority: int = 0

    def __post_init__(self):
        for name, limit in _RANGES.items():
            validate.number(name, getattr(self, name), limit)
        if 0.0 < self.temperature < validate.LEAST:
            validate.fail("temperature", f"0 (greedy) or a float ≥ {validate.LEAST}", repr(self.temperature))
        for name, limits in _COUNTS.items():
            _integer(name, getattr(self, name), *limits)
        _integer("seed", self.seed, -(2**63), 2**63 - self.n), _integer("priority", self.priority, -(2**31))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self.stop)
        if not isinstance(self.stop, (tuple, list)) or not all(isinstance(s, str) and s for s in self.stop):
            validate.fail("stop", "strings that are not empty", repr(self.stop), TypeError)
        if not isinstance(self.stop_token_ids, (tuple, list)):
            validate.fail("stop_token_ids", "a tuple of ids", repr(self.stop_token_ids), TypeError)
        if not isinstance(self.logit_bias, dict):
            validate.fail("logit_bias", "a dict of ids and numbers", repr(self.logit_bias), TypeError)
        for token in (*self.stop_token_ids, *self.logit_bias):
            _integer("stop_token_ids, logit_bias", token, 0)
        for value in self.logit_bias.values():
            validate.finite("logit_bias", value)
        if self.allowed_token_ids is not None and not callable(self.allowed_token_ids):
            allowed = checked_ids("allowed_token_ids", self.allowed_token_ids, 1 << 62)
            object.__setattr__(self, "allowed_token_ids", tuple(allowed.tolist()))
        validate.flag("ignore_eos", self.ignore_eos)
        if self.min_tokens > self.max_tokens:
            validate.fail("min_tokens", f"at most max_tokens, {self.max_tokens}", str(self.min_tokens))

    @property
    def penalises(self) -> bool:
        """Whether tokens of prompt or response have other logits for it."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def of_sample(self, index: int) -> SamplingParams:
        """Those of one of the n samples."""
        return replace(self, n=1, seed=self.seed + index)


def _integer(name: str, x, least: int, most: int = 2**63 - 1) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        validate.fail(name, "an int", repr(x), TypeError)
    if not least <= x <= most:
        validate.fail(name, f"an int ≥ {least}" if x < least else f"an int ≤ {most}", repr(x))


@dataclass(frozen=True)
class Request:
    """One prompt: its tokens, and how its samples are drawn."""

    prompt: tuple[int, ...]
    params: SamplingParams = SamplingParams()


class Rollout(NamedTuple):
    """One response.

    request, index: which request it answers, and which of its samples it is.
    logp_raw: float32 [n]. Log-prob of each token under the model's own distribution, softmax(logits).
    logp: float32 [n]. Under the distribution that it was drawn from: edited, tempered, truncated, renormalised.
    kept: float32 [n]. The tempered distribution's mass that the truncation kept.
    entropy: float32 [n]. Of the model's own distribution.
    versions: int64 [n]. The policy version that each token was drawn from.
    finish_reason: "stop", "length", "abort", "no token" where none has a probability (NaN, or nothing is allowed),
        "error" where the caller's ``allowed_token_ids`` failed (the log says how), or "paused" of one that a caller
        took unfinished.
    """

    request: int
    index: int
    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    logp_raw: torch.Tensor
    logp: torch.Tensor
    kept: torch.Tensor
    entropy: torch.Tensor
    versions: torch.Tensor
    finish_reason: str


class Score(NamedTuple):
    """Of tokens 1 to n − 1 of a sequence, given those before: float32 [n − 1] each, by the rollouts' routine."""

    logp_raw: torch.Tensor
    entropy: torch.Tensor


class Packed(NamedTuple):
    """Rollouts one after the other, as the losses take them."""

    tokens: torch.Tensor  # int64 [N]
    cu_seqlens: torch.Tensor  # int64 [B + 1]
    logp_raw: torch.Tensor  # [N]
    logp: torch.Tensor
    kept: torch.Tensor
    entropy: torch.Tensor
    versions: torch.Tensor


def pack(rollouts: Sequence[Rollout], device=None) -> Packed:
    """The responses of some rollouts: ``rlfast.loss(name)(logp, rollout_logp=packed.logp_raw, cu_seqlens=…)``."""
    ends = torch.tensor([0, *(len(r.tokens) for r in rollouts)]).cumsum(0)
    tokens = torch.tensor([t for r in rollouts for t in r.tokens], dtype=torch.int64)
    rest = [torch.cat([torch.empty(0), *(getattr(r, name) for r in rollouts)]) for name in Packed._fields[2:-1]]
    versions = torch.cat([tokens.new_empty(0), *(r.versions for r in rollouts)])
    return Packed(*(x.to(device) for x in (tokens, ends, *rest, versions)))


class RolloutBackend(Protocol):
    """What generates: the engine in this process, or a server elsewhere.

    ``logp_means`` says what a rollout's ``logp`` is there, "processed" or "tempered" (before truncation), and
    ``bitwise`` whether ``logp_raw`` has the bits of the trainer's forward, so that a loss needs no correction for the
    difference.
    """

    logp_means: str
    bitwise: bool

    def submit(self, requests: Sequence[Request]) -> list[int]: ...
    def step(self, timeout: float | None = None) -> list[Rollout]: ...
    def pause(self, mode: str = "keep") -> None: ...
    def resume(self) -> None: ...
    def sync_weights(self, named_params, version: int) -> None: ...


def checked_sizes(**sizes) -> None:
    """Whole numbers above 0, None where nothing is said, or an error that names one."""
    for name, x in sizes.items():
        if x is not None and (not isinstance(x, int) or isinstance(x, bool) or x < 1):
            validate.fail(name, "an int ≥ 1", repr(x))


def checked_version(version) -> int:
    """A policy version, or an error that names it."""
    _integer("version", version, 0)
    return version


def named_weights(named_params) -> list[tuple[str, torch.Tensor]]:
    """Pairs of a name and a parameter, as ``model.named_parameters()`` has them, or an error."""
    try:
        found = [(name, p) for name, p in named_params]
    except (TypeError, ValueError):
        found = [("", None)]
    if not all(isinstance(name, str) and isinstance(p, torch.Tensor) for name, p in found):
        wanted = "pairs of a name and a tensor, such as model.named_parameters()"
        validate.fail("named_params", wanted, repr(named_params)[:60], TypeError)
    return found


def listed(name: str, x, wanted: str) -> None:
    """A list or a tuple, or an error that names it: a string is none of its characters."""
    if not isinstance(x, (list, tuple)):
        validate.fail(name, f"a list of {wanted}", repr(x)[:60], TypeError)


def checked_prompt(prompt, tokenizer, vocab: int, most: float = math.inf, name: str = "prompts") -> tuple[int, ...]:
    """The tokens of a prompt, a string or ids, or an error that names the argument."""
    if isinstance(prompt, str):
        if tokenizer is None:
            validate.fail(name, "lists of token ids, since there is no tokenizer", repr(prompt))
        prompt = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        validate.fail(name, "strings or lists of token ids", repr(prompt)[:60], TypeError)
    if not prompt:
        validate.fail(name, "at least one token each", "an empty list")
    bad = next((t for t in prompt if not 0 <= t < vocab), None)
    if bad is not None:
        validate.fail(name, f"token ids in [0, {vocab})", str(bad))
    if len(prompt) > most:
        validate.fail(name, f"at most {most} tokens (the model's context)", str(len(prompt)))
    return tuple(prompt)


def checked_sequences(sequences, vocab: int, most: int) -> list[tuple[int, ...]]:
    """The sequences that are scored, of two tokens at least."""
    listed("sequences", sequences.tolist() if isinstance(sequences, torch.Tensor) else sequences, "lists of token ids")
    found = [checked_prompt(s, None, vocab, most, "sequences") for s in sequences]
    short = next((s for s in found if len(s) < 2), None)
    if short is not None:
        validate.fail("sequences", "at least two tokens each: the first has no log-prob", repr(list(short)))
    return found


def checked_request(request: Request, tokenizer, vocab: int, context: int = 1 << 30, *, here: bool = True) -> Request:
    """A request with the tokens of its prompt, all of whose ids are the vocabulary's, or an error.

    ``here`` is whether stop strings are looked for in this process.
    """
    if not isinstance(request, Request):
        validate.fail("requests", "Request", repr(request)[:60], TypeError)
    params = request.params
    if not isinstance(params, SamplingParams):
        validate.fail("params", "SamplingParams", repr(params), TypeError)
    prompt = checked_prompt(request.prompt, tokenizer, vocab, context - 1)
    if here and params.stop and tokenizer is None:
        validate.fail("stop", "no strings, since there is no tokenizer", repr(params.stop))
    checked_ids("stop_token_ids, logit_bias", (*params.stop_token_ids, *params.logit_bias), vocab)
    if isinstance(params.allowed_token_ids, tuple):
        checked_ids("allowed_token_ids", params.allowed_token_ids, vocab)
    return Request(prompt, params)


def checked_ids(name: str, ids, vocab: int) -> torch.Tensor:
    """Token ids, int64 [n], or an error that names them."""
    try:
        found = torch.as_tensor(ids if isinstance(ids, torch.Tensor) else list(ids))
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(1)
    if found.dim() != 1 or (found.numel() and found.dtype not in (torch.int64, torch.int32)):
        validate.fail(name, "token ids", repr(ids)[:60], TypeError)
    wrong = found[(found < 0) | (found >= vocab)]
    if wrong.numel():
        validate.fail(name, f"ids in [0, {vocab})", str(wrong[0].item()))
    return found.long()


def ends_of(model, given, vocab: int) -> frozenset[int]:
    """The ids that end a response: those that are given, or the model's, of which some may lie beyond its head."""
    if given is not None:
        return frozenset(checked_ids("eos_token_ids", given, vocab).tolist())
    found = (getattr(model, "generation_config", None) or model.config).eos_token_id
    found = [] if found is None else [found] if isinstance(found, int) else found
    return frozenset(token for token in found if token < vocab)


def choices(prompts, candidates) -> list[tuple]:
    """(prompt, its candidates) each, of which there must be some."""
    listed("prompts", prompts, PROMPTS)
    listed("candidates", candidates, "lists, one a prompt")
    if len(prompts) != len(candidates):
        validate.fail("candidates", f"{len(prompts)} lists, one a prompt", str(len(candidates)))
    for some in candidates:
        if not isinstance(some, (list, tuple)) or not some:
            validate.fail("candidates", "lists of one candidate at least", repr(some))
    return list(zip(prompts, candidates, strict=True))
