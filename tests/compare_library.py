"""A small library and its table for ``rlfast.compare.functions``; ``off`` says by how much a patch makes it wrong.

Processes that are started anew import it, so what is asked of it comes by the environment.
"""

from __future__ import annotations

import logging
import os
import sys
from types import SimpleNamespace

import torch

from rlfast.compare.functions import Case

LIBRARY, OURS = "a library", "tests.compare_library"
WRONG = "RLFAST_TEST_COMPARED"  # "values", "gradients", "missing" or nothing


def entropy(logits, temperature=1.0):
    logits.div_(temperature)  # as OpenRLHF does
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1), {"tokens": len(logits), "none": None}


def product(x, y):
    return x @ y


def alone(logits):
    """What no patch replaces."""
    return logits.amax(-1)


class Loss:
    def __init__(self, weight):
        self.weight = weight

    def forward(self, logits):
        return self.weight * entropy(logits)[0].mean()

    def __call__(self, logits):
        return self.forward(logits)


def load() -> list[str]:
    if os.environ.get(WRONG) == "missing":
        raise ImportError("No module named 'nonesuch'")
    return ["it is small"]


def patch():
    """Other functions in their place, that are off by 1% where they are asked to be."""
    here, wrong, theirs, forward = sys.modules[__name__], os.environ.get(WRONG), entropy, Loss.forward
    off = {"values": lambda x: 1.01 * x, "gradients": lambda x: 1.01 * x - 0.01 * x.detach()}.get(wrong, lambda x: x)

    def ours(logits, temperature=1.0):
        if len(logits) == 3:
            logging.getLogger("rlfast.integrations").warning("it runs as it is: three rows")
        value, metrics = theirs(logits, temperature)
        return off(value), metrics

    here.entropy, Loss.forward = ours, lambda self, logits: off(forward(self, logits))
    return SimpleNamespace(replaced=(f"{OURS}.entropy", f"{OURS}.Loss.forward", f"{OURS}.product"))


def _logits(rows: int, **options):
    return lambda draw: {"logits": torch.randn(rows, 9, generator=draw)} | options


def _pair(draw) -> dict:
    return {"x": torch.randn(2, 3, generator=draw), "y": torch.randn(3, 2, generator=draw)}


CASES = (
    Case(OURS, "entropy", _logits(5, temperature=0.7), ("logits",), note="0.7"),
    Case(OURS, "entropy", _logits(3)),
    Case(OURS, "Loss", _logits(5), ("logits",), {"weight": 3.0}),
    Case(OURS, "alone", _logits(5)),
    Case(OURS, "product", _pair, ("x", "y"), positional=True),
    Case(OURS, "product", _pair, gpu=not torch.cuda.is_available(), note="of a GPU"),
)
