"""More than one process: what a batch that is spread over ranks needs, and rows whose tokens are."""

from __future__ import annotations

import importlib

# Floors below import ``ranks`` while the package is still being made: a public name is looked up when it is asked for.
_HOME = {
    "Share": "data",
    "gather_batch": "data",
    "share": "data",
    "affine_scan": "context",
    "discounted_returns": "context",
    "gae": "context",
    "lambda_returns": "context",
    "shifted_targets": "context",
    "vtrace": "context",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
