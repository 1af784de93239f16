"""What the stages of a recipe share: the policy, the reward model, the prompts, and how answers are sampled."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from rlfast import validate
from rlfast.recipes.models import Actor, Batch, Scorer, batch_of
from rlfast.recipes.row import Stage, Value
from rlfast.rollout import Engine, Rollout, SamplingParams

logger = logging.getLogger("rlfast.recipes")
SEEDS = 1 << 20  # for each prompt that is drawn, more than it has answers


class Task(NamedTuple):
    """What is trained on.

    prompts, answers: token ids: of the questions, and of a good answer to each, whose likelihood is what is mixed in.
    reward: of a response to a prompt, from the prompt's number and the rollout; 1 and more is right.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    reward: Callable[[int, Rollout], float]


class Answers(NamedTuple):
    """Sampled responses, the candidates of a prompt one after the other."""

    numbers: list[int]  # of the prompts, one a response
    rollouts: list[Rollout]
    batch: Batch
    rewards: torch.Tensor  # [B], the task's
    group: int

    def groups(self, x: torch.Tensor) -> torch.Tensor:
        """[prompts, candidates] of one a response."""
        return x.view(-1, self.group)

    def rollout_logp(self) -> torch.Tensor:
        """[B, T − 1], the sampler's log-probs where the responses are."""
        mask = self.batch.mask
        logp = torch.zeros(mask.shape, device=mask.device)
        logp[mask] = torch.cat([r.logp for r in self.rollouts]).to(mask.device)
        return logp


class Record(NamedTuple):
    """One update.

    stage: its place in the recipe. kind: what ran. step: which rollouts it was on.
    loss: what was minimised. reward: mean of the task's over the rollouts; NaN where there are none.
    data: everything by name that made the loss.
    """

    stage: int
    kind: str
    step: int
    loss: float
    reward: float
    data: dict


class Session:
    """One run of a recipe.

    Args:
        model: a causal language model of transformers; it is trained in place, but where an adapter is merged.
        task: prompts and their reward.
        tokenizer: the model's, for the texts of rollouts.
        teacher: a model to distil from, or that judges; of the same tokens.
        max_tokens: of a response.
        seed: of prompts, samples and heads.
        kv_budget: bytes of keys and values of each engine.
        watch: called with a stage and its models by name before its first step.
    """

    def __init__(
        self, model: nn.Module, task: Task, *, tokenizer=None, teacher: nn.Module | None = None, max_tokens: int = 32,
        seed: int = 0, kv_budget: float = 1 << 28, watch: Callable[[Stage, dict], None] | None = None,
    ):  # fmt: skip
        self.task, self.tokenizer, self.max_tokens, self.seed, self.watch = task, tokenizer, max_tokens, seed, watch
        self.kv_budget = kv_budget
        self.adopt(model)
        self.teacher = None if teacher is None else Actor(teacher)
        self.reward_model: Scorer | None = None
        self.generator = torch.Generator().manual_seed(seed)
        self.drawn, self.place, self.waiting = 0, 0, []
        self.kept: dict = {}  # what a stage leaves to later ones

    def adopt(self, model: nn.Module) -> None:
        """This is the policy from now on."""
        self.model, self.actor = model, Actor(model)
        self.engine = self.engine_of(model)

    def engine_of(self, model: nn.Module) -> Engine:
        """What samples from a model."""
        return Engine(model, self.tokenizer, kv_budget=self.kv_budget)

    @property
    def device(self) -> torch.device:
        return self.actor.head.module.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of rewards: float32, or float64 beside a model of float64."""
        return torch.promote_types(self.actor.head.module.weight.dtype, torch.float32)

    def optimizer(self, parameters, rate: Value) -> torch.optim.Optimizer:
        """AdamW of what learns."""
        return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=rate.value, weight_decay=0.0)

    def scorer(self, outputs: int = 1) -> Scorer:
        """A new head on the policy's body."""
        return Scorer(self.actor, outputs, self.generator)

    def begins(self, stage: Stage, **models: nn.Module | None) -> None:
        """Tell who watches."""
        if self.watch is not None:
            self.watch(stage, {"policy": self.model, **models})

    def take(self, count: int) -> list[int]:
        """The numbers of the next prompts, in an order that begins anew when all were there."""
        while len(self.waiting) < count:
            self.waiting += torch.randperm(len(self.task.prompts), generator=self.generator).tolist()
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    def sample(self, stage: Stage, engine: Engine | None = None, numbers: list[int] | None = None) -> Answers:
        """Fresh answers to the next prompts, or to those of some numbers, by the policy or another engine."""
        n, numbers = stage.candidates.value, self.take(stage.batch.value) if numbers is None else numbers
        rollouts = self.generate([list(self.task.prompts[i]) for i in numbers], stage, n, engine)
        return self.answers([i for i in numbers for _ in range(n)], rollouts, n)

    def generate(self, prompts: list[list[int]], stage: Stage, n: int, engine: Engine | None = None) -> list[Rollout]:
        """n responses to each prompt, drawn as none before."""
        params = []
        for _ in prompts:
            seed = self.seed + SEEDS * self.drawn
            params.append(
                SamplingParams(n=n, temperature=stage.temperature.value, max_tokens=self.max_tokens, seed=seed)
            )
            self.drawn += 1
        return (engine or self.engine).generate(prompts, params)

    def answers(self, numbers: list[int], rollouts: list[Rollout], group: int) -> Answers:
        """Rollouts with their rewards."""
        rewards = [self.task.reward(i, r) for i, r in zip(numbers, rollouts, strict=True)]
        batch = batch_of([r.prompt_tokens for r in rollouts], [r.tokens for r in rollouts], self.device)
        return Answers(numbers, rollouts, batch, torch.tensor(rewards, dtype=self.dtype, device=self.device), group)

    def texts(self, numbers: Sequence[int]) -> Batch:
        """The task's own answers to some prompts."""
        return batch_of([self.task.prompts[i] for i in numbers], [self.task.answers[i] for i in numbers], self.device)

    @torch.no_grad()
    def judged(self, judge: str, answers: Answers) -> torch.Tensor:
        """[B], by the task or the reward model."""
        if judge == "task":
            return answers.rewards
        if self.reward_model is None:
            validate.fail("stages", "a RewardModel before a stage that asks it", "none")
        return self.reward_model.rewards(answers.batch)

    def alike(self, kind: str, step: int, so: str = "no update") -> None:
        """Say what becomes of a step whose groups have nothing to compare."""
        logger.warning("stage %d %s, step %d: %s, in no group do rewards differ", self.place, kind, step, so)

    def record(self, kind: str, step: int, loss: torch.Tensor, answers: Answers | None = None, **data) -> Record:
        """Of one update."""
        reward = float("nan") if answers is None else answers.rewards.mean().item()
        return Record(self.place, kind, step, loss.item(), reward, {"answers": answers, **data})


Runner = Callable[[Session, Stage, int], Iterator[Record]]
RUNNERS: dict[type[Stage], Runner] = {}


def runs(kind: type[Stage]):
    """The function under it runs stages of this kind: ``(session, stage, steps)`` → the records of its updates."""

    def register(runner: Runner) -> Runner:
        RUNNERS[kind] = runner
        return runner

    return register


def run(session: Session, stage: Stage, steps: int) -> Iterator[Record]:
    """The updates of one stage."""
    return RUNNERS[type(stage)](session, stage, steps)


def learn(loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One update."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
