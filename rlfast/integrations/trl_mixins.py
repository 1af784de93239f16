"""What ``rlfast.patch("trl")`` does, for one trainer class: TRL's own classes stay as they are.

class Trainer(RlfastGRPOMixin, GRPOTrainer, rollouts=True): ...

RlfastHeadMixin      the fused head: SFTTrainer, RLOOTrainer, AsyncGRPOTrainer, …
RlfastGRPOMixin      and the loss straight from hidden states, and generation if asked for
RlfastDPOMixin, RlfastKTOMixin, RlfastRewardMixin   and the loss
"""

from __future__ import annotations

import functools
from typing import ClassVar

from rlfast import validate
from rlfast.integrations import trl_grpo, trl_head, trl_preference, trl_rollout


@functools.cache
def _replacements() -> dict:
    """(TRL's class, method) → what the patch puts there."""
    strange: list[str] = []
    swaps = trl_grpo.swaps(strange) + trl_preference.swaps(strange) + trl_rollout.swaps(strange, bitwise=True)
    if strange:
        raise RuntimeError(f"TRL does not look as it should: {'; '.join(strange)}")
    return {(swap.owner.__name__, swap.name): swap.replacement for swap in swaps}


class RlfastHeadMixin:
    """The trainer's models have rlfast's fused head, on the CPU for the counted rows alone.

    Example:
        >>> class Trainer(RlfastHeadMixin, SFTTrainer): ...
    """

    def __init__(self, *args, **kwargs):
        with trl_head.own_heads():
            super().__init__(*args, **kwargs)


class _Methods(RlfastHeadMixin):
    """And methods of TRL's class ``_trainer``, each of which must be the next after the mixin's."""

    _trainer: ClassVar[str]
    _own: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return
        mixin = next(c for c in cls.__mro__ if c.__module__ == __name__)
        rest = [c for c in cls.__mro__[cls.__mro__.index(mixin) + 1 :] if c.__module__ != __name__]
        for name in cls._own:
            holder = next((c for c in rest if name in vars(c)), object)
            if (holder.__name__, holder.__module__.partition(".")[0]) != (cls._trainer, "trl"):
                wanted = f"TRL's {cls._trainer} after {mixin.__name__}, with its own {name}"
                validate.fail("bases", wanted, f"{name} of {holder.__name__}", TypeError)

    def _call(self, name: str, *args, **kwargs):
        if name not in self._own:
            return getattr(super(), name)(*args, **kwargs)
        return _replacements()[self._trainer, name](self, *args, **kwargs)


class RlfastGRPOMixin(_Methods):
    """GRPOTrainer with rlfast's head and its loss made from hidden states.

    Args:
        rollouts: it generates by ``rlfast.rollout.Engine``. bitwise: and trains in ``Engine.training_mode``; both as in
            ``rlfast.patch``.

    Raises:
        TypeError: the class after it in the bases is not TRL's GRPOTrainer, or has another loss.

    Example:
        >>> class Trainer(RlfastGRPOMixin, GRPOTrainer, rollouts=True): ...
    """

    _trainer, _own = "GRPOTrainer", ("_compute_loss",)

    def __init_subclass__(cls, rollouts: bool | None = None, bitwise: bool | None = None, **kwargs):
        if rollouts is not None or bitwise is not None:
            bitwise = validate.flag("bitwise", False if bitwise is None else bitwise)
            generates = validate.flag("rollouts", False if rollouts is None else rollouts) or bitwise
            more = ("_generate_single_turn",) * generates + ("training_step",) * bitwise
            cls._own = ("_compute_loss", *more)
        super().__init_subclass__(**kwargs)

    def _compute_loss(self, *args, **kwargs):
        return self._call("_compute_loss", *args, **kwargs)

    def _generate_single_turn(self, *args, **kwargs):
        return self._call("_generate_single_turn", *args, **kwargs)

    def training_step(self, *args, **kwargs):
        return self._call("training_step", *args, **kwargs)


class RlfastDPOMixin(_Methods):
    """DPOTrainer with rlfast's head and loss.

    Example:
        >>> class Trainer(RlfastDPOMixin, DPOTrainer): ...
    """

    _trainer, _own = "DPOTrainer", ("_compute_loss",)

    def _compute_loss(self, *args, **kwargs):
        return self._call("_compute_loss", *args, **kwargs)


class RlfastKTOMixin(_Methods):
    """KTOTrainer with rlfast's head and loss.

    Example:
        >>> class Trainer(RlfastKTOMixin, KTOTrainer): ...
    """

    _trainer, _own = "KTOTrainer", ("_compute_loss",)

    def _compute_loss(self, *args, **kwargs):
        return self._call("_compute_loss", *args, **kwargs)


class RlfastRewardMixin(_Methods):
    """RewardTrainer with rlfast's loss.

    Example:
        >>> class Trainer(RlfastRewardMixin, RewardTrainer): ...
    """

    _trainer, _own = "RewardTrainer", ("compute_loss",)

    def compute_loss(self, *args, **kwargs):
        return self._call("compute_loss", *args, **kwargs)
