"""Preference losses as TRL writes them, and the strongest plain PyTorch that we could write, at most 40 lines each."""

from __future__ import annotations

import torch
import torch.nn.functional as F

BETA = 0.1


def dpo(chosen, rejected, ref_chosen, ref_rejected, *lengths):
    """−log σ(βΔ), and the scores."""
    w, l_ = chosen - ref_chosen, rejected - ref_rejected
    return -F.logsigmoid(BETA * (w - l_)), w, l_


def ipo(chosen, rejected, ref_chosen, ref_rejected, n_w, n_l):
    """(h − 1/(2β))², h of means."""
    w, l_ = chosen - ref_chosen, rejected - ref_rejected
    return (w / n_w.clamp(min=1.0) - l_ / n_l.clamp(min=1.0) - 1 / (2 * BETA)) ** 2, w, l_


def simpo(chosen, rejected, ref_chosen, ref_rejected, n_w, n_l):
    """−log σ(βΔ − γ), of means without a reference."""
    w, l_ = chosen / n_w.clamp(min=1.0), rejected / n_l.clamp(min=1.0)
    return -F.logsigmoid(2.0 * (w - l_) - 1.0), w, l_


LOSSES = {"dpo": dpo, "ipo": ipo, "simpo": simpo}


def kto(logps, ref_logps, desirable, z):
    """1 − σ(±β(D − z)), as TRL has it: both kinds apart."""
    d = logps - ref_logps
    good, bad = 1 - torch.sigmoid(BETA * (d[desirable] - z)), 1 - torch.sigmoid(BETA * (z - d[~desirable]))
    return torch.cat((good, bad)).mean(), d[desirable].mean(), d[~desirable].mean()


def kto_where(logps, ref_logps, desirable, z):
    """The same without a shape that depends on the data."""
    d = logps - ref_logps
    u = BETA * (d - z)
    good, bad = (torch.where(kind, d, 0.0).sum() / kind.sum() for kind in (desirable, ~desirable))
    return (1 - torch.sigmoid(torch.where(desirable, u, -u))).mean(), good, bad


def logged(function):
    """The loss, and then what TRL logs: rewards, accuracy, margin, log-probs."""

    def run(chosen, rejected, *rest):
        losses, w, l_ = function(chosen, rejected, *rest)
        w, l_ = BETA * w.detach(), BETA * l_.detach()
        means = w.mean(), l_.mean(), (w > l_).float().mean(), (w - l_).mean()
        return losses.mean(), *means, chosen.detach().mean(), rejected.detach().mean()

    return run


def alone(function):
    """The loss."""
    return lambda *fields: function(*fields)[0].mean()


def of_tokens(function):
    """From the tokens of concatenated rows, the chosen ones first: what TRL sums before its loss."""

    def run(logps, ref_logps, mask):
        sums = [(x * mask).sum(-1).chunk(2) for x in (logps, ref_logps)]
        return function(*sums[0], *sums[1], *mask.sum(-1).chunk(2))

    return run


def of_packed(function):
    """From packed tokens: a sum of each segment."""

    def run(logps, ref_logps, mask, rows, count):
        sums = []
        for x in (logps, ref_logps, None):
            x = mask if x is None else x * mask
            sums.append(torch.zeros(count, dtype=x.dtype, device=x.device).index_add(0, rows, x).chunk(2))
        return function(*sums[0], *sums[1], *sums[2])

    return run
