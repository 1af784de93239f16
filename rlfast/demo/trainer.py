"""What the trainers of both arms have in common, and a clock around the parts of a step."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

from rlfast.demo.settings import Common

ARMS = ("stock", "rlfast")


def kernels(arm: str):
    """What an arm trains under: TRL as it is, or with rlfast swapped in, its generation too."""
    import rlfast

    return rlfast.patch("trl", rollouts=True) if arm == "rlfast" else contextlib.nullcontext()


def quiet() -> None:
    """Leave the terminal to the demo's own progress."""
    import datasets
    import transformers

    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def training_of(settings: Common):
    """The module that knows this trainer: ``grpo.py`` or ``dpo.py``."""
    return importlib.import_module(f"rlfast.demo.{settings.training}")


def options(settings: Common, steps: int) -> dict:
    """The options that the trainers have in common."""
    return {
        "output_dir": str(Path(settings.model) / "runs"),  # TRL makes the folder; nothing is saved to it
        "per_device_train_batch_size": settings.batch,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": settings.checkpointing,
        "max_steps": steps,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": settings.seed,
    }


def loaded(settings: Common) -> dict:
    """Freshly loaded weights and the tokenizer, as a trainer takes them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if settings.threads:
        torch.set_num_threads(settings.threads)
    return {
        "model": AutoModelForCausalLM.from_pretrained(settings.model),
        "processing_class": AutoTokenizer.from_pretrained(settings.model, padding_side="left"),
    }


class Clock:
    """Seconds spent in each part of a step."""

    def __init__(self):
        self.seconds = Counter()
        self.rows = 0  # rows of hidden states that reached the head in the step's training forward

    def around(self, owner, name: str, part: str) -> None:
        """Time every call of ``owner.name``."""
        call = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        setattr(owner, name, timed)

    @contextlib.contextmanager
    def watch_head(self):
        """Time the language-model head, forward and backward, whichever kernel is in place."""
        import trl.trainer.utils as utils

        head, clock = utils._ChunkedLogProbFunction, self

        class Timed:
            @staticmethod
            def apply(hidden, *args):
                start = time.perf_counter()
                out = head.apply(hidden, *args)
                clock.seconds["head forward"] += time.perf_counter() - start
                if out[0].requires_grad:
                    clock.rows = hidden.shape[0]
                    clock._watch_backward(out[0].grad_fn)
                return out

        utils._ChunkedLogProbFunction = Timed
        try:
            yield
        finally:
            utils._ChunkedLogProbFunction = head

    def _watch_backward(self, node) -> None:
        began = []
        node.register_prehook(lambda _: began.append(time.perf_counter()))
        node.register_hook(lambda *_: self.seconds.update({"head backward": time.perf_counter() - began.pop()}))

    def take(self) -> dict:
        """What was counted since the last call."""
        taken, self.seconds = dict(self.seconds), Counter()
        return taken


class PeakMemory:
    """The largest resident memory of this process between ``start`` and ``stop``, sampled every 10 ms."""

    def __init__(self):
        import psutil

        self._process, self.bytes = psutil.Process(), 0

    def start(self) -> None:
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self):
        while True:
            self.bytes = max(self.bytes, self._process.memory_info().rss)
            if self._ended.wait(0.01):
                return

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
