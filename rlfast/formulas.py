"""Formulas made at run time: a surrogate of one's own, for the torch and Triton backends."""

from __future__ import annotations

import inspect
import typing
from dataclasses import fields

import torch

from rlfast import validate
from rlfast.kernels.formulas import SURROGATES, Formula
from rlfast.kernels.formulas.token import Token
from rlfast.kernels.lang import jit, torch_version
from rlfast.losses import Loss


class UserFormula:
    """A surrogate that ``rlfast.Loss`` takes by this object; ``name`` is how the op knows it."""

    def __init__(self, name: str, function, hyper: type):
        self.name, self.function, self.hyper = name, function, hyper

    def __repr__(self) -> str:
        return f"<formula {self.name}({', '.join(self.hyper._fields)})>"


def formula(function) -> UserFormula:
    """A surrogate from a function of a token and its hyper-parameters.

        function(t, h) -> (ℓ, ∂ℓ/∂x, ∂ℓ/∂log p, clipped)

    It runs on the ``torch`` and ``triton`` backends. The C++ backends have the formulas that were there when they were
    built: asked for by name they say so, and without a request ``torch`` serves.

    Args:
        function: ``t`` is a token with ``logp``, ``old_logp``, ``log_ratio`` (x, of the unit), ``ratio`` (e^x), ``adv``
            and ``extra``; ``h`` is annotated with a NamedTuple of floats that all have defaults. Assignments and one
            return, in the words of ``rlfast.kernels.lang.tl``, which its module imports. It must be in a file: Triton
            reads its source.

    Returns:
        A UserFormula, for ``rlfast.Loss(surrogate, hyper)``.

    Raises:
        TypeError: the function has other arguments or does not return four values, ``h`` is not annotated with a
            NamedTuple of floats, or one of these is called like an option of ``rlfast.Loss``.

    Example:
        >>> import typing
        >>> class Power(typing.NamedTuple):
        ...     k: float = 0.5
        >>> def tempered(t, h: Power):
        ...     weight = 1.0 + h.k * (t.ratio - 1.0)
        ...     return -weight * t.adv * t.logp, 0.0, -weight * t.adv, 0.0
        >>> objective = rlfast.Loss(rlfast.formula(tempered), {"k": 0.25})
        >>> with rlfast.use_backend("torch"):
        ...     out = objective(torch.tensor([[-1.0, -3.0]]), adv=torch.tensor([1.0]))
        >>> out.loss.item()
        2.0
    """
    if not callable(function):
        validate.fail("function", "a function of (t, h)", type(function).__name__, TypeError)
    names = list(inspect.signature(function).parameters)
    if len(names) != 2 or names[1] != "h":
        validate.fail("function", "the arguments (t, h)", f"({', '.join(names)})", TypeError)
    hyper = _record(function)
    made = Formula.of(jit(function), hyper)
    _tried(made)
    name = _name_of(function)
    SURROGATES[name] = made
    return UserFormula(name, made.function, hyper)


def _name_of(function) -> str:
    """A name of its own: what a factory or a notebook makes anew leaves the losses alone that have the old one."""
    name = whole = f"{function.__module__}.{function.__qualname__}"
    count = 1
    while name in SURROGATES:
        count += 1
        name = f"{whole}#{count}"
    return name


def _tried(made: Formula) -> None:
    """Refuse what does not return the four numbers of a token."""
    one = torch.ones(1)
    found = torch_version(made.function)(Token(-one, -one, one - one, one, one, one), made.hyper())
    if not isinstance(found, tuple) or len(found) != 4:
        got = f"{len(found)} values" if isinstance(found, tuple) else type(found).__name__
        validate.fail("function", "a function that returns (ℓ, ∂ℓ/∂x, ∂ℓ/∂log p, clipped)", got, TypeError)


def _record(function) -> type:
    """The NamedTuple of h."""
    hyper = function.__annotations__.get("h")
    if isinstance(hyper, str):  # from __future__ import annotations
        scope = function.__globals__ | inspect.getclosurevars(function).nonlocals
        hyper = scope.get(hyper, hyper)
    wanted = "a NamedTuple of floats with defaults as the annotation of h"
    if not (isinstance(hyper, type) and issubclass(hyper, tuple) and hasattr(hyper, "_fields")):
        validate.fail("function", wanted, repr(hyper), TypeError)
    kinds = typing.get_type_hints(hyper).values()
    if set(hyper._field_defaults) != set(hyper._fields) or any(kind is not float for kind in kinds):
        validate.fail("function", wanted, f"{hyper.__name__}{hyper._fields}", TypeError)
    taken = {option.name for option in fields(Loss)} & set(hyper._fields)
    if taken:
        wanted = "hyper-parameters with other names than the options of rlfast.Loss"
        validate.fail("function", wanted, ", ".join(sorted(taken)), TypeError)
    return hyper
