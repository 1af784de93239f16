"""The related papers' steps again, in float64, from what was drawn: plain PyTorch and transformers, nothing of rlfast.

Each function follows the updates of one stage from copies of its models and gives what each should have come to. The
numbers are written here once more. The stages of agents are in ``room_oracle.py``.
"""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import logsigmoid, softplus

COMPARE = (
    "Here is a request and two responses to it. Which response is more helpful, honest and harmless?\n\n"
    "Request: {}\n\nResponse A: {}\n\nResponse B: {}\n\nThe better response:"
)
ASPECT = "Request: {}\n\nResponse: {}\n\nThe {} of the response (bad, fair or good) is"
ASPECTS = ("factuality", "logical correctness", "insightfulness", "completeness", "readability", "harmlessness")
WORDS = (" up", " down", " left", " right")
TOKENS = {word: i for i, word in enumerate((*WORDS, " A", " B", " bad", " fair", " good"), 1)}


def double(model):
    """A copy that learns in float64."""
    return copy.deepcopy(model).double().requires_grad_(True)


def adam(parameters, rate: float):
    return torch.optim.AdamW(list(parameters), lr=rate, weight_decay=0.0)


def learn(loss, *optimizers) -> float:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.item()


# Language models


def logps(model, batch, temperature: float = 1.0):
    """[B, T − 1], 0 outside of the responses."""
    logits = model(input_ids=batch.ids, attention_mask=batch.attention).logits[:, :-1] / temperature
    found = torch.stack(
        [row.log_softmax(-1).gather(-1, ids[1:, None])[:, 0] for row, ids in zip(logits, batch.ids, strict=True)]
    )
    return torch.where(batch.mask, found, torch.zeros_like(found))


def hidden(body, batch):
    return body(input_ids=batch.ids, attention_mask=batch.attention).last_hidden_state


def last(x, batch):
    """What is at the last token of each row."""
    return torch.stack([row[int(n) - 1] for row, n in zip(x, batch.attention.sum(-1), strict=True)])


class Head:
    """A reward model or a critic, from its body and its head."""

    def __init__(self, scorer):
        self.body = double(scorer.body)
        self.head = scorer.head.detach().double().requires_grad_(True)

    def parameters(self):
        return [*self.body.parameters(), self.head]

    def rewards(self, batch):
        return last(hidden(self.body, batch), batch) @ self.head[0]

    def values(self, batch):
        return hidden(self.body, batch)[:, :-1] @ self.head[0]


def encoded(words: str) -> list[int]:
    """What the tests' tokenizer makes of a text."""
    return [TOKENS[words]] if words in TOKENS else list(words.encode())


def said(model, prompt: str, verdicts) -> torch.Tensor:
    """log p of each verdict after a prompt."""
    with torch.no_grad():
        return answered(model, prompt, verdicts)


def answered(model, prompt: str, verdicts) -> torch.Tensor:
    """The same with gradient."""
    logits = model(input_ids=torch.tensor([encoded(prompt)])).logits[0, -1]
    return logits.log_softmax(-1)[[TOKENS[v] for v in verdicts]]


def compared(model, prompts, first, second):
    """P(first ≻ second), both orders."""
    found = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        there = said(model, COMPARE.format(prompt, one, other), (" A", " B")).softmax(0)[0]
        back = said(model, COMPARE.format(prompt, other, one), (" A", " B")).softmax(0)[1]
        found.append((there + back) / 2)
    return torch.stack(found)


def text(ids) -> str:
    return bytes(ids).decode()


# Estimators


def mean_over(x, mask):
    return (x * mask).sum() / mask.sum()


def gae(rewards, values, mask, gamma: float, lam: float, after=None):
    """Advantages and returns over the tokens of each row that count."""
    adv = torch.zeros_like(values)
    for b in range(len(values)):
        at = mask[b].nonzero()[:, 0].tolist()
        following, ahead = (0.0 if after is None else after[b]), 0.0
        for t in reversed(at):
            ahead = rewards[b, t] + gamma * following - values[b, t] + gamma * lam * ahead
            following = values[b, t]
            adv[b, t] = ahead
    return adv, torch.where(mask, adv + values, torch.zeros_like(values))


def clipped(ratio, adv):
    return -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)


def critic_loss(values, old, returns, mask, clip: float | None):
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return mean_over(0.5 * error, mask)


def soft(difference, p):
    return (-p * logsigmoid(difference) - (1 - p) * logsigmoid(-difference)).mean()


# Stages that train a language model


def labelled_rewards(models, records, rate):
    """RLAIF's reward model."""
    model, judge = Head(models["reward_model"]), models["judge"].double()
    optimizer = adam(model.parameters(), rate)
    for r in records:
        answers = r.data["answers"]
        rows = answers.rollouts
        prompts = [text(x.prompt_tokens) for x in rows[0::2]]
        texts = [text(x.tokens) for x in rows]
        p = compared(judge, prompts, texts[0::2], texts[1::2])
        scores = model.rewards(answers.batch)
        yield {"loss": learn(soft(scores[0::2] - scores[1::2], p), optimizer), "probability": p}


def pair_rewards(models, records, rate):
    """Satori's reward model: Bradley–Terry of the best and the worst of two."""
    model = Head(models["reward_model"])
    optimizer = adam(model.parameters(), rate)
    for r in records:
        scores, grades = model.rewards(r.data["answers"].batch), r.data["answers"].rewards
        differences = [
            (scores[i] - scores[i + 1]) * (1 if grades[i] > grades[i + 1] else -1)
            for i in range(0, len(scores), 2)
            if grades[i] != grades[i + 1]
        ]
        yield {"loss": learn(softplus(-torch.stack(differences)).mean(), optimizer)}


def margin_rewards(models, records, rate):
    """Max-margin inverse RL: −x where the expert's answer has the larger reward, else −2x."""
    model = Head(models["reward_model"])
    optimizer = adam(model.parameters(), rate)
    for r in records:
        x = model.rewards(r.data["answers"].batch) - model.rewards(r.data["other"].batch)
        yield {"loss": learn(torch.where(x >= 0, -x, -2.0 * x).mean(), optimizer)}


def actor_critic(models, records, rate, critic_rate, *, scores, beta, lam, temperature=1.0, ppo=True, clip=0.2):
    """A policy stage with a critic; ``scores`` of the answers are given."""
    policy, critic = double(models["policy"]), Head(models["critic"])
    reference = None if beta is None else double(models["reference"])
    optimizer, other = adam(policy.parameters(), rate), adam(critic.parameters(), critic_rate)
    before = None
    for r in records:
        answers = r.data["answers"]
        batch, mask = answers.batch, answers.batch.mask
        if answers is not before:  # else another update on the same answers
            before = answers
            with torch.no_grad():
                old, values = logps(policy, batch, temperature), critic.values(batch)
                rewards = torch.zeros_like(old)
                if reference is not None:
                    rewards = -beta * (old - logps(reference, batch, temperature))
                for b, score in enumerate(scores(answers)):
                    rewards[b, int(batch.attention[b].sum()) - 2] += score
                adv, returns = gae(rewards, values, mask, 1.0, lam)
        value_loss = learn(critic_loss(critic.values(batch), values, returns, mask, clip), other)
        logp = logps(policy, batch, temperature)
        loss = clipped((logp - old).exp(), adv) if ppo else -adv * logp
        yield {"loss": learn(mean_over(loss, mask), optimizer), "value_loss": value_loss, "advantages": adv}


def model_scores(models):
    """The frozen reward model's."""
    model = Head(models["reward_model"])

    def scores(answers):
        with torch.no_grad():
            return model.rewards(answers.batch)

    return scores


def satori_scores(models, beta):
    """1[right] − 1 + σ(r_ψ) + bonus."""
    liked = model_scores(models)

    def scores(answers):
        right, half = [x >= 1 for x in answers.rewards.tolist()], len(answers.rewards) // 2
        found = liked(answers).sigmoid() + torch.tensor([float(x) - 1.0 for x in right])
        for i in range(half):
            if right[i] != right[half + i]:
                found[half + i] += beta if right[half + i] else -beta
        return found

    return scores


def dpo(models, records, rate, chosen=None):
    """β 0.1 on pairs; ``chosen`` says which they should be."""
    policy, reference = double(models["policy"]), double(models["reference"])
    optimizer = adam(policy.parameters(), rate)
    for r in records:
        pairs, expected = r.data["pairs"], {}
        if chosen is not None:
            expected["pairs"] = chosen(reference, r.data["answers"])
        gap = 0.0
        for sign, side in ((1, pairs.chosen), (-1, pairs.rejected)):
            with torch.no_grad():
                ref = logps(reference, side)
            gap = gap + sign * (logps(policy, side) - ref).sum(-1)
        yield expected | {"loss": learn(softplus(-0.1 * gap).mean(), optimizer), "policy": policy}


def rated_pairs(reference, answers):
    """(best, worst) tokens of each group, by mean ratings of 0 to 2 over six aspects."""
    scores = []
    for x in answers.rollouts:
        prompt, response = text(x.prompt_tokens), text(x.tokens)
        found = [said(reference, ASPECT.format(prompt, response, a), (" bad", " fair", " good")) for a in ASPECTS]
        scores.append(torch.stack([p.softmax(0) @ torch.tensor([0.0, 1.0, 2.0]).double() for p in found]).mean().item())
    best, group = [], answers.group
    for start in range(0, len(scores), group):
        some = range(start, start + group)
        best.append([answers.rollouts[pick(some, key=scores.__getitem__)].tokens for pick in (max, min)])
    return best


class Ensemble:
    """Small networks on the last hidden state of a body, one by one."""

    def __init__(self, scorer):
        self.body, own = double(scorer.body), scorer.ensemble
        count = len(own.weights[0])
        self.members = [
            [(w[e].detach().double().requires_grad_(), b[e].detach().double().requires_grad_()) for w, b in
             zip(own.weights, own.biases, strict=True)] for e in range(count)
        ]  # fmt: skip

    def parameters(self):
        return [p for member in self.members for layer in member for p in layer]

    def rewards(self, batch):
        """[members, B]."""
        with torch.no_grad():
            x = last(hidden(self.body, batch), batch)
        found = []
        for member in self.members:
            h = x
            for k, (w, b) in enumerate(member):
                h = (h.relu() if k else h) @ w + b
            found.append(h[:, 0])
        return torch.stack(found)


def embedded_rewards(models, records, rate):
    """Each member by its own mean of Bradley–Terry losses."""
    model = Ensemble(models["reward_model"])
    optimizer = adam(model.parameters(), rate)
    for r in records:
        answers = r.data["answers"]
        rewards, grades = model.rewards(answers.batch), answers.rewards.view(-1, answers.group)
        best, worst = [], []
        for g, row in enumerate(grades.tolist()):
            if max(row) > min(row):
                best.append(g * len(row) + row.index(max(row)))
                worst.append(g * len(row) + row.index(min(row)))
        loss = softplus(rewards[:, worst] - rewards[:, best]).mean(1).sum()
        yield {"loss": learn(loss, optimizer)}


def best_by_ensemble(models, records, rate):
    """NLL of the best of four by mean − ½·variance."""
    model, policy = Ensemble(models["reward_model"]), double(models["policy"])
    optimizer = adam(policy.parameters(), rate)
    for r in records:
        answers = r.data["answers"]
        with torch.no_grad():
            rewards = model.rewards(answers.batch)
        mean = rewards.sum(0) / len(rewards)
        pooled = mean - 0.5 * ((rewards - mean) ** 2).sum(0) / len(rewards)
        rows = [g * answers.group + int(i) for g, i in enumerate(pooled.view(-1, answers.group).max(1).indices)]
        batch = answers.batch.rows(torch.tensor(rows))
        loss = mean_over(-logps(policy, batch), batch.mask)
        yield {"loss": learn(loss, optimizer), "rows": rows, "scores": pooled}
