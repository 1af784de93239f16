"""The second half: DPOTrainer, on pairs of the model's own answers."""

from __future__ import annotations

import dataclasses

from rlfast.demo import pairs
from rlfast.demo.settings import DpoSettings
from rlfast.demo.trainer import Clock, loaded, options

NAME, STEM = "DPO", "demo-dpo"
SAME, OWN = "same pairs", "same pairs"  # what parity and speed are measured on
# rows of the speed table: name, key of a step, format
MEASURED = (("rows through the head", "rows", ".0f"), ("reward margin", "margin", "+.5f"), ("loss", "loss", "+.5f"))


def prepared(settings: DpoSettings, progress) -> DpoSettings:
    """With the pairs made, or found where an earlier run put them."""
    return dataclasses.replace(settings, pairs_file=str(pairs.prepare(settings, progress)))


def describe(settings: DpoSettings) -> str:
    """A step, in words."""
    return (
        f"{settings.batch} pairs of a right and a wrong answer of at most {settings.max_completion} tokens a step, "
        f"loss {settings.loss_type}"
    )


def build(settings: DpoSettings, steps: int, callbacks=()):
    """A DPOTrainer and its reference on freshly loaded weights. Both arms see the same pairs in one order."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        **loaded(settings),
        args=DPOConfig(**options(settings, steps), beta=settings.beta, loss_type=settings.loss_type.split(",")),
        train_dataset=Dataset.from_list(pairs.read(settings)),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_parts(clock: Clock, trainer) -> None:
    """Time the loss, policy and reference scored, and the backward."""
    clock.around(trainer, "compute_loss", "logps")
    clock.around(trainer.accelerator, "backward", "backward")


def logged(logs: dict) -> dict:
    """What a step keeps of TRL's metrics."""
    return {"margin": logs["rewards/margins"], "accuracy": logs["rewards/accuracies"]}


def observe(trainer, now: dict) -> None:
    """Put log-probs and loss of each step into ``now``."""
    import torch

    def seen_loss(*args):
        out = type(trainer)._compute_loss(trainer, *args)  # looked up when it is called: the patch replaces it
        now["loss"] = out.item()
        now["scale"] = abs(out.item())
        return out

    def seen_logps(_, __, out):
        if torch.is_grad_enabled():
            now["logp"] = out.log_probs.detach().clone()

    trainer._compute_loss = seen_loss
    trainer.model.register_forward_hook(seen_logps)


def share(trainer, arm: str, kept: list) -> None:
    """Nothing: the pairs are in the data set."""


def failures(parity: list, timed: dict[str, list[dict]]) -> list[str]:
    """None: without enough pairs it does not come to a step."""
    return []
