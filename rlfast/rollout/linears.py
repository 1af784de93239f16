"""``nn.Linear`` of a model on rlfast's batch-invariant kernel, for as long as a context lasts."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

import torch
from torch import nn

from rlfast.linear import linear

DTYPES = (torch.float32, torch.bfloat16)
_hooks = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain(module: nn.Module) -> bool:
    """Whether a module is ``nn.Linear`` itself: no subclass, not quantised, not parametrised, without hooks.

    The base layer of a PEFT layer is one, and so are its adapters.
    """
    own = module.__dict__
    return type(module) is nn.Linear and "forward" not in own and not any(_hooks(own))


def swappable(module: nn.Module) -> bool:
    """Whether a module is plain, and its weight one that the kernel keeps its promise for."""
    if not plain(module):
        return False
    weight = module._parameters.get("weight")
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.is_cpu and weight.dtype in DTYPES


def forward_of(module: nn.Linear, wide: bool = False) -> Callable:
    """The kernel in a module's place; it reads the weights in place at every call, so that no update is stale.

    ``wide`` is for a head: its logits are float32.
    """
    parameters = module._parameters

    def forward(input):
        return linear(input, parameters["weight"], parameters["bias"], wide=wide)

    return forward


@contextlib.contextmanager
def swapped(forwards: dict[nn.Linear, Callable]):
    """Within it, the ``forward`` of these modules is the kernel's; they have their own again on any exit."""
    done = []
    try:
        for module, forward in forwards.items():
            if swappable(module):
                module.__dict__["forward"] = forward  # past nn.Module's way, which took most of a step's swaps
                done.append(module)
        yield
    finally:
        for module in done:
            module.__dict__.pop("forward", None)
