"""GRPO on ranks of torchrun, on CPUs: a batch that is spread over them, rows that are, and a head.

torchrun --nproc-per-node 2 examples/torchrun_grpo.py --steps 20

The model is a small random one that learns to say even tokens; on GPUs "gloo" becomes "nccl". Every rank draws the
rollouts of its prompts, and trains on its part of all samples; the loss, and what it is normalised by, are those of the
whole batch.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import rlfast

PROMPTS, GROUP, VOCAB = 5, 6, 64  # 30 samples: on two ranks the third group is half on one, half on the other


def model_of(seed: int = 0):
    """The same on every rank."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, head_dim=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def padded(rollouts):
    """(ids [B, T], which of their tokens were drawn)."""
    rows = [(r.prompt_tokens + r.tokens, len(r.prompt_tokens)) for r in rollouts]
    ids = torch.zeros(len(rows), max(len(row) for row, _ in rows), dtype=torch.int64)
    drawn = torch.zeros_like(ids, dtype=torch.bool)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        drawn[i, start : len(row)] = True
    return ids, drawn


def reward_of(rollouts):
    """The share of even tokens in each response."""
    return torch.tensor([sum(t % 2 == 0 for t in r.tokens) / max(len(r.tokens), 1) for r in rollouts])


def loss_of(model, objective, rollouts, adv, **normalisers):
    """The objective over some rollouts."""
    ids, drawn = padded(rollouts)
    mask = drawn[:, 1:]
    logp = rlfast.token_logps(model(ids).logits[:, :-1], ids[:, 1:], mask=mask).logp
    return objective(logp, adv=adv, mask=mask, **normalisers).loss


def train(group, steps: int) -> list[float]:
    """The mean reward of each step."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = model_of()
    trained = DistributedDataParallel(model, process_group=group)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pool = rlfast.rollout.RankPool(rlfast.rollout.Engine(model), group)
    objective, history = rlfast.loss("dapo"), []
    for step in range(steps):
        prompts = [[3 + (7 * step + i) % (VOCAB - 3), 4 + i] for i in range(PROMPTS)]
        params = rlfast.rollout.SamplingParams(n=GROUP, max_tokens=12, seed=step)
        rollouts = pool.generate(prompts, params)  # all of them, on every rank, whatever their number
        mine = rollouts[rank * len(rollouts) // size : (rank + 1) * len(rollouts) // size]

        rewards = reward_of(mine)
        adv = rlfast.group_advantage(rewards, group_size=GROUP, process_group=group)  # groups may straddle ranks
        _, drawn = padded(mine)
        share = rlfast.distributed.share(objective, drawn[:, 1:], process_group=group)
        loss = loss_of(trained, objective, mine, adv, **share._asdict())
        whole = rlfast.masked_mean(loss.detach().reshape(1), process_group=group)
        if step == 0:  # what one process would have had
            every = rlfast.group_advantage(reward_of(rollouts), group_size=GROUP)
            with torch.no_grad():
                alone = loss_of(model, objective, rollouts, every)
            torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
        optimiser.zero_grad()
        loss.backward()  # DistributedDataParallel takes the mean of the ranks' gradients
        optimiser.step()

        history.append(rlfast.masked_mean(rewards, process_group=group).item())
        if rank == 0:
            print(f"step {step:2}  mean reward {history[-1]:.3f}  loss {whole.item():+.4f}")
    pool.close()
    return history


def long_rows(group) -> None:
    """Rows too long for one rank: targets and advantages across the boundaries."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (2, 64 * size), generator=draw)
    rewards, values = torch.randn(2, 2, 64 * size, generator=draw)
    own = slice(64 * rank, 64 * (rank + 1))

    targets = rlfast.distributed.shifted_targets(ids[:, own], process_group=group)
    adv, _ = rlfast.distributed.gae(rewards[:, own], values[:, own], gamma=0.99, lam=0.95, process_group=group)
    whole, _ = rlfast.gae(rewards, values, gamma=0.99, lam=0.95)
    torch.testing.assert_close(adv, whole[:, own])
    if rank + 1 < size:
        assert torch.equal(targets[:, -1], ids[:, own.stop])
    white = rlfast.masked_whiten(adv, process_group=group)
    torch.testing.assert_close(white, rlfast.masked_whiten(whole)[:, own])
    if rank == 0:
        print(f"advantages of rows over {size} ranks: those of whole rows")


def shared_head(group) -> None:
    """A head too large for one rank: each has its rows of it, and all have the log-probs of the whole."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model, ids = model_of(), torch.arange(24).reshape(2, 12) % VOCAB
    with torch.no_grad():
        hidden, head = model.model(ids).last_hidden_state, model.lm_head.weight
        shard = head.chunk(size)[rank]
        logp = rlfast.linear_token_logps(hidden[:, :-1], shard, ids[:, 1:], process_group=group).logp
        whole = rlfast.linear_token_logps(hidden[:, :-1], head, ids[:, 1:]).logp
    torch.testing.assert_close(logp, whole)
    if rank == 0:
        print(f"log-probs of a head that {size} ranks share: those of the whole")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    train(dist.group.WORLD, options.steps)
    long_rows(dist.group.WORLD)
    shared_head(dist.group.WORLD)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
