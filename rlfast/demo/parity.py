"""Phase one: both arms consume the same recorded rollouts, and must take the same steps."""

from __future__ import annotations

import gc
from typing import NamedTuple

from rlfast.demo.settings import DemoError, Settings
from rlfast.demo.trainer import ARMS, build, kernels, quiet
from rlfast.demo.workers import Worker

LOGP_TOLERANCE = 1e-4  # nats, absolute: thirty float32 layers alone move a log-prob by some 1e-5
GRAD_NORM_TOLERANCE = 1e-4  # relative
UPDATE_TOLERANCE = 1e-3  # of the update's norm
LOSS_TOLERANCE = 1e-4  # of mean |advantage|: on policy the loss itself is near zero


class Step(NamedTuple):
    """One step of both arms, and how far they are apart."""

    loss: tuple[float, float]  # stock, rlfast
    grad_norm: tuple[float, float]
    mean_adv: float  # mean |advantage|
    flat_groups: float  # the share of groups without an advantage
    logp: float  # max |difference|, nats
    update: float  # ‖difference‖ / ‖stock's update‖

    @property
    def failures(self) -> list[str]:
        """What is out of tolerance, in words."""
        stock, ours = self.grad_norm
        checks = {
            f"log-probs {self.logp:.2g} apart, allowed {LOGP_TOLERANCE:.0e}": self.logp <= LOGP_TOLERANCE,
            f"gradient norms {stock:.7g} and {ours:.7g}, allowed {GRAD_NORM_TOLERANCE:.0e} relative": abs(stock - ours)
            <= GRAD_NORM_TOLERANCE * stock,
            f"updates {self.update:.2g} of their norm apart, allowed {UPDATE_TOLERANCE:.0e}": self.update
            <= UPDATE_TOLERANCE,
            f"losses {self.loss[0]:.7g} and {self.loss[1]:.7g}, allowed {LOSS_TOLERANCE:.0e} of mean |advantage|": abs(
                self.loss[0] - self.loss[1]
            )
            <= LOSS_TOLERANCE * self.mean_adv,
        }
        return [words for words, fine in checks.items() if not fine]


def compare(settings: Settings, progress) -> list[Step]:
    """The steps of both arms from the same weights; stock generates, rlfast is given the same completions."""
    worker = Worker(_both_arms, settings)
    steps = []
    try:
        while len(steps) < settings.parity_steps:
            message = worker.receive()
            if isinstance(message, str):
                progress(message)
            else:
                steps.append(Step(*message))
    finally:
        worker.close()
    return steps


def _both_arms(channel, settings: Settings) -> None:
    quiet()
    stock = ours = None
    rollouts = []
    for arm in ARMS:
        channel.send(f"{arm}: loading")
        seen = Seen(arm, settings, channel.send)
        trainer = build(settings, settings.parity_steps, [seen.callback()])
        seen.watch(trainer)
        if arm == "stock":
            stock = seen
            _record(trainer, rollouts)
        else:
            ours = seen
            _replay(trainer, rollouts)
        with kernels(arm):
            trainer.train()
        del trainer
        gc.collect()  # the trainer is a cycle that holds the optimizer's state
    for k in range(settings.parity_steps):
        channel.send(tuple(_apart(stock, ours, k)))


class Seen:
    """What one arm did: log-probs, loss and gradient norm of each step, and the weights before and after."""

    def __init__(self, arm: str, settings: Settings, say):
        self.arm, self.settings, self.say = arm, settings, say
        self.steps, self.weights, self._now = [], [], {}

    def watch(self, trainer) -> None:
        """Look at the trainer's own results as it trains."""
        logps, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

        def seen_logps(*args, **kwargs):
            out = logps(*args, **kwargs)
            self._now["logp"] = out[0].detach().clone()  # the training forward comes last
            return out

        def seen_loss(model, inputs):
            out = loss(model, inputs)
            self._now["loss"] = out.item()
            self._now["mean_adv"] = inputs["advantages"].abs().mean().item()
            return out

        trainer._get_per_token_logps_and_entropies, trainer._compute_loss = seen_logps, seen_loss
        self.weights.append(_flat(trainer.model))

    def callback(self):
        import torch
        from transformers import TrainerCallback

        seen = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                torch.manual_seed(seen.settings.seed + state.global_step)
                seen.say(f"{seen.arm}: step {state.global_step + 1} of {seen.settings.parity_steps}")

            def on_log(self, args, state, control, logs=None, model=None, **_):
                if "grad_norm" in logs:  # not the summary at the end of training
                    flat_groups = logs["frac_reward_zero_std"]
                    seen.steps.append({**seen._now, "grad_norm": logs["grad_norm"], "flat_groups": flat_groups})
                    seen.weights.append(_flat(model))

        return Callback()


def _flat(model):
    import torch

    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


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


def _apart(stock: Seen, ours: Seen, k: int) -> Step:
    a, b = stock.steps[k], ours.steps[k]
    update = stock.weights[k + 1] - stock.weights[k]
    difference = (ours.weights[k + 1] - ours.weights[k]).sub_(update)
    return Step(
        loss=(a["loss"], b["loss"]),
        grad_norm=(a["grad_norm"], b["grad_norm"]),
        mean_adv=a["mean_adv"],
        flat_groups=a["flat_groups"],
        logp=(a["logp"] - b["logp"]).abs().max().item(),
        update=(difference.norm() / update.norm()).item(),
    )
