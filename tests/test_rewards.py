"""Reward shaping, against the trainers' functions and the papers' formulas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlfast
from tests import golden_inputs
from tests.numerics import assert_value, assert_zero

GOLDEN = json.loads((Path(__file__).parent / "data" / "trainers.json").read_text(encoding="utf-8"))["rewards"]


def close(name, got, wanted):
    """Within the rounding of float32."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert_value(name, got, wanted, wanted)


def shaped(scores: str, **options):
    fields = golden_inputs.batch("far")
    given = (fields[name] for name in (scores, "old_logp", "ref_logp", "mask"))
    return rlfast.shape_rewards(*given, **options), fields["mask"]


def test_openrlhf_puts_the_score_at_the_last_token_and_bounds_the_kl():
    got, mask = shaped("scores", beta=0.05, clip=(-1.0, 1.0), like="openrlhf")
    wanted = torch.tensor(GOLDEN["openrlhf"], dtype=torch.float64)
    close("rewards", got, torch.where(mask, wanted, 0.0))  # OpenRLHF's masked tokens hold a KL too


def test_openrlhf_bounds_the_score_by_itself():
    zero = torch.zeros(1, 2)
    for clip, wanted in ((None, 10.0), ((-50.0, 50.0), 50.0)):
        got = rlfast.shape_rewards(torch.tensor([50.0]), zero, zero, like="openrlhf", clip=clip)
        assert got.tolist() == [[0.0, wanted]]


def test_verl_keeps_the_scores_of_tokens_where_they_are():
    got, mask = shaped("token_adv", beta=0.05, like="verl")
    close("rewards", got, torch.where(mask, torch.tensor(GOLDEN["verl"], dtype=torch.float64), 0.0))


def test_rloo_takes_the_whole_kl_off_the_score():
    got, mask = shaped("scores", clip=(-0.5, 0.5), like="trl")
    fields = golden_inputs.batch("far")
    kl = ((fields["old_logp"] - fields["ref_logp"]) * mask).sum(-1)
    close("rewards", got, fields["scores"].clamp(-0.5, 0.5) - 0.05 * kl)


def test_nemo_rl_takes_a_bounded_k3_off_each_token():
    """kl_type k3, the difference within ±20 and the estimate within 10; the score is at the last token."""
    logp, ref = torch.tensor([[-1.0, -30.0, -1.0, -2.0]]), torch.tensor([[-1.5, -1.0, -40.0, -2.0]])
    d = (ref - logp).double().clamp(-20.0, 20.0)
    kl = (d.exp() - 1.0 - d).clamp(-10.0, 10.0)
    wanted = -0.01 * kl + torch.tensor([0.0, 0.0, 0.0, 1.0])
    close("rewards", rlfast.shape_rewards(torch.ones(1), logp, ref, like="nemo-rl"), wanted)


def test_abs_is_absolute():
    logp, ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    close("abs", rlfast.shape_rewards(torch.ones(1), logp, ref, kind="abs", beta=1.0), [[-0.5, 0.0]])


def test_the_sum_over_tokens_is_the_reward_of_the_sequence():
    tokens, mask = shaped("scores", beta=0.1, kind="k3")
    whole, _ = shaped("scores", beta=0.1, kind="k3", level="sequence")
    filled = mask.any(-1)
    close("rewards", tokens.sum(-1)[filled], whole[filled])
    assert_zero("masked", tokens[~mask])


@pytest.mark.parametrize("like, beta", [(None, 0.05), ("trl", 0.05), ("verl", 0.001), ("openrlhf", 0.01)])
def test_the_default_coefficient_is_the_trainers(like, beta):
    logp, ref = torch.tensor([[-1.0]]), torch.tensor([[-3.0]])
    close("reward", rlfast.shape_rewards(torch.ones(1).double(), logp, ref, like=like).flatten(), [1.0 - beta * 2.0])


def test_a_controllers_value_is_a_coefficient():
    control = rlfast.AdaptiveKL(0.5, target=1.0, horizon=10)
    logp, ref = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-3.0, -1.0]])
    close("reward", rlfast.shape_rewards(torch.ones(1), logp, ref, beta=control.value), [[-1.0, 1.0]])


def test_what_is_masked_may_be_nan():
    logp = torch.tensor([[-1.0, torch.nan]])
    mask = torch.tensor([[True, False]])
    close("reward", rlfast.shape_rewards(torch.ones(1), logp, logp, mask), [[1.0, 0.0]])


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"scores: expected shape \(2,\) or \(2, 3\), got \(3,\)"):
        rlfast.shape_rewards(torch.zeros(3), x, x)
    with pytest.raises(
        ValueError, match="like: expected one of None, 'trl', 'verl', 'openrlhf', 'nemo-rl', got 'liger'"
    ):
        rlfast.shape_rewards(torch.zeros(2), x, x, like="liger")
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 3\) like logp, got \(2,\)"):
        rlfast.shape_rewards(torch.zeros(2), x, x, torch.ones(2))
    with pytest.raises(ValueError, match=r"buffer: expected a number in \[0, max_len = 10\], got 11"):
        rlfast.overlong_penalty(torch.ones(1), max_len=10, buffer=11)
    with pytest.raises(ValueError, match="group_size: expected a divisor of the 3 responses, got 2"):
        rlfast.length_reward(torch.ones(3), torch.ones(3), group_size=2)


X, TWO, ONES = torch.zeros(2, 3), torch.zeros(2), [[1, 1, 1], [1, 1, 1]]
NAN = float("nan")
BAD = [
    (lambda: rlfast.shape_rewards([1.0, 2.0], X, X), "scores: expected a torch.Tensor, got list"),
    (lambda: rlfast.shape_rewards(TWO, ONES, X), "logp: expected a torch.Tensor, got list"),
    (lambda: rlfast.shape_rewards(TWO, X, ONES), "ref_logp: expected a torch.Tensor, got list"),
    (lambda: rlfast.shape_rewards(TWO, X, X, ONES), "mask: expected a torch.Tensor, got list"),
    (lambda: rlfast.shape_rewards(TWO.to("meta"), X, X), "scores: expected device cpu like logp, got meta"),
    (lambda: rlfast.shape_rewards(TWO, X, X, beta="x"), "beta: expected a finite float, got 'x'"),
    (lambda: rlfast.shape_rewards(TWO, X, X, beta=NAN), "beta: expected a finite float, got nan"),
    (
        lambda: rlfast.shape_rewards(TWO, X, X, beta=torch.ones(3)),
        r"beta: expected a number or a 0-dim tensor, got \(3,",
    ),
    (lambda: rlfast.shape_rewards(TWO, X, X, clip=(1.0, -1.0)), r"clip: expected \(low, high\) with low <= high, got"),
    (lambda: rlfast.shape_rewards(TWO, X, X, clip=1.0), r"clip: expected \(low, high\), got 1.0"),
    (lambda: rlfast.shape_rewards(TWO, X, X, clip=(0.0, NAN)), "clip: expected a float, got nan"),
    (lambda: rlfast.length_reward([1, 2], TWO), "lengths: expected a torch.Tensor, got list"),
    (lambda: rlfast.length_reward(TWO, [1, 2]), "correct: expected a torch.Tensor, got list"),
    (lambda: rlfast.length_reward(X, X), r"lengths: expected shape \[B\], got \(2, 3\)"),
    (lambda: rlfast.length_reward(TWO, TWO, group_size="2"), "group_size: expected an int, got '2'"),
    (lambda: rlfast.overlong_penalty([1, 2], max_len=3, buffer=1), "lengths: expected a torch.Tensor, got list"),
    (lambda: rlfast.overlong_penalty(TWO, max_len="3", buffer=1), "max_len: expected a finite float ≥ 0, got '3'"),
    (
        lambda: rlfast.overlong_penalty(TWO, max_len=3, buffer=NAN),
        r"buffer: expected a number in \[0, max_len = 3\], got",
    ),
    (lambda: rlfast.overlong_penalty(TWO, max_len=3, buffer=1, factor="a"), "factor: expected a finite float, got 'a'"),
    (lambda: rlfast.reflection_bonus(TWO, TWO), "start: expected dtype torch.int64|start: expected dtype int64"),
    (lambda: rlfast.reflection_bonus(TWO, torch.tensor([0, 2])), "start: expected -1, 0 or 1 each, got 2"),
    (lambda: rlfast.reflection_bonus(TWO, torch.tensor([0])), r"correct: expected shape \(1,\) like start"),
    (lambda: rlfast.reflection_bonus(TWO, torch.tensor([0, 1]), beta=-1), "beta: expected a finite float ≥ 0"),
    (lambda: rlfast.best_of_n(torch.zeros(2, 2), group_size=2), r"rewards: expected shape \[B\], got \(2, 2\)"),
    (
        lambda: rlfast.best_of_n(torch.zeros(3), group_size=2),
        "group_size: expected a divisor of the 3 responses, got 2",
    ),
    (lambda: rlfast.best_of_n(torch.tensor([0.0, torch.nan]), group_size=2), "rewards: expected a float each, got nan"),
]


@pytest.mark.parametrize("call, said", BAD, ids=[said for _, said in BAD])
def test_bad_input_is_named(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


@pytest.mark.parametrize("name, factor", [("overlong_trl", 1.0), ("overlong_openrlhf", 0.5)])
def test_the_overlong_penalty_is_the_trainers(name, factor):
    lengths = torch.tensor(GOLDEN["lengths"])
    got = rlfast.overlong_penalty(lengths, max_len=100, buffer=20, factor=factor)
    close("penalty", got, GOLDEN[name])


def test_the_overlong_penalty_without_a_bound_or_a_buffer():
    lengths = torch.tensor([99, 100, 101, 130])
    close("verl", rlfast.overlong_penalty(lengths, max_len=100, buffer=20, bounded=False), [-0.95, -1.0, -1.05, -2.5])
    close("no buffer", rlfast.overlong_penalty(lengths, max_len=100, buffer=0), [0.0, 0.0, -1.0, -1.0])


def test_the_length_reward():
    lengths = torch.tensor([10, 20, 30, 10, 7, 7])
    correct = torch.tensor([1, 0, 1, 0, 1, 0])
    close("group of 3", rlfast.length_reward(lengths, correct, group_size=3), [0.5, 0.0, -0.5, -0.5, 0.5, 0.0])
    close("one group", rlfast.length_reward(lengths[4:], correct[4:]), [0.0, 0.0])
    assert rlfast.length_reward(torch.zeros(0), torch.zeros(0)).shape == (0,)


def test_the_reflection_bonus():
    """Every start with a right and a wrong answer."""
    start = torch.tensor([-1, -1, 0, 0, 1, 1])
    got = rlfast.reflection_bonus(torch.tensor([1, 0, 1, 0, 1, 0]), start, beta=0.3)
    close("bonus", got, torch.tensor([0.3, 0, 0, 0, 0, -0.3]).double())


def test_the_best_and_the_worst_of_n():
    rewards = torch.tensor([0.5, -1.0, 2.0, 1.0, 1.0, 1.0, -torch.inf, 3.0, 3.0])
    found = rlfast.best_of_n(rewards, group_size=3)
    assert found.best.tolist() == [2, 3, 7] and found.worst.tolist() == [1, 3, 6]
    assert found.gap.tolist() == [3.0, 0.0, torch.inf]
    assert rlfast.best_of_n(rewards[:0], group_size=3).best.shape == (0,)
