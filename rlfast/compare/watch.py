"""What a trainer does in a step: losses, log-probs, and the completions that it makes or is given."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rlfast.demo.settings import DemoError


class Watch:
    """The numbers of the step under way, from ``start`` on.

    ``scaled`` is what the loss is multiplied by: a way to see whether a mistake would show.
    """

    def __init__(self, scaled: float = 1.0):
        self.scaled = scaled
        self.start(0)

    def start(self, seed: int, given: Iterable | None = None) -> None:
        """A new step, whose random numbers are of this seed; ``given`` are the completions of an earlier run of it."""
        import torch

        torch.manual_seed(seed)
        self.seed, self.given = seed, None if given is None else iter(given)
        self.loss, self.logps, self.rollouts, self.generation = 0.0, [], [], 0.0  # the last in seconds

    def around(self, trainer) -> None:
        """Watch this trainer."""
        import torch

        def compute_loss(*args, **kwargs):
            # looked up when it is called: a patch replaces it
            out = type(trainer).compute_loss(trainer, *args, **kwargs)
            if not torch.is_grad_enabled():
                return out
            self.loss += out.item() * self.scaled
            return out * self.scaled

        def scored(_, __, out):
            if torch.is_grad_enabled() and getattr(out, "log_probs", None) is not None:
                self.logps.append(out.log_probs.detach().float().numpy().copy())

        trainer.compute_loss = compute_loss
        trainer.model.register_forward_hook(scored)
        if hasattr(trainer, "_generate_single_turn"):
            trainer._generate_single_turn = self._generation(trainer)

    def _generation(self, trainer):
        import torch

        def generate(prompt_ids, *args, **kwargs):
            start = time.perf_counter()
            if self.given is None:
                out = type(trainer)._generate_single_turn(trainer, prompt_ids, *args, **kwargs)
            else:
                prompts, out = next(self.given)
                if prompts != prompt_ids:
                    raise DemoError("the two runs were given different prompts")
            self.rollouts.append((prompt_ids, out))
            torch.manual_seed(self.seed)  # TRL shuffles a batch after generation
            self.generation += time.perf_counter() - start
            return out

        return generate


def flat(model):
    """Every weight of a model, one after the other, float32 in NumPy."""
    import numpy as np

    return np.concatenate([p.detach().float().reshape(-1).numpy() for p in model.parameters()])


def updates_apart(mine, stock) -> tuple[float, float]:
    """Of (before, after) of two runs: (‖difference of updates‖ / ‖stock's update‖, the same of the weights)."""
    import numpy as np

    update = stock[1] - stock[0]
    off = np.linalg.norm((mine[1] - mine[0]) - update) / np.linalg.norm(update)
    return float(off), float(np.linalg.norm(mine[1] - stock[1]) / np.linalg.norm(stock[1]))


def logps_apart(mine: list, stock: list) -> float:
    """The largest difference of the log-probs of a step, in nats."""
    return float(max((abs(a - b).max() for a, b in zip(mine, stock, strict=True)), default=0.0))
