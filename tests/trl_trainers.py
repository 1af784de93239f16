"""TRL's trainers on tiny random models, and what two runs of one must have in common."""

from __future__ import annotations

import contextlib

import torch
import transformers

from rlfast.compare.tiny import tiny, word_tokenizer
from rlfast.compare.trainers import KINDS as COMPARED
from rlfast.compare.trainers import PAIRED, SINGLE, Kind
from rlfast.compare.trainers import trainer_of as built
from rlfast.demo.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, UPDATE_TOLERANCE

STEPS = 3
# name -> a trainer of ``compare``, some with other options
KINDS = {
    "GRPO": COMPARED["grpo"],
    "RLOO": COMPARED["rloo"],
    "SFT": COMPARED["sft"],
    "DPO": Kind("DPO", {"loss_type": ["sigmoid"]}, PAIRED),
    "DPO mixture": Kind("DPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, PAIRED),
    "DPO IPO": Kind("DPO", {"loss_type": "ipo", "ld_alpha": 0.5, "precompute_ref_log_probs": True}, PAIRED),
    "DPO WPO": Kind("DPO", {"use_weighting": True, "f_divergence_type": "js_divergence"}, PAIRED),
    "KTO": COMPARED["kto"],
    "KTO APO": Kind("KTO", {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.5}, SINGLE),
    "Reward": Kind("Reward", {"center_rewards_coefficient": 0.05}, PAIRED),
    "Reward margin": Kind("Reward", {}, (*PAIRED, "margin")),
}
ALL = {
    "per_device_train_batch_size": 4,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def saved(folder, family: str = "Qwen2", task: str = "CausalLM", **head) -> dict:
    """A tiny model as a trainer takes it; references are loaded from its folder."""
    tiny(family, task, **head).save_pretrained(folder / "model")
    model = getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder / "model")
    return {"model": model, "processing_class": word_tokenizer()}


def trainer_of(kind: str, tokenizer, folder, callback):
    """A trainer of ``KINDS`` on a tiny model, which evaluates after its steps."""
    kind = KINDS[kind]
    reward = kind.trainer == "Reward"
    head = {"num_labels": 1} if reward else {"tie_word_embeddings": kind.trainer != "DPO"}
    given = ALL | {"output_dir": str(folder)} | kind.options
    if not kind.online:
        given |= {"eval_strategy": "steps", "eval_steps": STEPS, "per_device_eval_batch_size": 4}
    model = saved(folder, task="SequenceClassification" if reward else "CausalLM", **head)
    model["processing_class"] = tokenizer
    return built(kind, given, model, [callback], evaluates=not kind.online)


class Watch(transformers.TrainerCallback):
    """Loss, gradient norm and weights after each step; the same random numbers in each."""

    def __init__(self):
        self.loss, self.grad_norm, self.weights, self.metrics = [], [], [], []

    def on_step_begin(self, args, state, control, model=None, **_):
        torch.manual_seed(state.global_step)
        if not self.weights:
            self.weights.append(self._flat(model))

    def on_log(self, args, state, control, logs=None, model=None, **_):
        timed = ("runtime", "per_second", "flos", "step_time", "time/")
        self.metrics.append({k: x for k, x in logs.items() if not any(word in k for word in timed)})
        if "grad_norm" in logs:
            self.loss.append(logs["loss"])
            self.grad_norm.append(logs["grad_norm"])
            self.weights.append(self._flat(model))

    @staticmethod
    def _flat(model):
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def steps_of(kind: str, tokenizer, folder, context) -> Watch:
    """What a trainer did within a context."""
    seen = Watch()
    trainer = trainer_of(kind, tokenizer, folder, seen)
    with context:
        trainer.train()
    return seen


def assert_same_steps(mine: Watch, stock: Watch) -> None:
    """Losses, gradient norms, updates and metrics, by the tolerances of the demo."""
    assert len(mine.loss) == len(stock.loss) == STEPS
    assert stock.grad_norm[0] > 1e-3, "nothing was learned, nothing was compared"
    for k in range(STEPS):
        # rewards are of order one, and so are advantages and the other trainers' losses
        assert abs(mine.loss[k] - stock.loss[k]) <= LOSS_TOLERANCE * max(1.0, abs(stock.loss[k])), f"step {k}"
        assert abs(mine.grad_norm[k] - stock.grad_norm[k]) <= GRAD_NORM_TOLERANCE * stock.grad_norm[k], f"step {k}"
        update = stock.weights[k + 1] - stock.weights[k]
        difference = (mine.weights[k + 1] - mine.weights[k]) - update
        assert difference.norm() <= UPDATE_TOLERANCE * update.norm(), f"step {k}"
    for ours, theirs in zip(mine.metrics, stock.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            assert abs(ours[name] - x) <= LOSS_TOLERANCE * max(1.0, abs(x)), name


# A tenth of a percent of a gradient would be a mistake in a formula; float32 in two orders differs by 1e-6 of it.
CLOSE = 2e-5


class OneProcess:
    """accelerate's Accelerator where there is one process."""

    device, num_processes, sync_gradients, is_main_process = torch.device("cpu"), 1, True, False

    def autocast(self):
        return contextlib.nullcontext()

    def gather(self, x):
        return x

    def reduce(self, x, reduction="sum"):
        return x

    def pad_across_processes(self, x, **_):
        return x

    gather_for_metrics = gather


def assert_same_loss(mine, stock) -> None:
    """(loss, {name: gradient}, metrics, …) of two calls: the number, every parameter's gradient and the metrics."""
    assert abs(mine[0] - stock[0]) <= 1e-5 * max(1.0, abs(stock[0]))
    assert mine[1].keys() == stock[1].keys() and mine[1]
    for name, g in stock[1].items():
        assert (mine[1][name] - g).abs().max() <= CLOSE * g.abs().max(), name
    assert mine[2].keys() == stock[2].keys() and mine[2]
    for name, (x,) in stock[2].items():
        assert abs(mine[2][name][0] - x) <= 1e-5 * max(1.0, abs(x)), name
