"""Whether the weights are those of a moment ago."""

from __future__ import annotations

import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

# What PEFT's layers have of their adapters beside parameters; read at every step
SWITCHES = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")


class Weights:
    """The parameters of a model under training, and a number that changes whenever they do.

    In place a parameter counts its changes, but for optimisers of fused kernels, such as ``AdamW(fused=True)``, which
    transformers' trainers take by default: torch calls a hook after the step of any of its optimisers. Neither sees a
    change by ``.data`` or by a raw pointer. Which of PEFT's adapters are on, and at what scale, belongs to the policy.

    Args:
        model: whose parameters and adapters are watched.
    """

    def __init__(self, model: torch.nn.Module):
        self.parameters, self.steps = tuple(model.parameters()), 0
        self.adapted = [vars(m) for m in model.modules() if hasattr(m, "_disable_adapters")]
        this = weakref.ref(self)

        def stepped(optimizer, *_):
            weights = this()
            if weights is not None and weights.shares(optimizer):
                weights.steps += 1

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def shares(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimiser's parameters lie where one of these does, as flattened ones do."""
        places = {_place(p) for group in optimizer.param_groups for p in group["params"]}
        return any(_place(p) in places for p in self.parameters)

    def now(self) -> int:
        """The number."""
        return hash((self.steps, self.places(), *(p._version for p in self.parameters)))

    def places(self) -> int:
        """Changes when a parameter lies elsewhere, or an adapter is switched or scaled."""
        return hash((self._switches(), *(p.data_ptr() for p in self.parameters)))

    def _switches(self) -> tuple:
        return tuple([_frozen(own.get(name)) for own in self.adapted for name in SWITCHES])


def _frozen(x):
    return tuple(x.items()) if isinstance(x, dict) else tuple(x) if isinstance(x, list) else x


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()
