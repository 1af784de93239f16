"""The rollout engine: whole generations, their bits, requests that come and go, bad input."""

from __future__ import annotations

import asyncio
import copy

import pytest
import torch

import rlfast
from rlfast.rollout import Engine, Request, SamplingParams, pack
from rlfast.rollout.generate import GenerateEngine
from tests.decoders import FAMILIES, UNREACHED, VOCAB, decoder, prompts
from tests.numerics import assert_same_bits

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.9, top_k=60, max_tokens=10, ignore_eos=True, seed=7)
DTYPES = (torch.float32, torch.bfloat16)


def engine(family: str = "llama", dtype=torch.float32, **options) -> Engine:
    """An engine on a tiny model."""
    return Engine(decoder(family, dtype), **{"kv_budget": 1 << 22} | options)


def same(got, wanted) -> None:
    """Rollouts with the same tokens and the same bits."""
    assert [r.tokens for r in got] == [r.tokens for r in wanted]
    for one, other in zip(got, wanted, strict=True):
        for name in ("logp_raw", "logp", "kept", "entropy"):
            assert_same_bits(name, getattr(one, name), getattr(other, name))


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """What the model's own generate() says."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
        eos_token_id=None,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", (*FAMILIES, *UNREACHED))
def test_greedy_tokens_are_those_of_generate(family, caplog):
    """Or differ first where the two largest logits are within 1e-4; families that are not reached say so."""
    one, given = engine(family), prompts(3)
    assert isinstance(one, GenerateEngine) == (family in UNREACHED)
    if family in UNREACHED:
        assert "generates by its own generate()" in caplog.text and one.reason
    model = decoder(family)
    for prompt, rollout in zip(given, one.generate(given, GREEDY), strict=True):
        wanted = greedy(model, prompt, 12)
        if rollout.tokens == wanted:
            continue
        first = next(i for i, (a, b) in enumerate(zip(rollout.tokens, wanted, strict=True)) if a != b)
        ids = torch.tensor([[*prompt, *wanted[:first]]])
        top = model(input_ids=ids).logits[0, -1].topk(2).values
        assert top[0] - top[1] < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("params", (GREEDY, SAMPLED), ids=("greedy", "sampled"))
def test_a_request_does_not_depend_on_its_batch(dtype, params):
    """Alone and with 63 others, with pages of any size, prompts in chunks, few rows at once: the same bits."""
    given = prompts(64, longest=50)
    whole = engine(dtype=dtype).generate(given, params)
    few = engine(dtype=dtype)
    for at in (0, 17, 63):
        same(few.generate([given[at]], params), [whole[at]])
    for options in ({"page_size": 1}, {"page_size": 64}, {"token_budget": 7}, {"max_batch": 3}, {"kv_budget": 3 << 15}):
        same(engine(dtype=dtype, **options).generate(given, params), whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_have_the_bits_of_rollouts(dtype):
    one = engine(dtype=dtype)
    assert one.bitwise
    rollouts = one.generate(prompts(9), SamplingParams(n=3, max_tokens=10, ignore_eos=True))
    for several in (rollouts, rollouts[4:5]):
        scores = one.score([[*r.prompt_tokens, *r.tokens] for r in several])
        for rollout, score in zip(several, scores, strict=True):
            n = len(rollout.tokens)
            assert_same_bits("logp_raw", score.logp_raw[-n:], rollout.logp_raw)
            assert_same_bits("entropy", score.entropy[-n:], rollout.entropy)


def test_without_the_mode_the_bits_differ(monkeypatch):
    """The control: with torch's own linears a score has not the rollout's bits."""
    from rlfast.rollout import linears

    monkeypatch.setattr(linears, "swappable", lambda module: False)
    one = engine(dtype=torch.float32)
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    rollouts = [one.generate([prompt], params)[0] for prompt in prompts(6)]  # MKL takes one row otherwise
    scores = one.score([[*r.prompt_tokens, *r.tokens] for r in rollouts])
    assert not one.bitwise
    pairs = [(s.logp_raw[-len(r.tokens) :], r.logp_raw) for r, s in zip(rollouts, scores, strict=True)]
    assert not all(torch.equal(*pair) for pair in pairs)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_are_those_of_the_hidden_state(dtype):
    """Within 1e-5 of float64 from the engine's own last hidden state and the head's weight."""
    from rlfast.rollout import attention

    one = engine(dtype=dtype)
    rollouts = one.generate(prompts(4), SamplingParams(temperature=0.7, top_k=20, max_tokens=6, ignore_eos=True))
    weight = one.decoder.head.module.weight.double()
    for rollout in rollouts:
        ids = torch.tensor([*rollout.prompt_tokens, *rollout.tokens])
        ends = torch.tensor([0, len(ids)], dtype=torch.int32)
        with one.decoder.installed():
            hidden = one.decoder.forward(ids, torch.arange(len(ids)), attention.Packed(ends))
        logits = hidden[len(rollout.prompt_tokens) - 1 : -1].double() @ weight.T
        tokens = torch.tensor(rollout.tokens).unsqueeze(1)
        raw = logits.log_softmax(-1)
        tempered = (logits / 0.7).softmax(-1)
        top = tempered.topk(20, -1).values
        wanted = {
            "logp_raw": raw.gather(1, tokens)[:, 0], "entropy": -(raw.exp() * raw).sum(-1), "kept": top.sum(-1),
            "logp": (tempered.gather(1, tokens)[:, 0] / top.sum(-1)).log(),
        }  # fmt: skip
        for name, x in wanted.items():
            torch.testing.assert_close(getattr(rollout, name).double(), x, rtol=1e-5, atol=1e-5)


def test_log_probs_are_those_of_the_model():
    """In float32 within 1e-3 of ``model(ids).logits``."""
    rollouts = engine("qwen3").generate(prompts(4), SamplingParams(max_tokens=8, ignore_eos=True))
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
        logits = decoder("qwen3")(input_ids=ids).logits[0, len(rollout.prompt_tokens) - 1 : -1]
        wanted = rlfast.token_logps(logits, torch.tensor(rollout.tokens)).logp
        torch.testing.assert_close(rollout.logp_raw, wanted, rtol=0, atol=1e-3)


def test_a_seed_is_a_sample():
    """The same tokens alone, in a group and in another order; other ones for another seed or another prompt."""
    one, (a, b) = engine(), prompts(2, seed=3)
    group = one.generate([a], SamplingParams(n=4, seed=5, max_tokens=8, ignore_eos=True))
    for index in (0, 3):
        alone = one.generate([b, a], SamplingParams(seed=5 + index, max_tokens=8, ignore_eos=True))
        same(alone[1:], [group[index]])
    assert len({tuple(r.tokens) for r in group}) == 4


def test_samples_of_a_prompt_share_its_prefill():
    """Its tokens are computed once, and so are those of a prompt that comes again."""
    (prompt,), one = prompts(1, seed=1, longest=60), engine(page_size=4)
    one.generate([prompt], SamplingParams(n=8, max_tokens=1, ignore_eos=True))
    assert one.forwards == 1 and one.pool.held == 0
    before = []
    forward = one.forward
    one.forward = lambda chunks: before.append([c.stop - c.start for c in chunks]) or forward(chunks)
    one.generate([prompt], SamplingParams(max_tokens=1))
    assert before == [[(len(prompt) - 1) % 4 + 1]]


@pytest.mark.parametrize("fused", (False, True))
def test_an_optimizer_step_is_a_new_policy(fused):
    """A fused kernel changes parameters without counting it. Pages of the prompt are there to be found."""
    model = copy.deepcopy(decoder("llama"))
    one, (prompt,) = Engine(model, kv_budget=1 << 22, page_size=4), prompts(1, seed=1, longest=60)
    optimizer, other = (torch.optim.AdamW(m.parameters(), lr=0.1, fused=fused) for m in (model, torch.nn.Linear(2, 2)))
    one.generate([prompt], GREEDY)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    other.param_groups[0]["params"][0].grad = torch.ones(2, 2)
    other.step()
    assert one.generate([prompt], GREEDY)[0].versions.max() == 0
    optimizer.step()
    (again,) = one.generate([prompt], GREEDY)
    same([again], Engine(copy.deepcopy(model), kv_budget=1 << 22).generate([prompt], GREEDY))
    assert set(again.versions.tolist()) == {1}
    (score,) = one.score([[*again.prompt_tokens, *again.tokens]])
    assert_same_bits("logp", again.logp_raw, score.logp_raw[len(prompt) - 1 :])


def test_an_update_in_place_is_a_new_policy():
    """The next generation is a fresh engine's, and says so; what was under way is computed again."""
    model = copy.deepcopy(decoder("llama"))
    one, given = Engine(model, kv_budget=1 << 22), prompts(3)
    first = one.generate(given, GREEDY)
    one.submit([Request(tuple(given[0]), GREEDY)])
    for _ in range(4):
        one.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.07)
    ended = []
    while not ended:
        ended = one.step()
    assert ended[0].versions.tolist() == [0] * 4 + [1] * 8
    again = one.generate(given, GREEDY)
    same(again, Engine(copy.deepcopy(model), kv_budget=1 << 22).generate(given, GREEDY))
    assert [r.tokens for r in again] != [r.tokens for r in first]
    assert set(first[0].versions.tolist()) == {0} and set(again[0].versions.tolist()) == {1}


@pytest.mark.parametrize("mode", ("keep", "recompute", "abort"))
def test_pause_and_resume(mode):
    one, given = engine(), prompts(5)
    whole = engine().generate(given, SAMPLED)
    numbers = one.submit([Request(tuple(p), SAMPLED) for p in given])
    for _ in range(4):
        one.step()
    one.pause(mode)
    held = one.pool.held
    assert (held > 0) == (mode == "keep")
    partial = one.partial()
    assert all(r.finish_reason == "paused" for r in partial) and len(partial) == (0 if mode == "abort" else 5)
    ended = one.step()
    assert [r.finish_reason for r in ended] == (["abort"] * 5 if mode == "abort" else [])
    for rollout in ended or partial:
        assert rollout.tokens == whole[rollout.request].tokens[:4]
    one.resume()
    if mode != "abort":
        found = []
        while len(found) < len(numbers):
            found += one.step()
        same(sorted(found, key=lambda r: r.request), whole)
    assert one.pool.held == 0


def test_a_stream_may_be_left_and_gone_on_with():
    """Dynamic sampling: enough is enough, and the rest stays where it is."""
    one, given = engine(), prompts(8)
    params = [SamplingParams(temperature=0.0, max_tokens=4 + i, ignore_eos=True) for i in range(8)]
    first = list(one.stream(given, params, until=lambda found: len(found) == 3))
    assert len(first) == 3 and len(one.partial()) + len(one.later) == 5
    rest = list(one.stream(None))
    assert len(rest) == 5 and one.pool.held == 0
    everything = sorted((*first, *rest), key=lambda r: r.request)
    same(everything, [engine().generate([p], q)[0] for p, q in zip(given, params, strict=True)])

    async def gathered():
        return [r async for r in engine().astream(given, params)]

    same(sorted(asyncio.run(gathered()), key=lambda r: r.request), everything)
    tokens = [token for token, _ in engine().tokens(given[0], params[0])]
    assert tokens == everything[0].tokens

    async def both():
        """Two at once: their steps are shared."""
        one = engine()

        async def read(i: int):
            return [token async for token, _ in one.atokens(given[i], params[i])]

        return await asyncio.gather(read(0), read(1))

    assert asyncio.run(both()) == [everything[0].tokens, everything[1].tokens]


def test_priorities_and_cancelling():
    one, given = engine(max_batch=1), prompts(3)
    numbers = one.submit([Request(tuple(p), SamplingParams(max_tokens=3, priority=i)) for i, p in enumerate(given)])
    one.step()
    one.cancel(numbers[1])
    ended = []
    while len(ended) < 3:
        ended += one.step()
    assert [r.request for r in ended if r.finish_reason != "abort"] == [2, 0] and one.pool.held == 0
    assert [r.tokens for r in ended if r.finish_reason == "abort"] == [[]]


def test_a_thousand_requests_leak_no_page():
    """With cancels, pauses and preemptions in a pool that is too small for all of them."""
    rng = torch.Generator().manual_seed(0)

    def upto(n: int) -> int:
        return int(torch.randint(n, (), generator=rng))

    one = engine(kv_budget=14 * 4 * 1024, page_size=4, max_batch=6, token_budget=40)
    given, ended, sent, expected = prompts(1000, seed=9, longest=24), [], 0, 0
    chunk, short = one.scheduler._chunk, []

    def counted(sample, budget):
        before = len(one.scheduler.running)
        found = chunk(sample, budget)
        short.append(before - len(one.scheduler.running))
        return found

    one.scheduler._chunk = counted
    while sent < 1000 or one.live or one.later:
        if sent < 1000 and upto(3):
            batch = given[sent : sent + 1 + upto(4)]
            params = [SamplingParams(n=1 + upto(3), max_tokens=1 + upto(6), seed=sent, priority=upto(3)) for _ in batch]
            one.submit([Request(tuple(p), q) for p, q in zip(batch, params, strict=True)])
            sent, expected = sent + len(batch), expected + sum(p.n for p in params)
        if one.live and not upto(12):
            one.cancel(sorted(one.live)[upto(len(one.live))])
        if not upto(25):
            one.pause(("keep", "recompute", "abort")[upto(8) // 3])
            one.resume()
        ended += one.step()
        counted = [0] * one.pool.pages
        for sample in one.scheduler.running:
            for page in sample.table:
                counted[page] += 1
        assert counted == one.pool.count and one.pool.held == sum(c > 0 for c in counted)
    assert len(ended) == expected and one.pool.held == 0 and one.pool.free == one.pool.pages
    assert sum(short) > 50 and {r.finish_reason for r in ended} == {"abort", "length", "stop"}


def test_the_rows_that_a_choice_has():
    """Each candidate's log-prob is that of the whole text; the prompt is computed once."""
    one, (prompt, *_) = engine(page_size=4), prompts(1, seed=1, longest=60)
    candidates = [[5], [5, 9, 11], [77, 3]]
    (found,) = one.choose([prompt], [candidates])
    for value, candidate in zip(found, candidates, strict=True):
        (score,) = one.score([[*prompt, *candidate]])
        assert_same_bits("choice", value, score.logp_raw[-len(candidate) :].double().sum().float())
    assert one.pool.held == 0


def test_decode_steps_in_buckets(monkeypatch):
    """What a CUDA graph would replay, run again instead: padded to buckets, the same bits."""
    from rlfast.rollout import graphs

    captured, one = [], engine()

    def again(run):
        out = run()
        captured.append(out.shape[0])
        return lambda: out.copy_(run()), out

    monkeypatch.setattr(graphs, "capture", again)
    one.graphs = graphs.Graphs(one.decoder, one.caches)
    given = prompts(11, longest=50)
    params = [SamplingParams(max_tokens=3 + i, ignore_eos=True, seed=i) for i in range(11)]
    same(one.generate(given, params), engine().generate(given, params))
    assert set(captured) >= {1, 2, 4, 8, 12} and len(captured) < 30
    count = len(captured)
    same(one.generate(given, params), engine().generate(given, params))
    assert len(captured) == count  # each was captured once
    assert [graphs.bucket(n) for n in (1, 2, 3, 4, 5, 7, 9, 13, 100)] == [1, 2, 3, 4, 6, 8, 12, 16, 128]
    with pytest.raises(ValueError, match="graphs: expected None or False: the model is on cpu"):
        engine(graphs=True)


def test_packed_rollouts_go_into_a_loss():
    rollouts = engine().generate(prompts(3), SamplingParams(n=2, max_tokens=5))
    packed = pack(rollouts)
    assert packed.cu_seqlens.tolist()[-1] == len(packed.tokens) == len(packed.logp)
    adv = torch.randn(6).repeat_interleave(packed.cu_seqlens.diff())
    logp = packed.logp_raw.clone().requires_grad_()
    rlfast.loss("dapo")(logp, old_logp=packed.logp_raw, adv=adv, cu_seqlens=packed.cu_seqlens).loss.backward()
    assert logp.grad.isfinite().all()
    assert pack([]).tokens.numel() == 0


class Words:
    """A tokenizer of which every id is a word."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(f"w{t}" for t in tokens)


def test_what_ends_a_response():
    one = Engine(decoder("llama"), Words(), kv_budget=1 << 22)
    (prompt,) = prompts(1, seed=2)
    (free,) = one.generate([prompt], GREEDY)
    third = free.tokens[2]
    at = free.tokens.index(third)
    (stopped,) = one.generate([prompt], SamplingParams(temperature=0.0, stop_token_ids=(third,), ignore_eos=True))
    assert stopped.tokens == free.tokens[: at + 1] and stopped.finish_reason == "stop"
    (text,) = one.generate([prompt], SamplingParams(temperature=0.0, stop=f"w{third}", ignore_eos=True, max_tokens=12))
    assert text.finish_reason == "stop" and f"w{third}" not in text.text and text.tokens[-1] == third
    assert len(text.logp) == len(text.tokens)
    late = SamplingParams(temperature=0.0, stop_token_ids=(third,), min_tokens=8, max_tokens=12, ignore_eos=True)
    (rollout,) = one.generate([prompt], late)
    assert third not in rollout.tokens[:8] and len(rollout.tokens) > 8
    (eos,) = Engine(decoder("llama"), eos_token_ids=[third], kv_budget=1 << 22).generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=12)
    )
    assert eos.tokens == free.tokens[: at + 1] and eos.finish_reason == "stop"


def test_what_changes_the_logits():
    one, (prompt,) = engine(), prompts(1, seed=2)
    only = SamplingParams(max_tokens=20, allowed_token_ids=(5, 9, 11), ignore_eos=True)
    assert set(one.generate([prompt], only)[0].tokens) <= {5, 9, 11}
    turns = SamplingParams(max_tokens=6, allowed_token_ids=lambda tokens: [7 + len(tokens)], ignore_eos=True)
    assert one.generate([prompt], turns)[0].tokens == [7, 8, 9, 10, 11, 12]
    biased = SamplingParams(max_tokens=4, logit_bias={33: 1e4}, ignore_eos=True)
    assert one.generate([prompt], biased)[0].tokens == [33] * 4
    for name, value in (("presence_penalty", 1e4), ("frequency_penalty", 1e4)):
        (rollout,) = one.generate([prompt], SamplingParams(max_tokens=30, ignore_eos=True, **{name: value}))
        assert len(set(rollout.tokens)) == 30
    (rollout,) = one.generate([prompt], SamplingParams(temperature=0.0, repetition_penalty=1e6, ignore_eos=True))
    assert len(set(rollout.tokens)) == 64 and not set(rollout.tokens) & set(prompt)


def test_a_request_that_cannot_go_on_harms_no_other(caplog):
    """Nothing is allowed: it ends, and says so. A caller's function that raises ends its own response."""
    one, (a, b) = engine(), prompts(2, seed=4)
    (wanted,) = engine().generate([a], GREEDY)
    stuck, fine = one.generate([b, a], [SamplingParams(allowed_token_ids=()), GREEDY])
    assert stuck.finish_reason == "no token" and stuck.tokens == [] and "no token has a probability" in caplog.text
    same([fine], [wanted])
    calls = []

    def allowed(tokens):
        calls.append(len(tokens))
        if len(calls) == 3:
            raise KeyError("a grammar's own")
        return range(VOCAB)

    one.submit([Request(tuple(b), SamplingParams(max_tokens=5, allowed_token_ids=allowed)), Request(tuple(a), GREEDY)])
    found = []
    while len(found) < 2:
        found += one.step()
    failed, fine = sorted(found, key=lambda r: r.request)
    assert failed.finish_reason == "error" and len(failed.tokens) == 2 and "a grammar's own" in caplog.text
    same([fine], [wanted])
    assert one.pool.held == 0


BAD = {
    "prompts: expected at least one token each, got an empty list": lambda e: e.generate([[]]),
    f"prompts: expected token ids in [0, {VOCAB}), got {VOCAB}": lambda e: e.generate([[3], [VOCAB]]),
    "prompts: expected strings or lists of token ids": lambda e: e.generate([3.5]),
    "prompts: expected a list of strings": lambda e: e.generate("a text"),
    "prompts: expected at most 255 tokens (the model's context), got 300": lambda e: e.generate([[3] * 300]),
    "prompts: expected at most 160 tokens with max_tokens": lambda e: e.generate([[3] * 150]),
    "temperature: expected a float ≥ 0": lambda e: SamplingParams(temperature=-1.0),
    "top_p: expected a float in (0, 1], got 0": lambda e: SamplingParams(top_p=0.0),
    "n: expected an int ≥ 1, got 0": lambda e: SamplingParams(n=0),
    "max_tokens: expected an int ≥ 1": lambda e: SamplingParams(max_tokens=0),
    "min_tokens: expected at most max_tokens, 64, got 65": lambda e: SamplingParams(min_tokens=65),
    "stop: expected strings that are not empty": lambda e: SamplingParams(stop=(3,)),
    "stop: expected no strings, since there is no tokenizer": lambda e: e.generate([[3]], SamplingParams(stop="x")),
    "stop_token_ids, logit_bias: expected ids in [0,": lambda e: e.generate(
        [[3]], SamplingParams(stop_token_ids=(999,))
    ),
    "params: expected 2, one a prompt, got 1": lambda e: e.generate([[3], [4]], [GREEDY]),
    "params: expected SamplingParams": lambda e: e.generate([[3]], {"n": 2}),
    "mode: expected one of 'keep'": lambda e: e.pause("stop"),
    "number: expected a request under way, got 77": lambda e: e.cancel(77),
    "page_size: expected an int ≥ 1": lambda e: engine(page_size=0),
    "kv_budget: expected at least": lambda e: engine(kv_budget=10.0),
    "candidates: expected at least one token each": lambda e: e.choose([[3]], [[[]]]),
    "candidates: expected as many tokens as kv_budget has room for": lambda e: e.choose([[3] * 140], [[[4] * 30]]),
    "sequences: expected at least one token each": lambda e: e.score([[]]),
    "sequences: expected at least two tokens each": lambda e: e.score([[3]]),
    "use_attention: expected one of 'flash-attn'": lambda e: engine(use_attention="xformers"),
    "graphs: expected True, False or None, got 'no'": lambda e: engine(graphs="no"),
    "model: expected a causal language model of transformers, got 3": lambda e: Engine(3),
    "model: expected a causal language model of transformers, got Linear": lambda e: Engine(torch.nn.Linear(2, 2)),
    "prompts: expected a list of strings or of lists of token ids, got 'ab'": lambda e: e.choose("ab", [[[5]], [[6]]]),
    "candidates: expected a list of lists, one a prompt, got 5": lambda e: e.choose([[3]], 5),
    "requests: expected a list of Request, got Request(prompt=(3,)": lambda e: e.submit(Request((3,))),
    "candidates: expected 2 lists, one a prompt, got 1": lambda e: e.choose([[3], [4]], [[[5]]]),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said):
    """And the requests that are under way are unharmed."""
    one = engine(kv_budget=10 * 16 * 1024)
    (number,) = one.submit([Request((5, 6, 7), GREEDY)])
    one.step()
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[said](one)
    assert str(caught.value).startswith(said)
    found = []
    while not found:
        found = one.step()
    assert found[0].request == number and found[0].tokens == engine().generate([[5, 6, 7]], GREEDY)[0].tokens


def test_a_closed_engine_says_so():
    with engine() as one:
        one.generate([[3]], GREEDY)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        one.generate([[3]], GREEDY)


def test_a_paused_engine_does_not_wait_for_ever():
    one = engine()
    one.pause()
    with pytest.raises(RuntimeError, match="the engine is paused"):
        one.generate([[3]], GREEDY)


def test_nothing_of_the_model_is_changed(monkeypatch):
    """Not its attention, not its linears, not its training mode; also after an exception."""
    model = decoder("llama")
    model.train()
    try:
        one = Engine(model, kv_budget=1 << 22)
        before = [dict(m.__dict__) for m in model.modules()]
        configs = [c._attn_implementation for c in one.decoder.configs]
        one.generate([[3]], GREEDY)
        monkeypatch.setattr(one.decoder.body.norm, "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one.generate([[3]], GREEDY)
        monkeypatch.undo()
        assert [set(m.__dict__) for m in model.modules()] == [set(d) for d in before]
        assert all(m.training for m in model.modules())
        assert [c._attn_implementation for c in one.decoder.configs] == configs
    finally:
        model.eval()
