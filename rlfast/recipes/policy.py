"""The stage of rollouts, rewards, advantages and policy losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch

from rlfast.loss_table import loss as policy_loss
from rlfast.recipes.row import Policy
from rlfast.recipes.session import Answers, Record, Session, learn, runs

NLL = policy_loss("raft")  # −log π, a mean over tokens
ROUNDS = 4  # of sampling for groups whose rewards differ


class Measured(NamedTuple):
    """What of a batch of rollouts no update changes."""

    old_logp: torch.Tensor
    ref_logp: torch.Tensor | None
    values: torch.Tensor | None
    scores: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor | None


class PolicyRun:
    """A policy stage under way: its models, its optimisers, and what it carries from step to step."""

    def __init__(self, session: Session, stage: Policy):
        self.session, self.stage, self.actor = session, stage, session.actor
        self.reference = self.critic = self.average = None
        loss = stage.loss.ready
        if stage.kl is not None or loss.has_kl:
            self.reference = self.actor.frozen()
        if stage.critic is not None:
            known = session.reward_model
            self.critic = session.scorer() if known is None else copy.deepcopy(known).learning(True)
            self.critic_optimizer = session.optimizer(
                self.critic.parameters(), stage.critic_rate or stage.learning_rate
            )
        self.optimizer = session.optimizer(session.model.parameters(), stage.learning_rate)
        self.entropy = None if stage.entropy is None else stage.entropy(device=session.device)
        if stage.ema is not None:
            self.average = {k: x.clone() for k, x in session.model.state_dict().items()}
        reference = None if self.reference is None else self.reference.model
        session.begins(stage, reference=reference, critic=self.critic, reward_model=session.reward_model)

    def rollouts(self) -> Answers | None:
        """Answers to the next prompts; with dynamic sampling, only those of groups whose rewards differ, if any do."""
        session, stage = self.session, self.stage
        if not stage.dynamic:
            return session.sample(stage)
        numbers, kept, n, wanted = [], [], stage.candidates.value, stage.batch.value
        for _ in range(ROUNDS):
            found = session.sample(stage)
            grouped = found.groups(found.rewards)
            for i in (grouped.amax(1) > grouped.amin(1)).nonzero()[:, 0].tolist():
                numbers += found.numbers[i * n : (i + 1) * n]
                kept += found.rollouts[i * n : (i + 1) * n]
            if len(kept) >= wanted * n:
                break
        return session.answers(numbers[: wanted * n], kept[: wanted * n], n) if kept else None

    def scores(self, answers: Answers) -> torch.Tensor:
        """[B], the sum of the stage's rewards."""
        stage, lengths = self.stage, answers.batch.lengths
        total = torch.zeros_like(answers.rewards)
        for name in stage.rewards:
            if name == "length":
                right = answers.rewards >= 1.0
                total = total + stage.shaping["length"](lengths, right, group_size=answers.group)
            elif name == "overlong":
                total = total + stage.shaping["overlong"](lengths)
            else:
                part = self.session.judged(name, answers)
                total = total + (part * stage.scale.value if name == "task" and stage.scale else part)
        if stage.baseline == "reference":
            total = total - self.session.reward_model.rewards(self.session.texts(answers.numbers))
        return total

    @torch.no_grad()
    def measured(self, answers: Answers) -> Measured:
        """Log-probs before any update, and the advantages."""
        stage, batch = self.stage, answers.batch
        given = {"temperature": stage.temperature.value}
        old = self.actor.logps(batch, **given).logp
        ref = None if self.reference is None else self.reference.logps(batch, **given).logp
        scores = rewards = self.scores(answers)
        if stage.kl is not None:
            rewards = stage.kl(scores, old, ref, batch.mask)
        values = returns = None
        if stage.advantage.function == "gae":
            values = self.critic.values(batch)
            advantages, returns = stage.advantage(rewards, values, batch.mask)
        else:
            advantages = stage.advantage(rewards, group_size=answers.group)
        if stage.whiten is not None:
            advantages = stage.whiten(advantages, batch.mask)
        return Measured(old, ref, values, scores, advantages, returns)

    def loss(self, answers: Answers, m: Measured, rows: torch.Tensor) -> torch.Tensor:
        """The policy's loss on some rows."""
        stage, batch = self.stage, answers.batch.rows(rows)
        loss = stage.loss.ready
        given = {"adv": m.advantages[rows], "old_logp": m.old_logp[rows], "mask": batch.mask}
        if loss.has_kl:
            given["ref_logp"] = m.ref_logp[rows]
        if loss.correction is not None:
            given["rollout_logp"] = answers.rollout_logp().to(m.old_logp)[rows]
        if self.entropy is None:
            out = self.actor.logps(batch, temperature=stage.temperature.value)
        else:
            out = self.actor.logps(batch, temperature=stage.temperature.value, outputs=("logp", "entropy"))
            loss = loss.with_options(entropy_coef=self.entropy.value)
            given["entropy"] = out.entropy
        total = loss(out.logp, **given).loss
        if stage.nll is not None:
            texts = self.session.texts([answers.numbers[i] for i in rows.tolist()])
            total = total + stage.nll.value * NLL(self.actor.logps(texts).logp, mask=texts.mask).loss
        if self.entropy is not None:
            kept = out.entropy.detach()[batch.mask]
            self.entropy.update(kept.mean(), kept.numel())
        return total

    def update(self, step: int, answers: Answers, m: Measured, rows: torch.Tensor) -> Record:
        """One update of the critic and of the policy."""
        stage, data = self.stage, {"measured": m, "rows": rows}
        if self.critic is not None:
            batch = answers.batch.rows(rows)
            out = stage.critic(self.critic.values(batch), m.values[rows], m.returns[rows], batch.mask)
            learn(out.loss, self.critic_optimizer)
            data["value_loss"] = out.loss.item()
        loss = self.loss(answers, m, rows)
        if step >= stage.warm_up.value:
            learn(loss, self.optimizer)
        return self.session.record("policy", step, loss, answers, **data)

    def ends_step(self, step: int) -> None:
        """What follows a step's updates."""
        stage, state = self.stage, self.session.model.state_dict()
        if self.average is not None:
            stage.ema(self.average, state)
        if self.reference is not None and stage.anchor is not None:
            stage.anchor(self.reference.model.state_dict(), state)
        if self.reference is not None and stage.refresh is not None and (step + 1) % stage.refresh.value == 0:
            self.reference.model.load_state_dict(state)


@runs(Policy)
def policy(session: Session, stage: Policy, steps: int) -> Iterator[Record]:
    """Sample, reward, and update some times; then the next prompts."""
    yield from stepped(PolicyRun(session, stage), steps)


def stepped(now: PolicyRun, steps: int) -> Iterator[Record]:
    """The updates of a policy stage."""
    stage = now.stage
    for step in range(steps):
        answers = now.rollouts()
        if answers is None:
            now.session.alike("policy", step)
            continue
        m = now.measured(answers)
        if not m.advantages.any():
            now.session.alike("policy", step, "every advantage is 0")
        count = min(stage.minibatches.value, len(answers.numbers))
        for _ in range(stage.epochs.value):
            for part in range(count):
                yield now.update(step, answers, m, torch.arange(part, len(answers.numbers), count))
        now.ends_step(step)
    if now.average is not None:
        now.session.model.load_state_dict(now.average)
