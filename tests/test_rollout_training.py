"""The training forward has the rollouts' bits: by itself, and within TRL's GRPO step."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch

import rlfast
from rlfast.integrations import trl as ours
from rlfast.integrations import trl_rollout
from rlfast.rollout import Engine, SamplingParams, attention
from tests.decoders import decoder, prompts
from tests.numerics import assert_same_bits

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from rlfast.compare.tiny import PROMPTS, rewards, tiny, word_tokenizer  # noqa: E402


def padded(rollouts, side: str, pad: int = 0):
    """(ids, mask) of prompts and responses, padded left or right."""
    whole = [[*r.prompt_tokens, *r.tokens] for r in rollouts]
    width = max(map(len, whole))
    ids, mask = torch.full((len(whole), width), pad), torch.zeros(len(whole), width, dtype=torch.bool)
    for row, tokens in enumerate(whole):
        at = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
        ids[row, at], mask[row, at] = torch.tensor(tokens), True
    return ids, mask


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("form", ("left", "right", "packed"))
@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_training_forward_has_the_bits(dtype, form, checkpointing):
    """With gradients on, whatever the layout."""
    model = copy.deepcopy(decoder("llama", dtype)).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = Engine(model, kv_budget=1 << 22)
    rollouts = engine.generate(prompts(5), SamplingParams(n=2, max_tokens=9, ignore_eos=True))
    with engine.training_mode():
        if form == "packed":
            ids = torch.tensor([[t for r in rollouts for t in (*r.prompt_tokens, *r.tokens)]])
            lengths = [len(r.prompt_tokens) + len(r.tokens) for r in rollouts]
            positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
            hidden = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
            rows, targets = hidden[0, :-1], ids[0, 1:]
        else:
            ids, mask = padded(rollouts, form)
            hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            rows, targets = hidden[:, :-1], ids[:, 1:]
        logp = rlfast.linear_token_logps(rows, model.lm_head.weight, targets, batch_invariant=True).logp
        logp.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    at = 0
    for row, rollout in enumerate(rollouts):
        before, n = len(rollout.prompt_tokens), len(rollout.tokens)
        if form == "packed":
            got, at = logp[at + before - 1 : at + before + n - 1], at + before + n
        else:
            first = int(mask[row].float().argmax())
            got = logp[row, first + before - 1 : first + before + n - 1]
        assert_same_bits("logp", got.detach(), rollout.logp_raw)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_model_s_own_head_has_the_bits(dtype):
    """Of ``model(ids).logits``, in float32; outside of the mode they are the model's."""
    model = copy.deepcopy(decoder("llama", dtype)).train()
    engine = Engine(model, kv_budget=1 << 22)
    (rollout,) = engine.generate(prompts(1), SamplingParams(max_tokens=9, ignore_eos=True))
    ids, found = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]]), []
    for context in (engine.training_mode(), torch.enable_grad()):
        with context:
            logits = model(input_ids=ids, use_cache=False).logits
            logp = rlfast.token_logps(logits[0, :-1], ids[0, 1:]).logp[-9:]
            logp.sum().backward()
        found.append((logits.dtype, torch.equal(logp.detach(), rollout.logp_raw)))
    assert found == [(torch.float32, True), (dtype, False)]
    assert model.lm_head.weight.grad.isfinite().all() and "forward" not in vars(model.lm_head)


def test_without_its_attention_the_bits_are_others(monkeypatch):
    """The control of one part alone: the linears and the head are rlfast's still."""
    model = copy.deepcopy(decoder("llama")).train()
    engine = Engine(model, kv_budget=1 << 22)
    (rollout,) = engine.generate(prompts(1, seed=1, longest=60), SamplingParams(max_tokens=40, ignore_eos=True))
    ids, found = torch.tensor([[*rollout.prompt_tokens, *rollout.tokens]]), []
    for off in (False, True):
        if off:
            monkeypatch.setattr(attention, "implementation", lambda *_: contextlib.nullcontext())
        with engine.training_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        found.append(torch.equal(rlfast.token_logps(logits[0, :-1], ids[0, 1:]).logp[-40:].detach(), rollout.logp_raw))
    assert found == [True, False]


POSITIONS = ([[0, 0, 1, 2, 0, 1]], [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]], [[3, 4, 5, 0, 1, 2]], [[0, 1, 2, 3, 4, 5]])


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("batch", (1, 2))
def test_rows_of_packed_sequences_are_those_of_transformers(positions, batch):
    """A sequence begins where positions do not count on, in every row of a batch."""
    model, rng = decoder("llama"), torch.Generator().manual_seed(0)
    given = {
        "input_ids": torch.randint(3, 200, (batch, 6), generator=rng), "position_ids": torch.tensor(positions)[:batch],
        "use_cache": False,
    }  # fmt: skip
    with torch.no_grad():
        wanted = model(**given).logits
        with Engine(model, kv_budget=1 << 22).training_mode():
            torch.testing.assert_close(model(**given).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_is_looked_at_once(monkeypatch):
    """By all layers together; again where its mask has changed, though numpy did it, or is another tensor's."""
    model, looked = copy.deepcopy(decoder("llama")).train(), []
    found = attention._found_layout
    monkeypatch.setattr(attention, "_found_layout", lambda *given: looked.append(given) or found(*given))
    given = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 5, 6, 7]]), "use_cache": False}
    mask = torch.ones(2, 4, dtype=torch.bool)
    with Engine(model, kv_budget=1 << 22).training_mode():
        del looked[:]
        whole = model(**given, attention_mask=mask).logits
        assert len(looked) == 1 < model.config.num_hidden_layers
        mask.numpy()[1, :2] = False
        part = model(**given, attention_mask=mask).logits
        again = model(**given, attention_mask=mask.clone()).logits
    assert len(looked) == 3 and torch.equal(part, again)
    assert torch.equal(part[0], whole[0]) and not torch.equal(part[1, 2:], whole[1, 2:])


def test_a_mask_of_pairs_is_refused():
    """Which of a row's tokens see which is no question that rlfast's attention asks."""
    engine = Engine(decoder("llama"), kv_budget=1 << 22)
    with engine.training_mode(), pytest.raises(ValueError, match=r"attention_mask: expected shape \(B, T\)"):
        engine.decoder.model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 1, 3, 3).bool())


def test_gradients_are_those_of_the_model():
    """Of float32, near those of the model's own attention and linears."""
    model = copy.deepcopy(decoder("qwen3")).train()
    engine = Engine(model, kv_budget=1 << 22)
    ids, mask = padded(engine.generate(prompts(4), SamplingParams(max_tokens=9, ignore_eos=True)), "right")
    found = []
    for mode in (True, False):
        model.zero_grad()
        context = engine.training_mode() if mode else torch.enable_grad()
        with context:
            hidden = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            (hidden[mask] * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        found.append([p.grad.clone() for p in model.base_model.parameters()])
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4 * wanted.abs().max().item())


def test_sinks_are_trained():
    """gpt-oss learns its sinks in training mode too."""
    model = copy.deepcopy(decoder("gpt_oss")).train()
    engine = Engine(model, kv_budget=1 << 22)
    ids = torch.tensor([prompts(1, seed=1)[0]])
    with engine.training_mode():
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
    sinks = [p.grad for name, p in model.named_parameters() if "sinks" in name]
    assert sinks and all(g is not None and g.any() for g in sinks)


def grpo(tmp_path, model=None, **options):
    """A GRPOTrainer on a tiny model, and what its first steps saw: (log-probs, mask, the rollouts')."""
    from datasets import Dataset

    rows = [{"prompt": [{"role": "user", "content": f"{p} " * 6}]} for p in PROMPTS]  # whole pages of them
    args = trl.GRPOConfig(
        str(tmp_path), num_generations=2, max_completion_length=8, per_device_train_batch_size=4, max_steps=2,
        learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1, seed=1,
        **{"bf16": False} | options,
    )  # fmt: skip
    model = tiny("Llama", hidden_size=64, intermediate_size=128, head_dim=32) if model is None else model
    trainer = trl.GRPOTrainer(
        model, rewards, args, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer()
    )
    seen, loss = [], trainer._compute_loss
    logps = trainer._get_per_token_logps_and_entropies
    last = []

    def logged(*args, **kwargs):
        out = logps(*args, **kwargs)
        last[:] = [out[0].detach().clone()]
        return out

    def computed(model, inputs):
        out = loss(model, inputs)
        seen.append((last[0], inputs["completion_mask"].bool(), inputs.get("sampling_per_token_logps")))
        return out

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = logged, computed
    return trainer, seen


@pytest.mark.parametrize("checkpointing", (False, True))
@pytest.mark.parametrize("bf16", (False, True), ids=("float32", "autocast"))
def test_the_first_ratio_of_a_grpo_step_is_one(tmp_path, checkpointing, bf16):
    """torch.equal(logp, rollout_logp) on every token of a completion, at every step: each is the first on its batch.

    TRL's default is bf16: autocast around the forward of a float32 model.
    """
    with rlfast.patch("trl", rollouts=True, bitwise=True) as patch:
        trainer, seen = grpo(tmp_path, gradient_checkpointing=checkpointing, bf16=bf16)
        trainer.train()
        assert "trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn" in patch.replaced
        engine = trl_rollout.engine_of(trainer)
        assert isinstance(engine, Engine) and engine.bitwise
        assert engine.decoder.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert len(seen) == 2
    for logp, mask, rollout_logp in seen:
        assert mask.any() and torch.equal(logp[mask], rollout_logp[mask])
        assert ((logp - rollout_logp)[mask].exp() == 1.0).all()


def test_without_the_mode_the_ratio_is_near_one(tmp_path):
    """The control: the same rollouts, TRL's own training forward."""
    with rlfast.patch("trl", rollouts=True):
        trainer, seen = grpo(tmp_path)
        trainer.train()
    assert not all(torch.equal(logp[mask], theirs[mask]) for logp, mask, theirs in seen)
    for logp, mask, theirs in seen:
        torch.testing.assert_close(logp[mask], theirs[mask], rtol=1e-4, atol=1e-4)


def test_a_rollout_func_groups_equal_prompts(tmp_path, monkeypatch):
    """TRL repeats a prompt; the engine gets it once, with so many samples, and the order is TRL's."""
    from datasets import Dataset

    asked = []
    generate = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, p, params: asked.append([x.n for x in params]) or generate(self, p, params)
    )
    rows = [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]
    args = trl.GRPOConfig(
        str(tmp_path), num_generations=4, max_completion_length=6, per_device_train_batch_size=8, max_steps=1,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        tiny("Llama"), rewards, args, train_dataset=Dataset.from_list(rows), processing_class=word_tokenizer(),
        rollout_func=ours.rollout(temperature=0.5),
    )  # fmt: skip
    trainer.train()
    assert asked == [[4, 4]]
    given = [[{"role": "user", "content": p}] for p in ("no", "no", "big red mat")]
    found = trainer.rollout_func(given, trainer)
    assert found["prompt_ids"][0] == found["prompt_ids"][1] != found["prompt_ids"][2]
    assert [len(x) for x in found["completion_ids"]] == [len(x) for x in found["logprobs"]]


def test_options_of_generate_are_the_engines(tmp_path):
    """``generation_kwargs`` over the trainer's own; what the engine has no word for is refused in a rollout_func."""
    more = {"temperature": 0.2, "max_new_tokens": 3, "top_k": 5, "min_new_tokens": 2, "num_beams": 1}
    trainer, _ = grpo(tmp_path, generation_kwargs=more)
    params = trl_rollout.params_of(trainer)
    assert (params.temperature, params.max_tokens, params.top_k, params.min_tokens) == (0.2, 3, 5, 2)
    found = ours.rollout()([[{"role": "user", "content": "no"}]] * 2, trainer)
    assert all(len(tokens) <= 3 for tokens in found["completion_ids"])
    trainer.generation_kwargs["do_sample"] = False
    assert trl_rollout.params_of(trainer).temperature == 0.0
    trainer.generation_kwargs["typical_p"] = 0.9
    with pytest.raises(ValueError, match=r"generation_kwargs: expected options among .*, got typical_p"):
        ours.rollout()([[{"role": "user", "content": "no"}]], trainer)


def test_the_trainers_ids_end_a_response_of_any_engine(tmp_path):
    """TRL ends at the tokenizer's end of sequence too, of which the model's config may say nothing."""
    trainer, _ = grpo(tmp_path, generation_kwargs={"max_new_tokens": 60})
    engine = Engine(trainer.model, eos_token_ids=[], kv_budget=1 << 22)
    (eos,), given = trainer.eos_token_ids, [[{"role": "user", "content": "no"}]] * 8
    found = ours.rollout(engine, temperature=3.0)(given, trainer)["completion_ids"]
    assert any(eos in tokens for tokens in found) and not any(eos in tokens[:-1] for tokens in found)
    found = ours.rollout(engine, temperature=3.0, ignore_eos=True)(given, trainer)["completion_ids"]
    assert {len(tokens) for tokens in found} == {60}


def test_a_response_ends_where_trl_drops_the_rest(tmp_path):
    """After the trainer's ids, and after those of generation_kwargs."""
    with rlfast.patch("trl", rollouts=True):
        trainer, _ = grpo(tmp_path, generation_kwargs={"max_new_tokens": 100, "eos_token_id": 7, "temperature": 3.0})
        found, _ = trainer._generate_single_turn([[3, 4]] * 16, None, {}, 16)
    ends = {7, *trainer.eos_token_ids}
    assert len(ends) == 2 == len(ends & {tokens[-1] for tokens in found})
    assert not any(ends & {*tokens[:-1]} for tokens in found)


def test_a_server_gives_the_log_probs_that_it_has():
    nan, logp = torch.full((2,), torch.nan), torch.tensor([-1.0, -2.0])
    (rollout,) = Engine(decoder("llama"), kv_budget=1 << 22).generate(prompts(1), SamplingParams(max_tokens=2))
    rollout = rollout._replace(logp_raw=nan, logp=logp, kept=nan)
    for temperature in (1.0, 0.5):
        assert torch.equal(trl_rollout.logp_of(rollout, SamplingParams(temperature=temperature)), logp)


def test_prompts_with_images_are_refused(tmp_path):
    """TRL's function would have given their ids alone."""
    trainer, _ = grpo(tmp_path)
    tokenize = trainer._tokenize_prompts
    trainer._tokenize_prompts = lambda given: (tokenize(given)[0], [["an image"]], {"pixel_values": torch.ones(1)})
    with pytest.raises(ValueError, match=r"prompts: expected text alone: .*, got prompts with images"):
        ours.rollout()([[{"role": "user", "content": "no"}]], trainer)


def test_a_model_that_no_process_has_whole_is_trls(tmp_path, caplog):
    """Of FSDP and ZeRO 3 a process has a part."""
    with rlfast.patch("trl", rollouts=True, bitwise=True):
        trainer, _ = grpo(tmp_path)
        trainer.is_fsdp_enabled = True
        _, logps = trainer._generate_single_turn([[3, 4], [3, 4]], None, {}, 2)
        trainer.is_fsdp_enabled = False
        trainer.train()
        trainer.is_fsdp_enabled = True
        with pytest.raises(ValueError, match="engine: expected one, such as a VLLMServer, got None"):
            trl_rollout._engines.clear()
            ours.rollout()([[{"role": "user", "content": "no"}]], trainer)
    assert logps is None and "parameters are spread over the processes" in caplog.text


def test_prompts_that_find_no_room_are_trls(tmp_path, caplog):
    """Longer than the model's context, or than the memory of keys and values: stock TRL generates after them."""
    with rlfast.patch("trl", rollouts=True):
        trainer, _ = grpo(tmp_path)
        for prompt, budget, said in (
            ([3] * 130, 1 << 22, "prompts: expected at most 127 tokens"),
            ([3] * 100, 4 * Engine(trainer.model).decoder.bytes_of_token * 16, "kv_budget has room for no more"),
        ):
            trl_rollout._engines[trainer] = Engine(trainer.model, kv_budget=budget)
            ids, logps = trainer._generate_single_turn([[3, 4], prompt], None, {}, 1)
            assert logps is None and len(ids) == 2 and said in caplog.text
            assert trainer._generate_single_turn([[3, 4], [5]], None, {}, 1)[1] is not None


def test_no_two_samples_of_a_prompt_are_one():
    """Also where its neighbours come in several groups: a sample's seed counts all before it."""
    engine = Engine(decoder("llama"), kv_budget=1 << 22)
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    a, b = prompts(2, seed=3)
    tokens, _ = trl_rollout.generated(engine, [a, a, b, a, a, a], params)
    assert len({tuple(x) for i, x in enumerate(tokens) if i != 2}) == 5


def test_a_model_that_the_engine_does_not_reach_is_trls(tmp_path, caplog):
    """TRL's own generation has batches; bitwise=True says that it is not."""
    from tests.test_rollout_families import Lora

    model = tiny("Llama")
    model.lm_head.__class__ = Lora
    with rlfast.patch("trl", rollouts=True, bitwise=True):
        trainer, _ = grpo(tmp_path, model)
        _, logps = trainer._generate_single_turn([[3, 4], [3, 4]], None, {}, 2)
        assert logps is None and "runs as it is: the head of" in caplog.text
        trainer.train()
    assert "bitwise=True: training has not the bits of the rollouts: the head of" in caplog.text


def test_what_the_engine_cannot_do_is_trls(tmp_path, caplog):
    with rlfast.patch("trl", rollouts=True):
        trainer, _ = grpo(tmp_path, generation_kwargs={"num_beams": 1, "diversity_penalty": 0.0})
        trainer.generation_kwargs["typical_p"] = 1.0
        ids, logps = trainer._generate_single_turn([[3, 4], [3, 4]], None, {}, 2)
    assert logps is None and len(ids) == 2 and "typical_p" in caplog.text


def test_options_of_a_patch():
    with rlfast.patch("trl"), pytest.raises(RuntimeError, match="it is patched with other options"):
        rlfast.patch("trl", rollouts=True)
    owner = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    before = owner._generate_single_turn
    with rlfast.patch("trl", rollouts=True):
        assert owner._generate_single_turn is not before
        with rlfast.patch("trl"):  # the patch in place is enough
            pass
        assert owner._generate_single_turn is not before
    assert owner._generate_single_turn is before
    with pytest.raises(TypeError, match="rollouts: expected True or False"):
        rlfast.patch("trl", rollouts=1)
