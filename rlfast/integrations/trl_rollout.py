"""Generation in TRL's trainers by ``rlfast.rollout.Engine``, on the weights that are trained.

    rollout(engine)     a ``rollout_func`` for GRPOTrainer(..., rollout_func=…)
    swaps(bitwise)      what ``rlfast.patch("trl", rollouts=True)`` puts in place of TRL's own generation

TRL hands over each prompt ``num_generations`` times; equal neighbours are one request of so many samples, whose
prompt is computed once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import weakref
from dataclasses import replace
from itertools import accumulate, groupby

import torch

from rlfast import validate
from rlfast.integrations.patching import Swap, original_of, refused, runs_as_it_is, say_once, takes
from rlfast.rollout import Engine, Request, SamplingParams

GENERATION = ("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images")
STEP = ("self", "model", "inputs", "num_items_in_batch")
WITHOUT_END = 1 << 20  # tokens: the context ends it
SPREAD = "the model's parameters are spread over the processes"
_engines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # trainer → its engine
# Options of generate(): what they are to the engine, and what they are if they are None.
_OPTIONS = {
    "temperature": ("temperature", float, 1.0),
    "top_p": ("top_p", float, 1.0),
    "top_k": ("top_k", int, 0),
    "min_p": ("min_p", float, 0.0),
    "repetition_penalty": ("repetition_penalty", float, 1.0),
    "max_new_tokens": ("max_tokens", int, WITHOUT_END),
    "min_new_tokens": ("min_tokens", int, 0),
}
_UNUSED = {"do_sample", "eos_token_id", "pad_token_id", "bos_token_id", "cache_implementation"}  # or read elsewhere
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}  # values under which there is nothing to do


def _spread(trainer) -> bool:
    """Whether no process has the whole model: FSDP, ZeRO 3."""
    zero = trainer.accelerator.state.deepspeed_plugin
    return trainer.is_fsdp_enabled or (zero is not None and zero.zero_stage == 3)


def engine_of(trainer) -> Engine:
    """The engine on a trainer's model, in the precision that it trains in, made when it is first needed."""
    found = _engines.get(trainer)
    if found is None:
        if _spread(trainer):
            validate.fail("engine", "one, such as a VLLMServer", f"None, and {SPREAD}")
        model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.accelerator.autocast():
            found = Engine(model, _tokenizer(trainer), eos_token_ids=_eos(trainer))
        _engines[trainer] = found
    return found


def _tokenizer(trainer):
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _options(trainer) -> dict:
    """Those of generate() that the trainer generates with, ``GRPOConfig(generation_kwargs=…)`` among them.

    A trainer that asked for another backend has none but those of its config.
    """
    own = {
        "temperature": trainer.temperature, "top_p": trainer.top_p, "top_k": trainer.top_k, "min_p": trainer.min_p,
        "repetition_penalty": trainer.repetition_penalty, "max_new_tokens": trainer.max_completion_length,
        "eos_token_id": trainer.eos_token_ids,
    }  # fmt: skip
    return own | getattr(trainer, "generation_kwargs", trainer.args.generation_kwargs or {})


def _eos(trainer) -> list[int]:
    """The ids that end a response: those that generate() is told of, and those after which TRL drops what there is."""
    told = _options(trainer).get("eos_token_id")
    told = [] if told is None else [told] if isinstance(told, int) else told
    return list(dict.fromkeys([*told, *trainer.eos_token_ids]))


def _strange(options: dict) -> list[str]:
    """Those that the engine has no word for."""
    known = {*_OPTIONS, *_UNUSED}
    return sorted(k for k, x in options.items() if k not in known and x is not None and x != _NEUTRAL.get(k))


def params_of(trainer) -> SamplingParams:
    """How the trainer samples; the seed comes from torch's generator, which the trainer has seeded.

    Raises:
        ValueError: ``generation_kwargs`` has an option that the engine has not.
    """
    options = _options(trainer)
    if _strange(options):
        validate.fail(
            "generation_kwargs", f"options among {(*_OPTIONS, *sorted(_UNUSED))}", ", ".join(_strange(options))
        )
    words = {
        name: none if options.get(theirs) is None else kind(options[theirs])
        for theirs, (name, kind, none) in _OPTIONS.items()
    }
    if not options.get("do_sample", True):
        words["temperature"] = 0.0
    return SamplingParams(**words, seed=int(torch.randint(1 << 62, ()).item()))


def generated(engine, prompts: list[list[int]], params: SamplingParams) -> tuple[list, list]:
    """(tokens, log-probs) of one response to each prompt, equal neighbours as samples of one request."""
    groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts, key=tuple)]
    before = accumulate((count for _, count in groups), initial=0)  # a prompt that comes again goes on counting
    each = [
        replace(params, n=count, seed=(params.seed + first) % (1 << 62))
        for (_, count), first in zip(groups, before, strict=False)
    ]
    rollouts = engine.generate([list(prompt) for prompt, _ in groups], each)
    return [r.tokens for r in rollouts], [logp_of(r, params).tolist() for r in rollouts]


def logp_of(rollout, params: SamplingParams) -> torch.Tensor:
    """The log-prob that a trainer computes: tempered, not truncated; of a server, which says no more, its own."""
    found = rollout.logp_raw if params.temperature == 1.0 else rollout.logp + rollout.kept.log()
    return torch.where(found.isnan(), rollout.logp, found)


def rollout(engine: Engine | None = None, **options):
    """A ``rollout_func`` of TRL's GRPOTrainer.

    Args:
        engine: by default one on the trainer's own model. The trainer's end-of-sequence ids end a response of any.
        options: ``SamplingParams`` that differ from the trainer's.

    Returns:
        (prompts, trainer) → {"prompt_ids", "completion_ids", "logprobs"}, in the order of the prompts.

    Example:
        >>> GRPOTrainer(model, reward, args, train_dataset=data, rollout_func=rlfast.integrations.trl.rollout())
    """

    def rollout_func(prompts, trainer):
        one = engine_of(trainer) if engine is None else engine
        params = replace(params_of(trainer), **options | _ends(trainer, options))
        ids, images, more = trainer._tokenize_prompts(prompts)  # TRL's chat template and its options
        if images or more:
            validate.fail("prompts", "text alone: the engine takes no images", "prompts with images")
        tokens, logps = generated(one, ids, params)
        return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logps}

    return rollout_func


def _ends(trainer, options: dict) -> dict:
    """What ends a response: an engine that was made elsewhere knows the model's ids, but not the tokenizer's."""
    eos = [] if options.get("ignore_eos") else _eos(trainer)
    return {"stop_token_ids": (*eos, *options.get("stop_token_ids", ()))}


def _unsupported(trainer, images, multimodal_fields) -> str | None:
    """Why TRL generates by itself."""
    if trainer.use_vllm or trainer.use_transformers_continuous_batching:
        return "another generation backend was asked for"
    if images or multimodal_fields:
        return "prompts have images"
    if _spread(trainer):
        return SPREAD
    strange = _strange(_options(trainer))
    if strange:
        return f"rlfast has no {', '.join(strange)}"
    engine = engine_of(trainer)
    return None if isinstance(engine, Engine) else engine.reason  # TRL's generate() has batches, that engine has none


def _unfit(trainer, prompt_ids) -> str | None:
    """Why the engine has no room for the longest prompt and what follows it."""
    most = _options(trainer).get("max_new_tokens") or WITHOUT_END
    longest = tuple(max(prompt_ids, key=len))
    return refused(lambda: engine_of(trainer)._checked(Request(longest, SamplingParams(max_tokens=most))))


def _generation(original):
    @functools.wraps(original)
    def generate(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        reason = _unsupported(self, images, multimodal_fields) or _unfit(self, prompt_ids)
        if reason is not None:
            runs_as_it_is(original, reason)
            return original(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs)
        return generated(engine_of(self), prompt_ids, params_of(self))

    return generate


def _step(original):
    @functools.wraps(original)
    def training_step(self, *args, **kwargs):
        if _spread(self):
            say_once(f"bitwise=True: training has not the bits of the rollouts: {SPREAD}")
            return original(self, *args, **kwargs)
        engine = engine_of(self)
        paged = isinstance(engine, Engine)
        if not engine.bitwise:
            why = engine.decoder.inexact if paged else engine.reason
            say_once(f"bitwise=True: training has not the bits of the rollouts: {why}")
        with engine.training_mode() if paged else contextlib.nullcontext():
            return original(self, *args, **kwargs)

    return training_step


def swaps(strange: list[str], bitwise: bool) -> list[Swap]:
    """The methods to swap; with ``bitwise`` the training step too, which then has the bits of the rollouts."""
    owner = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    wanted = [("_generate_single_turn", _generation, GENERATION)]
    if bitwise:
        wanted.append(("training_step", _step, STEP))
    found = []
    for name, made, parameters in wanted:
        original = original_of(owner, name)
        if takes(original, parameters, f"trl.trainer.grpo_trainer.GRPOTrainer.{name}", strange):
            found.append(Swap(original, made(original), owner=owner, name=name))
    return found
