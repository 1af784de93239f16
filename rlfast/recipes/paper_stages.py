"""Stages that related papers have and no system of the survey: feedback of language models, restarts, agents."""

from __future__ import annotations

from dataclasses import dataclass

from rlfast.recipes.row import Policy, Preference, RewardModel, Stage, Use, Value

ONCE, FOUR, ZERO, WHOLE, RATE = (Value(x) for x in (1, 4, 0.0, 1.0, 1e-6))


@dataclass(frozen=True, kw_only=True)
class Compared(RewardModel):
    """A reward model of pairs that a judge compares: labels are its probabilities, not the task's.

    Args:
        judge: ``rewards.judge``. The judge is the teacher, or the model that the stage begins with.
    """

    judge: Use


@dataclass(frozen=True, kw_only=True)
class Demonstrated(RewardModel):
    """Training, and a reward model of pairs of an answer after it and one before: what the training was for.

    Args:
        stage: the training. The policy is then again what it was before it.
    """

    stage: Stage


@dataclass(frozen=True, kw_only=True)
class Embedded(RewardModel):
    """Small reward models on the last hidden state that a frozen body has of each answer.

    Args:
        ensemble: ``EmbeddingRewards``.
        pool: ``pooled_rewards``.
        updates: on the embeddings of a batch, which are made once.
    """

    ensemble: Use
    pool: Use
    updates: Value = ONCE


@dataclass(frozen=True, kw_only=True)
class Restarted(Policy):
    """Rollouts from prompts, and from the middle of rollouts from them.

    Args:
        restart: ``rollout.restarts``.
        bonus: ``reflection_bonus``.
    """

    restart: Use
    bonus: Use


@dataclass(frozen=True, kw_only=True)
class Rated(Preference):
    """Pairs of the answers that a judge rates best and worst, aspect by aspect, a mean over the aspects.

    Args:
        rate: ``rewards.rate``. The judge is the teacher, or the model that the stage begins with.
        aspects: what is rated.
    """

    rate: Use
    aspects: Value


@dataclass(frozen=True, kw_only=True)
class Extrapolated(Stage):
    """A stage, and then further in the direction that it went.

    Args:
        stage: what is run.
        extrapolate: ``extrapolate``.
    """

    stage: Stage
    extrapolate: Use


@dataclass(frozen=True, kw_only=True)
class Agent(Stage):
    """PPO of an agent in the grid world. ``batch`` is a number of episodes.

    Args:
        loss: ``loss``.
        advantage: ``gae``.
        critic: ``value_loss``.
        whiten: ``masked_whiten`` of the advantages.
        share: λ of the rewards λ·(the reward model's) + (1 − λ)·(the environment's).
        epochs: updates on a batch of episodes.
        corner: the goal is in one corner of the room.
    """

    loss: Use
    advantage: Use
    critic: Use
    whiten: Use | None = None
    share: Value = ZERO
    epochs: Value = ONCE
    corner: bool = True


@dataclass(frozen=True, kw_only=True)
class Feedback(Stage):
    """A reward model of steps, from a language model's preferences between episodes. ``batch`` is a number of pairs.

    Args:
        loss: ``reward_loss``.
        judge: ``rewards.judge``.
        corner: as of ``Agent``.
    """

    loss: Use
    judge: Use
    corner: bool = False


@dataclass(frozen=True, kw_only=True)
class Guided(Stage):
    """Q-learning that is held near what a language model would do. ``batch`` is a number of episodes.

    Args:
        loss: ``value_loss``.
        value: ``regularized_value``.
        gamma: of the target.
        corner: as of ``Agent``.
    """

    loss: Use
    value: Use
    gamma: Value = WHOLE
    corner: bool = False


@dataclass(frozen=True, kw_only=True)
class Advised(Agent):
    """A language model advises an agent, and both learn. ``batch`` is a number of starts.

    Args:
        teacher: ``loss`` of the language model.
        feedback: ``group_advantage`` of the advice for one start.
        candidates: advice for each start.
        teacher_rate: learning rate of the language model.
    """

    teacher: Use
    feedback: Use
    candidates: Value = FOUR
    teacher_rate: Value = RATE
