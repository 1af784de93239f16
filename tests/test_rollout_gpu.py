"""The engine on a GPU: CUDA graphs, and the attention of other libraries where they are installed."""

from __future__ import annotations

import copy

import pytest
import torch

from rlfast.rollout import Engine, SamplingParams, flash
from tests.decoders import decoder, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
INSTALLED = [name for name in flash.NAMES if flash.why_not(name) is None]


def on_gpu(family: str, dtype: torch.dtype = torch.float32):
    return copy.deepcopy(decoder(family, dtype)).cuda()


@pytest.mark.parametrize("family", ("llama", "qwen3", "gemma2", "gpt_oss"))
def test_greedy_tokens_are_those_of_generate(family):
    model, given = on_gpu(family), prompts(3)
    for prompt, rollout in zip(given, Engine(model, kv_budget=1 << 24).generate(given, GREEDY), strict=True):
        ids = torch.tensor([prompt], device="cuda")
        wanted = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)[0, len(prompt) :].tolist()
        assert rollout.tokens == wanted


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_graphs_change_nothing(dtype):
    """Batches that grow and shrink go through several buckets; weights that move are captured again."""
    model, given = on_gpu("llama", dtype), prompts(7)
    params = [SamplingParams(max_tokens=4 + 3 * i, seed=i, ignore_eos=True) for i in range(7)]
    for _ in range(2):
        found = [Engine(model, kv_budget=1 << 24, graphs=graphs).generate(given, params) for graphs in (True, False)]
        for one, other in zip(*found, strict=True):
            assert one.tokens == other.tokens
            torch.testing.assert_close(one.logp_raw, other.logp_raw, rtol=0, atol=1e-5)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.05)


def test_an_update_in_place_reaches_a_graph():
    model, given = on_gpu("llama"), prompts(2)
    one = Engine(model, kv_budget=1 << 24, graphs=True)
    one.generate(given, GREEDY)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.07)
    again, fresh = one.generate(given, GREEDY), Engine(model, kv_budget=1 << 24, graphs=True).generate(given, GREEDY)
    assert [r.tokens for r in again] == [r.tokens for r in fresh]


@pytest.mark.parametrize("name", INSTALLED)
def test_a_library_s_attention(name):
    """The real package: greedy tokens of a bfloat16 model, and log-probs near those of rlfast's own kernel."""
    model, given = on_gpu("llama", torch.bfloat16), prompts(4)
    own = Engine(model, kv_budget=1 << 24).generate(given, GREEDY)
    theirs = Engine(model, kv_budget=1 << 24, use_attention=name).generate(given, GREEDY)
    for a, b in zip(own, theirs, strict=True):
        same = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y), len(a.tokens))
        assert same > 0
        torch.testing.assert_close(a.logp_raw[:same], b.logp_raw[:same], rtol=0, atol=0.05)
