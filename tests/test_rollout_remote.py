"""Rollouts from servers, against a stand-in that speaks their HTTP APIs, and from Ray workers."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlfast.rollout import Engine, Request, RolloutBackend, SamplingParams
from rlfast.rollout.generate import GenerateEngine
from rlfast.rollout.ray_pool import RayPool
from rlfast.rollout.remote import ServerError, SGLangServer, VLLMServer
from tests.decoders import decoder, prompts
from tests.rollout_servers import StandIn, engine, serving

KINDS = {"vllm": VLLMServer, "sglang": SGLangServer}
PARAMS = SamplingParams(n=3, temperature=0.8, top_k=40, max_tokens=6, ignore_eos=True, seed=4)


@pytest.fixture
def stand_in():
    return StandIn(engine())


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_gives_the_engines_rollouts(kind, stand_in):
    given = prompts(5)
    wanted = engine().generate(given, PARAMS)
    with serving(stand_in) as url:
        server = KINDS[kind](url)
        found = server.generate(given, PARAMS)
        server.close()
    assert not server.bitwise and [r.tokens for r in found] == [r.tokens for r in wanted]
    assert [(r.request, r.index) for r in found] == [(i, j) for i in range(5) for j in range(3)]
    for got, rollout in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.logp, rollout.logp)
        assert got.logp_raw.isnan().all() and got.entropy.isnan().all() and got.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_server_is_told(kind, stand_in, tmp_path):
    with serving(stand_in) as url:
        server = KINDS[kind](url, weights_dir=tmp_path)
        server.pause("recompute")
        with pytest.raises(RuntimeError, match="the engine is paused"):
            server.generate([[3]], PARAMS)
        server.resume()
        server.sync_weights([("w", torch.arange(3.0))], version=7)
        (rollout,) = server.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))
        server.close()
    paths = [path for path, _ in stand_in.calls]
    wanted = {
        "vllm": ["/pause?mode=keep", "/reset_prefix_cache?reset_running_requests=true"],
        "sglang": ["/pause_generation"],
    }[kind]
    assert paths[: len(wanted)] == wanted and rollout.versions.tolist() == [7, 7]
    from safetensors.torch import load_file

    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "broken, said",
    (
        ("status", "503"),
        ("shape", "gave no rollouts"),
        ("id", r"a token id -5, expected one in \[0, "),
        ("log-prob", "a log-prob nan, expected one ≤ 0"),
        ("infinite", "a log-prob -inf, expected one ≤ 0"),
        ("list", "gave no rollouts"),
        ("fewer", "samples for n = 3"),
        ("reason", "a finish reason 'gibberish', expected one of"),
    ),
)
def test_a_server_that_answers_badly(kind, broken, said):
    """A clear error, and the other requests go on."""
    stand_in = StandIn(engine(), broken)
    with serving(stand_in) as url:
        server = KINDS[kind](url)
        server.submit([Request((3, 4), PARAMS)])
        with pytest.raises(ServerError, match=said):
            server.step()
        stand_in.broken = ""
        assert len(server.generate([[3, 4]], PARAMS)) == 3
        server.close()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_seeds_of_their_own_and_greedy_ones_are_alike(kind, stand_in):
    with serving(stand_in) as url:
        server = KINDS[kind](url)
        drawn = server.generate([[3, 4]], PARAMS)
        greedy = server.generate([[3, 4]], replace(PARAMS, temperature=0.0))
        server.close()
    assert len({tuple(r.tokens) for r in drawn}) == PARAMS.n
    assert len({tuple(r.tokens) for r in greedy}) == 1 and [r.index for r in greedy] == [0, 1, 2]
    if kind == "sglang":
        _, body = stand_in.calls[0]
        assert [p["sampling_seed"] for p in body["sampling_params"]] == [4, 5, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_have_the_version_that_they_were_asked_for_with(kind, stand_in, tmp_path):
    """What was sent before new weights came, and is taken after it, is not of them."""
    with serving(stand_in) as url:
        server = KINDS[kind](url, weights_dir=tmp_path)
        stand_in.go.clear()
        server.submit([Request((3, 4), PARAMS)])
        while not stand_in.calls:
            time.sleep(0.01)
        server.sync_weights([("w", torch.arange(3.0))], version=7)
        stand_in.go.set()
        assert {v for r in server.step() for v in r.versions.tolist()} == {0}
        assert {v for r in server.generate([[3]], PARAMS) for v in r.versions.tolist()} == {7}
        server.close()


def test_weights_are_read_where_a_checkpoint_has_several_files(stand_in, tmp_path):
    """vLLM and SGLang read the files that the index names."""
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(b"")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-00001-of-00001.safetensors"}}))
    with serving(stand_in) as url:
        server = VLLMServer(url, weights_dir=tmp_path)
        server.sync_weights([("w", torch.arange(3.0))], version=1)
        stand_in.broken = "cache"
        with pytest.raises(ServerError, match="the prefix cache was not reset"):
            server.sync_weights([("w", torch.arange(3.0))], version=2)
        server.close()
    assert json.loads(index.read_text())["weight_map"] == {"w": "model.safetensors"} and server.version == 1


def test_sglang_loads_no_weights_under_keys_that_are_kept(stand_in, tmp_path):
    """Its scheduler would end at the cache that cannot be flushed."""
    with serving(stand_in) as url:
        server = SGLangServer(url, weights_dir=tmp_path)
        stand_in.go.clear()
        server.submit([Request((3, 4), PARAMS)])
        server.pause("keep")
        with pytest.raises(RuntimeError, match=r'sync_weights: 1 requests keep .* pause\("recompute"\)'):
            server.sync_weights([("w", torch.arange(3.0))], version=1)
        server.pause("recompute")
        server.sync_weights([("w", torch.arange(3.0))], version=1)
        server.resume()
        stand_in.go.set()
        assert len(server.step()) == PARAMS.n
        server.submit([Request((3, 4), PARAMS)])
        (handle,) = (handle for handle, _ in server.waiting.values())
        handle.result()
        server.pause("keep")
        server.sync_weights([("w", torch.arange(3.0))], version=2)  # it has ended there, though nobody has taken it
        server.resume()
        assert len(server.step()) == PARAMS.n
        server.generate([[3]], replace(PARAMS, priority=5))
        server.close()
    assert stand_in.calls[-1][1]["priority"] == 5 and "priority" not in stand_in.calls[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_is_down(kind):
    server = KINDS[kind]("http://127.0.0.1:9", timeout=5.0)
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:9"):
        server.generate([[3]], PARAMS)
    server.close()


def test_bad_input_is_named(stand_in):
    with serving(stand_in) as url:
        server = VLLMServer(url, vocab=10)
        for said, given, params in (
            ("prompts: expected at least one token each", [[]], None),
            ("prompts: expected token ids in", [[10]], None),
            ("allowed_token_ids: expected ids", [[3]], SamplingParams(allowed_token_ids=lambda tokens: [1])),
            ("logit_bias: expected numbers in", [[3]], SamplingParams(logit_bias={3: -1000.0})),
        ):
            with pytest.raises(ValueError, match=said):
                server.generate(given, params)
        with pytest.raises(RuntimeError, match="weights_dir"):
            server.sync_weights([], 1)
        with pytest.raises(ValueError, match="mode: expected one of"):
            server.pause("stop")
        server.weights_dir = Path("nowhere")
        with pytest.raises(TypeError, match="version: expected an int, got 'a'"):
            server.sync_weights([], "a")
        for wrong in (None, 3, [1], [("w", 2.0)]):
            with pytest.raises(TypeError, match="named_params: expected pairs of a name and a tensor"):
                server.sync_weights(wrong, 1)
        server.close()
    assert not stand_in.calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_server(kind, tmp_path):
    with KINDS[kind]("http://127.0.0.1:9", weights_dir=tmp_path) as server:
        pass
    for wrong in ("3", Request((3,), None)):
        with pytest.raises(TypeError, match=r"(requests|params): expected (Request|SamplingParams)"):
            server._checked(wrong)
    for call in (server.pause, server.resume, server.step, lambda: server.sync_weights([], 1)):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()
    for options in ({"url": None}, {"connections": 0}, {"timeout": -1.0}, {"vocab": 0}):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))}: expected"):
            KINDS[kind](**{"url": "http://127.0.0.1:9"} | options)


def test_every_backend_speaks_the_protocol():
    for kind in (Engine, GenerateEngine, VLLMServer, SGLangServer, RayPool):
        for name in ("submit", "step", "pause", "resume", "sync_weights"):
            assert callable(getattr(kind, name)), f"{kind.__name__}.{name}"
        assert kind.logp_means in ("processed", "tempered") and hasattr(kind, "bitwise")
    assert {"submit", "step", "pause", "resume", "sync_weights"} <= set(vars(RolloutBackend))


def test_ray_workers():
    """Two engines in processes of their own give what one gives here, before and after new weights."""
    import ray

    for options, said in (({"workers": 0}, "workers: expected an int ≥ 1"), ({"make": 3}, "make: expected a function")):
        with pytest.raises((ValueError, TypeError), match=said):
            RayPool(**{"make": engine} | options)
    found = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, runtime_env=found)
    try:
        pool, given = RayPool(engine, workers=2, num_cpus=1), prompts(4)
        same = engine().generate(given, PARAMS)
        assert [r.tokens for r in pool.generate(given, PARAMS)] == [r.tokens for r in same]
        changed = decoder("llama", seed=1)
        pool.sync_weights(changed.named_parameters(), version=3)
        found, wanted = pool.generate(given, PARAMS), Engine(changed, kv_budget=1 << 22).generate(given, PARAMS)
        assert [r.tokens for r in found] == [r.tokens for r in wanted] != [r.tokens for r in same]
        assert set(found[0].versions.tolist()) == {3}
        with pytest.raises(ValueError, match="prompts: expected at least one token each"):
            pool.generate([[]], PARAMS)
        with pytest.raises(TypeError, match="requests: expected a list of Request"):
            pool.submit(Request((3,), PARAMS))
        with pytest.raises(ValueError, match="named_params: expected the worker's model's"):
            pool.sync_weights(list(changed.named_parameters())[1:], version=4)
        with pytest.raises(TypeError, match="named_params: expected pairs"):
            pool.sync_weights(None, version=4)
        pool.pause()
        numbers = pool.submit([Request(tuple(p), PARAMS) for p in given])
        pool.cancel(numbers[0])
        assert [r.finish_reason for r in pool.step(timeout=0.5)] == ["abort"] * PARAMS.n
        pool.resume()
        ended = []
        while pool.under_way:
            ended += pool.step()
        ended = sorted(ended, key=lambda r: (r.request, r.index))
        assert [r.tokens for r in ended] == [r.tokens for r in wanted[PARAMS.n :]] and pool.load == [0, 0]
        pool.close()
    finally:
        ray.shutdown()
