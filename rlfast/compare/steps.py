"""A TRL trainer stock and patched, each in a fresh process: one step of each in turn, on the same data.

The rlfast arm is given the completions that the stock arm has generated, and the folder where that one leaves its
weights; so a step's numbers are of the same batch, and only one process works at a time.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import NamedTuple

from rlfast.compare.trainers import Settings, build
from rlfast.compare.watch import Watch, flat, logps_apart, updates_apart
from rlfast.demo.parity import Step
from rlfast.demo.trainer import ARMS, PeakMemory, quiet
from rlfast.demo.workers import Worker


class Compared(NamedTuple):
    """One step of both arms."""

    step: Step
    weights: float  # ‖difference‖ / ‖stock's weights‖
    seconds: tuple[float, float]  # stock, rlfast; without generation
    peak: tuple[int, int]  # bytes resident at most


def compare(settings: Settings, folder: Path, progress=lambda _: None, mistake: float = 1.0) -> list[Compared]:
    """The steps of both arms; ``mistake`` is what rlfast's loss is multiplied by, to see whether it would show."""
    workers = {arm: Worker(_train, arm, settings, str(folder), mistake) for arm in ARMS}
    steps = []
    try:
        for arm, worker in workers.items():
            progress(f"{arm}: loading")
            worker.receive()
        for k in range(settings.steps):
            done, rollouts = {}, None
            for arm in ARMS:
                progress(f"{arm}: step {k + 1} of {settings.steps}")
                workers[arm].send(rollouts)
                done[arm] = workers[arm].receive()
                rollouts = done[arm].pop("rollouts")
            steps.append(_compared(done["stock"], done["rlfast"]))
    finally:
        for worker in workers.values():
            worker.close()
    return steps


def _compared(stock: dict, ours: dict) -> Compared:
    loss, grad_norm, seconds, peak = ((stock[x], ours[x]) for x in ("loss", "grad_norm", "seconds", "peak"))
    scale = max(1.0, abs(stock["loss"]))  # a policy's loss is near zero, and made of advantages of order one
    step = Step(loss, grad_norm, scale, logps_apart(ours["logps"], stock["logps"]), ours["update"])
    return Compared(step, ours["weights"], seconds, peak)


def _train(channel, arm: str, settings: Settings, folder: str, mistake: float) -> None:
    """Runs in the arm's process: a step for each message, answered with what it did."""
    quiet()
    import rlfast

    loop = _Loop(channel, arm == "stock", Path(folder), settings.seed, mistake)
    trainer = build(settings, [loop.callback()])
    loop.watch.around(trainer)
    with rlfast.patch("trl") if arm == "rlfast" else contextlib.nullcontext():
        channel.send("ready")
        trainer.train()


class _Loop:
    """The trainer's end of the pipe."""

    def __init__(self, channel, stock: bool, folder: Path, seed: int, mistake: float):
        self.channel, self.stock, self.folder, self.seed = channel, stock, folder, seed
        self.watch, self.memory = Watch(1.0 if stock else mistake), PeakMemory()
        self.step, self.before = 0, None

    def begin(self, model) -> None:
        """Wait for the word; then the clock runs."""
        given = self.channel.recv()
        if self.before is None:
            self._apart(flat(model))
        self.watch.start(self.seed + self.step, given)
        self.memory.start()
        self.began = time.perf_counter()

    def end(self) -> None:
        self.seconds = time.perf_counter() - self.began - self.watch.generation
        self.memory.stop()

    def tell(self, logs: dict, model) -> None:
        """After the optimizer's step."""
        self.step += 1
        seen = {name: getattr(self.watch, name) for name in ("loss", "logps", "rollouts")}
        measured = {"grad_norm": logs["grad_norm"], "seconds": self.seconds, "peak": self.memory.bytes}
        self.channel.send(self._apart(flat(model)) | seen | measured)

    def _apart(self, weights) -> dict:
        """Stock leaves its weights in the folder, where rlfast looks how far its own are from them."""
        import numpy as np

        here, apart = self.folder / f"stock-{self.step}.npy", {}
        if self.stock:
            np.save(here, weights)
            (self.folder / f"stock-{self.step - 2}.npy").unlink(missing_ok=True)
        elif self.before is not None:
            theirs = np.load(self.folder / f"stock-{self.step - 1}.npy"), np.load(here)
            apart = dict(zip(("update", "weights"), updates_apart((self.before, weights), theirs), strict=True))
        self.before = weights
        return apart

    def callback(self):
        """For the trainer."""
        from transformers import TrainerCallback

        loop = self

        class Callback(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **_):
                loop.begin(model)

            def on_step_end(self, args, state, control, **_):
                loop.end()

            def on_log(self, args, state, control, logs=None, model=None, **_):
                if "grad_norm" in logs:  # not the summary at the end of training
                    loop.tell(logs, model)

        return Callback()
