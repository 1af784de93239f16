"""The first half: GRPOTrainer, on rollouts of its own."""

from __future__ import annotations

import statistics

from rlfast.demo.settings import DemoError, Settings
from rlfast.demo.task import closeness, problems
from rlfast.demo.trainer import Clock, loaded, options

NAME, STEM = "GRPO", "demo"
SAME, OWN = "same rollouts", "own rollouts"  # what parity and speed are measured on
# rows of the speed table: name, key of a step, format
MEASURED = (("rows through the head", "rows", ".0f"), ("reward", "reward", ".2f"), ("loss", "loss", "+.4f"))
PROMPTS = 256
FLAT_GROUPS_ALLOWED = 0.5


def describe(settings: Settings) -> str:
    """A step, in words."""
    return f"{settings.batch} completions of at most {settings.max_completion} tokens a step"


def build(settings: Settings, steps: int, callbacks=()):
    """A GRPOTrainer on freshly loaded weights. Both arms get the same options and see the same prompts in one order."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    trainer = GRPOTrainer(
        **loaded(settings),
        reward_funcs=closeness,
        args=GRPOConfig(
            **options(settings, steps),
            num_generations=settings.generations,
            max_completion_length=settings.max_completion,
            temperature=settings.temperature,
            beta=settings.beta,
        ),
        train_dataset=Dataset.from_list(problems(PROMPTS, settings.seed)),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def time_parts(clock: Clock, trainer) -> None:
    """Time generation, log-probs and backward."""
    clock.around(trainer, "_generate_single_turn", "generation")
    clock.around(trainer, "_get_per_token_logps_and_entropies", "logps")
    clock.around(trainer.accelerator, "backward", "backward")


def logged(logs: dict) -> dict:
    """What a step keeps of TRL's metrics."""
    return {
        "reward": logs["reward"],
        "flat_groups": logs["frac_reward_zero_std"],
        "tokens": logs["completions/mean_length"],
    }


def observe(trainer, now: dict) -> None:
    """Put log-probs, loss and mean |advantage| of each step into ``now``: on policy the loss itself is near zero."""
    logps, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def seen_logps(*args, **kwargs):
        out = logps(*args, **kwargs)
        now["logp"] = out[0].detach().clone()  # the training forward comes last
        return out

    def seen_loss(model, inputs):
        out = loss(model, inputs)
        now["loss"] = out.item()
        now["scale"] = inputs["advantages"].abs().mean().item()
        return out

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = seen_logps, seen_loss


def share(trainer, arm: str, rollouts: list) -> None:
    """Keep what stock generates, and give it to rlfast."""
    (_record if arm == "stock" else _replay)(trainer, rollouts)


def _record(trainer, rollouts: list) -> None:
    """Keep what is generated. TRL shuffles a batch after generation, so the random numbers start afresh there."""
    import torch

    generate = trainer._generate_single_turn

    def recorded(prompt_ids, *args, **kwargs):
        out = generate(prompt_ids, *args, **kwargs)
        rollouts.append((prompt_ids, out))
        torch.manual_seed(len(rollouts))
        return out

    trainer._generate_single_turn = recorded


def _replay(trainer, rollouts: list) -> None:
    """Give out what was kept, with the random numbers in the same state."""
    import torch

    waiting = iter(enumerate(rollouts, 1))

    def replayed(prompt_ids, *_, **__):
        number, (prompts, out) = next(waiting)
        torch.manual_seed(number)
        if prompts != prompt_ids:
            raise DemoError("parity: the two arms were given different prompts")
        return out

    trainer._generate_single_turn = replayed


def failures(parity: list, timed: dict[str, list[dict]]) -> list[str]:
    """Too little to learn from."""
    flat = [step.flat_groups for step in parity]
    flat += [step["flat_groups"] for steps in timed.values() for step in steps]
    share = statistics.mean(flat)
    if share <= FLAT_GROUPS_ALLOWED:
        return []
    return [
        f"{share:.0%} of the groups had no advantage, at most {FLAT_GROUPS_ALLOWED:.0%} may: "
        "too little to learn from; raise --temperature or --generations"
    ]
