"""Phase two: each arm trains in a process of its own, on its own rollouts or the pairs, one step of each in turn."""

from __future__ import annotations

import time

from rlfast.demo.settings import Common
from rlfast.demo.trainer import ARMS, Clock, PeakMemory, kernels, quiet, training_of
from rlfast.demo.workers import Worker


def train_on_command(channel, arm: str, settings: Common) -> None:
    """Runs in the arm's process: a step for each message, answered with its measurements."""
    quiet()
    import torch
    from transformers import TrainerCallback

    clock, memory, training = Clock(), PeakMemory(), training_of(settings)

    class OnCommand(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            channel.recv()
            torch.manual_seed(settings.seed + state.global_step)  # both arms draw the same random numbers
            memory.start()
            clock.take()
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            self.whole = time.perf_counter() - self.start
            memory.stop()

        def on_log(self, args, state, control, logs=None, **_):
            if "grad_norm" not in logs:
                return  # the summary at the end of training
            channel.send(
                {
                    "seconds": clock.take() | {"whole": self.whole},
                    "rows": clock.rows,
                    "peak": memory.bytes,
                    "loss": logs["loss"],
                    **training.logged(logs),
                }
            )

    trainer = training.build(settings, settings.total_steps, [OnCommand()])
    with kernels(arm):
        training.time_parts(clock, trainer)  # the methods that are in place by now
        channel.send("ready")
        with clock.watch_head():
            trainer.train()


def measure(settings: Common, progress) -> dict[str, list[dict]]:
    """The timed steps of each arm; ``progress(text)`` is called before each step."""
    workers = {arm: Worker(train_on_command, arm, settings) for arm in ARMS}
    steps = {arm: [] for arm in ARMS}
    try:
        for arm, worker in workers.items():
            progress(f"{arm}: loading")
            worker.receive()
        for step in range(settings.total_steps):
            for arm in ARMS if step % 2 == 0 else ARMS[::-1]:
                progress(f"{arm}: " + (f"step {step} of {settings.steps}" if step else "warm-up"))
                workers[arm].send("step")
                steps[arm].append(workers[arm].receive())
    finally:
        for worker in workers.values():
            worker.close()
    return {arm: measured[1:] for arm, measured in steps.items()}


def parts(step: dict) -> dict[str, float]:
    """A step's seconds by part; the parts of the first level add up to the whole."""
    s = step["seconds"]
    generation = {"generation": s["generation"]} if "generation" in s else {}
    return {
        **generation,
        "log-probs": s["logps"],
        "· of which head": s["head forward"],
        "backward": s["backward"],
        "· of which head ": s["head backward"],
        "other": s["whole"] - s.get("generation", 0.0) - s["logps"] - s["backward"],
        "whole step": s["whole"],
    }
