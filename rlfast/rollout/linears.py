"""``nn.Linear`` of a model on rlfast's batch-invariant kernel, for as long as a context lasts."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from rlfast.linear import linear

DTYPES = (torch.float32, torch.bfloat16)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def swappable(module: nn.Module) -> bool:
    """Whether a module is a plain ``nn.Linear``: no subclass, not quantised, not parametrised, without hooks.

    The base layer of a PEFT layer is one, and so are its adapters.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__ or any(getattr(module, name) for name in _HOOKS):
        return False
    weight = module.weight
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.device.type == "cpu" and weight.dtype in DTYPES


@contextlib.contextmanager
def swapped(modules):
    """Within it, the ``forward`` of these modules is the kernel's; they have their own again on any exit.

    Weights are read in place at every call, so that an update is never stale.
    """
    done = []
    try:
        for module in modules:
            if swappable(module):
                module.forward = _forward_of(module)
                done.append(module)
        yield
    finally:
        for module in done:
            module.__dict__.pop("forward", None)


def _forward_of(module: nn.Linear):
    def forward(x):
        return linear(x, module.weight, module.bias)

    return forward
