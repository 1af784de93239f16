"""``rlfast.patch("trl")``: TRL's trainers take the same steps with it, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import importlib
import logging
import subprocess
import sys

import pytest
import torch

import rlfast
from rlfast.integrations import patching, trl_head
from rlfast.integrations import trl as ours
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
transformers = pytest.importorskip("transformers")
from trl.trainer import utils  # noqa: E402

from rlfast.compare.tiny import VOCAB, tiny, word_tokenizer  # noqa: E402
from tests.trl_trainers import assert_same_steps, steps_of  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def patched():
    with rlfast.patch("trl") as patch:
        yield patch


@pytest.fixture
def tokenizer():
    return word_tokenizer()


@pytest.mark.parametrize("kind", ("GRPO", "RLOO", "DPO", "KTO", "SFT"))
def test_trainers_take_the_same_steps(kind, tokenizer, tmp_path, monkeypatch):
    calls = []
    kernel = trl_head.linear_token_logps
    monkeypatch.setattr(
        trl_head,
        "linear_token_logps",
        lambda hidden, *args, **kw: calls.append(hidden.shape[0]) or kernel(hidden, *args, **kw),
    )
    stock = steps_of(kind, tokenizer, tmp_path / "stock", contextlib.nullcontext())
    assert not calls
    mine = steps_of(kind, tokenizer, tmp_path / "rlfast", rlfast.patch("trl"))
    assert calls
    assert_same_steps(mine, stock)


FAMILIES = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}


def z_of(config, hidden, weight, temperature):
    """The models' own order: scale, soft-cap, temperature."""
    z = hidden @ weight.T
    z = z * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_head_of_model_families(patched, family):
    model = tiny(family, **FAMILIES[family])
    fields = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    utils.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *fields))
    hidden = []
    model.base_model.register_forward_hook(lambda *args: hidden.append(args[-1].last_hidden_state))
    ids = torch.randint(3, VOCAB, (6, 100))  # enough rows for a largest error to mean something
    labels = ids.clone()
    labels[:, :5] = -100
    labels[1, 9:] = -100
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    counted, weight = labels[:, 1:] != -100, model.get_output_embeddings().weight
    rows, targets = hidden[0][:, :-1][counted].detach(), labels[:, 1:][counted]

    def plain(dtype):
        logp = z_of(model.config, rows.to(dtype), weight.detach().to(dtype), 0.7).log_softmax(-1)
        chosen = logp.gather(1, targets[:, None])[:, 0]
        return {
            "log_probs": chosen,
            "entropy": -(logp.exp() * logp).sum(-1),
            "log_sum_sq_probs": (2 * logp).logsumexp(-1),
            "mean_logits": z_of(model.config, rows.to(dtype), weight.detach().to(dtype), 0.7).mean(-1),
        }

    truth, yardstick = plain(torch.float64), plain(torch.float32)
    for name in truth:
        got = getattr(out, name)
        assert got.dtype == torch.float32
        assert_zero(name, got[~counted])
        assert_value(name, got[counted], truth[name], yardstick[name])
    z = z_of(model.config, rows.double(), weight.detach().double(), 0.7)
    assert_same_bits("is_top1", out.is_top1[counted], z.argmax(-1) == targets)
    own = model(input_ids=ids).logits[:, :-1][counted] / 0.7
    assert_value("z", own.detach(), z, z_of(model.config, rows, weight.detach(), 0.7))  # that z is the model's own


@pytest.mark.parametrize(
    "module", ("trainer.sft_trainer", "trainer.rloo_trainer", "experimental.async_grpo.async_grpo_trainer")
)
def test_a_head_that_a_trainers_module_adds_is_ours(module, patched, monkeypatch):
    """A trainer that is imported and has added its head before the patch, or after it."""
    add, calls = importlib.import_module(f"trl.{module}").add_fused_lm_head, []
    kernel = trl_head.linear_token_logps
    monkeypatch.setattr(trl_head, "linear_token_logps", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    ids = torch.randint(3, VOCAB, (2, 6))
    model = tiny()
    add(model)
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert len(calls) == 1
    patched.undo()
    model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert len(calls) == 1


def test_what_was_set_since_stays(patched):
    """An undo takes back what is the patch's, and nothing that somebody has put in its place."""
    from trl import DPOTrainer

    stock = patching.original_of(DPOTrainer, "_compute_loss")
    mine = DPOTrainer._compute_loss = lambda *_: None
    patched.undo()
    assert vars(DPOTrainer)["_compute_loss"] is mine
    DPOTrainer._compute_loss = stock


def test_importing_patches_nothing():
    """In a process of its own: not rlfast, before TRL or after it; the patch reaches what is imported afterwards."""
    code = (
        "import rlfast, trl.trainer.utils as utils; kernel = utils._ChunkedLogProbFunction\n"
        "assert kernel.__module__.startswith('trl.')\n"
        "undo = rlfast.patch('trl')\n"
        "from trl.trainer import sft_trainer\n"
        "assert utils._ChunkedLogProbFunction is not kernel\n"
        "undo(); assert utils._ChunkedLogProbFunction is kernel\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


HEADS = [
    (dtype, bias, frozen)
    for dtype in (torch.float32, torch.bfloat16)
    for bias in (False, True)
    for frozen in (False, True)
]


@pytest.mark.parametrize("dtype, bias, frozen", HEADS)
def test_chunked_logprob_contract(patched, dtype, bias, frozen):
    torch.manual_seed(1)
    head = utils._ChunkedLogProbFunction
    hidden, weight = torch.randn(300, 24).to(dtype), torch.randn(VOCAB, 24).to(dtype)
    offset = torch.randn(VOCAB).to(dtype) if bias else None
    targets, pull = torch.randint(VOCAB, (300,)), torch.randn(2, 300)

    def run(function, compute):
        leaves = [None if x is None else x.to(compute).requires_grad_() for x in (hidden, weight, offset)]
        if frozen:
            leaves = [leaves[0], *(None if x is None else x.detach() for x in leaves[1:])]
        logp, entropy = function(*leaves)
        wanted = [x for x in leaves if x is not None and x.requires_grad]
        total = (logp * pull[0].to(logp.dtype)).sum() + (entropy * pull[1].to(entropy.dtype)).sum()
        return logp.detach(), entropy.detach(), torch.autograd.grad(total, wanted)

    def plain(h, w, b):
        logp = ((h @ w.T if b is None else h @ w.T + b) / 0.7).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    got = run(lambda h, w, b: head.apply(h, w, b, targets, 0.7, 64)[:2], dtype)
    truth, yardstick = run(plain, torch.float64), run(plain, torch.float32)
    for i, name in enumerate(("logp", "entropy")):
        assert got[i].dtype == torch.float32
        assert_value(name, got[i], truth[i], yardstick[i])
    for g, t, y in zip(got[2], truth[2], yardstick[2], strict=True):
        assert g.dtype == dtype
        assert_gradient("gradient", g, t, y)


def test_chunked_logprob_returns_only_what_is_asked_and_marks_it(patched):
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    targets = torch.randint(VOCAB, (4,))
    out = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)
    assert [x.requires_grad for x in out] == [True, True, False, False, False]
    assert [x.dtype for x in out] == [torch.float32] * 4 + [torch.bool]
    out = utils._ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 64, None, 1.0, ("log_probs", "mean_logits")
    )
    assert [x is None for x in out] == [False, True, True, False, True]


def test_chunked_logprob_of_no_rows_stays_differentiable(patched):
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)
    out = utils._ChunkedLogProbFunction.apply(hidden, weight, None, torch.empty(0, dtype=torch.int64), 1.0, 64)
    out[0].sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert_zero("weight.grad", weight.grad)


def test_a_batch_without_labels_gives_a_differentiable_zero(patched):
    model = tiny()
    utils.add_fused_lm_head(model)
    ids = torch.randint(3, VOCAB, (2, 6))
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0.0


@pytest.mark.parametrize("autocast", (torch.bfloat16, torch.float16))
def test_autocast_decides_the_dtype_of_the_projection(patched, autocast):
    hidden, weight = torch.randn(5, 16), torch.randn(VOCAB, 16)
    targets = torch.randint(VOCAB, (5,))
    with torch.autocast("cpu", dtype=autocast):
        got = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64)[0]
    rounded = [x.to(autocast) for x in (hidden, weight)]
    truth, yardstick = (
        torch.log_softmax(rounded[0].to(d) @ rounded[1].to(d).T, -1).gather(1, targets[:, None])[:, 0]
        for d in (torch.float64, torch.float32)
    )
    assert_value("logp", got, truth, yardstick)


def test_selective_log_softmax_and_entropy(patched):
    torch.manual_seed(2)
    logits = torch.randn(2, 7, VOCAB)[:, :-1].mul(4).requires_grad_()
    index, mask = torch.randint(VOCAB, (2, 6)), torch.rand(2, 6) > 0.4
    many, many_mask = torch.randint(VOCAB, (2, 6, 3)), torch.rand(2, 6, 3) > 0.4

    def plain(dtype):
        logp = (logits.detach().to(dtype) / 0.7).log_softmax(-1)
        one = logp.gather(-1, index[..., None])[..., 0] * mask
        return one, logp.gather(-1, many) * many_mask, -(logp.exp() * logp).sum(-1)

    truth, yardstick = plain(torch.float64), plain(torch.float32)
    logp, entropy = utils.selective_log_softmax_and_entropy(logits, index, False, 0.7, mask)
    assert logp.requires_grad and not entropy.requires_grad
    assert_value("entropy", entropy, truth[2] * mask, yardstick[2] * mask)
    assert_value("logp", logp, truth[0], yardstick[0])
    assert_value("logp", utils.selective_log_softmax(logits, index, 0.7, mask), truth[0], yardstick[0])
    assert_value("logp of many", utils.selective_log_softmax(logits, many, 0.7, many_mask), truth[1], yardstick[1])
    assert_value("entropy", utils.entropy_from_logits(logits / 0.7, chunk_size=2), truth[2], yardstick[2])
    kernel = sys.modules["trl.kernels"].__dict__.get("selective_log_softmax_and_entropy")
    if kernel is not None:  # TRL has it where Triton is installed
        assert_value("kernel's logp", kernel(logits, index, 0.7, mask)[0], truth[0], yardstick[0])


def test_selective_log_softmax_and_entropy_reads_the_logits_once(patched, monkeypatch):
    calls = []
    kernel = ours.token_logps
    monkeypatch.setattr(ours, "token_logps", lambda *args, **kw: calls.append(kw) or kernel(*args, **kw))
    utils.selective_log_softmax_and_entropy(torch.randn(3, VOCAB), torch.zeros(3, dtype=torch.int64))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ("cpo", "orpo"))
def test_get_batch_logps(name, patched):
    module = importlib.import_module(f"trl.experimental.{name}.{name}_trainer")
    trainer = getattr(module, f"{name.upper()}Trainer")
    again = rlfast.patch("trl")  # reaches what was imported since
    assert f"{trainer.__module__}.{trainer.__qualname__}.get_batch_logps" in again.replaced
    logits, labels = torch.randn(3, 8, VOCAB), torch.randint(VOCAB, (3, 8))
    labels[:, :3] = -100
    before = labels.clone()
    for seq2seq in (False, True):
        scored, wanted = (logits, labels) if seq2seq else (logits[:, :-1], labels[:, 1:])
        counted = wanted != -100

        def plain(dtype, scored=scored, wanted=wanted, counted=counted):
            logp = scored.to(dtype).log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
            return (logp * counted).sum(-1)

        got = trainer.get_batch_logps(logits, labels, is_encoder_decoder=seq2seq)
        assert_value("sum", got, plain(torch.float64), plain(torch.float32))
        mean = trainer.get_batch_logps(logits, labels, average_log_prob=True, is_encoder_decoder=seq2seq)
        assert_value("mean", mean, plain(torch.float64) / counted.sum(-1), plain(torch.float32) / counted.sum(-1))
        assert_same_bits("labels", labels, before)
    patched.undo()
    assert "__wrapped__" not in vars(trainer.get_batch_logps)


class Wrapped(torch.Tensor):
    """Stands for the tensor subclasses that sharding and quantisation bring."""


@pytest.mark.parametrize("why", ("subclass", "device", "no candidates"))
def test_the_original_runs_where_rlfast_cannot_and_says_so_once(patched, caplog, why):
    patching.say_once.cache_clear()
    logits, index = torch.randn(3, VOCAB), torch.randint(VOCAB, (3,))
    if why == "subclass":
        logits = logits.as_subclass(Wrapped)
    elif why == "device":
        logits, index = logits.to("meta"), index.to("meta")
    else:
        index = index[:, None][:, :0]
    with caplog.at_level(logging.WARNING, "rlfast.integrations"):
        for _ in range(2):
            got = utils.selective_log_softmax(logits, index)
    assert got.shape == index.shape
    assert len(caplog.records) == 1
    assert "selective_log_softmax runs as it is" in caplog.text
