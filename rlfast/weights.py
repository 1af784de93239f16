"""Arithmetic on state dicts: averages, extrapolation and interpolation of models, a chunk of a tensor at a time.

Every function takes state dicts of equal keys and shapes (``model.state_dict()``), computes in float32 (float64 where
the tensors are) and rounds once, to the dtype of what it writes. Tensors that are not floats must be equal; an average
takes the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from rlfast import validate

CHUNK = 1 << 22  # elements at a time: 16 MiB a float32 temporary, whatever the model
SMALLEST_ANGLE = 1e-4  # sin Ω below it: a great circle is a straight line, to the last bit of float32


def _checked(dicts: Sequence[Mapping], names: Sequence[str], equal: bool = True) -> list[str]:
    """The keys that all of them have, of equal shapes; what is no float is ``equal``, if it has to be."""
    first = dicts[0]
    for name, other in zip(names[1:], dicts[1:], strict=True):
        if other.keys() != first.keys():
            odd = sorted(first.keys() ^ other.keys())[:3]
            validate.fail(name, f"the keys of {names[0]}", f"a difference in {', '.join(odd)}")
        for key, x in other.items():
            validate.tensor(f"{name}[{key!r}]", x, (*validate.MASKS, torch.complex64))
            if x.shape != first[key].shape:
                wanted = f"shape {validate.shape(first[key])} like {names[0]}"
                validate.fail(f"{name}[{key!r}]", wanted, validate.shape(x))
            if equal and not x.is_floating_point() and not torch.equal(x, first[key]):
                validate.fail(f"{name}[{key!r}]", f"what {names[0]} has: it is no float", "another value")
    return list(first)


def _pieces(target, *sources):
    """Views of some elements of each tensor, with the accumulation dtype."""
    acc = torch.float64 if target.dtype == torch.float64 else torch.float32
    flat = [x.reshape(-1) for x in (target, *sources)]
    for start in range(0, flat[0].numel(), CHUNK):
        yield acc, [x[start : start + CHUNK] for x in flat]


@torch.no_grad()
def _apply(targets: Mapping, sources: Sequence[Mapping], keys, formula) -> None:
    """target ← formula(target, *sources), each in the accumulation dtype; once where two keys share a tensor."""
    done = set()
    for key in keys:
        target = targets[key]
        place = target.data_ptr(), target.shape, target.stride()
        if not target.is_floating_point() or (place in done and target.numel()):
            continue
        done.add(place)
        if not target.is_contiguous():
            whole = target.contiguous()
            _apply({key: whole}, sources, [key], formula)
            target.copy_(whole)
            continue
        for acc, (to, *given) in _pieces(target, *(source[key].to(target.device) for source in sources)):
            to.copy_(formula(to.to(acc), *(x.to(acc) for x in given)))


def _copies(state: Mapping) -> dict:
    return {key: x.detach().clone(memory_format=torch.contiguous_format) for key, x in state.items()}


def ema_update(average, model, *, decay: float) -> None:
    """average ← decay·average + (1 − decay)·model, in place.

    TR-DPO's soft update of the reference is ``decay = 1 − α``; its hard update, every τ steps, ``decay = 0``.

    Args:
        average, model: state dicts of equal keys and shapes.
        decay: a float in [0, 1].

    Reference: TR-DPO, arXiv 2404.09656 (α = 0.6, or 512 steps).

    Example:
        >>> average, model = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
        >>> rlfast.ema_update(average, model, decay=0.75)
        >>> average["w"]
        tensor([1.5000])
    """
    if not 0 <= validate.finite("decay", decay) <= 1:
        validate.fail("decay", "a float in [0, 1]", repr(decay))
    keys = _checked((average, model), ("average", "model"), equal=False)
    with torch.no_grad():
        for key in keys:
            if not average[key].is_floating_point():
                average[key].copy_(model[key])
    # a factor of 0 leaves no trace of a NaN
    mix = {0: lambda a, m: m, 1: lambda a, m: a}.get(decay, lambda a, m: torch.lerp(m, a, decay))
    _apply(average, (model,), keys, mix)


def extrapolate(base, tuned, *, alpha: float) -> dict:
    """ExPO: tuned + α(tuned − base), a new state dict of tuned's dtypes.

    Args:
        base, tuned: state dicts of equal keys and shapes: the SFT model and the aligned one.
        alpha: α, a float; 0.3 to 0.5 in the paper.

    Reference: arXiv 2404.16792.
    """
    validate.finite("alpha", alpha)
    keys, out = _checked((tuned, base), ("tuned", "base")), _copies(tuned)
    _apply(out, (base,), keys, lambda t, b: t + alpha * (t - b))
    return out


def merge(models, *, weights=None) -> dict:
    """Σ_i w_i·model_i, a new state dict of the first one's dtypes; the mean if there are no weights.

    Args:
        models: a sequence of state dicts of equal keys and shapes.
        weights: a float for each; they need not add up to 1.

    Reference: model soups, arXiv 2203.05482.
    """
    models = list(models)
    if not models:
        validate.fail("models", "at least one state dict", "none")
    weights = [1 / len(models)] * len(models) if weights is None else [validate.finite("weights", w) for w in weights]
    if len(weights) != len(models):
        validate.fail("weights", f"{len(models)} numbers, one a model", str(len(weights)))
    keys, out = _checked(models, [f"models[{i}]" for i in range(len(models))]), _copies(models[0])

    def mix(first, *others):
        total = weights[0] * first
        for w, x in zip(weights[1:], others, strict=True):
            total = total + w * x
        return total

    _apply(out, models[1:], keys, mix)
    return out


def _angle(first, second, base) -> float:
    """Between two differences from a base; 0 if one of them is nothing."""
    dot = torch.zeros(3, dtype=torch.float64)
    for _, (x, y, b) in _pieces(first, second, base):
        u, v = x.double() - b.double(), y.double() - b.double()
        dot += torch.stack([u @ v, u @ u, v @ v]).cpu()
    uv, uu, vv = dot.tolist()
    return math.acos(max(-1.0, min(1.0, uv / math.sqrt(uu * vv)))) if uu * vv > 0 else 0.0


@torch.no_grad()
def slerp(first, second, *, weight: float = 0.5, base=None) -> dict:
    """Spherical interpolation of two models, tensor by tensor, a new state dict of the first one's dtypes.

        θ = base + sin((1 − λ)Ω)/sin Ω·(first − base) + sin(λΩ)/sin Ω·(second − base)

    with Ω the angle between the two differences; a straight line where they are parallel, or numbers. WARP merges
    policies so, with their common initialisation as the base.

    Args:
        first, second, base: state dicts of equal keys and shapes; no base is 0.
        weight: λ, a float in [0, 1].

    Raises:
        ValueError: two differences point in opposite directions: then no way between them is the shortest.

    Reference: WARP, arXiv 2406.16768.
    """
    if not 0 <= validate.finite("weight", weight) <= 1:
        validate.fail("weight", "a float in [0, 1]", repr(weight))
    if base is None:
        base = {key: torch.zeros_like(x) if x.is_floating_point() else x for key, x in first.items()}
    keys, out = _checked((first, second, base), ("first", "second", "base")), _copies(first)
    for key in keys:
        if not first[key].is_floating_point():
            continue
        angle = _angle(first[key], second[key], base[key])
        sine = math.sin(angle)
        if sine <= SMALLEST_ANGLE and angle > 1 and 0 < weight < 1 and first[key].numel() > 1:
            validate.fail(f"second[{key!r}]", "a direction that is not the opposite of first's", "the opposite")
        a, b = 1 - weight, weight
        if sine > SMALLEST_ANGLE:
            a, b = math.sin(a * angle) / sine, math.sin(b * angle) / sine
        _apply(out, (second, base), [key], lambda x, y, o, a=a, b=b: o + a * (x - o) + b * (y - o))
    return out
