"""GRPOTrainer's loss under ``rlfast.patch("trl")``: TRL's method on a tiny model, with the fused gradient."""

from __future__ import annotations

import logging
import types
from collections import defaultdict

import pytest
import torch

import rlfast
from rlfast.integrations import patching, trl_grpo, trl_head
from rlfast.losses import Loss

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from trl.trainer import utils  # noqa: E402

from rlfast.compare.tiny import VOCAB, tiny  # noqa: E402
from tests.trl_trainers import CLOSE, OneProcess, assert_same_loss  # noqa: E402

ROWS, PROMPT, LENGTH = 6, 5, 9


def trainer_of(cls=None, **settings):
    """A GRPOTrainer that has what its loss reads, with the defaults of TRL's configuration."""
    given = {
        "loss_type": "dapo", "importance_sampling_level": "token", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "delta": None, "beta": 0.0, "use_bias_correction_kl": False, "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0, "entropy_coef": 0.0, "use_adaptive_entropy": False, "entropy_target": 1.0,
        "_last_world_entropy": float("inf"), "_entropy_window_stats": None, "max_completion_length": 11,
        "entropy_coef_delta": 0.0, "entropy_coef_max": 1.0, "entropy_coef_min": 0.0,
        "current_gradient_accumulation_steps": 2, "steps_per_generation": 4, "use_vllm": False,
        "vllm_importance_sampling_correction": True, "aux_loss_enabled": False, "router_aux_loss_coef": 0.25,
        "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0, "temperature": 0.9, "family": "Qwen2", "cast": False,
    } | settings  # fmt: skip
    trainer = object.__new__(cls or trl.GRPOTrainer)
    model = tiny(given["family"], **settings.get("model", {}))
    outputs = ("log_probs", "entropy")
    utils.add_fused_lm_head(
        model, temperature=given["temperature"], cast_lm_head_to_fp32=given["cast"], outputs=outputs
    )
    given["_entropy_bonus_enabled"] = given["entropy_coef"] != 0.0 or given["use_adaptive_entropy"]
    trainer.__dict__.update(
        given, args=types.SimpleNamespace(**given), model=model, accelerator=OneProcess(),
        _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    return trainer


def batch(trainer, tools=False, on_policy=False, by_token=False, ratio=None, lengths=None, seed=0) -> dict:
    """Prompts padded on the left and completions of different lengths, one of them cut off before its first token."""
    draw = torch.Generator().manual_seed(seed)
    prompts, completions = (torch.randint(2, VOCAB, (ROWS, n), generator=draw) for n in (PROMPT, LENGTH))
    drawn = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=draw)
    drawn[2] = 0
    lengths = drawn if lengths is None else torch.tensor(lengths).unsqueeze(1)
    mask = (torch.arange(LENGTH) < lengths).long()
    before = (torch.arange(PROMPT) >= torch.randint(0, PROMPT - 1, (ROWS, 1), generator=draw)).long()
    inputs = {"prompt_ids": prompts, "prompt_mask": before, "completion_ids": completions, "completion_mask": mask}
    with torch.no_grad():
        ids = torch.cat((prompts, completions), 1), torch.cat((before, mask), 1)
        logp, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, *ids, LENGTH)
    near = [logp + s * torch.randn(logp.shape, generator=draw) for s in (0.3, 0.3, 0.1)]
    inputs |= {
        "old_per_token_logps": near[0], "ref_per_token_logps": near[1], "sampling_per_token_logps": near[2],
        "num_items_in_batch": torch.tensor(57.0),
        "advantages": torch.randn((ROWS, LENGTH) if by_token else (ROWS,), generator=draw),
    }  # fmt: skip
    if tools:
        inputs["tool_mask"] = (torch.rand(ROWS, LENGTH, generator=draw) < 0.7).long()
    if on_policy:
        del inputs["old_per_token_logps"]
    if ratio is not None:
        inputs["importance_sampling_ratio"] = (
            torch.rand((ROWS, LENGTH if ratio == "token" else 1), generator=draw) + 0.5
        )
    return inputs


def taken(settings: dict, data: dict) -> tuple:
    """(loss, {name: gradient}, metrics) of the method as it is now."""
    trainer = trainer_of(**settings)
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, batch(trainer, **data))
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, trainer._metrics["train"]


def count(monkeypatch) -> list:
    calls = []
    linear = Loss.linear
    monkeypatch.setattr(Loss, "linear", lambda self, *a, **k: calls.append(self) or linear(self, *a, **k))
    return calls


def assert_same(monkeypatch, caplog, data: dict | None = None, **settings) -> None:
    """The number, every parameter's gradient and the metrics."""
    stock = taken(settings, data or {})
    calls = count(monkeypatch)
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        mine = taken(settings, data or {})
    assert len(calls) == 1 and not caplog.records
    assert_same_loss(mine, stock)


TYPES = tuple(trl_grpo.TYPES)


@pytest.mark.parametrize("data", ({}, {"tools": True}, {"on_policy": True}, {"by_token": True}), ids=str)
@pytest.mark.parametrize("loss_type", TYPES)
def test_every_loss_type(loss_type, data, monkeypatch, caplog):
    wide = {"epsilon_high": 1.2} if loss_type == "cispo" else {}
    assert_same(monkeypatch, caplog, data, loss_type=loss_type, **wide)


@pytest.mark.parametrize("loss_type", ("grpo", "dapo", "dr_grpo"))
def test_as_many_tokens_as_completions(loss_type, monkeypatch, caplog):
    """Advantages of completions are not those of tokens."""
    assert_same(monkeypatch, caplog, {"lengths": (3, 0, 1, 0, 2, 0)}, loss_type=loss_type)


@pytest.mark.parametrize("wrapper", ("ddp", "fsdp"))
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no CUDA device")
def test_a_wrapped_model(wrapper, monkeypatch, caplog, tmp_path):
    """DDP looks for unused parameters behind what the model returns; FSDP hangs its hooks there."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    stock = taken({"loss_type": "grpo"}, {})
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with rlfast.patch("trl"):
            trainer = trainer_of(loss_type="grpo")
            trainer.model.train()
            inputs, inner = batch(trainer), trainer.model
            if wrapper == "ddp":
                outer = DistributedDataParallel(inner, find_unused_parameters=True)
            else:
                outer = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=True)
            calls = count(monkeypatch)
            trainer._compute_loss(outer, inputs).backward()
        assert len(calls) == 1
        norm = torch.stack([p.grad.square().sum() for p in outer.parameters() if p.grad is not None]).sum().sqrt()
        wanted = torch.stack([g.square().sum() for g in stock[1].values()]).sum().sqrt()
        assert abs(norm - wanted) <= 1e-4 * wanted
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("corrected", (False, True))
@pytest.mark.parametrize("loss_type", TYPES)
def test_a_kl(loss_type, corrected, monkeypatch, caplog):
    assert_same(monkeypatch, caplog, loss_type=loss_type, beta=0.1, use_bias_correction_kl=corrected)


@pytest.mark.parametrize("loss_type", [t for t in TYPES if t != "vespo"])
def test_sequences(loss_type, monkeypatch, caplog):
    settings = {"beta": 0.1, "use_bias_correction_kl": True, "importance_sampling_level": "sequence"}
    assert_same(monkeypatch, caplog, {"tools": True}, loss_type=loss_type, **settings)


@pytest.mark.parametrize("loss_type", ("grpo", "dapo", "dr_grpo", "luspo", "cispo"))
def test_an_entropy_bonus(loss_type, monkeypatch, caplog):
    assert_same(monkeypatch, caplog, {"tools": True}, loss_type=loss_type, entropy_coef=0.2)


@pytest.mark.parametrize("last", (0.5, 2.0))
def test_an_adaptive_bonus(last, monkeypatch, caplog):
    assert_same(monkeypatch, caplog, use_adaptive_entropy=True, entropy_coef=0.2, _last_world_entropy=last)


@pytest.mark.parametrize("loss_type", ("grpo", "vespo", "sapo"))
@pytest.mark.parametrize("by_token", (False, True))
def test_an_off_policy_mask(loss_type, by_token, monkeypatch, caplog):
    data = {"by_token": by_token, "tools": True}
    assert_same(monkeypatch, caplog, data, loss_type=loss_type, off_policy_mask_threshold=0.02)


@pytest.mark.parametrize("ratio", ("token", "sequence"))
def test_the_samplers_ratio(ratio, monkeypatch, caplog):
    assert_same(monkeypatch, caplog, {"ratio": ratio}, loss_type="grpo", use_vllm=True, beta=0.1)


def test_two_sided_clipping(monkeypatch, caplog):
    assert_same(monkeypatch, caplog, loss_type="grpo", delta=1.1)


def test_a_mixture_of_experts(monkeypatch, caplog):
    """The router's loss is differentiated too."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    assert_same(monkeypatch, caplog, family="Mixtral", model=experts, aux_loss_enabled=True, loss_type="grpo")


@pytest.mark.parametrize("family", ("Gemma2", "Cohere", "Granite"))
def test_heads_with_options(family, monkeypatch, caplog):
    options = {
        "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8}, "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 4.0},
    }  # fmt: skip
    assert_same(monkeypatch, caplog, family=family, model=options[family], loss_type="grpo", beta=0.1)


def test_a_head_in_float32(monkeypatch, caplog):
    assert_same(monkeypatch, caplog, cast=True, model={"tie_word_embeddings": False})


class OtherForward(trl.GRPOTrainer):
    """A trainer that calls the model in its own way."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


WHY = {
    "top_entropy_quantile": ({"top_entropy_quantile": 0.5}, {}, "top_entropy_quantile chooses tokens"),
    "vespo": ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, {}, "rlfast's vespo weighs the KL"),
    "a ratio": ({"loss_type": "vespo"}, {"ratio": "token"}, "rlfast's vespo takes log-probs of the sampler"),
    "a subclass": ({"cls": OtherForward}, {}, "another class calls the model"),
    "a number": ({"off_policy_mask_threshold": -1.0}, {}, "off_policy: expected"),
}


@pytest.mark.parametrize("why", WHY)
def test_trls_own_loss_stands_where_rlfast_cannot_and_says_so_once(why, monkeypatch, caplog):
    settings, data, words = WHY[why]
    stock = taken(settings, data)
    calls = count(monkeypatch)
    patching.say_once.cache_clear()
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        mine = taken(settings, data)
        taken(settings, data)
    assert not calls
    assert [words in record.getMessage() for record in caplog.records] == [True]
    for name, g in stock[1].items():
        assert (mine[1][name] - g).abs().max() <= CLOSE * g.abs().max(), name


@pytest.mark.parametrize("how", ("no grad", "eval"))
def test_an_evaluation_is_trls(how, monkeypatch, caplog):
    calls = count(monkeypatch)
    with rlfast.patch("trl"):
        trainer = trainer_of(loss_type="grpo")
        trainer.model.train(how != "eval")
        with torch.set_grad_enabled(how != "no grad"):
            loss = trainer._compute_loss(trainer.model, batch(trainer))
    assert not calls and loss.requires_grad == (how == "eval")


def test_only_scored_rows_are_projected(monkeypatch):
    """Prompts and padding are not."""
    rows = []
    linear = Loss.linear
    monkeypatch.setattr(Loss, "linear", lambda s, h, *a, **k: rows.append(len(h)) or linear(s, h, *a, **k))
    with rlfast.patch("trl"):
        trainer = trainer_of(loss_type="grpo")
        trainer.model.train()
        inputs = batch(trainer)
        trainer._compute_loss(trainer.model, inputs)
    assert rows == [int(inputs["completion_mask"].sum())]


def test_undo_restores_the_method():
    original = trl.GRPOTrainer._compute_loss
    with rlfast.patch("trl") as patch:
        assert trl.GRPOTrainer._compute_loss is not original
        assert any(name.endswith("GRPOTrainer._compute_loss") for name in patch.replaced)
    assert trl.GRPOTrainer._compute_loss is original


def test_a_method_that_changed_is_left_alone(monkeypatch, caplog):
    def _compute_loss(self, model, inputs):
        return None

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", _compute_loss)
    with pytest.raises(RuntimeError, match=r"GRPOTrainer\._compute_loss does not read loss_type"):
        rlfast.patch("trl")
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("trl", untested=True):
        assert trl.GRPOTrainer._compute_loss is _compute_loss


def taken_by_async_grpo() -> tuple:
    """(loss, {name: gradient}, metrics) of AsyncGRPO's own method: two completions in one row, its attention aside."""
    from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

    trainer, model, draw = object.__new__(AsyncGRPOTrainer), tiny("Qwen2"), torch.Generator().manual_seed(3)
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    trainer.__dict__.update(
        epsilon_low=0.2, epsilon_high=0.28, aux_loss_enabled=False, accelerator=OneProcess(),
        current_gradient_accumulation_steps=2, _metrics={"train": defaultdict(list)}, _step_forward_tokens=0.0,
        _step_trained_tokens=0.0, _step_seq_len_weighted=0.0, _step_samples=0.0, _step_forward_s=0.0,
    )  # fmt: skip
    length, of = 16, torch.tensor([2, 3, 4, 5, 9, 10, 11, 12, 13])  # tokens of a row, and those that are scored
    ids, labels = torch.randint(2, VOCAB, (1, length), generator=draw), torch.full((1, length), -100)
    labels[0, of] = ids[0, of + 1]
    noise, adv = (torch.randn(1, len(of), generator=draw) for _ in range(2))
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "shift_labels": labels,
        "position_ids": torch.arange(length).remainder(8)[None], "token_index": of[None],
        "old_log_probs": 0.3 * noise - 4.0, "advantages": adv,
        "segment_id": (of >= 8).long()[None], "global_n_tokens": torch.tensor([float(len(of))]),
        "global_n_forward_tokens": torch.tensor([length]), "mean_seq_len": torch.tensor([8.0]),
        "tree_max_seqlens": torch.tensor([[8, 8]]),
    }  # fmt: skip
    inputs |= {f"tree_{name}": torch.arange(3)[None] for name in ("kv_index", "cu_seqlens_q", "cu_seqlens_k")}
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters()}, dict(trainer._metrics["train"])


def test_async_grpo(monkeypatch, caplog):
    """Its trainer's attention is FlashAttention's; its loss on rlfast's head is TRL's, and 1% would show."""
    stock, calls, wrong = taken_by_async_grpo(), [], 1.0
    kernel = trl_head.linear_token_logps

    def head(*args, **options):
        calls.append(options["outputs"])
        out = kernel(*args, **options)
        return out._replace(logp=wrong * out.logp)

    monkeypatch.setattr(trl_head, "linear_token_logps", head)
    with rlfast.patch("trl"), caplog.at_level(logging.WARNING, "rlfast.integrations"):
        mine = taken_by_async_grpo()
        assert calls == [("logp", "entropy")] and not caplog.records
        assert_same_loss(mine, stock)
        wrong = 1.01
        with pytest.raises(AssertionError):
            assert_same_loss(taken_by_async_grpo(), stock)
