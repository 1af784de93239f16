"""PPO with verl's own functions, on rlfast's kernels, in a loop without verl: a recurrent policy learns to count.

python examples/verl_functions.py --iterations 60

Where verl is installed, `rlfast.patch("verl")` puts the same functions under its trainer.
"""

import argparse

import torch
from torch import nn

from rlfast.integrations.verl import (
    agg_loss,
    compute_gae_advantage_return,
    compute_policy_loss_vanilla,
    compute_value_loss,
    entropy_from_logits,
    logprobs_from_logits,
)

WORDS, END, LENGTH, ROWS = 12, 0, 10, 128


class Config(dict):
    """What verl's policy losses read of verl's ActorConfig."""

    __getattr__ = dict.__getitem__


CONFIG = Config(clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0, global_batch_info={})


class ActorCritic(nn.Module):
    """Logits over the next word and a value of each prefix."""

    def __init__(self, width=48):
        super().__init__()
        self.embed, self.body = nn.Embedding(WORDS, width), nn.GRU(width, width, batch_first=True)
        self.policy, self.critic = nn.Linear(width, WORDS), nn.Linear(width, 1)

    def forward(self, before, state=None):
        hidden, state = self.body(self.embed(before), state)
        return self.policy(hidden), self.critic(hidden).squeeze(-1), state


@torch.no_grad()
def rollout(model, draw):
    """Responses to a first word each: (inputs, responses, mask), [B, T]; the mask ends with the first END."""
    last = torch.randint(1, WORDS, (ROWS, 1), generator=draw)
    words, state = [last], None
    for _ in range(LENGTH):
        logits, _, state = model(words[-1], state)
        words.append(torch.multinomial(logits[:, -1].softmax(-1), 1, generator=draw))
    words = torch.cat(words, 1)
    inputs, responses = words[:, :-1], words[:, 1:]
    ended = (responses == END).long().cumsum(1)
    return inputs, responses, (ended == 0) | ((ended == 1) & (responses == END))


def rewards_of(inputs, responses, mask):
    """1 for a word that is the next number, and for END after the last one."""
    return ((responses == (inputs + 1) % WORDS) & mask).float()


def losses(model, batch):
    """verl's losses of a batch: policy, critic, entropy, and the metrics of the first."""
    logits, values, _ = model(batch["inputs"])
    logp = logprobs_from_logits(logits, batch["responses"], inplace_backward=False)
    policy, metrics = compute_policy_loss_vanilla(
        old_log_prob=batch["logp"], log_prob=logp, advantages=batch["advantages"], response_mask=batch["mask"],
        loss_agg_mode="token-mean", config=CONFIG,
    )  # fmt: skip
    critic, _ = compute_value_loss(values, batch["returns"], batch["values"], batch["mask"], cliprange_value=0.5)
    return policy, critic, agg_loss(entropy_from_logits(logits), batch["mask"], "token-mean"), metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    model, draw = ActorCritic(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for iteration in range(1, options.iterations + 1):
        inputs, responses, mask = rollout(model, draw)
        rewards = rewards_of(inputs, responses, mask)
        with torch.no_grad():
            logits, values, _ = model(inputs)
            logp = logprobs_from_logits(logits, responses)
            advantages, returns = compute_gae_advantage_return(rewards, values, mask, gamma=0.99, lam=0.95)
        batch = {"inputs": inputs, "responses": responses, "mask": mask, "logp": logp, "values": values}
        batch |= {"advantages": advantages, "returns": returns}
        for _ in range(options.epochs):
            policy, critic, entropy, metrics = losses(model, batch)
            optimizer.zero_grad()
            (policy + 0.5 * critic - 0.01 * entropy).backward()
            optimizer.step()
        right = rewards.sum() / mask.sum()
        if iteration % 10 == 0 or iteration == options.iterations:
            print(f"iteration {iteration}: {right:.0%} of the words are right, KL {metrics['actor/ppo_kl']:.4f}")
    return float(right)


if __name__ == "__main__":
    main()
