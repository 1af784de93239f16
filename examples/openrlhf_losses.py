"""OpenRLHF's losses on rlfast's kernels, under OpenRLHF's names: a reward model, DPO, and PPO with a critic.

It needs no OpenRLHF. Where OpenRLHF can be imported, each loss is beside its own, and must be the same. In OpenRLHF
itself nothing of this is written: see the page on migration.

python examples/openrlhf_losses.py
"""

import argparse
import importlib

import torch

from rlfast.integrations import openrlhf as losses

VOCAB, SIZE = 2000, 64


class Model(torch.nn.Module):
    """Random weights; what matters here is what comes after its logits."""

    def __init__(self, outputs):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, SIZE)
        self.body = torch.nn.GRU(SIZE, SIZE, batch_first=True)
        self.head = torch.nn.Linear(SIZE, outputs)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens))[0])


def log_probs(model, sequences):
    """Log-probs of the tokens after the first, and the logits that they came from."""
    logits = model(sequences[:, :-1])
    return losses.log_probs_from_logits(logits, sequences[:, 1:]), logits


def reward_model(module, sequences):
    """Bradley-Terry on pairs: the first half of the sequences is preferred."""
    rewards = Model(1)(sequences)[:, -1, 0]
    chosen, rejected = rewards.chunk(2)
    return module.PairWiseLoss()(chosen, rejected)


def dpo(module, sequences):
    """DPO on the same pairs, with smoothed labels."""
    policy, reference = Model(VOCAB), Model(VOCAB)
    sums = log_probs(policy, sequences)[0].sum(-1).chunk(2)
    with torch.no_grad():
        ref_sums = log_probs(reference, sequences)[0].sum(-1).chunk(2)
    return module.DPOLoss(beta=0.1, label_smoothing=0.1)(*sums, *ref_sums)[0]


def ppo(module, sequences):
    """The actor's loss with a KL and an entropy bonus, and the critic's."""
    actor, critic, reference = Model(VOCAB), Model(1), Model(VOCAB)
    mask = torch.ones_like(sequences[:, 1:], dtype=torch.bool)
    mask[:, :3] = False  # the prompt
    with torch.no_grad():
        old, ref = (log_probs(model, sequences)[0] for model in (actor, reference))
        values = critic(sequences[:, :-1])[..., 0]
        score = (sequences % 2 == 0).float().mean(-1)
        rewards = module.compute_reward(score, 0.01, module.compute_approx_kl(old, ref), action_mask=mask)
    maker = module.RemoteExperienceMaker  # a method that reads nothing of its object
    adv, returns = maker.get_advantages_and_returns(None, values, rewards, mask, 1.0, 0.95)
    logp, logits = log_probs(actor, sequences)
    loss, clip_ratio, ppo_kl, *_ = module.PolicyLoss(0.2, 0.28, dual_clip=3.0)(logp, old - 0.2 * values, adv, mask)
    kl = module.compute_approx_kl(logp, ref, kl_estimator="k3", unbiased_gradient=True)
    entropy = module.compute_entropy(logits)
    value = module.ValueLoss(0.2)(critic(sequences[:, :-1])[..., 0], values, returns, mask)
    print(f"    clipped {clip_ratio.item():.3f}, KL to the old policy {ppo_kl.item():.3f}")
    return loss + 0.01 * module.aggregate_loss(kl, mask) - 0.001 * module.aggregate_loss(entropy, mask) + value


def of_openrlhf():
    """OpenRLHF's own functions by the same names; None where it cannot be imported."""
    try:
        parts = [importlib.import_module(f"openrlhf.{name}") for name in (
            "models.utils", "models.loss", "trainer.ppo_utils.experience_maker")]  # fmt: skip
    except ImportError as error:
        print(f"OpenRLHF is not here ({error}): its losses are not compared")
        return None
    return argparse.Namespace(**{key: x for part in parts for key, x in vars(part).items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    theirs = of_openrlhf()
    sequences = torch.randint(VOCAB, (options.rows, options.length), generator=torch.Generator().manual_seed(0))
    for loss in (reward_model, dpo, ppo):
        found = []
        for module in (losses, theirs):
            if module is not None:
                torch.manual_seed(0)  # the models' weights
                found.append(loss(module, sequences))
                found[-1].backward()
        values = zip(("rlfast", "OpenRLHF"), found, strict=False)
        print(f"{loss.__name__:13}" + "".join(f"  {who} {x.item():.6f}" for who, x in values))
        torch.testing.assert_close(found[0], found[-1], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main()
