"""The stages in which a language model is the judge, and the others of related papers that train a language model."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from rlfast import validate
from rlfast.recipes.models import Batch
from rlfast.recipes.paper_stages import Compared, Demonstrated, Embedded, Extrapolated, Rated, Restarted
from rlfast.recipes.policy import PolicyRun, stepped
from rlfast.recipes.preferences import ends, preference
from rlfast.recipes.session import Answers, Record, Session, learn, run, runs
from rlfast.rollout import Engine

ASPECT = "Request: {{prompt}}\n\nResponse: {{response}}\n\nThe {aspect} of the response (bad, fair or good) is"


def judge_of(session: Session) -> Engine:
    """The teacher, if there is one, or the policy as it is now: RLAIF's judge may be the model that it improves."""
    if session.tokenizer is None:
        validate.fail("tokenizer", "the model's, since a judge reads texts", "None")
    judge = session.actor.frozen() if session.teacher is None else session.teacher
    return session.engine_of(judge.model)


def asked(session: Session, answers: Answers) -> list[str]:
    """The prompts as a judge reads them."""
    return [session.tokenizer.decode(list(session.task.prompts[i]), skip_special_tokens=True) for i in answers.numbers]


@runs(Compared)
def compared(session: Session, stage: Compared, steps: int) -> Iterator[Record]:
    """Two answers of the policy to each prompt, and the judge's probability that the first is the better one."""
    if stage.candidates.value < 2:
        validate.fail("candidates", "2, which a judge compares", str(stage.candidates.value))
    judge, model = judge_of(session), session.scorer()
    session.reward_model, optimizer = model, session.optimizer(model.parameters(), stage.learning_rate)
    session.begins(stage, reward_model=model, judge=judge.decoder.model)
    for step in range(steps):
        answers = session.sample(stage)
        texts, prompts = [r.text for r in answers.rollouts], asked(session, answers)
        first, second = (slice(k, None, answers.group) for k in (0, 1))
        said = stage.judge(judge, prompts[first], texts[first], texts[second])
        rewards = [model.rewards(answers.batch.rows(rows)) for rows in (first, second)]
        loss = stage.loss(*rewards, probability=said.probability.to(rewards[0])).loss
        learn(loss, optimizer)
        yield session.record("reward_model", step, loss, answers, judged=said)
    model.requires_grad_(False)


@runs(Demonstrated)
def demonstrated(session: Session, stage: Demonstrated, steps: int) -> Iterator[Record]:
    """Training, and then a reward model by which what it made is better than what was there."""
    before, start = session.actor.frozen(), {k: x.clone() for k, x in session.model.state_dict().items()}
    yield from run(session, stage.stage, steps)
    engine, model = session.engine_of(before.model), session.scorer()
    session.reward_model, optimizer = model, session.optimizer(model.parameters(), stage.learning_rate)
    session.begins(stage, reward_model=model, before=before.model)
    for step in range(steps):
        expert = session.sample(stage)
        other = session.sample(stage, engine, expert.numbers[:: expert.group])
        loss = stage.loss(model.rewards(expert.batch), model.rewards(other.batch)).loss
        learn(loss, optimizer)
        yield session.record("reward_model", step, loss, expert, other=other)
    model.requires_grad_(False)
    session.model.load_state_dict(start)


class EmbeddedScorer(nn.Module):
    """Pooled rewards of an ensemble on the last hidden state of a body that does not learn."""

    def __init__(self, session: Session, stage: Embedded):
        super().__init__()
        self.body, self.pool = copy.deepcopy(session.actor.body).requires_grad_(False), stage.pool
        weight = session.actor.head.module.weight
        self.ensemble = stage.ensemble(weight.shape[1], seed=session.seed).to(weight.device, session.dtype)

    @torch.no_grad()
    def embeddings(self, batch: Batch) -> torch.Tensor:
        """[B, D], at the last token."""
        hidden = self.body(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(hidden), device=hidden.device), batch.last].to(self.ensemble.weights[0].dtype)

    def rewards(self, batch: Batch) -> torch.Tensor:
        """[B]."""
        return self.pool(self.ensemble(self.embeddings(batch)))


@runs(Embedded)
def embedded(session: Session, stage: Embedded, steps: int) -> Iterator[Record]:
    """The best and the worst answer by the task's reward; their embeddings are made once for all updates on them."""
    model = session.reward_model = EmbeddedScorer(session, stage)
    optimizer = session.optimizer(model.ensemble.parameters(), stage.learning_rate)
    session.begins(stage, reward_model=model)
    for step in range(steps):
        answers = session.sample(stage)
        best, worst = ends(answers, answers.rewards)
        if not len(best):
            session.alike("reward_model", step)
            continue
        cached = model.embeddings(answers.batch)
        for _ in range(stage.updates.value):
            sides = (model.ensemble(cached[rows]) for rows in (best, worst))  # [members, pairs]
            out = stage.loss(*(x.flatten() for x in sides), accumulation=1 / len(model.ensemble.weights[0]))
            learn(out.loss, optimizer)
            yield session.record("reward_model", step, out.loss, answers, rows=(best, worst))
    model.requires_grad_(False)


class RestartedRun(PolicyRun):
    """Half of the rollouts go on from the other half, some steps back."""

    def rollouts(self) -> Answers:
        """Answers from the prompts, and others from the middle of these."""
        session, stage = self.session, self.stage
        first = session.sample(stage)
        prompts = stage.restart(first.rollouts, seed=session.drawn)
        more = session.generate(prompts, stage, 1)
        right = (first.rewards >= 1.0).long()
        self.start = torch.cat((torch.zeros_like(right), 2 * right - 1))
        rewards = [session.task.reward(i, self._whole(i, r)) for i, r in zip(first.numbers, more, strict=True)]
        found = session.answers(first.numbers * 2, [*first.rollouts, *more], 1)
        return found._replace(rewards=torch.cat((first.rewards, first.rewards.new_tensor(rewards))))

    def _whole(self, number: int, rollout):
        """A rollout from a restart as the answer to its prompt."""
        prompt, tokenizer = list(self.session.task.prompts[number]), self.session.tokenizer
        tokens = [*rollout.prompt_tokens[len(prompt) :], *rollout.tokens]
        text = "" if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)
        return rollout._replace(prompt_tokens=prompt, tokens=tokens, text=text)

    def scores(self, answers: Answers) -> torch.Tensor:
        """1[right] − 1 + σ(the reward model's) + bonus."""
        right = answers.rewards >= 1.0
        liked = self.session.judged("model", answers).sigmoid()
        return right.to(liked) - 1.0 + liked + self.stage.bonus(right, self.start)

    def update(self, *given) -> Record:
        """With where its rollouts began."""
        record = super().update(*given)
        record.data["start"] = self.start
        return record


@runs(Restarted)
def restarted(session: Session, stage: Restarted, steps: int) -> Iterator[Record]:
    """A policy stage on such rollouts."""
    yield from stepped(RestartedRun(session, stage), steps)


@runs(Rated)
def rated(session: Session, stage: Rated, steps: int) -> Iterator[Record]:
    """A preference stage whose answers the judge rates, aspect by aspect."""
    judge, template = judge_of(session), [ASPECT.format(aspect=a) for a in stage.aspects.value]

    def scored(answers: Answers) -> torch.Tensor:
        found = stage.rate(judge, asked(session, answers), [r.text for r in answers.rollouts], template=template)
        return found.mean(-1).to(answers.rewards)

    yield from preference(session, stage, steps, scored)


@runs(Extrapolated)
def extrapolated(session: Session, stage: Extrapolated, steps: int) -> Iterator[Record]:
    """The stage, and the model beyond it."""
    start = {k: x.clone() for k, x in session.model.state_dict().items()}
    yield from run(session, stage.stage, steps)
    session.model.load_state_dict(stage.extrapolate(start, session.model.state_dict()))
