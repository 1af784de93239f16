"""What a shared vocabulary sends is what the table of docs/distributed.md says, number for number and byte for byte."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

import rlfast
from rlfast import heads
from rlfast.distributed import VocabParallel
from rlfast.distributed.groups import FACTS
from tests.rank_pool import SIZE, fresh_group, group
from tests.vocab_cases import Counted

ROWS, LENGTH, DEPTH, OTHER, VOCAB, RANK = 2, 20, 16, 8, 64, 4
N, K = ROWS * LENGTH, 5


class Sent(NamedTuple):
    """Numbers that go into each collective, after the two integers with which a call begins; bytes of all."""

    forward: list
    backward: list
    bytes: int


def counted(call) -> Sent:
    """What a second call sends, hands having been shaken; ``call()`` gives what is differentiated, or None."""
    call()
    with Counted() as forward:
        value = call()
    assert forward.gathered[0] == 2 and not forward.reduced
    with Counted() as backward:
        if value is not None and value.requires_grad:
            value.sum().backward()
    assert not backward.gathered
    return Sent(forward.gathered[1:], backward.reduced, sum(forward.bytes[1:] + backward.bytes))


def fused(call) -> Sent:
    """The same of a loss whose gradients are made, and summed, with it."""
    call()
    with Counted() as seen:
        call()
    assert seen.gathered[0] == 2
    return Sent(seen.gathered[1:], seen.reduced, sum(seen.bytes[1:]))


def every_row() -> dict:
    """{row of the table: what this rank sends}."""
    heads.FEWEST_ROWS = LENGTH
    whole, rank = group(SIZE), dist.get_rank()
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(N, DEPTH, generator=draw), torch.randn(VOCAB, DEPTH, generator=draw)
    weight = weight.chunk(SIZE)[rank].clone().requires_grad_()
    ref_hidden, ref_weight = hidden[:, :OTHER].clone(), weight[:, :OTHER].detach().clone()
    targets, hidden = torch.randint(VOCAB, (N,), generator=draw), hidden.requires_grad_()
    logits = torch.randn(N, VOCAB // SIZE, generator=draw).requires_grad_()

    def logps(ids=targets, **more):
        return counted(lambda: rlfast.linear_token_logps(hidden, weight, ids, process_group=whole, **more).logp)

    def of_logits(**more):
        return counted(lambda: rlfast.token_logps(logits, targets, process_group=whole, **more).logp)

    def pair(teacher=False, **more):
        def call():
            ref = ref_hidden.clone().requires_grad_(teacher)
            return rlfast.linear_divergence(hidden, weight, ref, ref_weight, process_group=whole, **more).value

        return counted(call)

    def pair_of_logits(**more):
        return counted(lambda: rlfast.divergence(logits, logits.detach(), process_group=whole, **more).value)

    def loss(name="reinforce", options=None, lora=False, **more):
        made = rlfast.loss(name, **(options or {}))
        own = weight.detach() if lora else weight
        if lora:
            more["lora"] = torch.ones(RANK, DEPTH).requires_grad_(), torch.ones(len(own), RANK).requires_grad_(), 1.0
        if made.has_full_kl:
            more |= {"ref_hidden": ref_hidden.view(ROWS, LENGTH, -1), "ref_weight": ref_weight}
        given = {"adv": torch.ones(ROWS), "process_group": whole} | more
        shaped = hidden.view(ROWS, LENGTH, -1), own, targets.view(ROWS, LENGTH)
        return made.linear(*shaped, **given).loss

    fresh = VocabParallel(fresh_group(list(range(SIZE))))
    with Counted() as first:
        rlfast.linear_token_logps(hidden.detach(), weight, targets, process_group=fresh)
    again = {"memory_budget": 0}
    full = {"kl": "full", "beta": 0.25}
    old = {"old_logp": torch.full((ROWS, LENGTH), -3.0)}
    chunk = {"memory_budget": LENGTH * 4 * VOCAB // SIZE}
    return {
        "first": (first.gathered, first.bytes),
        "log-probs": logps(),
        "entropies, squares": logps(outputs=("entropy", "log_sum_sq_probs")),
        "mean logits": logps(outputs=("mean_logits",)),
        "is_top1": logps(outputs=("is_top1",)),
        "top-k": logps(top_k=K),
        "two targets": logps(targets.unsqueeze(1).repeat(1, 2)),
        "two targets, is_top1": logps(targets.unsqueeze(1).repeat(1, 2), outputs=("is_top1",)),
        "logits": of_logits(),
        "logits, top-k": of_logits(top_k=K),
        "reverse KL": pair(kind="reverse_kl"),
        "forward KL, both train": pair(True, kind="forward_kl"),
        "KL of logits": pair_of_logits(kind="reverse_kl"),
        "JSD": pair(kind="jsd"),
        "JSD of logits": pair_of_logits(kind="jsd"),
        "reverse KL of the top": pair(kind="reverse_kl", top_k=K),
        "forward KL of the top": pair(kind="forward_kl", top_k=K),
        "reverse KL of the top, both train": pair(True, kind="reverse_kl", top_k=K),
        "forward KL of the top, both train": pair(True, kind="forward_kl", top_k=K),
        "loss": fused(loss),
        "loss, entropies": fused(lambda: loss(entropy=True)),
        "loss, KL": fused(lambda: loss("ppo", full, **old)),
        "loss, KL and entropies": fused(lambda: loss("ppo", full, entropy=True, **old)),
        "loss, chunks": fused(lambda: loss(**chunk)),
        "loss, again": counted(lambda: loss(**again)),
        "lora": fused(lambda: loss(lora=True)),
        "lora, again": fused(lambda: loss(lora=True, **again)),
        "accumulated": fused(lambda: loss(accumulate_grad=True)),
        "accumulated, again": fused(lambda: loss(accumulate_grad=True, **again)),
    }


H, E = DEPTH * N, OTHER * N
A = RANK * DEPTH
TABLE = {
    "log-probs": ([3 * N], [H]),
    "entropies, squares": ([5 * N], [H]),
    "mean logits": ([4 * N], [H]),
    "is_top1": ([4 * N], [H]),
    "top-k": ([(3 + 2 * K + 1) * N], [H]),
    "two targets": ([4 * N], [H]),
    "two targets, is_top1": ([6 * N], [H]),
    "logits": ([3 * N], []),
    "logits, top-k": ([(3 + 2 * K + 1) * N], []),
    "reverse KL": ([7 * N], [H]),
    "forward KL, both train": ([7 * N], [H, E]),
    "KL of logits": ([7 * N], []),
    "JSD": ([7 * N, 2 * N], [H]),
    "JSD of logits": ([7 * N, 2 * N], []),
    "reverse KL of the top": ([(4 + 2 * K) * N, (2 + K) * N, (2 + K) * N], [H]),
    "forward KL of the top": ([(4 + 2 * K) * N, (2 + K) * N], [H]),
    "reverse KL of the top, both train": ([(4 + 2 * K) * N, (2 + K) * N, (2 + K) * N], [E, H]),
    "forward KL of the top, both train": ([(4 + 2 * K) * N, (2 + K) * N, (2 + K) * N], [E, H]),
    "loss": ([3 * N], [H]),
    "loss, entropies": ([4 * N], [H]),
    "loss, KL": ([8 * N], [H]),
    "loss, KL and entropies": ([9 * N], [H]),
    "loss, chunks": ([3 * N // 2] * 2, [H]),
    "loss, again": ([3 * N], [H]),
    "lora": ([3 * N], [H, A]),
    "lora, again": ([3 * N, 3 * N // 2, 3 * N // 2], [H, A]),
    "accumulated": ([3 * N], [H]),
    "accumulated, again": ([3 * N, 3 * N // 2, 3 * N // 2], [H]),
}


@pytest.fixture(scope="module")
def sent(ranks):
    return ranks.run(every_row)


@pytest.mark.parametrize("row", TABLE)
def test_a_row_of_the_table(sent, row):
    forward, backward = TABLE[row]
    wide = 4 * 2 * N if row.startswith("JSD") else 0  # its sums are float64
    for answer in sent:
        assert answer[row] == Sent(forward, backward, 4 * sum(forward + backward) + wide), row


def test_a_first_call(sent):
    """Two integers, then those of the handshake, each of 8 bytes."""
    for answer in sent:
        assert answer["first"] == ([2, FACTS, 3 * N], [16, 8 * FACTS, 12 * N])
        assert set(answer) == {*TABLE, "first"}
