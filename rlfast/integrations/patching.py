"""Replacing a library's functions, wherever its modules hold them, and putting them back."""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import inspect
import logging
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

logger = logging.getLogger("rlfast.integrations")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = ("cpu", "cuda")
WHOLE = ("labels", "shift_labels", "done", "terminated")  # and masks: what need not be floating point


class Swap(NamedTuple):
    """One object for another: in every module under ``prefix``, or only as attribute ``name`` of ``owner``."""

    original: Any
    replacement: Any
    prefix: str = ""
    owner: Any = None
    name: str = ""


def rebind(prefix: str, original, replacement) -> list[str]:
    """Replace ``original`` under every name that a loaded module ``prefix`` or ``prefix.*`` has for it.

    ``from library.utils import function`` copies the binding, so replacing ``library.utils.function`` alone misses the
    modules that were imported before.

    Returns:
        list of str: the dotted names that were replaced.
    """
    names = []
    for module_name, module in list(sys.modules.items()):
        if module is None or not (module_name == prefix or module_name.startswith(prefix + ".")):
            continue
        for name, value in list(vars(module).items()):
            if value is original:
                setattr(module, name, replacement)
                names.append(f"{module_name}.{name}")
    return names


class Undo(contextlib.ExitStack):
    """What takes something back, when it is called or its ``with`` block ends. Twice is once."""

    def __call__(self) -> None:
        self.close()


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls ``then`` whenever one of some modules has been imported, from now until ``stop``."""

    def __init__(self, names: tuple[str, ...], then: Callable[[], None]):
        self.names, self.then, self._asking = names, then, set()
        sys.meta_path.insert(0, self)

    def stop(self) -> None:
        """Modules that are imported from now on are left alone."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name, path=None, target=None):
        """The spec that the other finders have, whose loader calls ``then`` at its end."""
        if name not in self.names or name in self._asking:
            return None
        self._asking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking.remove(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if self in sys.meta_path:
                    self.then()

            spec.loader.exec_module = exec_module
        return spec


_originals: dict[tuple[Any, str], Any] = {}  # (owner, name) → what a patch has replaced there


def original_of(owner, name: str):
    """The library's own ``owner.name``, also while a patch is on; None where it has none of its own."""
    return _originals.get((owner, name), vars(owner).get(name))


class Patch:
    """What ``rlfast.patch`` put in place: undo by calling it, or by leaving its ``with`` block.

    Args:
        swaps: a function that lists the swaps.
        awaited: modules after whose import it is asked again.
    """

    def __init__(self, trainer: str, swaps, version: str, awaited: tuple[str, ...] = ()):
        self.trainer, self.version = trainer, version
        self._swaps, self._names, self._first = swaps, {}, self
        self._apply()
        self._awaiting = AfterImport(awaited, self._apply) if awaited else None

    def _apply(self) -> None:
        for swap in self._swaps():
            if swap.owner is None:
                names = rebind(swap.prefix, swap.original, swap.replacement)
            else:
                _originals.setdefault((swap.owner, swap.name), swap.original)
                setattr(swap.owner, swap.name, swap.replacement)
                names = [f"{_dotted(swap.owner)}.{swap.name}"]
            self._names.update((name, swap) for name in names)

    def again(self) -> Patch:
        """The same patch for a second caller: reaches what was imported since; its ``with`` block undoes nothing."""
        self._apply()
        other = object.__new__(Patch)
        other.__dict__ = {"_first": self._first}
        return other

    @property
    def active(self) -> bool:
        """Whether the replacements are in place, or will be once the trainer is imported."""
        return bool(self._first._names) or self._first._awaiting is not None

    @property
    def replaced(self) -> tuple[str, ...]:
        """The dotted names that are replaced now."""
        return tuple(sorted(self._first._names))

    def undo(self) -> None:
        """Put the originals back, also into modules that were imported while the patch was on. Twice is once."""
        first = self._first
        if first._awaiting is not None:
            first._awaiting.stop()
            first._awaiting = None
        swaps, first._names = {id(s): s for s in first._names.values()}, {}
        for swap in swaps.values():
            if swap.owner is None:
                rebind(swap.prefix, swap.replacement, swap.original)
            else:
                if _held(swap.owner, swap.name) is swap.replacement:  # else somebody has put another one there since
                    setattr(swap.owner, swap.name, swap.original)
                _originals.pop((swap.owner, swap.name), None)

    def __call__(self) -> None:
        self.undo()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_) -> None:
        if self._first is self:
            self.undo()

    def __repr__(self) -> str:
        first = self._first
        what = (", ".join(self.replaced) or "awaits its import") if self.active else "undone"
        return f"<rlfast.patch({first.trainer!r}) on {first.trainer} {first.version}: {what}>"


def _held(owner, name: str):
    """What is under a name of a module or a class, as it was put there; of anything else, what it says it has."""
    return vars(owner).get(name) if isinstance(owner, type | types.ModuleType) else getattr(owner, name, None)


def _dotted(owner) -> str:
    return owner.__name__ if inspect.ismodule(owner) else f"{owner.__module__}.{owner.__qualname__}"


def or_original(ours, original, why_not):
    """``ours``, or ``original`` where ``why_not(*args)`` gives a reason, which is logged once.

    The result has the original's name, docstring and signature.
    """

    @functools.wraps(original)
    def call(*args, **kwargs):
        reason = why_not(*args, **kwargs)
        if reason is None:
            return ours(*args, **kwargs)
        runs_as_it_is(original, reason)
        return original(*args, **kwargs)

    return call


@functools.cache
def _static(ours, original, why_not):
    return staticmethod(or_original(ours, original.__func__, why_not))


def static_swap(owner, name: str, ours, why_not) -> Swap | None:
    """``ours`` for a static method of a class; None where there is no such class, or its method is another one."""
    original = original_of(owner, name) if owner is not None else None
    if not isinstance(original, staticmethod):
        return None
    if list(inspect.signature(original.__func__).parameters) != list(inspect.signature(ours).parameters):
        return None
    return Swap(original, _static(ours, original, why_not), owner=owner, name=name)


def runs_as_it_is(original, reason: str) -> None:
    """Log, once, why an original is not replaced."""
    say_once(f"{original.__module__}.{original.__qualname__} runs as it is: {reason}")


@functools.cache
def say_once(message: str, level: int = logging.WARNING) -> None:
    """A message that is new."""
    logger.log(level, message)


def refused(make, *given) -> str | None:
    """How ``make`` refuses a number that a trainer takes and ``rlfast.limits`` does not; None if it takes it."""
    try:
        make(*given)
    except ValueError as error:
        return str(error)
    return None


def tensor_unsupported(**tensors) -> str | None:
    """Why rlfast cannot take one of these, or None; a tensor that is None can be taken."""
    for name, x in tensors.items():
        if x is None:
            continue
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            return f"{name} is a {type(x).__name__}, rlfast takes plain tensors"
        if x.layout is not torch.strided:
            return f"{name} has layout {x.layout}, rlfast takes dense tensors"
        if x.device.type not in DEVICES:
            return f"{name} is on {x.device.type}, rlfast runs on {' and '.join(DEVICES)}"
        if not (x.is_floating_point() or name in WHOLE or name.endswith("mask")):
            return f"{name} is {x.dtype}, rlfast takes floating point"
        if x.is_floating_point() and x.dtype not in DTYPES:
            return f"{name} is {x.dtype}, rlfast takes {', '.join(str(d) for d in DTYPES)}"
    return None


def takes(original, wanted, name: str, strange: list[str], skip: str = "") -> bool:
    """Whether ``original`` has the parameters ``wanted``; if not, ``strange`` gets the reason."""
    if original is None:
        strange.append(f"{name} is not there")
        return False
    live = [p for p in inspect.signature(original).parameters if p != skip]
    if live != list(wanted):
        strange.append(f"{name} takes ({', '.join(live)}), expected ({', '.join(wanted)})")
    return live == list(wanted)


def refuse_untested(trainer: str, version: str, tested: tuple[str, ...], untested: bool) -> None:
    """An error if a trainer's version is not one of these, and it was not asked for.

    Args:
        tested: versions as far as they count, "0.11" for "0.11.2".
    """
    if not untested and ".".join(version.split(".")[:2]) not in tested:
        raise RuntimeError(
            f'rlfast.patch("{trainer}"): tested with {trainer} {", ".join(tested)}, found {version}: '
            f"run `pip install '{trainer}=={tested[-1]}.*'`, or pass untested=True "
            "to replace what still has the signature that rlfast knows"
        )


def refuse_strange(trainer: str, version: str, strange: list[str], untested: bool) -> None:
    """An error if something is not as known; with ``untested`` a warning that it is left alone."""
    if strange and not untested:
        words = "; ".join(strange)
        raise RuntimeError(f'rlfast.patch("{trainer}"): {trainer} {version} does not look as it should: {words}')
    for reason in strange:
        logger.warning("%s %s: %s; it is left alone", trainer, version, reason)


def reads(code: types.CodeType, name: str) -> bool:
    """Whether compiled code, or a function inside of it, reads a global or an attribute of this name."""
    return name in code.co_names or any(reads(c, name) for c in code.co_consts if isinstance(c, types.CodeType))
