"""What an objective carries from step to step: coefficients that follow a measurement, and running statistics.

Each is updated once a step, keeps its numbers on the device without reading them, and has ``state_dict`` and
``load_state_dict``. With a ``process_group`` an update takes the measurements of all its processes together.
"""

from __future__ import annotations

import torch

from rlfast import limits, validate
from rlfast.distributed.ranks import Ranks, ranks_of, summed
from rlfast.reductions import moments_of_all


class _State:
    """Tensors by name, changed in place, so that whoever holds one sees the update."""

    _names: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors that an update changes."""
        return {name: getattr(self, name).clone() for name in self._names}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Put them back, in place.

        Raises:
            ValueError, TypeError: the names are not those of ``state_dict``, or an entry is not a number.
        """
        if not isinstance(state, dict) or set(state) != set(self._names):
            came = sorted(map(str, state)) if isinstance(state, dict) else [type(state).__name__]
            validate.fail("state", f"entries {', '.join(self._names)}", ", ".join(came))
        found = {name: validate.scalar(name, state[name]) for name in self._names}
        for name, x in found.items():
            getattr(self, name).copy_(torch.as_tensor(x))


def _mean(name: str, measured, n, like: torch.Tensor, ranks: Ranks | None):
    """(mean over every process's n, Σ n) of a measurement that is a mean over n; over none it has no effect."""
    measured, n = validate.scalar(name, measured), validate.scalar("n", n)
    measured, n = (x.to(like) if isinstance(x, torch.Tensor) else torch.full_like(like, x) for x in (measured, n))
    parts = torch.stack([torch.where(n == 0, 0.0, measured * n), n])
    total, count = (parts if ranks is None else summed(parts, ranks, name)).unbind()
    return total / count.clamp(min=1.0), count


class AdaptiveKL(_State):
    """A KL coefficient that holds the KL near a target.

        β ← β·(1 + clip(KL/target − 1, −0.2, 0.2)·n/horizon)

    Args:
        value: β at the beginning.
        target: the KL that is aimed at.
        horizon: samples over which β changes by at most a fifth.
        device: of ``value``.
        process_group: whose measurements count together.

    Reference:
        arXiv 1909.08593.

    Example:
        >>> control = rlfast.AdaptiveKL(0.1, target=6.0, horizon=10000)
        >>> control.update(12.0, 256)
        >>> round(control.value.item(), 6)
        0.100512
    """

    _names = ("value",)

    def __init__(self, value: float, *, target: float, horizon: float, device=None, process_group=None):
        self.value = torch.tensor(validate.finite("value", value), dtype=torch.float32, device=device)
        self.target, self.horizon = validate.positive("target", target), validate.positive("horizon", horizon)
        self.ranks = ranks_of(process_group)

    def update(self, kl, n) -> None:
        """One step.

        Args:
            kl: a number or a 0-dim tensor. The mean KL of this process's n samples. A NaN leaves β as it was.
            n: a number or a 0-dim tensor. How many samples that was.
        """
        kl, n = _mean("kl", kl, n, self.value, self.ranks)
        error = (kl / self.target - 1.0).clamp(-0.2, 0.2)
        self.value.mul_((1.0 + error * n / self.horizon).nan_to_num(nan=1.0))


class AdaptiveEntropy(_State):
    """An entropy coefficient that grows by δ while the entropy is at or below a target, and else shrinks by it.

        c ← clip(c ± δ, low, high);   value = c where H ≤ target, else 0

    ``value`` is for the step that follows the update, and 0 before the first: that is how TRL applies Skywork's rule.

    Args:
        coef: c at the beginning.
        target: H in nats.
        delta: δ.
        low, high: bounds of c.
        device: of ``value``.
        process_group: whose measurements count together.

    Reference:
        Skywork-OR1, arXiv 2505.22312.

    Example:
        >>> control = rlfast.AdaptiveEntropy(0.01, target=0.2)
        >>> control.update(0.1, 4096)
        >>> round(control.value.item(), 6)
        0.015
    """

    _names = ("coef", "value")

    def __init__(self, coef=0.0, *, target=0.2, delta=0.005, low=0.0, high=1.0, device=None, process_group=None):
        self.coef = torch.tensor(validate.finite("coef", coef), dtype=torch.float32, device=device)
        self.value = torch.zeros_like(self.coef)
        self.target, self.delta = validate.finite("target", target), validate.positive("delta", delta)
        self.low, self.high = (validate.number(x, y, limits.ANY) for x, y in (("low", low), ("high", high)))
        validate.ordered("low", low, "high", high)
        self.ranks = ranks_of(process_group)

    def update(self, entropy, n) -> None:
        """One step.

        Args:
            entropy: a number or a 0-dim tensor. The mean entropy of this process's n tokens. A NaN leaves c and the
                value as they were.
            n: a number or a 0-dim tensor. How many tokens that was.
        """
        entropy, _ = _mean("entropy", entropy, n, self.coef, self.ranks)
        below, known = entropy <= self.target, ~entropy.isnan()
        moved = (self.coef + torch.where(below, self.delta, -self.delta)).clamp(self.low, self.high)
        self.coef.copy_(torch.where(known, moved, self.coef))
        self.value.copy_(torch.where(known, torch.where(below, self.coef, 0.0), self.value))


class RunningMeanStd(_State):
    """The mean and the standard deviation of everything seen so far.

        mean ← mean + δ·n/N,   M ← M + M_batch + δ²·(N − n)·n/N,   δ = mean_batch − mean,   std = √(M/(N − 1))

    Args:
        device: of the statistics, which are float64.
        process_group: whose batches count together.

    Reference:
        Chan, Golub and LeVeque 1979.

    Example:
        >>> seen = rlfast.RunningMeanStd()
        >>> seen.update(torch.tensor([1.0, 2.0, 3.0]))
        >>> seen.mean.item(), seen.std.item()
        (2.0, 1.0)
    """

    _names = ("mean", "square", "count")

    def __init__(self, *, device=None, process_group=None):
        self.mean, self.square, self.count = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(3))
        self.ranks = ranks_of(process_group)

    @property
    def std(self) -> torch.Tensor:
        """Bessel's; 0 before the second value. 0-dim float64."""
        return (self.square / (self.count - 1.0).clamp(min=1.0)).sqrt()

    def update(self, x, mask=None) -> None:
        """Take in a batch.

        Args:
            x: any shape, float or int.
            mask: like x, bool or number. What counts; None is all.
        """
        validate.tensor("x", x, validate.COUNTS)
        mask = validate.counted(mask, "x", x).to(self.mean.device)
        x = x.detach().to(self.mean)
        x = torch.where(mask, x, 0.0)
        n = mask.sum().to(x)
        mean = x.sum() / n.clamp(min=1.0)
        spread = torch.where(mask, (x - mean).square(), 0.0).sum()
        if self.ranks is not None:
            n, mean, spread = moments_of_all(n, mean, spread, self.ranks, "RunningMeanStd")
        whole = (self.count + n).clamp(min=1.0)
        delta = mean - self.mean
        self.square.add_(spread + delta.square() * self.count * n / whole)
        self.mean.add_(delta * n / whole)
        self.count.add_(n)

    def normalize(self, x, *, eps: float = 1e-8, centre: bool = True) -> torch.Tensor:
        """(x − mean)/(std + eps), or x/(std + eps); the dtype of x."""
        validate.tensor("x", x)
        shifted = x - self.mean.to(x.dtype) if centre else x
        return shifted / (self.std.to(x.dtype) + eps)
