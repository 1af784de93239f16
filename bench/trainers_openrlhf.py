"""OpenRLHF's functions for ``bench.trainers``."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import torch

from bench.trainers import Row, pulled
from rlfast.integrations import openrlhf as ours

ROWS, VOCAB = 256, 65536


@functools.cache
def theirs():
    """OpenRLHF's ``models.utils``, without DeepSpeed; no other code finds the modules that stand in for the rest."""
    from tools.trainer_code import openrlhf

    folder, before = Path(importlib.util.find_spec("openrlhf").origin).parents[1], dict(sys.modules)
    try:
        return openrlhf(folder)[1]
    finally:
        for name in [x for x in sys.modules if x.partition(".")[0] in ("openrlhf", "deepspeed")]:
            del sys.modules[name]
        sys.modules.update(before)


def log_probs(small: bool):
    """Log-probs of a batch of bfloat16 logits, forward and backward."""
    torch.manual_seed(0)
    rows, vocab = (4, 512) if small else (ROWS, VOCAB)
    data, labels = {"logits": torch.randn(1, rows, vocab).bfloat16()}, torch.randint(vocab, (1, rows))

    def call(function):
        return lambda logits: {"logp": function(logits, labels)}

    return tuple(pulled(call(f.log_probs_from_logits), data) for f in (theirs(), ours))


def rows() -> list[Row]:
    """The rows."""
    return [Row("OpenRLHF", f"log_probs_from_logits {ROWS}×{VOCAB} bfloat16", 6.0, log_probs, gate=0.1)]
