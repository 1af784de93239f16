"""Stock and patched TRL take the same steps: every loss, each with a part of what models and training can be like.

SGD, whose update is linear in the gradient: AdamW's divides by its size, and turns a rounding into a whole step where
it is near zero. The product of losses and forms is slow; a diagonal of it, in which each is at least once, is not.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

import rlfast
from rlfast.compare.watch import Watch, flat, logps_apart, updates_apart

pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
transformers = pytest.importorskip("transformers")
from trl.trainer import utils  # noqa: E402

from rlfast.compare.tiny import tiny  # noqa: E402
from rlfast.compare.trainers import DPO, GRPO, KINDS, ONLINE, PAIRED, Kind  # noqa: E402
from rlfast.compare.trainers import trainer_of as built  # noqa: E402
from rlfast.integrations import trl_dpo, trl_grpo, trl_head  # noqa: E402
from tests.trl_trainers import ALL, saved  # noqa: E402

pytestmark = pytest.mark.usefixtures("frozen_objects")
STEPS = 2
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
LOSSES = {
    **{
        f"DPO {name}": Kind("DPO", {"loss_type": [name], "label_smoothing": 0.1 * (name in SMOOTHED)}, PAIRED)
        for name in DPO
    },
    "DPO WPO": Kind("DPO", {"use_weighting": True}, PAIRED),
    "DPO LD": Kind("DPO", {"ld_alpha": 0.5}, PAIRED),
    "KTO": KINDS["kto"],
    "RLOO": KINDS["rloo"],
    **{f"GRPO {name}": Kind("GRPO", ONLINE | {"loss_type": name}, ("prompt",)) for name in GRPO},
    "GRPO entropy": Kind("GRPO", ONLINE | {"entropy_coef": 0.05}, ("prompt",)),
    "SFT nll": KINDS["sft"],
    "Distillation": Kind("Distillation", {"max_completion_length": 8, "beta": 0.5}, ("prompt",)),
    "SFT dft": Kind("SFT", {"completion_only_loss": True, "loss_type": "dft"}, ("prompt", "completion")),
    "GRPO KL": Kind("GRPO", ONLINE | {"loss_type": "grpo", "beta": 1.0}, ("prompt",)),
}


class Form(NamedTuple):
    """What a model and its training are like."""

    family: str = "Qwen2"
    head: dict = {"tie_word_embeddings": True}  # noqa: RUF012
    options: dict = {}  # noqa: RUF012
    lora: bool = False


FORMS = {
    "tied": Form(),
    "untied": Form(head={"tie_word_embeddings": False}),
    "soft-cap": Form("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "logit scale": Form("Cohere", {"logit_scale": 0.25}),
    "accumulated": Form(options={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "checkpointed": Form(options={"gradient_checkpointing": True}),
    "autocast": Form(options={"bf16": True}),
    "LoRA": Form(lora=True, head={"tie_word_embeddings": False}),
}
DIAGONAL = {(loss, list(FORMS)[i % len(FORMS)]) for i, loss in enumerate(LOSSES)}
PRODUCT = [
    pytest.param(loss, form, marks=() if (loss, form) in DIAGONAL else pytest.mark.slow)
    for loss in LOSSES
    for form in FORMS
]


class Bounds(NamedTuple):
    """Of numbers relative to their size, but log-probs in nats.

    Over the product, TRL in another order of sums differs from itself by 3e-6, 9e-6, 1.2e-5, 3e-5 and 6e-8 at most: so
    a gradient norm cannot be held to 1e-5, as a loss and weights are.
    """

    loss: float = 1e-5
    logp: float = 2e-5
    grad_norm: float = 2e-5
    update: float = 3e-5  # and the rounding of the weights that it is a difference of
    weights: float = 1e-6


FLOAT32 = Bounds()
ROUNDING = 2.0**-28  # of the weights' norm: those that an update moves are rounded to 2⁻²⁴, most of them alike
# TRL rounds each logit to bfloat16 and rlfast does not: 2⁻⁹ of logits up to ten, in every token. The most that is
# seen of it is 2e-2, 0.14, 4e-2, 0.1 and 2e-4.
BFLOAT16 = Bounds(4e-2, 0.25, 8e-2, 0.2, 5e-4)


class Steps(transformers.TrainerCallback):
    """Loss, log-probs, gradient norm and weights of each step, and its completions, or those of an earlier run."""

    def __init__(self, earlier: Steps | None = None, scaled: float = 1.0):
        self.watch, self.earlier, self.taken, self.weights = Watch(scaled), earlier, [], []

    def on_step_begin(self, args, state, control, model=None, **_):
        k = state.global_step
        if not self.weights:
            self.weights.append(flat(model))
        self.watch.start(k, self.earlier.taken[k]["rollouts"] if self.earlier else None)

    def on_log(self, args, state, control, logs=None, model=None, **_):
        if "grad_norm" in logs:
            seen = {name: getattr(self.watch, name) for name in ("loss", "logps", "rollouts")}
            self.taken.append(seen | {"grad_norm": logs["grad_norm"]})
            self.weights.append(flat(model))


def steps_of(loss: str, form: str, folder, context, earlier=None, scaled=1.0) -> Steps:
    """What a trainer did within a context."""
    kind, form, steps = LOSSES[loss], FORMS[form], Steps(earlier, scaled)
    given = ALL | {"max_steps": STEPS, "output_dir": str(folder), "optim": "sgd", "learning_rate": 0.1}
    given |= {"max_grad_norm": 1.0, "lr_scheduler_type": "constant"} | kind.options | form.options
    more = {}
    if form.lora:
        from peft import LoraConfig

        more["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    if kind.trainer == "Distillation":
        more["teacher_model"] = tiny("Llama", hidden_size=48)
    model = saved(folder, form.family, **form.head)
    torch.manual_seed(7)
    trainer = built(kind, given, model, [steps], **more)
    steps.watch.around(trainer)
    with context:
        trainer.train()
    return steps


def assert_same(mine: Steps, stock: Steps, bounds: Bounds, steps: int = STEPS) -> None:
    """Every number of every step, or of the first ones."""
    assert len(mine.taken) == len(stock.taken) == STEPS
    for k, (a, b) in enumerate(zip(mine.taken[:steps], stock.taken[:steps], strict=True)):
        assert b["grad_norm"] > 1e-3, "nothing was learned, nothing was compared"
        assert logps_apart(a["logps"], b["logps"]) <= bounds.logp, f"log-probs of step {k}"
        # a policy's loss is near zero, and made of advantages of order one
        assert abs(a["loss"] - b["loss"]) <= bounds.loss * max(1.0, abs(b["loss"])), f"loss of step {k}"
        assert abs(a["grad_norm"] - b["grad_norm"]) <= bounds.grad_norm * b["grad_norm"], f"gradient norm of step {k}"
        update, weights = updates_apart(mine.weights[k : k + 2], stock.weights[k : k + 2])
        size = np.linalg.norm(stock.weights[k]) / np.linalg.norm(stock.weights[k + 1] - stock.weights[k])
        assert update <= bounds.update + ROUNDING * size, f"update of step {k}"
        assert weights <= bounds.weights, f"weights after step {k}"


@pytest.fixture(autouse=True, scope="module")
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("loss, form", PRODUCT)
def test_the_same_steps(loss, form, tmp_path):
    stock = steps_of(loss, form, tmp_path, contextlib.nullcontext())
    mine = steps_of(loss, form, tmp_path, rlfast.patch("trl"), earlier=stock)
    assert_same(mine, stock, BFLOAT16 if form == "autocast" else FLOAT32)


@pytest.mark.parametrize("loss", ("SFT nll", "DPO discopop", "GRPO grpo"))
def test_stock_in_another_order_of_sums(loss, tmp_path, monkeypatch):
    """What the bounds are made of: TRL itself, in other chunks of the vocabulary and of the counted rows alone."""
    stock = steps_of(loss, "untied", tmp_path, contextlib.nullcontext())
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 13)
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    other = steps_of(loss, "untied", tmp_path, contextlib.nullcontext(), earlier=stock)
    assert any((a != b).any() for a, b in zip(other.weights, stock.weights, strict=True))
    assert_same(other, stock, FLOAT32)


@contextlib.contextmanager
def mistaken(where: str):
    """TRL patched, with an error of 1%."""
    with rlfast.patch("trl"):
        head = utils._ChunkedLogProbFunction.apply

        def apply(*args):
            logp, *rest = head(*args)
            wrong = {"log-probs": 1.01 * logp, "gradients": 1.01 * logp - 0.01 * logp.detach()}[where]
            return wrong, *rest

        utils._ChunkedLogProbFunction.apply = staticmethod(apply)
        try:
            yield
        finally:
            utils._ChunkedLogProbFunction.apply = head


@pytest.mark.parametrize("loss", ("SFT nll", "DPO ipo", "KTO", "RLOO"))
@pytest.mark.parametrize("where", ("log-probs", "gradients", "loss"))
def test_an_error_of_one_percent_shows(loss, where, tmp_path):
    stock = steps_of(loss, "tied", tmp_path, contextlib.nullcontext())
    context, scaled = (rlfast.patch("trl"), 1.01) if where == "loss" else (mistaken(where), 1.0)
    mine = steps_of(loss, "tied", tmp_path, context, earlier=stock, scaled=scaled)
    with pytest.raises(AssertionError, match="of step"):
        assert_same(mine, stock, FLOAT32)


def wrong_by(where, name: str, mistake):
    """rlfast with an error of 1% in a seam of its fused losses, whose log-probs have no gradient."""

    def patched(monkeypatch):
        monkeypatch.setattr(where, name, mistake(getattr(where, name)))
        return rlfast.patch("trl")

    return patched


def steeper(made):
    return lambda fusion, loss, logp: made(fusion, 1.01 * loss - 0.01 * loss.detach(), logp)


MISTAKES = {
    ("GRPO KL", "β"): wrong_by(
        trl_grpo, "loss_of", lambda right: lambda trainer: right(trainer).with_options(beta=1.01 * trainer.beta)
    ),
    ("GRPO entropy", "its coefficient"): wrong_by(
        trl_grpo,
        "loss_of",
        lambda right: lambda trainer: right(trainer).with_options(entropy_coef=1.01 * trainer.entropy_coef),
    ),
    ("DPO sigmoid", "β"): wrong_by(
        trl_dpo.DpoOptions, "of", lambda right: lambda trainer: right(trainer)._replace(beta=1.01 * trainer.beta)
    ),
    ("GRPO grpo", "gradient"): wrong_by(trl_head.Fusion, "made", steeper),
    ("DPO sigmoid", "gradient"): wrong_by(trl_head.Fusion, "made", steeper),
}


@pytest.mark.parametrize("loss, what", MISTAKES)
def test_an_error_of_one_percent_in_a_fused_loss_shows(loss, what, tmp_path, monkeypatch):
    stock = steps_of(loss, "tied", tmp_path, contextlib.nullcontext())
    mine = steps_of(loss, "tied", tmp_path, MISTAKES[loss, what](monkeypatch), earlier=stock)
    with pytest.raises(AssertionError, match="of step"):
        assert_same(mine, stock, FLOAT32)


def exact_head(hidden, weight, bias, targets, temperature, _, softcap=None, logit_scale=1.0, outputs=()):
    """TRL's head in float64, of the hidden states and weights that autocast rounds, and of these alone."""
    dtype = trl_head.compute_dtype(hidden)
    with torch.autocast("cpu", enabled=False):
        logits = logit_scale * (hidden.to(dtype).double() @ weight.to(dtype).double().T)
        if bias is not None:
            logits = logits + bias.to(dtype).double()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        logp = logits.log_softmax(-1)
        more = {
            "entropy": lambda: -(logp.exp() * logp).sum(-1).float(),
            "log_sum_sq_probs": lambda: (2 * logp).logsumexp(-1).float(),
            "mean_logits": lambda: logits.mean(-1).float(),
            "is_top1": lambda: logits.argmax(-1) == targets,
        }
        made = [make() if name in outputs else None for name, make in more.items()]
        return logp.gather(-1, targets[:, None])[:, 0].float(), *made


# Of a first step: both round gradients to bfloat16, mostly to the same numbers, and where not, the next step is another
# one. The most that is seen is 2e-4 and 2.2e-3 of norm and update; an error of 1% moves one of them by 7e-3 or more.
AUTOCAST = Bounds(1e-3, 5e-3, 2e-3, 4e-3, 1e-5)
ROUNDED = ("SFT nll", "DPO sigmoid", "DPO ipo", "KTO", "GRPO grpo", "RLOO")


@pytest.mark.parametrize("loss", ROUNDED)
def test_autocast_beside_a_head_that_rounds_as_ours(loss, tmp_path, monkeypatch):
    """TRL's trainer on an exact head of the rounded inputs: there 1% of a gradient shows under autocast too."""
    with monkeypatch.context() as patched:
        patched.setattr(utils._ChunkedLogProbFunction, "apply", staticmethod(exact_head))
        stock = steps_of(loss, "autocast", tmp_path, contextlib.nullcontext())
    mine = steps_of(loss, "autocast", tmp_path, rlfast.patch("trl"), earlier=stock)
    assert_same(mine, stock, AUTOCAST, steps=1)
    fused = loss in ("DPO sigmoid", "GRPO grpo")
    wrong = wrong_by(trl_head.Fusion, "made", steeper)(monkeypatch) if fused else mistaken("gradients")
    mine = steps_of(loss, "autocast", tmp_path, wrong, earlier=stock)
    with pytest.raises(AssertionError, match="of step"):
        assert_same(mine, stock, AUTOCAST, steps=1)
