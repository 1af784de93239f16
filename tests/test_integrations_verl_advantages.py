"""verl's estimators of advantages, patched and not: the same advantages and returns, at masked tokens too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("verl", reason='the verl package is missing: pip install --no-deps "verl==0.9.*"')
import rlfast
from rlfast.integrations import patching, verl_advantages
from rlfast.integrations import verl as ours
from tests.verl_parity import LENGTH, MASKS, ROWS, VERL, close, mask_of, same, stock

# Groups of three, of two, of one, their answers apart.
NAMES = np.array([f"3f2a-{i}" for i in (0, 1, 2, 0, 1, 0, 3, 2, 4)], dtype=object)
OUTCOME = ("grpo", "grpo_vectorized", "reinforce_plus_plus_baseline", "rloo", "rloo_vectorized", "opo", "gpg")


class Settings(dict):
    """verl's algorithm configuration: entries that are attributes too."""

    __getattr__ = dict.__getitem__


@pytest.fixture(scope="module", autouse=True)
def patched():
    with rlfast.patch("verl"):
        yield


@pytest.fixture(autouse=True)
def as_they_are(monkeypatch):
    """Why a call went to verl; a test that expects none of that finds it empty."""
    said = []
    monkeypatch.setattr(patching, "runs_as_it_is", lambda original, reason: said.append(reason))
    yield said
    assert not said


def rewards(seed: int = 0, outcome: bool = True) -> torch.Tensor:
    """[ROWS, LENGTH], of whole answers 0 but for the last token that counts."""
    torch.manual_seed(seed)
    if not outcome:
        return torch.randn(ROWS, LENGTH)
    last = (mask_of() * torch.arange(1, LENGTH + 1)).argmax(-1)
    return torch.zeros(ROWS, LENGTH).scatter(1, last[:, None], torch.randint(-2, 3, (ROWS, 1)).float())


@pytest.mark.parametrize("dtype", MASKS)
@pytest.mark.parametrize("holes", (False, True))
@pytest.mark.parametrize("gamma, lam", ((1.0, 1.0), (0.97, 0.9), (1, 0.0)))
def test_gae(gamma, lam, holes, dtype):
    torch.manual_seed(1)
    leaves = {"rewards": torch.randn(ROWS, LENGTH), "critic": torch.randn(ROWS, LENGTH)}
    for mask in (mask_of(dtype, holes), torch.ones(ROWS, LENGTH, dtype=dtype)):

        def call(verl, rewards, critic, mask=mask):
            return verl.core.compute_gae_advantage_return(
                token_level_rewards=rewards, values=critic, response_mask=mask.to(torch.int64), gamma=gamma, lam=lam
            )

        def plain(verl, rewards, critic, mask=mask):
            function = verl.core.compute_gae_advantage_return
            return function(rewards, critic, mask if verl is VERL else mask.float(), gamma, lam)

        same(call, leaves)
        same(plain, leaves)  # verl's own cannot subtract a mask of bools from 1


def test_gae_of_other_layouts_and_types():
    torch.manual_seed(1)
    leaves = {"rewards": torch.randn(ROWS, 2 * LENGTH)[:, ::2], "critic": torch.randn(LENGTH, ROWS).T}
    mask = mask_of(torch.int64)
    same(lambda verl, rewards, critic: verl.core.compute_gae_advantage_return(rewards, critic, mask, 0.9, 0.8), leaves)
    got = VERL.core.compute_gae_advantage_return(
        leaves["rewards"].bfloat16(), leaves["critic"].bfloat16(), mask, 1.0, 1.0
    )
    assert [x.dtype for x in got] == [torch.bfloat16] * 2
    for kind in (torch.float32, torch.float64):  # of a mask that counts in the type of the result
        narrow = leaves["rewards"].bfloat16(), leaves["critic"].bfloat16(), mask.to(kind), 1.0, 1.0
        types = [[x.dtype for x in v.core.compute_gae_advantage_return(*narrow)] for v in (stock(), VERL)]
        assert types[0] == types[1]
    tensors = torch.tensor(0.9), torch.tensor(0.8)
    same(lambda verl, rewards, critic: verl.core.compute_gae_advantage_return(rewards, critic, mask, *tensors), leaves)


@pytest.mark.parametrize("which", ("stock", "patched", "ours"))
@pytest.mark.parametrize("count", (0, 1))
def test_too_few_tokens_to_whiten(which, count):
    core = {"stock": stock().core, "patched": VERL.core, "ours": ours}[which]
    mask, wanted = torch.zeros(ROWS, LENGTH), ("At least one element", "The sum of the mask is one")[count]
    mask[0, :count] = 1.0
    with pytest.raises(ValueError, match=wanted):
        core.compute_gae_advantage_return(rewards(), rewards(1, False), mask, 1.0, 1.0)
    with pytest.raises(ValueError, match=wanted):
        core.compute_reinforce_plus_plus_baseline_outcome_advantage(rewards(), mask, NAMES)
    with pytest.raises(ValueError, match=wanted):
        core.compute_gdpo_outcome_advantage(rewards(), mask, NAMES)
    with pytest.raises(ValueError, match=wanted):
        core.compute_reinforce_plus_plus_outcome_advantage(rewards(), mask, config=Settings(gamma=1.0))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", OUTCOME)
def test_outcome_estimators(name, mask):
    def call(verl, rewards):
        function = verl.core.get_adv_estimator_fn(name)
        out = function(token_level_rewards=rewards, response_mask=mask_of(mask), index=NAMES, config=Settings())
        assert out[0] is out[1]
        return out

    same(call, {"rewards": rewards()})
    same(call, {"rewards": rewards(2, outcome=False)})


@pytest.mark.parametrize("name", ("grpo", "grpo_vectorized"))
def test_grpo_without_the_deviation_and_with_another_epsilon(name):
    for options in ({"norm_adv_by_std_in_grpo": False}, {"epsilon": 0.1}):

        def call(verl, rewards, options=options):
            return verl.core.get_adv_estimator_fn(name)(rewards, mask_of(), NAMES, **options)

        same(call, {"rewards": rewards()})


@pytest.mark.parametrize("names", (NAMES.astype(str), np.array([7, 1, 2, 7, 1, 7, 3, 2, 4]), list(NAMES)))
def test_groups_are_told_by_any_name(names):
    same(
        lambda verl, rewards: verl.core.compute_grpo_outcome_advantage(rewards, mask_of(), names),
        {"rewards": rewards()},
    )


def test_ten_thousand_answers():
    names = np.array([f"prompt-{i // 8}" for i in np.random.default_rng(0).permutation(2000)], dtype=object)
    scores = torch.randn(2000, 2)
    ones = torch.ones(2000, 2)
    same(lambda verl, rewards: verl.core.compute_grpo_outcome_advantage(rewards, ones, names), {"rewards": scores})


def test_bfloat16_rewards_keep_their_type():
    got = VERL.core.compute_grpo_outcome_advantage(rewards().bfloat16(), mask_of(), NAMES)[0]
    theirs = stock().core.compute_grpo_outcome_advantage(rewards().bfloat16(), mask_of(), NAMES)[0]
    assert got.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(got, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ("grpo_vectorized", "rloo_vectorized"))
def test_the_vectorised_estimators_of_bfloat16_rewards_are_not_rounded(name):
    got, theirs = (
        x.core.get_adv_estimator_fn(name)(rewards().bfloat16(), mask_of(), NAMES, config=Settings())[0]
        for x in (VERL, stock())
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, theirs.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", ({}, {"norm_adv_by_std_in_grpo": False}, {"gdpo_reward_weights": [1.0, 0.25]}))
def test_gdpo(options):
    torch.manual_seed(4)
    given = {
        "batch": {"prompts": torch.zeros(ROWS, 3), "attention_mask": torch.ones(ROWS, LENGTH + 3, dtype=torch.int64)},
        "non_tensor_batch": {"format": np.random.default_rng(0).normal(size=ROWS), "right": list(range(ROWS))},
        "config": Settings(gdpo_reward_keys=["format", "right"], **options),
    }
    by_std = options.get("norm_adv_by_std_in_grpo", True)
    for more in (given, {}):

        def call(verl, rewards, more=more):
            function = verl.core.get_adv_estimator_fn("gdpo")
            return function(rewards, mask_of(), index=NAMES, norm_adv_by_std_in_grpo=by_std, **more)

        same(call, {"rewards": rewards()})
    del given["non_tensor_batch"]["right"]
    for verl in (VERL, stock()):
        with pytest.raises(AssertionError, match="'right' not found"):
            verl.core.compute_gdpo_outcome_advantage(rewards(), mask_of(), NAMES, **given)


@pytest.mark.parametrize("by_std", (True, False))
def test_pass_at_k(by_std):
    names, config = NAMES[[0, 1, 2, 3, 4, 5, 7, 1, 2]], Settings(norm_adv_by_std_in_grpo=by_std)

    def call(verl, rewards):
        return verl.core.get_adv_estimator_fn("grpo_passk")(rewards, mask_of(), index=names, config=config)

    same(call, {"rewards": rewards(3, outcome=False)})
    for verl in (VERL, stock()):
        with pytest.raises(ValueError, match=r"at least 2 samples per group\. Got 1 for group 3f2a-3"):
            verl.core.compute_grpo_passk_outcome_advantage(rewards(), mask_of(), NAMES, config=config)
        with pytest.raises(AssertionError):
            verl.core.compute_grpo_passk_outcome_advantage(rewards(), mask_of(), names)


@pytest.mark.parametrize("gamma", (1.0, 0.9))
@pytest.mark.parametrize("dtype", MASKS[1:])
def test_returns_of_tokens(gamma, dtype):
    mask, config, baselines = mask_of(dtype), Settings(gamma=gamma), torch.randn(ROWS)
    by_token = {"rewards": rewards(5, outcome=False)}

    def plus_plus(verl, rewards):
        function = verl.core.get_adv_estimator_fn("reinforce_plus_plus")
        return function(token_level_rewards=rewards, response_mask=mask, config=config, index=NAMES)

    def remax(verl, rewards):
        function = verl.core.get_adv_estimator_fn("remax")
        return function(token_level_rewards=rewards, response_mask=mask, reward_baselines=baselines, config=config)

    same(plus_plus, by_token)
    same(remax, by_token)


@pytest.mark.parametrize("zero_tail", (True, False))
@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("name", ("optimal_token_baseline", "tir_optimal_token_baseline"))
def test_optimal_token_baselines(name, weighted, zero_tail):
    torch.manual_seed(7)
    logp = -torch.rand(ROWS, LENGTH) * 3
    squares, weights = torch.rand(ROWS, LENGTH) * 0.8 + 0.1, torch.rand(ROWS, LENGTH) + 0.5
    mask = mask_of(torch.int64, holes=name.startswith("tir"))

    def call(verl, rewards):
        return verl.core.get_adv_estimator_fn(name)(
            token_level_rewards=rewards, response_mask=mask, index=NAMES, old_log_probs=logp, sum_pi_squared=squares,
            rollout_is_weights=weights if weighted else None, handle_zero_tail=zero_tail, config=Settings(),
        )  # fmt: skip

    same(call, {"rewards": rewards(6, outcome=False)})


def whole_numbers():
    return (rewards() * 3).round().long()


REASONS = {
    "compute_gae_advantage_return": lambda f: f(rewards(), rewards(1, False), mask_of().float(), 1.5, 1.0),
    "compute_grpo_outcome_advantage": lambda f: f(rewards(), mask_of()[1:2], NAMES),
    "compute_rloo_vectorized_outcome_advantage": lambda f: f(whole_numbers(), mask_of().float(), NAMES),
    "compute_opo_outcome_advantage": lambda f: f(rewards(), mask_of().float() * 0.5, NAMES),
    "compute_reinforce_plus_plus_outcome_advantage": lambda f: f(
        rewards(), mask_of().float(), config=Settings(gamma=1.5)
    ),
    "compute_grpo_vectorized_outcome_advantage": lambda f: f(rewards(), mask_of(), NAMES, epsilon=-0.5),
    "compute_multi_turn_optimal_token_baseline_advantage": lambda f: f(
        rewards(), mask_of().float(), NAMES, -rewards().abs(), rewards().abs() + 0.5, epsilon=-1.0
    ),
    "compute_optimal_token_baseline_advantage": lambda f: f(
        rewards(), mask_of().float(), NAMES, -rewards().abs(), rewards().abs()
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_rlfast_does_not_take_goes_to_verl(name, as_they_are):
    for got, theirs in zip(*(REASONS[name](getattr(x.core, name)) for x in (VERL, stock())), strict=True):
        close(name, got, theirs)
    assert as_they_are
    as_they_are.clear()


def test_an_advantage_that_is_off_by_a_hundredth_is_noticed(monkeypatch):
    kernel = verl_advantages.group_advantage
    monkeypatch.setattr(verl_advantages, "group_advantage", lambda *args, **kw: kernel(*args, **kw) * 1.01)
    with pytest.raises(AssertionError, match="off by"):
        test_outcome_estimators("rloo", torch.bool)
    scan = verl_advantages.gae
    monkeypatch.setattr(verl_advantages, "gae", lambda *args, gamma, lam: scan(*args, gamma=gamma * 0.99, lam=lam))
    with pytest.raises(AssertionError, match="off by"):
        test_gae(1.0, 1.0, True, torch.float32)
