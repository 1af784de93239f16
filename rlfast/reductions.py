"""Means and whitening over a mask, with the bits of any number of threads."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from rlfast import validate
from rlfast.distributed.ranks import Ranks, gathered_alike, ranks_of

CHUNK = 4096  # elements that one thread adds up, then as many of these sums
WHERE = ("inside", "outside", "floor")


class Mean(NamedTuple):
    """Σ mask·x ÷ max(Σ mask + eps, least)."""

    eps: float = 0.0
    least: float = 0.0


class Whiten(NamedTuple):
    """(x − mean) ÷ √(var + eps); "outside": ÷ (√var + eps); "floor": ÷ √max(var, eps)."""

    bessel: bool = True
    eps: float = 1e-8
    where: str = "inside"
    shift_mean: bool = True


MEANS = {
    "trl": Mean(least=1.0),
    "verl": Mean(eps=1e-8),
    "openrlhf": Mean(),
    "torchrl": Mean(least=1.0),
}
WHITENINGS = {
    "trl": Whiten(),  # its PPO trainer's, which 1.16 has no more
    "verl": Whiten(),
    "openrlhf": Whiten(bessel=False, where="floor"),
    "torchrl": Whiten(where="floor"),  # a deviation of at least 1e-4
}


def preset(table: dict, like):
    """The row of a table of presets; None for None."""
    if like is not None and like not in tuple(table):
        validate.fail("like", f"one of {tuple(table)} or None", repr(like))
    return table.get(like)


def total(x: torch.Tensor, places=None) -> torch.Tensor:
    """Σ x in float64, in an order that neither the threads nor what else is computed change, nor zeros at the end.

    With ``places`` the valid elements come first: what is padded adds up as what is packed.
    """
    parts = x.reshape(-1).double()
    if places is not None:
        parts = parts.new_zeros(len(parts) + 1).scatter(0, places, parts)[:-1]
    while parts.numel() != 1:
        whole = parts.numel() // CHUNK * CHUNK
        rest = torch.nn.functional.pad(parts[whole:], (0, CHUNK - parts.numel() + whole))
        parts = torch.cat((parts[:whole].view(-1, CHUNK).sum(-1), rest.sum(0, keepdim=True)))
    return parts[0]


def _places(mask):
    """Where each valid element goes when they come first, in their order; of the others, one place after all."""
    if mask is None:
        return None
    flat = mask.reshape(-1)
    return torch.where(flat, flat.cumsum(0) - 1, flat.numel())


def _valid(mask, x) -> torch.Tensor:
    return torch.ones(x.shape, dtype=torch.bool, device=x.device) if mask is None else mask


def mean_of(x, valid, dim, mean: Mean, ranks: Ranks | None = None) -> torch.Tensor:
    """The mean of the valid elements in float64, of those of all ranks if there are some."""
    kept = torch.where(valid, x, 0.0).double()
    summed, count = (total(kept), valid.sum()) if dim is None else (kept.sum(dim), valid.sum(dim))
    if ranks is not None:
        summed, count = gathered_alike(torch.stack((summed, count.to(summed))), ranks, "masked_mean").sum(0)
    return summed / (count + mean.eps).clamp(min=mean.least)


def deviation(var: torch.Tensor, eps: float, where: str) -> torch.Tensor:
    """What whitening divides by."""
    if where == "outside":
        return var.sqrt() + eps
    return (var.clamp(min=eps) if where == "floor" else var + eps).sqrt()


def moments_of_all(count, mean, square, ranks: Ranks, what: str) -> torch.Tensor:
    """(count, mean, Σ(x − mean)²) of all ranks, of those of each; one collective of three numbers.

    M = Σ M_i + Σ n_i·(mean_i − mean)², Chan, Golub and LeVeque 1979: nothing is subtracted from a sum of squares.
    """
    n, means, squares = gathered_alike(torch.stack((count.to(mean), mean, square)), ranks, what).unbind(-1)
    whole = n.sum()
    mean = (n * means).sum() / whole.clamp(min=1)
    return torch.stack((whole, mean, (squares + n * (means - mean).square()).sum()))


def whitened(
    x, mask, *, bessel: bool, eps: float, where: str, shift_mean: bool, dim=None, ranks: Ranks | None = None
) -> torch.Tensor:
    """``masked_whiten`` of checked arguments."""
    valid = _valid(mask, x)
    kept = torch.where(valid, x, 0.0).double()
    if dim is None:
        count, summed = valid.sum(), functools.partial(total, places=_places(mask))
    else:
        count, summed = valid.sum(dim, keepdim=True), functools.partial(torch.sum, dim=dim, keepdim=True)
    mean = summed(kept) / count.clamp(min=1)
    centred = torch.where(valid, kept - mean, 0.0)
    square = summed(centred * centred)
    if ranks is not None:
        count, mean, square = moments_of_all(count, mean, square, ranks, "masked_whiten")
        centred = torch.where(valid, kept - mean, 0.0)
    var = square / (count - int(bessel)).clamp(min=1)
    out = centred / deviation(var, eps, where) + (0.0 if shift_mean else mean)
    return torch.where(valid, out, 0.0).to(x.dtype)


def _checked(x, mask):
    validate.tensor("x", x)
    return validate.mask_like(mask, "x", x)


def masked_mean(x, mask=None, *, dim=None, eps=None, least=None, like=None, process_group=None) -> torch.Tensor:
    """The mean of the valid elements: Σ mask·x ÷ max(Σ mask + eps, least), summed in float64.

    Args:
        x: [*] float. What it holds where the mask is 0 has no effect.
        mask: [*] like x, 0 where an element does not count; None: all count.
        dim: an int or a tuple of them, the dimensions to reduce; None: all.
        eps: added to the count; 0 unless ``like`` says otherwise.
        least: the smallest count to divide by; 0 (an empty mask gives NaN) unless ``like`` says otherwise.
        like: "trl" or "torchrl" (at least 1), "verl" (eps 1e-8), "openrlhf" (none).
        process_group: ranks, or a ``DeviceMesh`` of one dimension, over which x is spread: the mean is over all of it,
            the same on every rank. Then ``dim`` is None.

    Returns:
        The mean, in x's dtype; differentiable.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.

    Example:
        >>> rlfast.masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 1, 0]))
        tensor(1.5000)
    """
    mask = _checked(x, mask)
    mean = preset(MEANS, like) or Mean()
    eps = mean.eps if eps is None else validate.finite("eps", eps)
    least = mean.least if least is None else validate.finite("least", least)
    ranks = ranks_of(process_group)
    if ranks is not None and dim is not None:
        validate.fail("dim", "None beside process_group", repr(dim))
    return mean_of(x, _valid(mask, x), dim, Mean(eps, least), ranks).to(x.dtype)


def masked_whiten(
    x, mask=None, *, dim=None, bessel=None, eps=None, where=None, shift_mean=None, like=None, process_group=None
) -> torch.Tensor:
    """x with a mean of 0 and a variance of 1 over the valid elements; 0 elsewhere.

    (x − mean) ÷ √(var + eps), sums in float64: the same bits for any number of threads.

    Args:
        x: [*] float. What it holds where the mask is 0 has no effect.
        mask: [*] like x, 0 where an element does not count; None: all count.
        dim: an int or a tuple of them: each slice along it is whitened by itself; None: all elements together.
        bessel: divide the squares by n − 1 (the default) or by n.
        eps: a float ≥ 0; 1e-8 by default.
        where: "inside" the root (the default), "outside" it (√var + eps), or "floor": √max(var, eps).
        shift_mean: False gives the mean back after scaling.
        like: "trl" or "verl" (Bessel, 1e-8 inside), "openrlhf" (biased, variance at least 1e-8), "torchrl" (Bessel,
            variance at least 1e-8); other arguments go before it. Alone, a valid element is at the mean: it
            becomes 0, with Bessel's correction too.
        process_group: ranks, or a ``DeviceMesh`` of one dimension, over which x is spread: mean and variance are of all
            of it. As many elements as a rank has, none too.

    Returns:
        Like x; differentiable.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range.

    Example:
        >>> rlfast.masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
        tensor([-0.7071,  0.7071,  0.0000])
    """
    mask = _checked(x, mask)
    chosen, ranks = whitening(like, bessel, eps, where, shift_mean), ranks_of(process_group)
    if dim is not None and ranks is not None:
        validate.fail("process_group", "None with dim", "a group")
    return whitened(x, mask, **chosen._asdict(), dim=dim, ranks=ranks)


def whitening(like=None, bessel=None, eps=None, where=None, shift_mean=None) -> Whiten:
    """A preset with what is given in its place."""
    chosen = preset(WHITENINGS, like) or Whiten()
    given = {"bessel": bessel, "eps": eps, "where": where, "shift_mean": shift_mean}
    return checked_whiten(chosen._replace(**{name: value for name, value in given.items() if value is not None}))


def checked_whiten(chosen: Whiten) -> Whiten:
    """The same, its numbers of the right kind and range."""
    eps = validate.at_least("eps", chosen.eps, 0.0)
    if chosen.where not in WHERE:
        validate.fail("where", f"one of {WHERE}", repr(chosen.where))
    return chosen._replace(bessel=bool(chosen.bessel), shift_mean=bool(chosen.shift_mean), eps=eps)
