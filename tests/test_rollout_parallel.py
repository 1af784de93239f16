"""``RankPool``: processes over gloo give what one engine gives, and a rank that fails says so on all."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist

from rlfast.rollout import Engine, RankPool, Request, RolloutBackend, SamplingParams
from rlfast.rollout.calls import RequestError
from rlfast.rollout.parallel import spelled
from tests.decoders import decoder, prompts
from tests.test_rollout import engine, same

PARAMS = SamplingParams(n=2, max_tokens=6, ignore_eos=True, seed=3)


def said(call) -> str:
    """The error of a call."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def refuse(pool, work) -> None:
    """What a server does that fails at one request."""
    number = min(pool.own)
    pool.engine._drop({number})
    pool.engine.failed[number] = RequestError("no")
    pool.engine._work = work


def ranked(group) -> dict:
    """What a process does."""
    rank, found = dist.get_rank(group), {}
    model = copy.deepcopy(decoder("llama"))  # its weights change
    pool, given = RankPool(Engine(model, kv_budget=1 << 22), group), prompts(5)
    found["whole"] = pool.generate(given, PARAMS)
    found["one"] = pool.generate(given[:1], PARAMS)  # nothing is rank 1's
    found["stream"] = list(pool.stream(given, PARAMS, until=lambda so_far: len(so_far) == 3))
    found["rest"] = list(pool.stream(None))
    found["wrong prompt"] = said(lambda: pool.generate([[3], [], [4]], PARAMS))
    found["idle"] = pool.step()
    work = pool.engine._work
    if rank == 1:
        pool.engine._work = lambda timeout=None: 1 // 0
    numbers = pool.submit([Request(tuple(p), PARAMS) for p in given])
    found["failure"] = said(pool.step)
    pool.engine._work = work
    found["after"] = pool.step()
    assert [r.request for r in found["after"]] == [n for n in numbers for _ in range(2)]
    if rank == 1:
        pool.engine._work = lambda timeout=None: refuse(pool, work)
    numbers = pool.submit([Request(tuple(p), PARAMS) for p in given])
    found["refused"], found["others"] = said(pool.step), []
    while pool.under_way or pool.later or pool.failed:
        found["others"] += pool.step()
    assert {r.request for r in found["others"]} == {*numbers} - {numbers[1]} and not pool.numbers
    numbers = pool.submit([Request(tuple(p), PARAMS) for p in given])
    pool.cancel(numbers[1])
    found["cancelled"] = [(r.request, r.finish_reason) for r in pool.step()]
    pool.pause()
    found["paused"] = said(lambda: pool.generate(given, PARAMS)), pool.step()
    pool.resume()
    pool.step()
    with torch.no_grad():
        for p, new in zip(pool.engine.decoder.model.parameters(), decoder("llama", seed=1).parameters(), strict=True):
            p.copy_(new)
    pool.sync_weights(None, 5)
    found["new"] = pool.generate(given, PARAMS)
    found["held"], found["bitwise"] = pool.engine.pool.held, pool.bitwise
    requests = {
        "other prompts": [Request((prompt,), PARAMS) for prompt in (3 + rank, 5)],
        "more prompts": [Request((3,), PARAMS)] * (1 + rank),
    }
    requests["other params"] = [Request((3,), SamplingParams(max_tokens=2, logit_bias={4: 0.5 + rank}))]
    for name, own in requests.items():
        other = RankPool(engine(), group)
        other.submit(own)
        found[name] = said(other.step)
        other.close()
    pool.close()
    return found


def generated(group, count: int) -> list:
    """On a mesh over the ranks."""
    mesh = dist.DeviceMesh("cpu", range(dist.get_world_size(group)))
    pool = RankPool(engine(), mesh)
    found = pool.generate(prompts(count), PARAMS), pool.engine.forwards
    pool.close()
    return found


@pytest.fixture(scope="module")
def answers(ranks) -> list[dict]:
    """Of both ranks."""
    return ranks.run(ranked, size=2)


def test_ranks_give_what_one_engine_gives(answers):
    """On every rank, in the order of the prompts, whose number they need not divide; before and after new weights."""
    given, changed = prompts(5), Engine(decoder("llama", seed=1), kv_budget=1 << 22)
    whole, new = engine().generate(given, PARAMS), changed.generate(given, PARAMS)
    for found in answers:
        same(found["whole"], whole)
        assert [(r.request, r.index) for r in found["whole"]] == [(i, k) for i in range(5) for k in range(2)]
        same(found["one"], whole[:2])
        same([*found["stream"], *found["rest"]], whole)
        assert len(found["stream"]) == 3
        same(found["after"], whole)
        same(found["new"], new)
        assert set(found["new"][0].versions.tolist()) == {5}
        assert found["held"] == 0 and found["bitwise"]


def test_a_rank_that_fails_says_so_on_every_rank(answers):
    """And nothing is lost by it: the next step has it all."""
    for found in answers:
        assert found["wrong prompt"] == "prompts: expected at least one token each, got an empty list"
        assert found["more prompts"] == "requests: expected the same on every rank, got [1, 2] of them"
        others = "requests: expected the same on every rank, got others on rank 1"
        assert found["other prompts"] == found["other params"] == others
        assert found["idle"] == []
        assert found["failure"] == "rank 1: ZeroDivisionError: integer division or modulo by zero"
        assert found["refused"].startswith("request ") and found["refused"].endswith(" of rank 1: no")
        assert len(found["others"]) == 2 * 4
        assert [reason for _, reason in found["cancelled"]].count("abort") == 2
        assert "the engine is paused" in found["paused"][0] and found["paused"][1] == []


def allowed(tokens):
    return [3, 4]


OTHER = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.5, "max_tokens": 5, "min_tokens": 2, "n": 2, "seed": 1,
    "stop": ("a",), "stop_token_ids": (3,), "ignore_eos": True, "repetition_penalty": 1.5, "presence_penalty": -1.0,
    "frequency_penalty": -2.0, "logit_bias": {3: 1.0}, "allowed_token_ids": (3, 4), "priority": 1,
}  # fmt: skip


def test_every_parameter_tells_requests_apart():
    """By a text that is one in every process: no address and no hash is in it; what is equal has the same."""
    assert set(OTHER) == {field.name for field in dataclasses.fields(SamplingParams)}
    texts = [repr(spelled(SamplingParams(**{name: x}))) for name, x in OTHER.items()]
    texts += [repr(spelled(SamplingParams(**x))) for x in (
        {}, {"stop": ("a", "b")}, {"presence_penalty": -2.0}, {"logit_bias": {3: 1.5}}, {"logit_bias": {4: 1.0}},
        {"allowed_token_ids": allowed}, {"allowed_token_ids": functools.partial(allowed)},
    )]  # fmt: skip
    assert len({*texts}) == len(texts)
    assert "tests.test_rollout_parallel.allowed" in texts[-2] and not any("0x" in text for text in texts)
    same_again = {"temperature": 1, "stop_token_ids": [3, 4], "logit_bias": {4: 1, 3: 2}}
    again = {"temperature": 1.0, "stop_token_ids": (3, 4), "logit_bias": {3: 2.0, 4: 1.0}}
    assert spelled(SamplingParams(**same_again)) == spelled(SamplingParams(**again))


@pytest.mark.parametrize("count", [1, 6])
def test_tokens_do_not_depend_on_how_many_ranks_there_are(ranks, count):
    """Every rank has its share of the work, if there is enough."""
    wanted, found = engine().generate(prompts(count), PARAMS), ranks.run(generated, count, size=4)
    for rollouts, forwards in found:
        same(rollouts, wanted)
        assert count < 4 or forwards
    assert sum(forwards > 0 for _, forwards in found) == min(count, 4)


def test_without_a_process_group():
    with pytest.raises(RuntimeError, match=r"RankPool: torch\.distributed is not initialised"):
        RankPool(engine())
    for name in ("submit", "step", "pause", "resume", "sync_weights"):
        assert callable(getattr(RankPool, name)) and hasattr(RolloutBackend, name)
