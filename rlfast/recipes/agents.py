"""Agents in the grid world that a language model helps: by preferences, by a prior over actions, or by advice."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from rlfast.recipes.gridworld import ACTIONS, GridWorld, Play
from rlfast.recipes.models import Actor, batch_of
from rlfast.recipes.paper_stages import Advised, Agent, Feedback, Guided

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


class Step(NamedTuple):
    """What a step of an agent's training came to, with all that it was made of."""

    loss: torch.Tensor  # []
    advantages: torch.Tensor | None = None
    reward_loss: torch.Tensor | None = None  # [], of the reward model, or what the teacher learns by
    play: Play | None = None
    labels: torch.Tensor | None = None  # P(first ≻ second); or the prior; or which advice was given


class Room:
    """A grid world, an agent in it, and the language model that helps.

    Args:
        actor: the language model.
        engine: of the same model and its tokenizer: ``rlfast.rollout.Engine``.
        world: the grid world.
        seed: of the networks' weights, the starts, and what is drawn.
    """

    def __init__(self, actor: Actor, engine, world: GridWorld | None = None, seed: int = 0):
        self.actor, self.engine, self.world = actor, engine, world or GridWorld()
        self.rng = torch.Generator().manual_seed(seed)
        self.dtype = actor.head.module.weight.dtype
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
        found = torch.stack(self.engine.choose(texts, [list(ACTIONS)] * len(texts)))
        return found[which].reshape(*cells.shape, len(ACTIONS)).to(self.dtype)


def agent_step(room: Room, stage: Agent, optimizer, play: Play | None = None, advice=None) -> Step:
    """One batch of episodes, and PPO's updates on it.

    r_t = λ·𝓡(s_t, s_{t+1}) + (1 − λ)·R_t
    loss = policy + critic
    """
    world, seen = room.world, None
    if play is None:
        starts = world.starts(stage.batch.value, room.rng, stage.corner)
        play = world.play(lambda cells, goal: room.act(room.seen(cells, goal))[0], *starts, room.rng)
    told = None if advice is None else advice[:, None]
    seen = room.seen(play.cells, play.goal[:, None], told)
    share = stage.share.value
    with torch.no_grad():
        values = room.act(seen)[1]
        rewards = share * room.learned_rewards(play) + (1.0 - share) * play.rewards
        after = torch.where(play.reached, 0.0, values[:, -1])
        adv, returns = stage.advantage(rewards, values[:, :-1].contiguous(), play.mask, bootstrap=after)
        used = adv if stage.whiten is None else stage.whiten(adv, play.mask)
    first = None
    for _ in range(stage.epochs.value):
        logp, value = room.act(seen[:, :-1])
        logp = logp.gather(-1, play.actions[..., None])[..., 0]
        loss = stage.loss(logp, adv=used, old_logp=play.logp, mask=play.mask).loss
        loss = loss + stage.critic(value, values[:, :-1], returns, play.mask).loss
        first = loss.detach() if first is None else first
        _update(optimizer, loss)
    return Step(first, used, None, play)


def feedback_step(room: Room, stage: Feedback, optimizer) -> Step:
    """Pairs of episodes from one start each, which the language model compares, and the reward model's update.

    P̂(ω_1 ≻ ω_2) = σ(Σ_{ω_1} 𝓡(s, s′) − Σ_{ω_2} 𝓡(s, s′))
    """
    world, count = room.world, stage.batch.value
    cells, goal = (x.repeat(2) for x in world.starts(count, room.rng, stage.corner))
    play = world.play(lambda c, g: room.act(room.seen(c, g))[0], cells, goal, room.rng)
    texts = [world.play_text(play, row) for row in range(2 * count)]
    asked = [world.goal_text(int(g)) for g in goal[:count]]
    said = stage.judge(room.engine, asked, texts[:count], texts[count:]).probability
    first, second = room.learned_rewards(play).sum(-1).split(count)
    loss = stage.loss(first, second, probability=said.to(room.dtype)).loss
    _update(optimizer, loss)
    return Step(loss.detach(), None, loss.detach(), play, said)


def guided_step(room: Room, stage: Guided, optimizer) -> Step:
    """One step of regularised Q-learning, on episodes of the policy that the language model's prior and Q make.

    target = r + γ·V(s′),   V = λ·log Σ_a π_LLM(a|s)·e^{Q(s, a)/λ}
    """
    world = room.world
    starts = world.starts(stage.batch.value, room.rng, stage.corner)

    def policy(cells, goal):
        seen = world.features(cells, goal, room.dtype)
        return stage.value(room.q(seen), room.prior(cells, goal)).logp

    play = world.play(policy, *starts, room.rng)
    seen, prior = world.features(play.cells, play.goal[:, None], room.dtype), room.prior(play.cells, play.goal[:, None])
    q = room.q(seen)
    taken = q[:, :-1].gather(-1, play.actions[..., None])[..., 0]
    with torch.no_grad():
        value = stage.value(q, prior).value
        ended = play.rewards.bool()
        target = play.rewards + stage.gamma.value * torch.where(ended, 0.0, value[:, 1:])
    loss = stage.loss(taken, None, target, play.mask).loss
    advantages = torch.where(play.mask, taken.detach() - value[:, :-1], 0.0)
    _update(optimizer, loss)
    return Step(loss.detach(), advantages, None, play, prior)


def advised_step(room: Room, stage: Advised, optimizer, teacher) -> Step:
    """The language model advises, the agent acts on the advice and learns; what it came to is the advice's reward.

    advice ~ π_LLM(·|start) over the actions' words;   reward of the advice = Σ_t R_t of the episode
    """
    world, each = room.world, stage.candidates.value
    starts = [x.repeat_interleave(each) for x in world.starts(stage.batch.value, room.rng, stage.corner)]
    logp = room.prior(*starts).log_softmax(-1)
    advice = torch.multinomial(logp.exp(), 1, generator=room.rng)[:, 0]
    play = world.play(lambda c, g: room.act(room.seen(c, g, advice))[0], *starts, room.rng)
    student = agent_step(room, stage, optimizer, play, advice)
    adv = stage.feedback(play.rewards.sum(-1), group_size=each)
    own = _advice_logps(room, *starts).gather(1, advice[:, None])
    loss = stage.teacher(own, adv=adv).loss
    _update(teacher, loss)
    return student._replace(reward_loss=loss.detach(), labels=advice)


def _advice_logps(room: Room, cells: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """[B, actions]: log π_LLM of each advice among all, with gradient."""
    tokenizer = room.engine.tokenizer
    asked = [
        tokenizer(room.world.state_text(c, g))["input_ids"] for c, g in zip(cells.tolist(), goal.tolist(), strict=True)
    ]
    said = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in ACTIONS]
    batch = batch_of([a for a in asked for _ in said], said * len(asked), cells.device)
    return room.actor.logps(batch).logp.sum(-1).reshape(len(asked), len(said)).log_softmax(-1)


def _update(optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
