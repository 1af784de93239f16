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
from itertools import groupby

import torch

from rlfast.integrations.patching import Swap, runs_as_it_is, takes
from rlfast.rollout import Engine, SamplingParams

GENERATION = ("self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images")
STEP = ("self", "model", "inputs", "num_items_in_batch")
_engines: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # trainer → its engine
# options of generate() that the engine has by other names or does not need
_KNOWN = {
    "max_new_tokens", "do_sample", "pad_token_id", "bos_token_id", "eos_token_id", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "cache_implementation",
}  # fmt: skip


def engine_of(trainer) -> Engine:
    """The engine on a trainer's model, made when it is first needed."""
    found = _engines.get(trainer)
    if found is None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        found = _engines[trainer] = Engine(model, _tokenizer(trainer), eos_token_ids=trainer.eos_token_ids)
    return found


def _tokenizer(trainer):
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def params_of(trainer) -> SamplingParams:
    """How the trainer samples; the seed comes from torch's generator, which the trainer has seeded."""
    return SamplingParams(
        temperature=float(trainer.temperature), top_p=float(trainer.top_p or 1.0), top_k=int(trainer.top_k or 0),
        min_p=float(trainer.min_p or 0.0), repetition_penalty=float(trainer.repetition_penalty),
        max_tokens=int(trainer.max_completion_length), seed=int(torch.randint(1 << 62, ()).item()),
    )  # fmt: skip


def generated(engine, prompts: list[list[int]], params: SamplingParams) -> tuple[list, list]:
    """(tokens, log-probs) of one response to each prompt, equal neighbours as samples of one request."""
    groups = [(prompt, len(list(same))) for prompt, same in groupby(prompts, key=tuple)]
    each = [
        SamplingParams(**{**vars(params), "n": count, "seed": (params.seed + number) % (1 << 62)})
        for number, (_, count) in enumerate(groups)
    ]
    rollouts = engine.generate([list(prompt) for prompt, _ in groups], each)
    return [r.tokens for r in rollouts], [logp_of(r, params).tolist() for r in rollouts]


def logp_of(rollout, params: SamplingParams) -> torch.Tensor:
    """The log-prob that a trainer computes: tempered, not truncated."""
    return rollout.logp_raw if params.temperature == 1.0 else rollout.logp + rollout.kept.log()


def rollout(engine: Engine | None = None, **options):
    """A ``rollout_func`` of TRL's GRPOTrainer.

    Args:
        engine: by default one on the trainer's own model.
        options: ``SamplingParams`` that differ from the trainer's.

    Returns:
        (prompts, trainer) → {"prompt_ids", "completion_ids", "logprobs"}, in the order of the prompts.

    Example:
        >>> GRPOTrainer(model, reward, args, train_dataset=data, rollout_func=rlfast.integrations.trl.rollout())
    """

    def rollout_func(prompts, trainer):
        one = engine_of(trainer) if engine is None else engine
        params = SamplingParams(**{**vars(params_of(trainer)), **options})
        ids, *_ = trainer._tokenize_prompts(prompts)  # TRL's chat template and its options
        tokens, logps = generated(one, ids, params)
        return {"prompt_ids": ids, "completion_ids": tokens, "logprobs": logps}

    return rollout_func


def _unsupported(trainer, images, multimodal_fields) -> str | None:
    """Why TRL generates by itself."""
    if trainer.use_vllm or trainer.use_transformers_continuous_batching:
        return "another generation backend was asked for"
    if images or multimodal_fields:
        return "prompts have images"
    others = set(trainer.generation_kwargs) - _KNOWN
    return f"rlfast has no {', '.join(sorted(others))}" if others else None


def _generation(original):
    @functools.wraps(original)
    def generate(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        reason = _unsupported(self, images, multimodal_fields)
        if reason is not None:
            runs_as_it_is(original, reason)
            return original(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs)
        return generated(engine_of(self), prompt_ids, params_of(self))

    return generate


def _step(original):
    @functools.wraps(original)
    def training_step(self, *args, **kwargs):
        engine = engine_of(self)
        mode = engine.training_mode() if isinstance(engine, Engine) else contextlib.nullcontext()
        with mode:
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
        original = vars(owner).get(name)
        if takes(original, parameters, f"trl.trainer.grpo_trainer.GRPOTrainer.{name}", strange):
            found.append(Swap(original, made(original), owner=owner, name=name))
    return found
