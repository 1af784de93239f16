"""More than one process: heads, batches and rows that ranks share."""

from __future__ import annotations

import importlib

# Floors below import a module of this package while it is still being made: a public name is looked up when asked for.
_HOME = {
    "Gathered": "gather",
    "LengthShare": "data",
    "Partitioned": "gather",
    "Share": "data",
    "VocabParallel": "groups",
    "affine_scan": "context",
    "discounted_returns": "context",
    "gae": "context",
    "gather_batch": "data",
    "gathered": "gather",
    "lambda_returns": "context",
    "share": "data",
    "shifted_targets": "context",
    "vtrace": "context",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
