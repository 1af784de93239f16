"""What kernels and formulas are written in: ``jit`` and ``tl``, Triton's own where it is installed.

Without Triton, ``jit`` is the identity and ``tl`` a torch-backed vocabulary, so that formulas can be imported,
tabulated and run anywhere. ``torch_version(formula)`` is a formula as a function of tensors, with Triton installed or
not.
"""

from __future__ import annotations

import dis
import functools
import types

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None


def _tensor(x) -> torch.Tensor:
    """Scalars as 0-dim float64 tensors, which do not promote a float32 operand that has dimensions."""
    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.float64)


def _unary(f):
    return staticmethod(lambda x: f(_tensor(x)))


def _binary(f):
    def apply(x, y):
        x, y = _tensor(x), _tensor(y)
        return f(x, y.to(x.device)) if x.dim() else f(x.to(y.device), y)

    return staticmethod(apply)


class TorchVocabulary:
    """The words of ``triton.language`` that a formula may use, on tensors. Same names, same meaning."""

    constexpr = staticmethod(lambda value: value)
    static_range = range
    float32 = torch.float32
    float64 = torch.float64
    int32 = torch.int32
    int64 = torch.int64

    exp = _unary(torch.exp)
    exp2 = _unary(torch.exp2)
    log = _unary(torch.log)
    log2 = _unary(torch.log2)
    sqrt = _unary(torch.sqrt)
    rsqrt = _unary(torch.rsqrt)
    abs = _unary(torch.abs)
    floor = _unary(torch.floor)
    ceil = _unary(torch.ceil)
    sigmoid = _unary(torch.sigmoid)
    # Triton's minimum and maximum return the operand that is not NaN unless told otherwise.
    minimum = _binary(torch.fmin)
    maximum = _binary(torch.fmax)
    div_rn = _binary(torch.div)
    where = staticmethod(torch.where)
    zeros_like = staticmethod(torch.zeros_like)
    sum = staticmethod(torch.sum)
    max = staticmethod(torch.amax)

    @staticmethod
    def fma(x, y, z):
        """x·y + z, rounded once in Triton and twice here."""
        return x * y + z

    @staticmethod
    def clamp(x, low, high):
        return TorchVocabulary.minimum(TorchVocabulary.maximum(x, low), high)


# The functions of kernels/formulas/elementary.py as torch has them: exact without what Triton needs for it.
ELEMENTARY = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": lambda x: torch.log1p(_tensor(x)),
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: -torch.nn.functional.logsigmoid(-x),
    "tanh": torch.tanh,
}


if triton is not None:
    from triton import jit
    from triton.language import constexpr as _constexpr

    NATIVE = True
else:
    tl = TorchVocabulary
    NATIVE = False
    _constexpr = ()

    def jit(fn=None, **_):
        return fn if fn is not None else lambda f: f


def _globals_of(code: types.CodeType):
    """Names that the code reads as globals; ``co_names`` would add the attributes, such as the exp of tl.exp."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_of(constant)


@functools.cache
def torch_version(formula):
    """A ``@jit`` formula as a plain function of tensors: its text, and its helpers', with ``tl`` bound to torch.

    The elementary functions that it calls are torch's own.

    Args:
        formula: a ``@jit`` function whose globals are formulas, constants and ``tl``.

    Returns:
        A function with the same arguments, differentiable by autograd.

    Example:
        >>> torch_version(softplus)(torch.tensor([-1.0, 0.0]))
        tensor([0.3133, 0.6931])
    """
    source = getattr(formula, "fn", formula)
    own = {"__name__": source.__module__, "__builtins__": __builtins__}
    for name in _globals_of(source.__code__):
        value = source.__globals__.get(name)
        if value is None:
            continue
        if value is tl:
            own[name] = TorchVocabulary
        elif isinstance(value, _constexpr):
            own[name] = value.value
        elif name in ELEMENTARY and value.__module__ != source.__module__ and value.__module__.endswith(".elementary"):
            own[name] = ELEMENTARY[name]
        elif value is not source and (hasattr(value, "fn") or _is_formula(value, source)):
            own[name] = torch_version(value)
        else:
            own[name] = value
    plain = types.FunctionType(source.__code__, own, source.__name__, source.__defaults__, source.__closure__)
    return functools.wraps(source)(plain)


def _is_formula(value, beside) -> bool:
    """Without Triton a formula is a plain function: one that lives in the package of the formula that calls it."""
    package = beside.__module__.rpartition(".")[0]
    return isinstance(value, types.FunctionType) and package != "" and value.__module__.startswith(package)
