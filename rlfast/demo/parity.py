"""Phase one: both arms consume the same recorded rollouts, or pairs, and must take the same steps."""

from __future__ import annotations

import gc
from typing import NamedTuple

from rlfast.compare.watch import flat, updates_apart
from rlfast.demo.settings import Common
from rlfast.demo.trainer import ARMS, kernels, quiet, training_of
from rlfast.demo.workers import Worker

LOGP_TOLERANCE = 1e-4  # nats, absolute: thirty float32 layers alone move a log-prob by some 1e-5
GRAD_NORM_TOLERANCE = 1e-4  # relative
UPDATE_TOLERANCE = 1e-3  # of the update's norm
LOSS_TOLERANCE = 1e-4  # of what the loss is made of
WEIGHTS_TOLERANCE = 1e-5  # of the weights' norm


class Tolerances(NamedTuple):
    """How far two arms may be apart."""

    logp: float = LOGP_TOLERANCE
    grad_norm: float = GRAD_NORM_TOLERANCE
    update: float = UPDATE_TOLERANCE
    loss: float = LOSS_TOLERANCE
    weights: float = WEIGHTS_TOLERANCE


TOLERANCES = Tolerances()


class Step(NamedTuple):
    """One step of both arms, and how far they are apart."""

    loss: tuple[float, float]  # stock, rlfast
    grad_norm: tuple[float, float]
    scale: float  # what the loss is made of: mean |advantage|, or the loss itself
    logp: float  # max |difference|, nats
    update: float  # ‖difference‖ / ‖stock's update‖
    flat_groups: float = 0.0  # the share of groups without an advantage

    @property
    def failures(self) -> list[str]:
        """What is out of the demo's tolerances, in words."""
        return self.beyond(TOLERANCES)

    def beyond(self, allowed: Tolerances) -> list[str]:
        """What is out of tolerance, in words; NaN is."""
        (stock, ours), (theirs, mine) = self.grad_norm, self.loss
        checks = {
            f"log-probs {self.logp:.2g} apart, allowed {allowed.logp:.0e}": self.logp <= allowed.logp,
            f"gradient norms {stock:.7g} and {ours:.7g}, allowed {allowed.grad_norm:.0e} relative": abs(stock - ours)
            <= allowed.grad_norm * stock,
            f"updates {self.update:.2g} of their norm apart, allowed {allowed.update:.0e}": self.update
            <= allowed.update,
            f"losses {theirs:.7g} and {mine:.7g}, allowed {allowed.loss:.0e} of {self.scale:.3g}": abs(theirs - mine)
            <= allowed.loss * self.scale,
        }
        return [words for words, fine in checks.items() if not fine]


def compare(settings: Common, progress) -> list[Step]:
    """The steps of both arms from the same weights; if any completions are generated, then by stock, for both."""
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


def _both_arms(channel, settings: Common) -> None:
    quiet()
    training, kept, seen = training_of(settings), [], {}
    for arm in ARMS:
        channel.send(f"{arm}: loading")
        seen[arm] = Seen(arm, settings, channel.send)
        trainer = training.build(settings, settings.parity_steps, [seen[arm].callback()])
        seen[arm].watch(trainer)
        training.share(trainer, arm, kept)
        with kernels(arm):
            trainer.train()
        del trainer
        gc.collect()  # the trainer is a cycle that holds the optimizer's state
    for k in range(settings.parity_steps):
        channel.send(tuple(_apart(*(seen[arm] for arm in ARMS), k)))


class Seen:
    """What one arm did: log-probs, loss and gradient norm of each step, and the weights before and after."""

    def __init__(self, arm: str, settings: Common, say):
        self.arm, self.settings, self.say = arm, settings, say
        self.steps, self.weights, self._now = [], [], {}

    def watch(self, trainer) -> None:
        """Look at the trainer's own results as it trains."""
        training_of(self.settings).observe(trainer, self._now)
        self.weights.append(flat(trainer.model))

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
                    kept = training_of(seen.settings).logged(logs)
                    seen.steps.append({**seen._now, "grad_norm": logs["grad_norm"], **kept})
                    seen.weights.append(flat(model))

        return Callback()


def _apart(stock: Seen, ours: Seen, k: int) -> Step:
    a, b = stock.steps[k], ours.steps[k]
    update, _ = updates_apart(ours.weights[k : k + 2], stock.weights[k : k + 2])
    return Step(
        loss=(a["loss"], b["loss"]),
        grad_norm=(a["grad_norm"], b["grad_norm"]),
        scale=a["scale"],
        flat_groups=a.get("flat_groups", 0.0),
        logp=(a["logp"] - b["logp"]).abs().max().item(),
        update=update,
    )
