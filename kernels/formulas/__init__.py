"""Formulas: pure arithmetic, written once, run by Triton, by torch and by the C++ that is printed from them.

``SURROGATES`` and ``ESTIMATORS`` are what a policy loss may name; ``SCORES``, ``PAIRS`` and ``SINGLES`` a preference
loss, ``RANKINGS`` a loss of ranked groups.
"""

from types import FunctionType
from typing import NamedTuple

from rlfast.kernels.formulas import anchored, kl, pair, ranked, reward, score, token, unpaired, value


def _names(source) -> set[str]:
    found = set(source.__code__.co_names)
    for name in tuple(found):
        called = source.__globals__.get(name)
        called = getattr(called, "fn", called)
        if isinstance(called, FunctionType) and called is not source and called.__module__ == source.__module__:
            found |= _names(called)
    return found


class Formula(NamedTuple):
    """A ``@jit`` formula, the NamedTuple of its hyper-parameters, and the names of what it reads of its records."""

    function: object
    hyper: type
    reads: frozenset

    @classmethod
    def of(cls, function, hyper: type):
        """With the names that its text has, and the texts of what it calls."""
        return cls(function, hyper, frozenset(_names(getattr(function, "fn", function))))


def _formulas(module) -> dict[str, Formula]:
    """Every formula of a module that a kernel calls: its last argument is the record ``h``."""
    found = {}
    for name, function in vars(module).items():
        source = getattr(function, "fn", function)
        annotations = getattr(source, "__annotations__", {})
        if getattr(source, "__module__", "") == module.__name__ and "h" in annotations and len(annotations) == 2:
            found[name] = Formula.of(function, annotations["h"])
    return found


SURROGATES = _formulas(token) | _formulas(value)
ESTIMATORS = {name: getattr(kl, name) for name in ("k1", "k2", "k3", "absolute")}
SCORES = _formulas(score)
PAIRS = _formulas(pair) | _formulas(anchored) | _formulas(reward)
SINGLES = _formulas(unpaired)
RANKINGS = _formulas(ranked)
