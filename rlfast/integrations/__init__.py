"""rlfast inside trainers: ``rlfast.patch(trainer)`` swaps the trainer's log-prob and entropy functions for ours."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import NamedTuple

from rlfast import validate
from rlfast.integrations.patching import Patch

logger = logging.getLogger("rlfast.integrations")


class Trainer(NamedTuple):
    """A trainer that can be patched."""

    module: str  # its ``replacements(untested, **options)`` says what to replace
    requirement: str  # for pip
    options: tuple[str, ...] = ()  # of ``patch``, beside ``untested``


TRAINERS = {
    "trl": Trainer("rlfast.integrations.trl", "trl==1.16.*", ("rollouts", "bitwise")),
    "verl": Trainer("rlfast.integrations.verl", "verl==0.9.*"),
    "openrlhf": Trainer("rlfast.integrations.openrlhf", "openrlhf==0.11.*"),
    "torchrl": Trainer("rlfast.integrations.torchrl", "torchrl==0.14.*"),
}

# Libraries that get one function, and what puts it there.
INSTALLED = {
    "transformers": "rlfast.integrations.transformers.install(model)",
    "flash_attn": "rlfast.integrations.flash_attn.install()",
}

_patches: dict[str, Patch] = {}
_options: dict[str, dict] = {}  # those of the patch in place


def installed(trainer: str) -> None:
    """ImportError, with what to run, if a trainer of ``TRAINERS`` is not installed."""
    if importlib.util.find_spec(trainer) is None:
        raise ImportError(f'{trainer} is not installed: run `pip install "{TRAINERS[trainer].requirement}"`')


def patch(trainer: str, *, untested: bool = False, rollouts: bool = False, bitwise: bool = False) -> Patch:
    """Put rlfast's kernels in the place of a trainer's own, until undone.

    Patching twice is one patch. A second call also reaches modules of the trainer that were imported since, and its
    ``with`` block, when it ends, leaves the patch in place for whoever came first; an explicit undo is for all.

    Args:
        trainer: "trl", "verl", "openrlhf" or "torchrl".
        untested: go on with a version of the trainer that rlfast was not tested with. Each function is still replaced
            only if its signature is the one that is known; the others are left alone, and a warning says why.
        rollouts: (TRL) the trainer generates by ``rlfast.rollout.Engine``, on the weights and in the precision that it
            trains. Where the engine lacks an option or does not reach the model, it generates by itself, with a
            warning.
        bitwise: (TRL) and its training steps run in ``Engine.training_mode``: the log-probs of the first pass over a
            batch are those of its rollouts, to the bit, where the engine is ``bitwise`` and the temperature is 1; else
            near them, with a warning if it is not.

    Returns:
        Patch: a context manager that undoes the patch at its end, and a function that undoes it when called.
        Printed, or as ``.replaced``, it says what was replaced; ``.active`` says whether it still is.

    Raises:
        ValueError: the trainer is unknown, or has no such option.
        ImportError: the trainer is not installed.
        TypeError: an option is not True or False.
        RuntimeError: its version was not tested, or its functions do not look as they should; or it is patched with
            other options.

    Example:
        >>> with rlfast.patch("trl"):
        ...     trainer.train()
        >>> undo = rlfast.patch("trl")
        >>> undo()
    """
    if not isinstance(trainer, str):
        validate.fail("trainer", "a name", repr(trainer), TypeError)
    if trainer in INSTALLED:
        validate.fail("trainer", f"one of {tuple(TRAINERS)}; {INSTALLED[trainer]} does this one", repr(trainer))
    if trainer not in TRAINERS:
        validate.fail("trainer", f"one of {tuple(TRAINERS)}", repr(trainer))
    known = TRAINERS[trainer]
    for option, value in (("untested", untested), ("rollouts", rollouts), ("bitwise", bitwise)):
        validate.flag(option, value)
    try:
        installed(trainer)
    except ImportError as error:
        raise ImportError(f'rlfast.patch("{trainer}"): {error}') from None
    asked = {"bitwise": bitwise, "rollouts": rollouts or bitwise}
    for option, value in asked.items():
        if value and option not in known.options:
            validate.fail(option, f"False: {trainer} has no such option", repr(value))
    options = {name: asked[name] for name in known.options}
    current = _patches.get(trainer)
    if current is not None and current.active:
        if any(options.values()) and options != _options[trainer]:
            raise RuntimeError(f'rlfast.patch("{trainer}"): it is patched with other options: undo that first')
        return current.again()
    current = Patch(trainer, *importlib.import_module(known.module).replacements(untested, **options))
    _patches[trainer], _options[trainer] = current, options
    logger.info("%r", current)
    return current


__all__ = ["Patch", "patch"]
