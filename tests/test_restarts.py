"""Prompts that are cut from earlier rollouts: where they can end, which steps are taken back, bad input."""

from __future__ import annotations

from collections import Counter

import pytest

from rlfast.rollout import Engine, SamplingParams, restarts
from tests.decoders import decoder, prompts
from tests.numerics import assert_same_bits

PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, seed=3)


@pytest.fixture(scope="module")
def rollouts():
    return Engine(decoder("llama"), kv_budget=1 << 22).generate(prompts(40, longest=5), PARAMS)


def test_each_is_a_prefix_and_up_to_so_many_tokens_are_missing(rollouts):
    lost = Counter()
    for r, ids in zip(rollouts, restarts(rollouts, back=3, append=[9, 9]), strict=True):
        whole = [*r.prompt_tokens, *r.tokens]
        assert ids[-2:] == [9, 9] and ids[:-2] == whole[: len(ids) - 2]
        lost[len(whole) - len(ids) + 2] += 1
    assert set(lost) == {0, 1, 2, 3} and max(lost.values()) < 20  # 10 each, on average
    assert restarts(rollouts, back=3) == restarts(rollouts, back=3) != restarts(rollouts, back=3, seed=1)


def test_no_more_is_taken_back_than_there_is(rollouts):
    for r, ids in zip(rollouts, restarts(rollouts, back=100), strict=True):
        assert ids[: len(r.prompt_tokens)] == r.prompt_tokens
    assert restarts(rollouts, back=0) == [[*r.prompt_tokens, *r.tokens] for r in rollouts]


def test_steps_end_with_tokens(rollouts):
    one = rollouts[0]._replace(prompt_tokens=[5], tokens=[10, 7, 11, 12, 7, 13])
    found = {tuple(restarts([one], back=9, step_ids=[7], seed=s)[0]) for s in range(40)}
    assert found == {(5,), (5, 10, 7), (5, 10, 7, 11, 12, 7), (5, 10, 7, 11, 12, 7, 13)}
    ended = one._replace(tokens=[10, 7, 11, 7])
    found = {tuple(restarts([ended], back=9, step_ids=[7], seed=s)[0]) for s in range(40)}
    assert found == {(5,), (5, 10, 7), (5, 10, 7, 11, 7)}
    assert restarts([one._replace(tokens=[])], back=9, step_ids=[7]) == [[5]]


def test_a_rollout_goes_on_from_a_restart_as_it_would_have():
    """Greedy: the tokens and log-probs that were cut off come again."""
    engine, greedy = (
        Engine(decoder("llama"), kv_budget=1 << 22),
        SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
    )
    (whole,) = engine.generate([[3, 4, 5]], greedy)
    cuts = [restarts([whole], back=5, seed=s)[0] for s in range(20)]
    cut = next(c for c in cuts if len(c) < 3 + 8)
    kept = len(cut) - 3
    (rest,) = engine.generate([cut], SamplingParams(temperature=0.0, max_tokens=8 - kept, ignore_eos=True))
    assert rest.tokens == whole.tokens[kept:]
    assert_same_bits("log-probs", rest.logp_raw, whole.logp_raw[kept:])


BAD = {
    "back: expected an int ≥ 0, got -1": {"back": -1},
    "back: expected an int ≥ 0, got 1.5": {"back": 1.5},
    "seed: expected an int ≥ 0, got True": {"back": 1, "seed": True},
    "append: expected token ids, got 'x'": {"back": 1, "append": "x"},
    "step_ids: expected ids in [0,": {"back": 1, "step_ids": [-1]},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said):
    with pytest.raises((ValueError, TypeError)) as caught:
        restarts([], **BAD[said])
    assert str(caught.value).startswith(said)
    with pytest.raises(TypeError, match="rollouts: expected Rollout, got"):
        restarts([[1, 2]], back=1)
