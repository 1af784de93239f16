"""The metrics of verl's policy losses, from those of the launch that made the loss.

A launch counts the tokens at a bound, which is what verl counts too, but for a few: verl separates the dual clip, its
bound of ±20 nats on a log-ratio is no clip, and a rollout weight of 0 hides nothing. Where such tokens may be there,
which a maximum or a minimum shows, they are counted by themselves.
"""

from __future__ import annotations

import math

import torch

FRAC, LOWER, KL = "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"
BOUND = 20.0  # of verl's log-ratios


def _plain(given, said: dict) -> bool:
    """Whether the launch counts as verl does: no log-ratio is at ±20, no weight is 0."""
    if not float(given.logp.detach().amin()) > -BOUND or not said["ratio_max"] < math.exp(BOUND) * 0.999:
        return False
    return given.weights is None or float(given.weights.amin()) > 0


def _moved(given):
    """The log-ratios, in float32 at least."""
    return given.logp.detach().to(torch.promote_types(given.logp.dtype, torch.float32)) - given.old


def _ratio(given):
    """π/π_old within verl's bounds."""
    return _moved(given).clamp(-BOUND, BOUND).exp()


def _share(given, said: dict, chosen) -> float:
    """The part of the tokens that are chosen."""
    return (chosen & given.mask.bool()).count_nonzero().item() / (said["tokens"] + 1e-8)


def clipped(ratio, adv, options: dict):
    """Where PPO's clip takes a token."""
    return ((ratio < 1 - options["eps_low"]) & (adv < 0)) | ((ratio > 1 + options["eps_high"]) & (adv > 0))


def _mean(given, said: dict, x) -> float:
    """The mean of a number of each token."""
    return torch.where(given.mask.bool(), x, 0.0).sum().item() / (said["tokens"] + 1e-8)


def _read(given, metrics) -> dict:
    return metrics.as_dict() if given.logp.numel() else dict.fromkeys(metrics.keys(), 0.0)


def ppo(given, metrics) -> dict:
    """Of PPO with a dual clip."""
    said, o = _read(given, metrics), given.options
    if given.logp.numel() and not (_plain(given, said) and said["ratio_max"] <= o["dual_clip"]):
        r, adv = _ratio(given), given.adv
        return _all(
            _share(given, said, clipped(r, adv, o)), said, _share(given, said, (r > o["dual_clip"]) & (adv < 0))
        )
    return _all(said["clip_low"] + said["clip_high"], said)


def dppo(given, metrics) -> dict:
    """Of DPPO: the tokens that have moved too far, and those of the others whose ratio is capped."""
    said, o = _read(given, metrics), given.options
    if given.logp.numel() and not (_plain(given, said) and said["ratio_max"] <= o["cap"]):
        moved = _moved_too_far(given)
        return _all(_share(given, said, moved), said, _share(given, said, ~moved & (_ratio(given) > o["cap"])))
    return _all(said["clip_low"] + said["clip_high"], said)


def _moved_too_far(given):
    logp, old, adv, o = given.logp.detach(), given.old, given.adv, given.options
    p, q = logp.exp(), old.exp()
    if given.row == "dppo_tv":
        return ~torch.where(adv > 0, p - q <= o["eps_high"], p - q >= -o["eps_low"])
    kl = q * (old - logp) + (1 - q) * ((1.0 - q + 1e-8) / (1.0 - p + 1e-8)).log()
    return ~torch.where(adv > 0, (kl <= o["eps_high"]) | (p <= q), (kl <= o["eps_low"]) | (p >= q))


def gspo(given, metrics) -> dict:
    """Of GSPO; a weight of 0 hides a token from the launch."""
    said = _read(given, metrics)
    if given.weights is None or not given.logp.numel() or float(given.weights.amin()) > 0:
        return _all(said["clip_low"] + said["clip_high"], said)
    mask = given.mask.bool()
    moved = torch.where(mask, _moved(given), 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    return _all(_share(given, said, clipped(moved.clamp(max=10.0).exp()[:, None], given.adv, given.options)), said)


def cispo(given, metrics) -> dict:
    """Of CISPO, whichever the advantage's sign."""
    said, o = _read(given, metrics), given.options
    if given.logp.numel() and given.weights is not None and not float(given.weights.amin()) > 0:
        r = _ratio(given)
        return _all(_share(given, said, (r < 1 - o["eps_low"]) | (r > 1 + o["eps_high"])), said)
    return _all(said["clip_low"] + said["clip_high"], said)


def sapo(given, metrics) -> dict:
    """Of SAPO, which clips nothing."""
    return _all(0.0, _read(given, metrics))


def clip_cov(given, metrics) -> dict:
    """Of Clip-Cov: the tokens that are left out."""
    said = _read(given, metrics)
    return {FRAC: _share(given, said, ~given.keep), KL: said["approx_kl_k1"]}


def kl_cov(given, metrics) -> dict:
    """Of KL-Cov: its KL is a mean of absolute log-ratios."""
    return {KL: _mean(given, _read(given, metrics), _moved(given).abs_())}


def geo_mean(given, metrics) -> dict:
    """Of GMPO: log-ratios out of bounds on either side, by the advantage's sign."""
    said, moved, o = _read(given, metrics), _moved(given), given.options
    kl, low, high = -_mean(given, said, moved), o["log_ratio_low"], o["log_ratio_high"]
    out = moved.abs_() > high if low == -high else (moved > high) | (moved < low)
    upper, lower = (_share(given, said, side & out) for side in (given.adv > 0, given.adv < 0))
    return {FRAC: upper, LOWER: lower, KL: kl}


def kl_alone(given, metrics) -> dict:
    """Of a loss that only reports its KL."""
    return {KL: _read(given, metrics)["approx_kl_k1"]}


def _all(upper: float, said: dict, lower: float = 0.0) -> dict:
    return {FRAC: upper, KL: said["approx_kl_k1"], LOWER: lower}
