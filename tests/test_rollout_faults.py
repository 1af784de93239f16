"""The rollout engine where things go wrong, or come at a bad moment."""

from __future__ import annotations

import copy

import pytest
import torch

from rlfast.rollout import Engine, Request, SamplingParams
from tests.decoders import decoder, prompts
from tests.test_rollout import GREEDY, engine, same


@pytest.mark.parametrize("at", (1, 2, 5), ids=lambda n: f"after_{n}_steps")
@pytest.mark.parametrize("end", ("done", "cancelled"))
def test_kept_keys_and_values_are_nobody_elses(at, end):
    """What goes on from those of older weights, in the midst of its prompt or forked, is found by no later request."""
    model, given = copy.deepcopy(decoder("llama")), prompts(3, seed=1, longest=60)
    options = {"page_size": 4, "kv_budget": 1 << 22, "token_budget": 40}
    one = Engine(model, **options)
    numbers = one.submit([Request(tuple(p), SamplingParams(n=2, max_tokens=12, ignore_eos=True)) for p in given])
    for _ in range(at):
        one.step()
    one.pause("keep")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.07)
    one.resume()
    one.step()
    if end == "cancelled":
        for number in numbers:
            one.cancel(number)
    while one.live:
        one.step()
    fresh = Engine(copy.deepcopy(model), **options)
    same(one.generate(given, GREEDY), fresh.generate(given, GREEDY))
    assert one.pool.held == 0
