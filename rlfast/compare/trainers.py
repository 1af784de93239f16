"""TRL's trainers for a comparison: which options each has, and how one is built on a model's folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rlfast.compare.tiny import PROMPTS, conversations, rewards, tiny, word_tokenizer
from rlfast.demo import model as smollm2
from rlfast.demo.settings import Common, DemoError, at_least
from rlfast.demo.trainer import loaded, options


class Kind(NamedTuple):
    """A trainer, its options beside those that all have, the columns of its data, and what it calls its losses."""

    trainer: str  # TRL's name before "Trainer" and "Config"
    options: dict
    columns: tuple[str, ...]
    losses: tuple[str, ...] = ()

    @property
    def online(self) -> bool:
        """Whether it generates."""
        return self.columns == ("prompt",)


ONLINE = {"num_generations": 2, "max_completion_length": 8, "beta": 0.04}
REWARDED = ("GRPO", "RLOO")
PAIRED, SINGLE = ("prompt", "chosen", "rejected"), ("prompt", "completion", "label")
GRPO = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
DPO = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
       "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
KINDS = {
    "grpo": Kind("GRPO", ONLINE, ("prompt",), GRPO),
    "rloo": Kind("RLOO", ONLINE, ("prompt",)),
    "sft": Kind("SFT", {"completion_only_loss": True}, ("prompt", "completion"), ("nll", "dft")),
    "dpo": Kind("DPO", {}, PAIRED, DPO),
    "kto": Kind("KTO", {"undesirable_weight": 1.5}, SINGLE, ("kto", "apo_zero_unpaired")),
}
OWN_OPTIONS = {"luspo": {"importance_sampling_level": "sequence"}, "exo_pair": {"label_smoothing": 0.1}}


@dataclass(frozen=True)
class Settings(Common):
    """One comparison."""

    trainer: str = "grpo"  # of KINDS
    loss_type: str = ""  # one of the trainer's configuration; "": its default
    batch: int = 4
    learning_rate: float = 1e-4


def check(settings: Settings) -> None:
    """Raise DemoError, with the option's name, for what no trainer can be built of."""
    if settings.trainer not in KINDS:
        raise DemoError(f"--trainer: expected one of {tuple(KINDS)}, got {settings.trainer!r}")
    kind, asked = KINDS[settings.trainer], settings.loss_type.split(",") if settings.loss_type else []
    at_least(1, steps=settings.steps, batch=settings.batch)
    at_least(0, threads=settings.threads, seed=settings.seed)
    if not 0 < settings.learning_rate < float("inf"):
        raise DemoError(f"--learning-rate: expected a float > 0, got {settings.learning_rate}")
    group, most = ONLINE["num_generations"], len(PROMPTS) * ONLINE["num_generations"]
    if kind.online and (settings.batch % group or settings.batch > most):
        wanted = f"a multiple of {group}, the completions of a prompt, and at most {most}"
        raise DemoError(f"--batch: expected {wanted}, got {settings.batch}")
    if kind.trainer == "KTO":
        at_least(2, batch=settings.batch)  # its KL is of a batch's other completions
    if len(asked) > 1 and settings.trainer != "dpo":
        raise DemoError(f"--loss-type: expected one name, as only DPO adds losses up, got {settings.loss_type!r}")
    for name in asked:
        if name not in kind.losses:
            wanted = f"one of {kind.losses}" if kind.losses else f"nothing: {settings.trainer} has one loss"
            raise DemoError(f"--loss-type: expected {wanted}, got {name!r}")


def prepared(settings: Settings, folder: Path) -> Settings:
    """With a model to load: "tiny" becomes a random one in ``folder``, "smollm2" the demo's; else it is a folder.

    Raises:
        DemoError: there is no such trainer, loss or model, or a number is out of its range.
    """
    check(settings)
    if settings.model == "tiny":
        tiny("Qwen2").save_pretrained(folder / "model")
        word_tokenizer().save_pretrained(folder / "model")
        return replace(settings, model=str(folder / "model"))
    if settings.model == "smollm2":
        return replace(settings, model=str(smollm2.prepare()))
    if not (Path(settings.model) / "config.json").exists():
        raise DemoError(f"--model: expected tiny, smollm2 or the folder of a model, got {settings.model!r}")
    return settings


def build(settings: Settings, callbacks=()):
    """The trainer of an arm, on freshly loaded weights. Both arms get the same options and see the same data."""
    kind = KINDS[settings.trainer]
    given = options(settings, settings.steps) | kind.options
    if settings.loss_type:
        given["loss_type"] = settings.loss_type.split(",") if settings.trainer == "dpo" else settings.loss_type
    for name in settings.loss_type.split(","):
        given |= OWN_OPTIONS.get(name, {})
    return trainer_of(kind, given, loaded(settings), callbacks)


def trainer_of(kind: Kind, given: dict, model: dict, callbacks, evaluates: bool = False, cls=None, **more):
    """A trainer with these options on ``model``, a dict of model and processing_class; its data is always the same.

    ``cls`` is its class, by default TRL's own.
    """
    import trl
    from datasets import Dataset
    from transformers import PrinterCallback

    rows = Dataset.from_list(conversations(*kind.columns))
    trainer = (cls or getattr(trl, f"{kind.trainer}Trainer"))(
        **model,
        args=getattr(trl, f"{kind.trainer}Config")(**given),
        train_dataset=rows,
        eval_dataset=rows if evaluates else None,
        callbacks=list(callbacks),
        **({"reward_funcs": rewards} if kind.trainer in REWARDED else {}),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
