"""Agents in the grid world that a language model helps: by preferences, by a prior over actions, or by advice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rlfast import validate
from rlfast.recipes.gridworld import ACTIONS, GridWorld, Play
from rlfast.recipes.models import batch_of
from rlfast.recipes.paper_stages import Advised, Agent, Feedback, Guided
from rlfast.recipes.session import Record, Session, learn, runs

HIDDEN = 16


class Net(nn.Module):
    """W_2·tanh(W_1·x + b_1) + b_2."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator, dtype: torch.dtype):
        super().__init__()
        self.layers = nn.ModuleList((nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, outputs)))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        return second(torch.tanh(first(x)))


class Room:
    """A grid world, an agent in it with its networks, and the language model that helps.

    Args:
        session: whose policy and engine the language model is.
        world: the grid world.
    """

    def __init__(self, session: Session, world: GridWorld | None = None):
        if session.tokenizer is None:
            validate.fail("tokenizer", "the model's, since it reads about the room", "None")
        self.session, self.world = session, world or GridWorld()
        self.rng, self.dtype = session.generator, session.dtype
        wide = 2 * self.world.count
        self.agent = self._net(wide + len(ACTIONS), len(ACTIONS) + 1)  # log-odds of the actions, and the value
        self.rewards = self._net(2 * wide, 1)
        self.q = self._net(wide, len(ACTIONS))

    def _net(self, inputs: int, outputs: int) -> Net:
        return Net(inputs, outputs, self.rng, self.dtype)

    def seen(self, cells: torch.Tensor, goal: torch.Tensor, advice: torch.Tensor | None = None) -> torch.Tensor:
        """What the agent sees: where it is, where the goal is, and what it was advised, if anything."""
        where = self.world.features(cells, goal, self.dtype)
        told = where.new_zeros(*where.shape[:-1], len(ACTIONS))
        if advice is not None:
            told = torch.nn.functional.one_hot(advice, len(ACTIONS)).to(where).expand_as(told)
        return torch.cat((where, told), -1)

    def act(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(log π [*, actions], V [*])."""
        out = self.agent(seen)
        return out[..., :-1].log_softmax(-1), out[..., -1]

    def learned_rewards(self, play: Play) -> torch.Tensor:
        """[B, T]: R(s, s′) of the reward model; 0 after the end."""
        seen = self.world.features(play.cells, play.goal[:, None], self.dtype)
        pairs = torch.cat((seen[:, :-1], seen[:, 1:]), -1)
        return torch.where(play.mask, self.rewards(pairs)[..., 0], 0.0)

    def prior(self, cells: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """[*, actions]: log-probs of the actions' words by the language model; each state is asked for once."""
        states, which = (
            torch.stack((cells, goal.expand_as(cells)), -1).reshape(-1, 2).unique(dim=0, return_inverse=True)
        )
        texts = [self.world.state_text(*state) for state in states.tolist()]
        found = torch.stack(self.session.engine.choose(texts, [list(ACTIONS)] * len(texts)))
        return found[which].reshape(*cells.shape, len(ACTIONS)).to(self.dtype)


def room_of(session: Session) -> Room:
    """The room of a run, which its stages share."""
    if "room" not in session.kept:
        session.kept["room"] = Room(session)
    return session.kept["room"]


def _record(session: Session, kind: str, step: int, loss: torch.Tensor, play: Play, **data) -> Record:
    record = session.record(kind, step, loss, play=play, **data)
    return record._replace(reward=play.rewards.sum(-1).mean().item())


def ppo(room: Room, stage: Agent, optimizer, step: int, play: Play, advice: torch.Tensor | None = None):
    """PPO's updates on a batch of episodes.

    r_t = λ·𝓡(s_t, s_{t+1}) + (1 − λ)·R_t;   loss = policy + critic
    """
    seen = room.seen(play.cells, play.goal[:, None], None if advice is None else advice[:, None])
    share = stage.share.value
    with torch.no_grad():
        values = room.act(seen)[1]
        rewards = share * room.learned_rewards(play) + (1.0 - share) * play.rewards
        after = torch.where(play.reached, 0.0, values[:, -1])
        adv, returns = stage.advantage(rewards, values[:, :-1].contiguous(), play.mask, bootstrap=after)
        used = adv if stage.whiten is None else stage.whiten(adv, play.mask)
    for _ in range(stage.epochs.value):
        logp, value = room.act(seen[:, :-1])
        logp = logp.gather(-1, play.actions[..., None])[..., 0]
        loss = stage.loss(logp, adv=used, old_logp=play.logp, mask=play.mask).loss
        loss = loss + stage.critic(value, values[:, :-1], returns, play.mask).loss
        learn(loss, optimizer)
        yield _record(room.session, "agent", step, loss, play, advantages=used, returns=returns, advice=advice)


@runs(Agent)
def agent(session: Session, stage: Agent, steps: int) -> Iterator[Record]:
    """Episodes, and PPO on them."""
    room = room_of(session)
    optimizer = session.optimizer(room.agent.parameters(), stage.learning_rate)
    session.begins(stage, agent=room.agent, rewards=room.rewards)
    for step in range(steps):
        starts = room.world.starts(stage.batch.value, room.rng, stage.corner)
        play = room.world.play(lambda cells, goal: room.act(room.seen(cells, goal))[0], *starts, room.rng)
        yield from ppo(room, stage, optimizer, step, play)


@runs(Feedback)
def feedback(session: Session, stage: Feedback, steps: int) -> Iterator[Record]:
    """Pairs of episodes from one start each, which the language model compares, and the reward model's update.

    P̂(ω_1 ≻ ω_2) = σ(Σ_{ω_1} 𝓡(s, s′) − Σ_{ω_2} 𝓡(s, s′))
    """
    room, count = room_of(session), stage.batch.value
    world, optimizer = room.world, session.optimizer(room.rewards.parameters(), stage.learning_rate)
    session.begins(stage, agent=room.agent, rewards=room.rewards)
    for step in range(steps):
        cells, goal = (x.repeat(2) for x in world.starts(count, room.rng, stage.corner))
        play = world.play(lambda c, g: room.act(room.seen(c, g))[0], cells, goal, room.rng)
        texts = [world.play_text(play, row) for row in range(2 * count)]
        asked = [world.goal_text(int(g)) for g in goal[:count]]
        said = stage.judge(session.engine, asked, texts[:count], texts[count:])
        first, second = room.learned_rewards(play).sum(-1).split(count)
        loss = stage.loss(first, second, probability=said.probability.to(room.dtype)).loss
        learn(loss, optimizer)
        yield _record(session, "reward_model", step, loss, play, judged=said)


@runs(Guided)
def guided(session: Session, stage: Guided, steps: int) -> Iterator[Record]:
    """Regularised Q-learning on episodes of the policy that the language model's prior and Q make.

    target = r + γ·V(s′),   V = λ·log Σ_a π_LLM(a|s)·e^{Q(s, a)/λ}
    """
    room = room_of(session)
    world, optimizer = room.world, session.optimizer(room.q.parameters(), stage.learning_rate)
    session.begins(stage, q=room.q)

    def policy(cells, goal):
        seen = world.features(cells, goal, room.dtype)
        return stage.value(room.q(seen), room.prior(cells, goal)).logp

    for step in range(steps):
        play = world.play(policy, *world.starts(stage.batch.value, room.rng, stage.corner), room.rng)
        prior = room.prior(play.cells, play.goal[:, None])
        q = room.q(world.features(play.cells, play.goal[:, None], room.dtype))
        taken = q[:, :-1].gather(-1, play.actions[..., None])[..., 0]
        with torch.no_grad():
            value = stage.value(q, prior).value
            target = play.rewards + stage.gamma.value * torch.where(play.rewards > 0, 0.0, value[:, 1:])
            advantages = torch.where(play.mask, taken - value[:, :-1], 0.0)
        loss = stage.loss(taken, None, target, play.mask).loss
        learn(loss, optimizer)
        yield _record(session, "q", step, loss, play, advantages=advantages, prior=prior)


@runs(Advised)
def advised(session: Session, stage: Advised, steps: int) -> Iterator[Record]:
    """The language model advises, the agent acts on the advice and learns; what it came to is the advice's reward.

    advice ~ π_LLM(·|start) over the actions' words;   reward of the advice = Σ_t R_t of the episode
    """
    room, each = room_of(session), stage.candidates.value
    world, optimizer = room.world, session.optimizer(room.agent.parameters(), stage.learning_rate)
    teacher = session.optimizer(session.model.parameters(), stage.teacher_rate)
    session.begins(stage, agent=room.agent)
    for step in range(steps):
        starts = world.starts(stage.batch.value, room.rng, stage.corner)
        cells, goal = (x.repeat_interleave(each) for x in starts)
        told = room.prior(cells, goal).log_softmax(-1)
        advice = torch.multinomial(told.exp(), 1, generator=room.rng)[:, 0]
        play = world.play(lambda c, g, a=advice: room.act(room.seen(c, g, a))[0], cells, goal, room.rng)
        yield from ppo(room, stage, optimizer, step, play, advice)
        adv = stage.feedback(play.rewards.sum(-1), group_size=each)
        own = _advice_logps(room, *starts).repeat_interleave(each, 0).gather(1, advice[:, None])
        loss = stage.teacher(own, adv=adv).loss
        learn(loss, teacher)
        yield _record(session, "teacher", step, loss, play, advantages=adv, advice=advice)


def _advice_logps(room: Room, cells: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """[B, actions]: log π_LLM of each advice among all, with gradient."""
    session, states = room.session, zip(cells.tolist(), goal.tolist(), strict=True)
    asked = [session.tokenizer(room.world.state_text(*state))["input_ids"] for state in states]
    said = [session.tokenizer(word, add_special_tokens=False)["input_ids"] for word in ACTIONS]
    batch = batch_of([a for a in asked for _ in said], said * len(asked), session.device)
    return session.actor.logps(batch).logp.sum(-1).reshape(len(asked), len(said)).log_softmax(-1).cpu()
