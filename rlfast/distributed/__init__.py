"""More than one process: a vocabulary that ranks share, and a head that they gather for a use."""

from __future__ import annotations

import importlib

# Floors below import a module of this package while it is still being made: a public name is looked up when asked for.
_HOME = {
    "Gathered": "gather",
    "Partitioned": "gather",
    "VocabParallel": "groups",
    "gathered": "gather",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
