"""PPO with a critic in plain PyTorch: every formula is rlfast's, the loop is yours.

A small recurrent model of random weights learns to count: its prompt is one digit, and the reward of an answer is the
part of it that goes on from there. It takes some seconds on one core.

python examples/ppo_from_scratch.py --iterations 40
"""

import argparse

import torch

import rlfast

VOCAB, LENGTH, END = 10, 6, 0  # END ends an answer


class Model(torch.nn.Module):
    """A GRU over tokens; ``head`` is the policy's over the vocabulary, or the critic's with one row."""

    def __init__(self, outputs, size=64):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, size)
        self.body = torch.nn.GRU(size, size, batch_first=True)
        self.head = torch.nn.Linear(size, outputs, bias=False)

    def forward(self, tokens, state=None):
        """Tokens [B, T] → hidden states [B, T, D] and the state after them."""
        return self.body(self.embed(tokens), state)


class Batch:
    """Answers of a policy to prompts [B, 1], and what PPO learns from them."""

    def __init__(self, prompts, answers, mask):
        self.inputs = torch.cat((prompts, answers[:, :-1]), 1)  # [B, T]: what is read before each answered token
        self.answers, self.mask = answers, mask


@torch.no_grad()
def rollout(policy, prompts, seed):
    """Answers, sampled a token at a time; the mask ends after END."""
    token, state, answers, seeds = prompts, None, [], torch.arange(len(prompts)) + seed * len(prompts)
    for place in range(LENGTH):
        hidden, state = policy(token, state)
        positions = torch.full_like(seeds, place)
        drawn = rlfast.linear_sample(hidden[:, -1], policy.head.weight, seeds=seeds, positions=positions)
        token = drawn.tokens[:, None]
        answers.append(token)
    answers = torch.cat(answers, 1)
    ended = (answers == END).cumsum(1)
    return Batch(prompts, answers, (ended == 0) | ((ended == 1) & (answers == END)))


def reward(batch):
    """The part of the answer in which each token is the one before it plus one, after 9 comes 1."""
    right = batch.answers == batch.inputs % (VOCAB - 1) + 1
    return (right & batch.mask).sum(1) / LENGTH


@torch.no_grad()
def assess(batch, policy, reference, critic, beta):
    """Log-probs, values, advantages and returns of a batch; its mean score and its KL to the reference."""
    batch.old_logp = rlfast.linear_token_logps(policy(batch.inputs)[0], policy.head.weight, batch.answers).logp
    ref_logp = rlfast.linear_token_logps(reference(batch.inputs)[0], reference.head.weight, batch.answers).logp
    batch.old_values = critic.head(critic(batch.inputs)[0])[..., 0]
    scores = reward(batch)
    rewards = rlfast.shape_rewards(scores, batch.old_logp, ref_logp, batch.mask, beta=beta)
    batch.adv, batch.returns = rlfast.gae(rewards, batch.old_values, batch.mask, gamma=1.0, lam=0.95, whiten=True)
    kl = rlfast.masked_mean(rlfast.kl_penalty(batch.old_logp, ref_logp, kind="k3"), batch.mask)
    return scores.mean().item(), kl


def step(batch, policy, critic, objective, optimizer):
    """One update of both; the policy's logits are never kept for a backward."""
    out = objective.linear(
        policy(batch.inputs)[0], policy.head.weight, batch.answers, old_logp=batch.old_logp, adv=batch.adv,
        mask=batch.mask,
    )  # fmt: skip
    values = critic.head(critic(batch.inputs)[0])[..., 0]
    loss = out.loss + rlfast.value_loss(values, batch.old_values, batch.returns, batch.mask, clip=0.2).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return out.metrics


def train(iterations=40, size=128, epochs=4, seed=0, say=print):
    """The mean score of each iteration's answers."""
    torch.manual_seed(seed)
    policy, reference, critic = Model(VOCAB), Model(VOCAB), Model(1)
    reference.load_state_dict(policy.state_dict())
    objective = rlfast.loss("ppo", eps_high=0.28, entropy_coef=0.01)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=3e-3)
    beta, scores = rlfast.AdaptiveKL(0.01, target=2.0, horizon=10_000), []
    for iteration in range(iterations):
        prompts = torch.randint(1, VOCAB, (size, 1))
        batch = rollout(policy, prompts, seed=iteration)
        score, kl = assess(batch, policy, reference, critic, beta.value)
        for _ in range(epochs):
            metrics = step(batch, policy, critic, objective, optimizer)
        beta.update(kl, size)
        scores.append(score)
        if iteration % 5 == 0 or iteration == iterations - 1:
            clipped = (metrics["clip_low"] + metrics["clip_high"]).item()
            say(
                f"iteration {iteration:3d}   reward {score:.3f}   KL {kl.item():.3f}   "
                f"entropy {metrics['entropy'].item():.3f}   clipped {clipped:.2f}"
            )
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores = train(options.iterations, seed=options.seed)
    print(f"reward of the first answers {scores[0]:.3f}, of the last {scores[-1]:.3f}")


if __name__ == "__main__":
    main()
