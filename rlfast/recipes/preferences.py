"""The stages of ranked answers: reward models, preference losses, rejection sampling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from rlfast import validate
from rlfast.recipes.models import Actor, Batch, batch_of
from rlfast.recipes.row import BestOf, Preference, RewardModel
from rlfast.recipes.session import Answers, Record, Session, learn, runs
from rlfast.rewards import best_of_n


class Pairs(NamedTuple):
    """The best and the worst answer to each prompt, where they differ."""

    chosen: Batch
    rejected: Batch
    margin: torch.Tensor  # [P], of the scores


def ends(answers: Answers, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the best answers, of the worst) of the groups whose scores differ."""
    found = best_of_n(scores, group_size=answers.group)
    return found.best[found.gap > 0], found.worst[found.gap > 0]


def pairs_of(answers: Answers, scores: torch.Tensor, skip: int = 0) -> Pairs | None:
    """Pairs, if there are any."""
    best, worst = ends(answers, scores)
    if not len(best):
        return None
    sides = []
    for rows in (best, worst):
        some = [answers.rollouts[i] for i in rows.tolist()]
        sides.append(batch_of([r.prompt_tokens for r in some], [r.tokens for r in some], scores.device, skip))
    return Pairs(*sides, scores[best] - scores[worst])


@runs(RewardModel)
def reward_model(session: Session, stage: RewardModel, steps: int) -> Iterator[Record]:
    """Answers of the policy, ranked by the task's reward."""
    model = session.reward_model = session.scorer(stage.outputs)
    optimizer = session.optimizer(model.parameters(), stage.learning_rate)
    session.begins(stage, reward_model=model)
    for step in range(steps):
        answers = session.sample(stage)
        if stage.loss.function == "reward_loss":
            best, worst = ends(answers, answers.rewards)
            if not len(best):
                session.alike("reward_model", step)
                continue
            given = {}
            if "extra" in stage.loss.ready.objective.needs:
                given["probability"] = (answers.rewards[best] - answers.rewards[worst]).sigmoid()
            chosen, rejected = (model.rewards(answers.batch.rows(x)) for x in (best, worst))
            loss = stage.loss(chosen, rejected, **given).loss
        elif stage.loss.function == "ranked_loss":
            scores = answers.groups(model.rewards(answers.batch))
            loss = stage.loss(scores, rewards=answers.groups(answers.rewards)).loss
        else:
            target = answers.rewards[:, None].expand(-1, stage.outputs)
            loss = stage.loss(model.attributes(answers.batch), target)
        learn(loss, optimizer)
        yield session.record("reward_model", step, loss, answers)
    model.learning(False)


@contextlib.contextmanager
def adapted(session: Session, stage: Preference):
    """Within it, the policy has an adapter where the stage says so, merged at the end; and its reference."""
    if stage.lora is None:
        yield session.actor.frozen(), contextlib.nullcontext
        return
    import peft

    rank, plain = stage.lora.value, session.model
    torch.manual_seed(session.seed)
    config = peft.LoraConfig(r=rank, lora_alpha=rank // 2, target_modules="all-linear", task_type="CAUSAL_LM")
    session.adopt(peft.get_peft_model(plain, config))
    yield session.actor, session.model.disable_adapter
    session.adopt(session.model.merge_and_unload())


@runs(Preference)
def preference(
    session: Session, stage: Preference, steps: int, scored: Callable[[Answers], torch.Tensor] | None = None
) -> Iterator[Record]:
    """Pairs of the policy's answers, or of the reference's, by their scores, and a preference loss."""
    scored = scored or (lambda answers: session.judged(stage.judge, answers))
    validate.one_of("sampler", stage.sampler, ("policy", "reference"))
    if stage.anchor is not None and stage.lora is not None:
        validate.fail("anchor", "None with lora, whose reference has no weights of its own", stage.anchor.function)
    with adapted(session, stage) as (reference, as_reference):
        optimizer = session.optimizer(session.model.parameters(), stage.learning_rate)
        plain = reference is not session.actor
        engine = session.engine_of(reference.model) if stage.sampler == "reference" and plain else None
        session.begins(stage, reference=reference.model, reward_model=session.reward_model)
        for step in range(steps):
            sampled_as = as_reference if stage.sampler == "reference" else contextlib.nullcontext
            with sampled_as():
                answers = session.sample(stage, engine)
            found = pairs_of(answers, scored(answers), stage.skip)
            if found is None:
                session.alike("preference", step)
                continue
            given = _given(stage, found, reference, as_reference)
            for _ in range(stage.epochs.value):
                sides = (session.actor.logps(x).logp for x in (found.chosen, found.rejected))
                out = stage.loss(*sides, **given, per_pair=True)
                learn(out.loss, optimizer)
                accuracy = (out.chosen_rewards > out.rejected_rewards).float().mean().item()
                yield session.record("preference", step, out.loss, answers, pairs=found, accuracy=accuracy)
            if stage.anchor is not None:
                stage.anchor(reference.model.state_dict(), session.model.state_dict())


@torch.no_grad()
def _given(stage: Preference, pairs: Pairs, reference: Actor, as_reference) -> dict:
    """What the loss is given beside the policy's log-probs."""
    loss = stage.loss.ready
    given = {"chosen_mask": pairs.chosen.mask, "rejected_mask": pairs.rejected.mask}
    if loss.prepared.referenced:
        with as_reference():
            for side in ("chosen", "rejected"):
                given[f"ref_{side}_logps"] = reference.logps(getattr(pairs, side)).logp
    if "margin" in loss.needs:
        given["margin"] = pairs.margin
    return given


@runs(BestOf)
def best_of(session: Session, stage: BestOf, steps: int) -> Iterator[Record]:
    """The likelihood of the best answer to each prompt."""
    optimizer = session.optimizer(session.model.parameters(), stage.learning_rate)
    session.begins(stage, reward_model=session.reward_model)
    for step in range(steps):
        answers = session.sample(stage)
        scores = session.judged(stage.judge, answers)
        rows = best_of_n(scores, group_size=answers.group).best
        best = answers.batch.rows(rows)
        loss = stage.loss(session.actor.logps(best).logp, mask=best.mask).loss
        learn(loss, optimizer)
        yield session.record("best_of", step, loss, answers, rows=rows, scores=scores)
