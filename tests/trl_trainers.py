"""TRL's trainers on tiny random models, and what two runs of one must have in common."""

from __future__ import annotations

import contextlib

import torch
import transformers
import trl

from rlfast.demo.parity import GRAD_NORM_TOLERANCE, LOSS_TOLERANCE, UPDATE_TOLERANCE

STEPS = 3
WORDS = "the a cat dog sat ran on mat hill red blue big small and or then one two three four is was no".split()  # noqa: SIM905
PROMPTS = ("the cat sat", "a dog ran on the hill", "one and two is", "big red mat", "no", "the small blue dog was not")
VOCAB = 151  # the head has more rows than the tokenizer has words, and an odd number of them


def word_tokenizer():
    """One token a word, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,  # large, so that the log-probs of a random model are far from uniform
}


def tiny(family: str = "Llama", task: str = "CausalLM", **options):
    """A random model of a family."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    return getattr(transformers, f"{family}For{task}")(config)


def conversations(*columns):
    """Rows of preference, completion or plain data over the tiny vocabulary."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
        row = {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": say("yes the " + prompt),
            "rejected": say("no " + " ".join(WORDS[i : i + 4])),
            "completion": say(prompt + " and then " + WORDS[-i]),
            "label": i % 2 == 0,
            "margin": 0.25 * i,
        }
        rows.append({name: row[name] for name in columns})
    return rows


def rewards(completions, **_):
    return [len(set(c[0]["content"].split())) / 8 for c in completions]


ONLINE = {"num_generations": 2, "max_completion_length": 8, "beta": 0.04}
PAIRED, SINGLE = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
# name -> (trainer, options, columns)
KINDS = {
    "GRPO": ("GRPO", ONLINE, ("prompt",)),
    "RLOO": ("RLOO", ONLINE, ("prompt",)),
    "SFT": ("SFT", {"completion_only_loss": True}, ("prompt", "completion")),
    "DPO": ("DPO", {"loss_type": ["sigmoid"]}, PAIRED),
    "DPO mixture": ("DPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, PAIRED),
    "DPO IPO": ("DPO", {"loss_type": "ipo", "ld_alpha": 0.5, "precompute_ref_log_probs": True}, PAIRED),
    "DPO WPO": ("DPO", {"use_weighting": True, "f_divergence_type": "js_divergence"}, PAIRED),
    "KTO": ("KTO", {"undesirable_weight": 1.5}, SINGLE),
    "KTO APO": ("KTO", {"loss_type": "apo_zero_unpaired", "desirable_weight": 0.5}, SINGLE),
    "Reward": ("Reward", {"center_rewards_coefficient": 0.05}, PAIRED),
    "Reward margin": ("Reward", {}, (*PAIRED, "margin")),
}


def trainer_of(kind: str, tokenizer, folder, callback):
    """A trainer of ``KINDS`` on a tiny model, which evaluates after its steps."""
    from datasets import Dataset

    name, extra, columns = KINDS[kind]
    options = {
        "output_dir": str(folder),
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
    online = name in ("GRPO", "RLOO")
    task = "SequenceClassification" if name == "Reward" else "CausalLM"
    head = {"num_labels": 1} if name == "Reward" else {"tie_word_embeddings": name != "DPO"}
    tiny("Qwen2", task, **head).save_pretrained(folder / "model")  # references are loaded from there
    rows = Dataset.from_list(conversations(*columns))
    if not online:
        options |= {"eval_strategy": "steps", "eval_steps": STEPS, "per_device_eval_batch_size": 4}
    trainer = getattr(trl, f"{name}Trainer")(
        model=getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder / "model"),
        processing_class=tokenizer,
        args=getattr(trl, f"{name}Config")(**options, **extra),
        train_dataset=rows,
        eval_dataset=None if online else rows,
        callbacks=[callback],
        **({"reward_funcs": rewards} if online else {}),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


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
