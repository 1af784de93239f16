"""``Truth``: takes the steps of a recipe beside ``rlfast``, from the initial weights and the sampled tokens alone."""

from __future__ import annotations

import contextlib
import copy

import torch

from tests.recipes.truth import (
    OF_WEIGHTS,
    copied,
    entropy_of,
    gae,
    jsd,
    length_rewards,
    logits_of,
    logp_of,
    nll,
    over_groups,
    padded,
    pair_of,
    policy_loss,
    preference_loss,
    reward_model_loss,
    reward_of,
    same,
    slerp,
    value_loss,
    values_of,
)

PROMPTS, GROUP, EPOCHS = 2, 4, 3  # of a step


class Truth:
    """One recipe, as ``expected`` has it.

    ``begins`` is told of a stage's models, of which it takes what is new: heads and adapters at their first weights.
    """

    def __init__(self, stages, model, teacher, prompts, answers, reward, rate):
        self.policy, self.teacher = copy.deepcopy(model), copy.deepcopy(teacher)
        self.prompts, self.answers, self.reward, self.rate = prompts, answers, reward, rate
        self.waiting, self.now, self.reward_model = self._flat(stages), None, None
        self.start, self.runs, self.entropies, self.total, self.updates = None, [], [], 0, 0

    @staticmethod
    def _flat(stages):
        """Stages as they begin; each run of an average is one."""
        found = []
        for s in stages:
            if s["kind"] == "average":
                found += [s["stage"] | {"of": s, "run": i} for i in range(s["runs"])]
            else:
                found.append(s)
        return found

    # Stages

    def begins(self, _, models) -> None:
        """A stage begins."""
        self.ends()
        assert self.waiting, "a stage too many"
        s = self.now = self.waiting.pop(0)
        if "of" in s:
            if s["run"] == 0:
                self.start, self.runs = copied(self.policy), []
            self.policy.load_state_dict(self.start)
        if "lora" in s:
            self.policy = copy.deepcopy(models["policy"])
            config = self.policy.peft_config["default"]
            assert (config.r, config.lora_alpha) == (s["lora"], s["lora"] / 2)
        self.check(models["policy"])
        if s["kind"] == "reward_model":
            self.reward_model = copy.deepcopy(models["reward_model"])
            assert len(self.reward_model.head) == s.get("outputs", 1)
            learns = self.reward_model
        else:
            learns = self.policy
        self.optimizer = self.adamw(learns)
        self.reference = copy.deepcopy(self.policy)
        self.critic = None
        if s.get("adv") == "gae":
            self.critic = copy.deepcopy(self.reward_model or models["critic"])
            self.critic_optimizer = self.adamw(self.critic.requires_grad_(True))
        self.average, self.step, self.coef, self.bonus = copied(self.policy), None, 0.0, 0.0

    def adamw(self, model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=self.rate, weight_decay=0.0)

    def ends(self) -> None:
        """What happens to the policy after a stage."""
        s = self.now
        if s is None:
            return
        self.ends_step()
        if "ema" in s:
            self.policy.load_state_dict(self.average)
        if "lora" in s:
            self.policy = self.policy.merge_and_unload()
        if "of" in s:
            self.runs.append(copied(self.policy))
            if len(self.runs) == s["of"]["runs"]:
                self.policy.load_state_dict(self.merged(s["of"]))

    def merged(self, s):
        if s["merge"] == "slerp":
            found = slerp(*self.runs, self.start, s["weight"])
        else:
            found = {k: sum(run[k] for run in self.runs) / len(self.runs) for k in self.start}
        back = s.get("back", 0.0)
        return {k: back * self.start[k] + (1 - back) * x for k, x in found.items()}

    def check(self, model) -> None:
        """The weights of rlfast's policy."""
        for (name, mine), theirs in zip(self.policy.named_parameters(), model.parameters(), strict=True):
            same(name, theirs, mine, OF_WEIGHTS)

    def end(self, model) -> None:
        """After the last stage."""
        self.ends()
        assert not self.waiting
        self.check(model)

    # Steps

    def ends_step(self) -> None:
        """The averages after a step's updates."""
        s = self.now
        if self.step is None:
            return
        assert self.updates == self.updates_of(s), f"{self.updates} updates of step {self.step}"
        for key, x in self.average.items():
            x.copy_(s.get("ema", 0.0) * x + (1 - s.get("ema", 0.0)) * self.policy.state_dict()[key])
        if "anchor" in s:
            for key, x in self.reference.state_dict().items():
                x.copy_(s["anchor"] * x + (1 - s["anchor"]) * self.policy.state_dict()[key])
        if "refresh" in s and (self.step + 1) % s["refresh"] == 0:
            self.reference.load_state_dict(self.policy.state_dict())

    def updates_of(self, s) -> int:
        """How many a step has."""
        return {"policy": EPOCHS * s.get("minibatches", 1), "preference": EPOCHS}.get(s["kind"], 1)

    def follow(self, record) -> None:
        """One update."""
        s, kind = self.now, record.kind
        fresh = self.step != record.step
        if fresh:
            self.ends_step()
            self.step, self.updates = record.step, 0
            self.sampled(record.data["answers"])
            same("log-probs of the sampler", self.rollout, self.sampler(s))
        assert kind == s["kind"], f"{kind}, not {s['kind']}"
        loss = getattr(self, f"on_{kind}")(s, record, fresh)
        same(f"loss of {kind}", record.loss, loss.detach())
        if kind != "policy" or record.step >= s.get("warm_up", 0):
            self.learn(loss, self.optimizer)
        self.updates, self.total = self.updates + 1, self.total + 1

    def learn(self, loss, optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def sampled(self, answers) -> None:
        """Tokens, and the rewards of the task."""
        self.of, self.group = answers.numbers, answers.group
        assert (len(self.of), self.group) == (PROMPTS * GROUP, GROUP), f"{len(self.of)} answers, groups of {self.group}"
        self.tokens = [r.tokens for r in answers.rollouts]
        self.asked = [list(self.prompts[i]) for i in self.of]
        for i in range(0, len(self.of), self.group):
            assert len(set(self.of[i : i + self.group])) == 1
        self.batch = padded(self.asked, self.tokens)
        self.rewards = torch.tensor(
            [self.reward(i, r) for i, r in zip(self.of, answers.rollouts, strict=True)]
        ).double()
        self.rollout = torch.zeros_like(self.batch[2])
        for i, r in enumerate(answers.rollouts):
            self.rollout[i, len(self.asked[i]) - 1 :][: len(r.tokens)] = r.logp.double()

    @contextlib.contextmanager
    def as_reference(self, s):
        """Within it, the model that the policy of a preference stage is compared with; without gradient."""
        adapter_off = self.policy.disable_adapter() if "lora" in s else contextlib.nullcontext()
        with torch.no_grad(), adapter_off:
            yield self.policy if "lora" in s else self.reference

    def sampler(self, s):
        """Log-probs of the tokens by the model that is to have drawn them, at a temperature of 1."""
        if s.get("sampler") == "reference":
            with self.as_reference(s) as model:
                return logp_of(model, self.batch)
        return logp_of(self.policy, self.batch).detach()

    def rows(self, index, skip=0):
        return padded([self.asked[i] for i in index], [self.tokens[i] for i in index], skip)

    def texts(self, index):
        return padded([self.prompts[self.of[i]] for i in index], [self.answers[self.of[i]] for i in index])

    def judged(self, s):
        with torch.no_grad():
            return self.rewards if s["judge"] == "task" else reward_of(self.reward_model, self.batch)

    # Kinds

    def on_reward_model(self, s, record, fresh):
        return reward_model_loss(s, self.reward_model, self.batch, self.rewards, self.group)

    def on_distil(self, s, record, fresh):
        with torch.no_grad():
            teacher = logits_of(self.teacher, self.batch)
        return jsd(logits_of(self.policy, self.batch), teacher, self.batch[2], s["beta"])

    def on_best_of(self, s, record, fresh):
        scores = self.judged(s).view(-1, self.group)
        best = [i * self.group + int(x.argmax()) for i, x in enumerate(scores)]
        rows = self.rows(best)
        return nll(logp_of(self.policy, rows), rows[2])

    def on_preference(self, s, record, fresh):
        if fresh:
            scores = self.judged(s)
            w, l_ = pair_of(scores, self.group)
            self.margin = scores[w] - scores[l_]
            self.sides = [self.rows(x, s.get("skip", 0)) for x in (w, l_)]
            with self.as_reference(s) as model:
                self.ref = [logp_of(model, x).sum(1) for x in self.sides]
        sums = [logp_of(self.policy, x).sum(1) for x in self.sides]
        return preference_loss(s, *sums, *self.ref, *(x[2].sum(1) for x in self.sides), self.margin)

    def scores(self, s):
        total = torch.zeros_like(self.rewards)
        lengths = [len(t) for t in self.tokens]
        for name in s["rewards"]:
            if name == "task":
                total = total + s.get("scale", 1.0) * self.rewards
            elif name == "model":
                total = total + reward_of(self.reward_model, self.batch)
            elif name == "length":
                total = total + length_rewards(lengths, (self.rewards >= 1).tolist(), self.group)
            else:
                over = torch.tensor([n - (s["max_len"] - s["buffer"]) for n in lengths]).double() / s["buffer"]
                total = total - s["factor"] * over.clamp(0, 1)
        if s.get("baseline"):
            total = total - reward_of(self.reward_model, self.texts(range(len(self.of))))
        return total

    @torch.no_grad()
    def measure(self, s) -> None:
        """Log-probs and advantages before the updates of a step."""
        mask = self.batch[2]
        self.old, self.ref = logp_of(self.policy, self.batch), logp_of(self.reference, self.batch)
        scores, kl = self.scores(s), s.get("kl")
        penalty = (kl or 0.0) * (self.old - self.ref) * mask
        if s["adv"] == "gae":
            rewards = -penalty
            for i, m in enumerate(mask):
                rewards[i, m.nonzero()[-1, 0]] += scores[i]
            self.old_values = values_of(self.critic, self.batch)
            self.adv, self.returns = gae(rewards, self.old_values, mask, s["gamma"], s["lam"])
        else:
            self.adv = over_groups(s["adv"], scores - penalty.sum(1), self.group)
        if s.get("whiten"):
            kept = self.adv[mask.bool()]
            self.adv = (self.adv - kept.mean()) / (kept.var() + 1e-8).sqrt() * mask

    def on_policy(self, s, record, fresh):
        index, m = record.data["rows"].tolist(), record.data["measured"]
        count = s.get("minibatches", 1)
        assert index == list(range(len(self.of)))[self.updates % count :: count], f"rows {index}"
        if fresh:
            if s.get("dynamic"):
                assert all(len(set(x.tolist())) > 1 for x in self.rewards.view(-1, self.group)), "a flat group"
            self.measure(s)
            same("advantages", m.advantages, self.adv)
            same("scores", m.scores, self.scores(s))
        batch = tuple(x[index] for x in self.batch)
        if self.critic is not None:
            clip = s["value_clip"]
            values = values_of(self.critic, batch)
            loss = value_loss(values, self.old_values[index], self.returns[index], batch[2], clip)
            same("value loss", record.data["value_loss"], loss.detach())
            self.learn(loss, self.critic_optimizer)
        lp = logp_of(self.policy, batch)
        adv = self.adv[index]
        total = policy_loss(s, lp, self.old[index], batch[2], adv, self.ref[index], self.rollout[index])
        if "nll" in s:
            texts = self.texts(index)
            total = total + s["nll"] * nll(logp_of(self.policy, texts), texts[2])
        if "target" in s:
            entropy = (entropy_of(self.policy, batch) * batch[2]).sum() / batch[2].sum()
            total = total - self.bonus * entropy
            self.entropies.append(entropy.item())
            below = entropy <= s["target"]
            self.coef = min(1.0, max(0.0, self.coef + (s["delta"] if below else -s["delta"])))
            self.bonus = self.coef if below else 0.0
        return total
