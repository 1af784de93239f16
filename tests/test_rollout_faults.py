"""The rollout engine where things go wrong, come at a bad moment, or from several sides at once."""

from __future__ import annotations

import asyncio
import copy
import inspect
import threading
import time
from dataclasses import replace

import pytest
import torch

from rlfast.rollout import Engine, Request, SamplingParams, ray_pool, remote, responses
from rlfast.rollout.generate import GenerateEngine
from rlfast.rollout.kv import PagePool
from rlfast.rollout.ray_pool import RayPool
from rlfast.rollout.remote import ServerError, VLLMServer
from rlfast.rollout.scheduler import Sample, Scheduler
from tests.decoders import VOCAB, decoder, prompts
from tests.rollout_servers import StandIn, serving
from tests.test_rollout import GREEDY, Words, engine, same

FEW = SamplingParams(max_tokens=3, ignore_eos=True)


def until_empty(one) -> list:
    """All that is under way, to its end."""
    found = []
    while one.under_way or one.later or one.failed:
        found += one.step()
    return found


# Keys and values of older weights


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
    until_empty(one)
    fresh = Engine(copy.deepcopy(model), **options)
    same(one.generate(given, GREEDY), fresh.generate(given, GREEDY))
    assert one.pool.held == 0


# One request, and the others


BAD = {
    "allowed_token_ids: expected ids in [0,": lambda: SamplingParams(allowed_token_ids=(3, VOCAB)),
    "allowed_token_ids: expected token ids, got 'ab'": lambda: SamplingParams(allowed_token_ids="ab"),
    "allowed_token_ids: expected token ids, got (1.5,)": lambda: SamplingParams(allowed_token_ids=(1.5,)),
    "allowed_token_ids: expected token ids, got 3": lambda: SamplingParams(allowed_token_ids=3),
    "allowed_token_ids: expected ids in": lambda: SamplingParams(allowed_token_ids=(-1,)),
    "stop_token_ids, logit_bias: expected ids in [0,": lambda: SamplingParams(logit_bias={VOCAB: 1.0}),
    "logit_bias: expected a dict": lambda: SamplingParams(logit_bias=[3]),
    "temperature: expected 0 (greedy) or a float ≥ 1e-30, got 1e-40": lambda: SamplingParams(temperature=1e-40),
    "top_k: expected an int ≤ 2147483647": lambda: SamplingParams(top_k=2**31),
    "seed: expected an int ≤": lambda: SamplingParams(seed=2**63 - 1, n=2),
}


@pytest.mark.parametrize("said", BAD)
def test_a_bad_parameter_is_named_and_forgotten(said):
    one = engine()
    with pytest.raises((ValueError, TypeError)) as caught:
        one.submit([Request((5,), FEW), Request((3, 4), BAD[said]())])
    assert str(caught.value).startswith(said) and not one.live and not len(one.scheduler)
    same(one.generate([[5]], GREEDY), engine().generate([[5]], GREEDY))


def test_ids_that_end_a_response_are_the_heads():
    """Those of the model that lie beyond it are never drawn; those of the caller are a mistake."""
    with pytest.raises(ValueError, match="eos_token_ids: expected ids in"):
        engine(eos_token_ids=[2, 10**6])
    model = copy.deepcopy(decoder("llama"))
    model.generation_config.eos_token_id = [2, 10**6]
    one = Engine(model, kv_budget=1 << 22)
    assert one.eos == {2} and len(one.generate([[3]], SamplingParams(min_tokens=3, max_tokens=4))[0].tokens) >= 3


@pytest.mark.parametrize("gives", (lambda: 1 / 0, lambda: [VOCAB], lambda: [-1], lambda: "ab", lambda: 3))
def test_a_function_that_fails_ends_its_own_response(gives, caplog):
    """And no other: not of its request, not of its batch."""
    one, calls = engine(), []

    def allowed(tokens):
        calls.append(len(tokens))
        return gives() if len(calls) == 4 else range(VOCAB)

    odd, fine = SamplingParams(n=2, max_tokens=6, ignore_eos=True, allowed_token_ids=allowed), GREEDY
    first, second, other = one.generate([[3, 4], [5]], [odd, fine])
    assert sorted(r.finish_reason for r in (first, second)) == ["error", "length"]
    assert sorted(len(r.tokens) for r in (first, second)) == [1, 6]
    assert "request 0: its allowed_token_ids failed" in caplog.text and "Traceback" in caplog.text
    same([other], engine().generate([[5]], GREEDY))
    assert one.pool.held == 0 and not one.live


def test_a_call_in_inference_mode_is_not_the_last():
    """Its caches are written again outside of it."""
    one = engine()
    with torch.inference_mode():
        first = one.generate([[3, 4]], GREEDY)
    same(one.generate([[3, 4]], GREEDY), first)


def test_an_engine_of_a_subclass_is_one():
    class Mine(Engine):
        """With a word of its own."""

    one = Mine(decoder("llama"), kv_budget=1 << 22)
    assert type(one) is Mine
    same(one.generate([[3, 4]], GREEDY), engine().generate([[3, 4]], GREEDY))
    assert isinstance(Mine(decoder("falcon")), GenerateEngine)


def test_what_has_ended_before_an_error_is_not_lost(monkeypatch):
    """The step's later rows fail once: those that ended among its first come with the next one, and nobody waits."""
    from rlfast.rollout import sampling

    one, draw, calls = engine(kv_budget=1 << 24), sampling.draw, []

    def once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return draw(*args)

    monkeypatch.setattr(sampling, "draw", once)
    short = SamplingParams(max_tokens=1, ignore_eos=True)
    one.submit([Request((3, 4 + i), short) for i in range(70)])
    with pytest.raises(MemoryError):
        one.step()
    assert len(until_empty(one)) == 70 and one.pool.held == 0


def test_generate_takes_its_requests_with_it(monkeypatch):
    """Whatever stops it: they are cancelled, and no later call sees them."""
    one = engine()
    (other,) = one.submit([Request((7, 8), FEW)])
    forward, calls = one.forward, []

    def interrupted(chunks):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(chunks)

    monkeypatch.setattr(one, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.generate([[3], [4]], [SamplingParams(max_tokens=2, ignore_eos=True), GREEDY])
    assert set(one.live) <= {other} and not one.left
    assert [r.request for r in until_empty(one)] == [other] and one.pool.held == 0


def test_a_call_does_not_wait_for_what_others_took():
    one = engine()
    rollouts = one.stream([[3], [4]], FEW)
    next(rollouts)
    until_empty(one)
    with pytest.raises(RuntimeError, match=r"requests \[1\] are not under way"):
        next(rollouts)


def test_what_a_call_does_not_want_is_the_next_steps():
    """A request of one's own ends while a call waits for others: ``step`` hands it out."""
    one = engine()
    (number,) = one.submit([Request((7, 8), FEW)])
    one.generate([[3]], GREEDY)
    assert [r.request for r in one.step()] == [number] and one.step() == []


# The first so many tokens


@pytest.mark.parametrize("family", ("llama", "falcon"))
def test_no_stop_is_among_the_first_tokens(family):
    """``min_tokens`` as transformers and vLLM have it, of ids, the end of sequence and strings."""
    model, (prompt,) = decoder(family), prompts(1, seed=2)
    one = Engine(model, Words(), **({} if family == "falcon" else {"kv_budget": 1 << 22}))
    (free,) = one.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    third = free.tokens[2]
    for count in (0, 1, 2, 3, 5):
        params = {"temperature": 0.0, "max_tokens": 12, "min_tokens": count}
        (ids,) = one.generate([prompt], SamplingParams(**params, stop_token_ids=(third,), ignore_eos=True))
        assert third not in ids.tokens[:count]
        given = torch.tensor([prompt])
        wanted = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=12,
            min_new_tokens=count or None, eos_token_id=[third],
        )  # fmt: skip
        assert ids.tokens == wanted[0, len(prompt) :].tolist()
        (text,) = one.generate([prompt], SamplingParams(**params, stop=f"w{third}", ignore_eos=True))
        ends = [i + 1 for i, t in enumerate(free.tokens) if f"w{third}" in f"w{t}" and i >= count]
        assert len(text.tokens) == min([*ends, 12]) and text.tokens == free.tokens[: len(text.tokens)]
        assert text.finish_reason == ("stop" if ends else "length")
        assert text.text.split() == [f"w{t}" for t in free.tokens[: ends[0] - 1 if ends else 12]]


@pytest.mark.parametrize("family", ("llama", "falcon"))
def test_the_text_of_tokens_is_the_rollouts(family):
    """Without its stop string, of which no part has been shown, and without special tokens."""

    class Spelled(Words):
        def decode(self, tokens, skip_special_tokens=False):
            return "".join(f"<{t}>" for t in tokens if not (skip_special_tokens and t == special))

    model, (prompt,) = decoder(family), prompts(1, seed=2)
    one = Engine(model, Spelled(), **({} if family == "falcon" else {"kv_budget": 1 << 22}))
    special = None
    (free,) = one.generate([prompt], GREEDY)
    special = free.tokens[1]
    for stop in ((), f"<{free.tokens[4]}><{free.tokens[5]}>", (f"{free.tokens[3]}><x", f"><{free.tokens[6]}")):
        params = replace(GREEDY, stop=stop)
        (whole,) = one.generate([prompt], params)
        shown = list(one.tokens(prompt, params))
        assert [t for t, _ in shown] == whole.tokens and "".join(text for _, text in shown) == whole.text
        assert f"<{special}>" not in whole.text and len(whole.text) > 4
        assert family == "falcon" or len([text for _, text in shown if text]) > 2  # as they come


class Bytes:
    """A tokenizer of which every id is a byte."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("stop", ("🙂" * 5, "é🙂" * 20, "end"))
def test_a_stop_of_characters_of_several_tokens(stop):
    """It is found with its last byte, however many tokens it takes."""
    tokens, params = list(f"🙂ab{stop}".encode()), SamplingParams(stop=stop)
    assert (
        responses.certain(tokens[:-1], params, Bytes()) == ("🙂ab", False)
        and responses.certain([240, 159], params, Bytes()) == ("", False)
        and responses.certain(tokens[:6], params, Bytes()) == ("🙂ab", True)
    )
    assert responses.stopped(tokens, params, Bytes()) and not responses.stopped(tokens[:-1], params, Bytes())


def test_an_aborted_response_keeps_no_text_back():
    """What waits, for it may begin the stop string, comes when no token follows."""
    one = Engine(decoder("llama"), Words(), kv_budget=1 << 22)
    (free,) = one.generate([[3]], GREEDY)
    begun = one.tokenizer.decode(free.tokens[:2])
    reader, got = one._token_by_token([3], replace(GREEDY, stop=f"{begun} no token")), []
    for token in reader:
        if token is not None:
            got.append(token)
        elif any(len(samples[0].tokens) == 2 for samples in one.live.values()):
            assert not got
            one.pause("abort")
            one.resume()
        else:
            one.step()
    assert [t for t, _ in got] == free.tokens[:2] and "".join(text for _, text in got) == begun


# Several callers


def test_two_streams_are_two():
    """Each has its own rollouts; what both have left, and only that, is gone on with."""
    one, (a, b) = engine(), prompts(2, seed=3)
    first, second = one.stream([a] * 3, FEW), one.stream([b] * 3, FEW)
    got = [next(first)]
    assert [r.prompt_tokens for r in second] == [b] * 3
    assert list(one.stream(None)) == []  # the first is still asked
    got += list(first)
    assert [r.prompt_tokens for r in got] == [a] * 3
    for prompt in (a, b):
        for _ in one.stream([prompt] * 2, FEW):
            break
    assert sorted(r.prompt_tokens for r in one.stream(None)) == sorted([a, b])
    assert not one.left and not one.later and one.pool.held == 0


def test_two_threads_and_two_tasks():
    """Steps of several callers come one after the other, and each has what it asked for."""
    given = prompts(2, seed=3)
    wanted = [engine().generate([p] * 4, GREEDY) for p in given]
    one, inside, met = engine(), [], []
    forward = one.forward

    def slow(chunks):
        met.extend(inside)
        inside.append(1)
        time.sleep(0.002)
        found = forward(chunks)
        inside.pop()
        return found

    one.forward = slow

    async def eat(prompt):
        return [r async for r in one.astream([prompt] * 4, GREEDY)]

    async def all_of_them():
        return await asyncio.wait_for(asyncio.gather(*map(eat, given)), 60)

    for found, right in zip(asyncio.run(all_of_them()), wanted, strict=True):
        same(sorted(found, key=lambda r: r.request), right)
    found = {}
    threads = [
        threading.Thread(target=lambda i=i, p=p: found.update({i: one.generate([p] * 4, GREEDY)}))
        for i, p in enumerate(given)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i, right in enumerate(wanted):
        same(found[i], right)
    assert not met and not any("forward" in m.__dict__ for m in one.decoder.modules) and one.pool.held == 0


def test_a_task_that_is_cancelled_leaves_its_requests():
    one = engine()

    async def impatient():
        async for _ in one.astream([[3]] * 2, GREEDY):
            pass

    async def main():
        task = asyncio.ensure_future(impatient())
        while not one.forwards:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert len(list(one.stream(None))) == 2


def test_tokens_of_one_response():
    """Of several none is taken; a reader who goes away takes the request along; a paused engine says so."""
    one = engine()
    with pytest.raises(ValueError, match="n: expected 1"):
        next(one.tokens([3], SamplingParams(n=2)))
    assert not one.live
    for _ in one.tokens([3], GREEDY):
        break
    assert not one.live and not one.later and one.pool.held == 0
    (whole,) = one.generate([[3]], GREEDY)
    reader = one.tokens([3], GREEDY)
    got = [next(reader)[0]]
    one.pause()
    with pytest.raises(RuntimeError, match="the engine is paused"):
        got += [token for token, _ in reader]
    one.resume()
    assert got == whole.tokens[: len(got)] and not one.live and not one.later
    assert [t for t, _ in one.tokens([3], GREEDY)] == whole.tokens


@pytest.mark.parametrize("call", ("generate", "stream", "tokens"))
def test_a_paused_engine_takes_no_request(call):
    one = engine()
    one.pause()
    with pytest.raises(RuntimeError, match="the engine is paused"):
        list(getattr(one, call)([3] if call == "tokens" else [[3]]))
    assert not one.live


# The schedule


def test_a_step_of_many_looks_at_each_once(monkeypatch):
    """What a step asks of each sample does not grow with their number, and one refusal is the last."""
    one = Scheduler(PagePool(10**4, 16), 10**6, 256)
    for i in range(256):
        one.add([Sample(i, 0, tuple(range(64)), SamplingParams())])
    for chunk in one.pick():
        chunk.sample.computed = 64
        chunk.sample.tokens.append(1)
    copied = []
    of = Sample.__getitem__
    monkeypatch.setattr(Sample, "__getitem__", lambda s, some: copied.append(some) or of(s, some))
    chunks = one.pick()
    assert len(chunks) == 256 and not copied
    assert [list(c.tokens[c.start : c.stop]) for c in chunks] == [[1]] * 256
    large, small = Scheduler(PagePool(8, 16), 10**6, 256), []
    large.add([Sample(0, 0, tuple(range(100)), SamplingParams())])
    assert len(large.pick()) == 1
    large.add([Sample(1, 0, tuple(range(200, 264)), SamplingParams(priority=1))])
    for i in range(2, 100):
        small.append(Sample(i, 0, (i,), SamplingParams()))
        large.add(small[-1:])
    tried, admit = [], large._admit
    monkeypatch.setattr(large, "_admit", lambda s: tried.append(s.request) or admit(s))
    large.running[0].computed = 100
    large.running[0].tokens.append(1)
    large.pick()
    assert tried == [1] and not any(s.running for s in small)  # none starves what has the priority


# Servers and workers


def test_a_log_prob_that_is_none_fails_its_request_alone():
    stand_in = StandIn(engine())
    answer = stand_in.completions

    def odd(body):
        found = answer(body)
        if body["prompt"] == [3, 4]:
            found["choices"][0]["logprobs"]["token_logprobs"][0] = None
        return found

    stand_in.completions = odd
    with serving(stand_in) as url:
        server = VLLMServer(url, connections=1)
        with pytest.raises(ServerError, match=r"request 1: .* gave no rollouts: TypeError.*token_logprobs"):
            server.generate([[5], [3, 4], [6]], FEW)
        assert [r.prompt_tokens for r in server.stream(None)] == [[5], [6]]  # that was there, and that was to come
        server.submit([Request((3, 4), FEW), Request((5,), FEW)])
        found, errors = [], 0
        while server.under_way or server.later or server.failed:
            try:
                found += server.step()
            except ServerError:
                errors += 1
        assert errors == 1 and [r.prompt_tokens for r in found] == [[5]]
        server.close()
        with pytest.raises(RuntimeError, match="the engine is closed"):
            server.submit([Request((3, 4), FEW)])
        with pytest.raises(RuntimeError, match="the engine is closed"):
            server.step()


def test_a_request_to_a_server_is_cancelled():
    stand_in = StandIn(engine())
    with serving(stand_in) as url:
        server = VLLMServer(url, connections=1)
        numbers = server.submit([Request((3, 4), FEW), Request((5,), SamplingParams(n=2))])
        server.cancel(numbers[1])
        found = until_empty(server)
        server.close()
    assert sorted((r.request, r.finish_reason) for r in found) == [(0, "length"), (1, "abort"), (1, "abort")]


class Pool(RayPool):
    """One whose workers are here, in an event loop of a thread."""

    class Ray:
        """What it asks of Ray."""

        def __init__(self, loop):
            self.loop, self.exceptions = loop, self

        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                self.cause = cause

        class ActorDiedError(RayError):
            pass

        def get(self, handle):
            try:
                return handle.result(60)
            except self.ActorDiedError:
                raise
            except Exception as error:
                raise self.RayTaskError(error) from None

        def put(self, x):
            return x

        def wait(self, handles, timeout=None):
            from concurrent.futures import FIRST_COMPLETED, wait

            return [list(x) for x in wait(handles, timeout, FIRST_COMPLETED)]

        def cancel(self, handle):
            handle.cancel()

    class Actor:
        """Whose methods have a ``remote``; after ``die`` nothing that it was or is asked has an answer."""

        def __init__(self, worker, loop):
            self.loop, self.dead, self.asked, self.tasks = loop, False, 0, []
            for name, method in inspect.getmembers(worker, inspect.iscoroutinefunction):
                call = lambda *args, m=method: asyncio.run_coroutine_threadsafe(self.answer(m, args), loop)  # noqa: E731
                setattr(self, name, type("Method", (), {"remote": staticmethod(call)}))

        async def answer(self, method, args):
            self.asked += 1
            if self.dead:
                raise Pool.Ray.ActorDiedError("the actor is dead")
            self.tasks.append(asyncio.ensure_future(method(*args)))
            try:
                return await self.tasks[-1]
            except asyncio.CancelledError:
                if self.dead:
                    raise Pool.Ray.ActorDiedError("the actor has died") from None
                raise

        def die(self):
            self.dead = True
            for task in self.tasks:
                self.loop.call_soon_threadsafe(task.cancel)

    def __init__(self, make, workers=1):
        remote.Remote.__init__(self)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.ray, self.engines = self.Ray(self.loop), [ray_pool._Worker(make) for _ in range(workers)]
        self.workers, self.load = [self.Actor(x, self.loop) for x in self.engines], [0] * workers
        self.worker, self.place, self.dead = self.engines[0], {}, {}

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)


def test_requests_share_the_steps_of_a_worker():
    """They are batched; what is wrong raises at once; a pause holds them; an abort ends them; a cancel is one's own."""
    pool, given = Pool(engine), prompts(6)
    wanted = engine().generate(given, GREEDY)
    same(pool.generate(given, GREEDY), wanted)
    assert pool.worker.engine.forwards < 2 * 12 and pool.load == [0]
    with pytest.raises(ValueError, match="prompts: expected token ids in"):
        pool.submit([Request((3,), FEW), Request((VOCAB,), FEW)])
    assert not pool.waiting and pool.load == [0]
    pool.pause()
    numbers = pool.submit([Request(tuple(p), GREEDY) for p in given])
    assert pool.step(timeout=0.2) == []
    pool.cancel(numbers[0])
    assert [r.finish_reason for r in pool.step()] == ["abort"]
    for _ in range(100):
        time.sleep(0.02 * (len(pool.worker.engine.live) > 5))
    assert len(pool.worker.engine.live) == 5
    pool.resume()
    same(sorted(until_empty(pool), key=lambda r: r.request), wanted[1:])
    pool.submit([Request(tuple(p), GREEDY) for p in given])
    pool.pause("abort")
    assert [r.finish_reason for r in until_empty(pool)] == ["abort"] * 6
    pool.resume()
    assert pool.worker.engine.pool.held == 0 and not pool.worker.engine.later and pool.load == [0]
    pool.worker.engine.forward = lambda chunks: 1 / 0
    with pytest.raises(ServerError, match=r"request .*: its worker failed"):
        pool.generate([[3]], FEW)
    assert not pool.left and not pool.waiting and not pool.worker.engine.live
    pool.close()


# A model that generates by itself


def test_the_fallback_draws_as_its_parameters_say():
    """What else a checkpoint's generation config says is not asked, and is there afterwards; so with PEFT."""
    peft = pytest.importorskip("peft", reason="the peft package is missing")
    greedy = replace(GREEDY, ignore_eos=True, max_tokens=12)
    (wanted,) = Engine(decoder("llama")).generate([[3, 4, 5]], greedy)
    model = copy.deepcopy(decoder("llama"))
    config = model.generation_config
    config.update(
        num_beams=3, no_repeat_ngram_size=1, typical_p=0.3, suppress_tokens=wanted.tokens[:4], top_k=3,
        eos_token_id=wanted.tokens[2], min_length=30, do_sample=True, repetition_penalty=2.0,
    )  # fmt: skip
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    for one in (GenerateEngine(model), GenerateEngine(lora)):
        assert one.generate([[3, 4, 5]], greedy)[0].tokens == wanted.tokens and model.generation_config is config
    config.suppress_tokens = None
    (drawn,) = one.generate([[3, 4, 5]], replace(FEW, temperature=9.0, ignore_eos=True, max_tokens=20))
    assert (drawn.kept > 1 - 1e-5).all()


def test_the_fallback_draws_two_prompts_with_one_seed_by_two_noises():
    """At a high temperature the noise alone decides."""
    params = SamplingParams(temperature=1e6, max_tokens=6, seed=3, ignore_eos=True)
    one, two = GenerateEngine(decoder("llama")).generate([[3], [4]], params)
    assert not {(i, t) for i, t in enumerate(one.tokens)} & {(i, t) for i, t in enumerate(two.tokens)}


@pytest.mark.parametrize("kind", (Engine, GenerateEngine))
def test_ends_that_min_tokens_keeps_away_have_no_mass(kind):
    """logp and kept are of the distribution without them, until they may come."""
    params = SamplingParams(
        n=4, temperature=0.7, top_k=40, min_tokens=3, max_tokens=5, stop_token_ids=tuple(range(50)), ignore_eos=True
    )
    with kind(decoder("llama")) as one:
        for rollout in one.generate(prompts(2), params):
            ids, before = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]]), len(rollout.prompt_tokens)
            with torch.no_grad():
                logits = decoder("llama")(ids).logits[0, before - 1 : -1].double() / 0.7
            logits[:3, :50] = -torch.inf
            top = logits.topk(40).indices
            kept = logits.softmax(-1).gather(1, top).sum(1)
            logp = logits.log_softmax(-1).gather(1, ids[0, before:, None])[:, 0] - kept.log()
            torch.testing.assert_close(rollout.kept.double(), kept, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rollout.logp.double(), logp, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        one.generate([[3]])


@pytest.mark.parametrize("kind", (Engine, GenerateEngine))
def test_sequences_are_a_list(kind):
    one = kind(decoder("llama"))
    for wrong in (None, "abc", 3):
        with pytest.raises(TypeError, match="sequences: expected a list of lists of token ids, got"):
            one.score(wrong)
    (a,), (b,) = one.score([[3, 4]]), one.score(torch.tensor([[3, 4]]))
    assert torch.equal(a.logp_raw, b.logp_raw)


@pytest.mark.parametrize("kind", (Engine, GenerateEngine))
def test_a_version_is_a_number(kind):
    one = kind(decoder("llama"))
    for wrong in ("a", None, True, 1.0):
        with pytest.raises(TypeError, match="version: expected an int"):
            one.sync_weights(None, wrong)
    with pytest.raises(ValueError, match="version: expected an int ≥ 0"):
        one.sync_weights(None, -1)
    assert one.version == 0 and one.generate([[3]], FEW)[0].versions.tolist()[0] == 0


def test_what_the_fallback_has():
    """All that an engine has, or why not."""
    model, tokens = decoder("falcon"), Words()
    one, (prompt, other) = Engine(model, tokens, page_size=4), prompts(2, seed=5)
    assert isinstance(one, GenerateEngine)
    names = {name for name in vars(Engine) if not name.startswith("_")} - {"forward", "step"}
    assert not {name for name in names if not hasattr(one, name)}
    options = set(inspect.signature(Engine.__init__).parameters)
    assert options <= set(inspect.signature(GenerateEngine.__init__).parameters)
    with pytest.raises(TypeError, match="page_syze"):
        Engine(model, page_syze=4)
    with pytest.raises(ValueError, match="at most 255 tokens"):
        one.generate([[3] * 300])
    with pytest.raises(ValueError, match="at most 256 tokens"):
        one.score([[3] * 300])
    (full,) = one.generate([[3] * 250], SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(full.tokens) == 6 and full.finish_reason == "length"
    (found,) = one.choose([prompt], [["w5", "w5 w9", [77, 3]]])
    for value, candidate in zip(found, ([5], [5, 9], [77, 3]), strict=True):
        (score,) = one.score([[*prompt, *candidate]])
        torch.testing.assert_close(value, score.logp_raw[-len(candidate) :].sum())
    for kind in (one, engine()):
        with pytest.raises(ValueError, match="candidates: expected lists of one candidate at least"):
            kind.choose([[3]], [[]])
    (whole,) = one.generate([other], GREEDY)
    assert [t for t, _ in one.tokens(other, GREEDY)] == whole.tokens
    (number,) = one.submit([Request(tuple(other), SamplingParams(n=2))])
    assert [(r.request, r.finish_reason, r.tokens) for r in one.partial()] == [(number, "paused", [])] * 2
    one.cancel(number)
    assert [r.finish_reason for r in one.step()] == ["abort"] * 2
    with pytest.raises(NotImplementedError, match=r"training_mode: .*FalconForCausalLM"):
        one.training_mode()
    for name, value in (("presence_penalty", 1.0), ("allowed_token_ids", ())):
        with pytest.raises(ValueError, match=name):
            one.generate([[3]], SamplingParams(**{name: value}))


def test_the_fallback_sees_new_weights():
    model = copy.deepcopy(decoder("falcon"))
    one, versions = Engine(model), []
    for change in (1.0, 1.07):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(change)
        versions += [set(r.versions.tolist()) for r in one.generate([[3, 4]], GREEDY)]
    assert versions == [{1}, {2}]
    with pytest.raises(ValueError, match="page_size: expected an int ≥ 1, got 0"):
        Engine(model, page_size=0)


def test_the_fallback_has_no_dropout():
    model = copy.deepcopy(decoder("codegen"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    one = Engine(model)
    (wanted,), (score,) = one.generate([[3, 4]], GREEDY), one.score([[3, 4, 5]])
    model.train()
    same(one.generate([[3, 4]], GREEDY), [wanted])
    assert torch.equal(one.score([[3, 4, 5]])[0].logp_raw, score.logp_raw)
    assert all(m.training for m in model.modules())


def test_a_worker_that_has_died_is_asked_no_more():
    """What it had under way fails, each request by itself; the others go on, and what comes later goes to them."""
    pool, given = Pool(lambda: Engine(copy.deepcopy(decoder("llama")), kv_budget=1 << 22), workers=3), prompts(6)
    wanted = engine().generate(given, GREEDY)
    same(pool.generate(given, GREEDY), wanted)
    pool.pause()
    numbers = pool.submit([Request(tuple(p), GREEDY) for p in given])
    pool.workers[0].die()
    pool.resume()
    assert pool.dead.keys() == {0}, "resume() asks every worker"
    found, failed = [], 0
    while pool.under_way or pool.later or pool.failed:
        try:
            found += pool.step()
        except ServerError as error:
            failed += "its worker, number 0, has died" in str(error)
    assert failed == 2 and sorted(r.request for r in found) == [n for i, n in enumerate(numbers) if i % 3]
    asked = pool.workers[0].asked
    same(pool.generate(given, GREEDY), wanted)
    pool.sync_weights(decoder("llama", seed=1).named_parameters(), version=2)
    new = Engine(decoder("llama", seed=1), kv_budget=1 << 22).generate(given, GREEDY)
    same(pool.generate(given, GREEDY), new)
    assert pool.workers[0].asked == asked and pool.load == [0, 0, 0]
    pool.workers[1].die()  # found out when it is asked for its check, before a request is taken
    same(pool.generate(given, GREEDY), new)
    assert pool.dead.keys() == {0, 1} and pool.bitwise
    pool.workers[2].die()
    for _ in range(2):
        with pytest.raises(ServerError, match=r"all 3 workers have died: the actor (is dead|has died)"):
            pool.generate(given, GREEDY)
    assert not pool.waiting
