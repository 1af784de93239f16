"""The stages of agents in the grid world again, in float64: the rules of the room, PPO, Q-learning, advice.

As in ``paper_oracle.py``, each function follows the updates of one stage and gives what each should have come to.
"""

from __future__ import annotations

import torch
from torch.nn.functional import one_hot

from tests.recipes.paper_oracle import (
    WORDS,
    adam,
    answered,
    clipped,
    compared,
    critic_loss,
    double,
    gae,
    learn,
    mean_over,
    said,
    soft,
)

SIZE, STEPS = 3, {0: (-1, 0), 1: (1, 0), 2: (0, -1), 3: (0, 1)}


class Net:
    """Two layers with tanh between them."""

    def __init__(self, net):
        self.own = [p.detach().double().requires_grad_() for p in net.parameters()]

    def parameters(self):
        return self.own

    def __call__(self, x):
        w1, b1, w2, b2 = self.own
        return torch.tanh(x @ w1.T + b1) @ w2.T + b2


def at(cell) -> str:
    return f"{int(cell) // SIZE},{int(cell) % SIZE}"


def features(cells, goal, advice=None):
    """[B, T + 1, 18], and the advice beside it."""
    goal = goal[:, None].expand_as(cells)
    parts = [one_hot(cells, SIZE**2), one_hot(goal, SIZE**2)]
    if advice is not None:
        parts.append(advice)
    return torch.cat(parts, -1).double()


def told(play, advice):
    shape = (*play.cells.shape, 4)
    return torch.zeros(shape, dtype=torch.int64) if advice is None else one_hot(advice, 4)[:, None].expand(shape)


def walked(play):
    """(rewards, mask) by the rules of the room, from where the agents were and what they did."""
    rewards, mask = torch.zeros(play.actions.shape).double(), torch.zeros(play.actions.shape, dtype=torch.bool)
    for b, actions in enumerate(play.actions.tolist()):
        cell, goal = int(play.cells[b, 0]), int(play.goal[b])
        for t, action in enumerate(actions):
            row, column = cell // SIZE + STEPS[action][0], cell % SIZE + STEPS[action][1]
            cell = min(max(row, 0), SIZE - 1) * SIZE + min(max(column, 0), SIZE - 1)
            assert int(play.cells[b, t + 1]) == cell
            mask[b, t], rewards[b, t] = True, float(cell == goal)
            if cell == goal:
                break
    return rewards, mask


def steps_of(net, play, mask):
    """R(s, s′) of each step."""
    seen = features(play.cells, play.goal)
    return net(torch.cat((seen[:, :-1], seen[:, 1:]), -1))[..., 0] * mask


class Learner:
    """PPO of an agent in the room."""

    def __init__(self, models, rate, *, share=0.0, gamma=0.99, lam=0.95):
        self.net, self.learned = Net(models["agent"]), Net(models["rewards"]) if share else None
        self.optimizer, self.numbers, self.play = adam(self.net.parameters(), rate), (share, gamma, lam), None

    def out(self, seen):
        out = self.net(seen)
        actions = self.play.actions[..., None]
        return out[:, : actions.shape[1], :4].log_softmax(-1).gather(-1, actions)[..., 0], out[..., 4]

    @torch.no_grad()
    def measure(self, play, advice):
        """What no update changes."""
        share, gamma, lam = self.numbers
        self.play, (earned, self.mask) = play, walked(play)
        self.seen = features(play.cells, play.goal, told(play, advice))
        self.old, values = self.out(self.seen)
        rewards = earned
        if self.learned is not None:
            rewards = share * steps_of(self.learned, play, self.mask) + (1 - share) * earned
        after = torch.where(earned.sum(-1) > 0, 0.0, values[:, -1])
        self.values = values[:, :-1]
        self.adv, self.returns = gae(rewards, self.values, self.mask, gamma, lam, after)

    def update(self, play, advice):
        if play is not self.play:  # else another update on the same episodes
            self.measure(play, advice)
        logp, values = self.out(self.seen)
        loss = mean_over(clipped((logp - self.old).exp(), self.adv), self.mask)
        loss = loss + critic_loss(values[:, :-1], self.values, self.returns, self.mask, 0.2)
        return {"loss": learn(loss, self.optimizer), "advantages": self.adv}


def agent(models, records, rate, **numbers):
    """An agent's stage."""
    learner = Learner(models, rate, **numbers)
    for r in records:
        yield learner.update(r.data["play"], r.data["advice"])


def preferred_steps(models, records, rate):
    """The reward model of steps, from the language model's preferences between episodes."""
    judge, net = models["policy"].double(), Net(models["rewards"])
    optimizer = adam(net.parameters(), rate)
    for r in records:
        play = r.data["play"]
        _, mask = walked(play)
        count = len(play.cells) // 2
        texts = [" ".join(at(c) for c in play.cells[b, : int(mask[b].sum()) + 1]) for b in range(2 * count)]
        asked = [f"Reach {at(g)}." for g in play.goal[:count]]
        p = compared(judge, asked, texts[:count], texts[count:])
        sums = steps_of(net, play, mask).sum(-1)
        yield {"loss": learn(soft(sums[:count] - sums[count:], p), optimizer), "probability": p}


def state(cell, goal) -> str:
    return f"You are at {at(cell)}. The goal is at {at(goal)}. Go"


def guided(models, records, rate, *, lam=0.2, gamma=0.99):
    """Q-learning with the value λ·log Σ_a π_LLM(a|s)·e^{Q/λ}."""
    model, net = models["policy"].double(), Net(models["q"])
    optimizer = adam(net.parameters(), rate)
    for r in records:
        play = r.data["play"]
        rewards, mask = walked(play)
        q = net(features(play.cells, play.goal))
        prior = torch.stack([torch.stack([said(model, state(c, g), WORDS).softmax(0) for c in row]) for row, g in
                             zip(play.cells, play.goal, strict=True)])  # fmt: skip
        with torch.no_grad():
            value = lam * (prior * (q / lam).exp()).sum(-1).log()
            target = rewards + gamma * (1 - rewards) * value[:, 1:]
        taken = q[:, :-1].gather(-1, play.actions[..., None])[..., 0]
        adv = ((taken - value[:, :-1]) * mask).detach()
        yield {"loss": learn(mean_over(0.5 * (taken - target) ** 2, mask), optimizer), "advantages": adv}


def advised(models, records, rate, teacher_rate, each=4):
    """The agent's updates, then the teacher's."""
    learner, model = Learner(models, rate), double(models["policy"])
    teacher = adam(model.parameters(), teacher_rate)
    for r in records:
        play, advice = r.data["play"], r.data["advice"]
        if r.kind == "agent":
            yield learner.update(play, advice)
            continue
        earned = walked(play)[0].sum(-1).view(-1, each)
        adv = ((each * earned - earned.sum(1, keepdim=True)) / (each - 1)).flatten()
        loss = 0.0
        for b in range(len(adv)):
            found = answered(model, state(play.cells[b, 0], play.goal[b]), WORDS)
            loss = loss - adv[b] * found.log_softmax(0)[advice[b]] / len(adv)
        yield {"loss": learn(loss, teacher), "advantages": adv}
