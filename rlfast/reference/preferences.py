"""Scores and preference losses as their papers write them: values alone, autograd does the rest.

Of a pair, w and l are the scores of the chosen and the rejected response; p has the fields of the pair.
"""

import math

import torch
from torch.nn.functional import logsigmoid, relu

CERTAIN = -1e-30  # the largest mean log-prob that has odds
EXPONENT = 80.0  # of scores: e^80 is a float32, and so is what a link makes of it


# Scores: r.logp is the summed log-prob, r.log_ratio what it is above the reference's, r.length the tokens.


def log_ratio(r):
    return r.log_ratio


def total(r):
    return r.logp


def power(r, alpha=0.25):
    """arXiv 2501.03884 (7), its exponent bounded."""
    if alpha == 0:
        return r.logp / r.length
    return (1 - torch.exp((-alpha * r.logp / r.length).clamp(max=EXPONENT))) / alpha


def forward_kl(r):
    """arXiv 2309.16240, table 1: f'(u) of u = e^D, its exponent bounded."""
    return 1 - torch.exp((-r.log_ratio).clamp(max=EXPONENT))


def jensen_shannon(r):
    return math.log(2) + logsigmoid(r.log_ratio)


def alpha_divergence(r, alpha=0.5):
    if alpha == 1:
        return r.log_ratio
    return (torch.exp(((alpha - 1) * r.log_ratio).clamp(max=EXPONENT)) - 1) / (alpha - 1)


# Links of a pair.


def logistic(p, beta=0.1, label_smoothing=0.0, gamma=0.0, length_price=0.0):
    x = beta * (p.chosen - p.rejected) - gamma - p.margin - length_price * (p.chosen_length - p.rejected_length)
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


def robust(p, beta=0.1, label_smoothing=0.1):
    """arXiv 2403.00409 (12)."""
    x = beta * (p.chosen - p.rejected) - p.margin
    return (-(1 - label_smoothing) * logsigmoid(x) + label_smoothing * logsigmoid(-x)) / (1 - 2 * label_smoothing)


def hinge(p, beta=0.1, delta=1.0):
    return relu(delta - (beta * (p.chosen - p.rejected) - p.margin))


def ipo(p, beta=0.1):
    """arXiv 2310.12036 (17)."""
    return (p.chosen - p.rejected - p.margin - 1 / (2 * beta)) ** 2


def exo_pair(p, beta=0.1, label_smoothing=1e-3):
    """arXiv 2402.00856 (16): KL of the policy's choice to the label's."""
    x = beta * (p.chosen - p.rejected)
    q, rest = torch.sigmoid(x), torch.sigmoid(-x)
    return q * (logsigmoid(x) - math.log1p(-label_smoothing)) + rest * (logsigmoid(-x) - math.log(label_smoothing))


def nca_pair(p, beta=0.1):
    """arXiv 2402.05369."""
    w, l_ = beta * p.chosen, beta * p.rejected
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l_)


def bco(p, beta=0.1):
    """arXiv 2404.04656."""
    return -logsigmoid(beta * p.chosen - p.shared) - logsigmoid(-(beta * p.rejected - p.shared))


def sppo_hard(p, beta=1e-3, scale=1.0):
    """arXiv 2405.00675 (4.7)."""
    return scale * ((p.chosen - 0.5 / beta) ** 2 + (p.rejected + 0.5 / beta) ** 2)


def sppo(p, beta=1e-3, scale=1.0):
    return scale * ((p.chosen - (p.extra - 0.5) / beta) ** 2 + (p.rejected - (1 - p.extra - 0.5) / beta) ** 2)


def apo_zero(p, beta=0.1):
    """arXiv 2408.06266 (7)."""
    return 1 - torch.sigmoid(beta * p.chosen) + torch.sigmoid(beta * p.rejected)


def apo_down(p, beta=0.1):
    """arXiv 2408.06266 (8)."""
    return torch.sigmoid(beta * p.chosen) + 1 - torch.sigmoid(beta * (p.chosen - p.rejected))


def discopop(p, beta=0.1, tau=0.05):
    """arXiv 2406.08414 (5); g·e^−x in one exponential, which stays finite."""
    x = beta * (p.chosen - p.rejected)
    return -(1 - torch.sigmoid(x / tau)) * logsigmoid(x) + torch.exp(logsigmoid(x / tau) - x)


def rpo_squared(p, beta=0.1, eta=1.0):
    """arXiv 2406.11704 (4) and its distances."""
    return (beta * (p.chosen - p.rejected) - eta * p.margin) ** 2


def _choice_kl(a, b):
    """KL of the choices whose log-odds are a and b."""
    up, down = torch.sigmoid(a), torch.sigmoid(-a)
    return up * (logsigmoid(a) - logsigmoid(b)) + down * (logsigmoid(-a) - logsigmoid(-b))


def rpo_backward_kl(p, beta=0.1, eta=1.0):
    return _choice_kl(eta * p.margin, beta * (p.chosen - p.rejected))


def rpo_forward_kl(p, beta=0.1, eta=1.0):
    return _choice_kl(beta * (p.chosen - p.rejected), eta * p.margin)


def _log1mexp(x):
    near = x > -math.log(2)
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )


def odds_ratio(p, beta=0.1):
    """arXiv 2403.07691 (6), (7)."""
    w, l_ = p.chosen.clamp(max=CERTAIN), p.rejected.clamp(max=CERTAIN)
    w, l_ = p.chosen + (w - p.chosen).detach(), p.rejected + (l_ - p.rejected).detach()
    return -beta * logsigmoid((w - l_) - (_log1mexp(w) - _log1mexp(l_)))


def dpop(p, beta=0.1, penalty=50.0):
    """arXiv 2402.13228 (3)."""
    return -logsigmoid(beta * (p.chosen - p.rejected - penalty * relu(-p.chosen)))


def dpop_outside(p, beta=0.1, penalty=50.0):
    return -logsigmoid(beta * (p.chosen - p.rejected)) + penalty * relu(-p.chosen)


def cal_dpo(p, beta=0.1, calibration=0.5):
    """arXiv 2412.14516."""
    errors = (p.chosen - 1 / (2 * beta)) ** 2 + (p.rejected + 1 / (2 * beta)) ** 2
    return -logsigmoid(p.chosen - p.rejected) + calibration * errors


def squared(p, beta=0.1):
    """arXiv 2402.05749, table 1."""
    return (beta * (p.chosen - p.rejected) - 1) ** 2


def exponential(p, beta=0.1):
    return torch.exp(-beta * (p.chosen - p.rejected))


def truncated_quadratic(p, beta=0.1):
    return relu(1 - beta * (p.chosen - p.rejected)) ** 2


def savage(p, beta=0.1):
    return torch.sigmoid(-beta * (p.chosen - p.rejected)) ** 2


def scaled_logistic(p, beta=0.1):
    """arXiv 2407.08639."""
    return -logsigmoid(beta * p.extra * (p.chosen - p.rejected))


def unequal(p, beta=0.1, alpha=0.1):
    """arXiv 2403.03419."""
    return -logsigmoid(beta * p.chosen - alpha * p.rejected)


def nll(p):
    return -p.chosen


def batch_nll(p):
    return -p.chosen / p.shared


def weighted_nll(p, beta=0.1, eta=0.005):
    """arXiv 2405.16436."""
    return -beta * eta * p.chosen


def exploration(p, alpha=1e-5):
    """arXiv 2405.21046."""
    return alpha * (p.extra * p.chosen + (1 - p.extra) * p.rejected)


def soft_label(p, beta=0.1):
    x = beta * (p.chosen - p.rejected)
    return -p.extra * logsigmoid(x) - (1 - p.extra) * logsigmoid(-x)


def centring(p):
    return (p.chosen + p.rejected) ** 2


def focal(p, gamma=2.0):
    """arXiv 2403.17297: 1 − 2·max(P − ½, 0) is 2(1 − P) where P > ½, and 1 elsewhere."""
    x = p.chosen - p.rejected
    weight = torch.where(x > 0, (2 * torch.sigmoid(-x)) ** gamma, torch.ones_like(x))
    return -weight * logsigmoid(x)


def barrier(p, limit=5.0, edge=4.999, barrier=0.02):
    w, l_ = p.chosen.clamp(-edge, edge), p.rejected.clamp(-edge, edge)
    return barrier * (-torch.log(limit - w) - torch.log(limit + w) - torch.log(limit - l_) - torch.log(limit + l_))


def max_margin(p, penalty=2.0):
    """Ng and Russell 2000: what is wrong counts twice."""
    x = p.chosen - p.rejected
    return torch.where(x >= 0, -x, -penalty * x)


def regression(p, target=10.0):
    return 0.5 * (p.chosen - p.rejected - target) ** 2


# Links of a single response: p.score, p.desirable.


def _by_kind(p, good, bad):
    return torch.where(p.desirable > 0, good, bad)


def kto(p, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """arXiv 2402.01306 (8)."""
    good = desirable_weight * (1 - torch.sigmoid(beta * (p.score - p.shared)))
    return _by_kind(p, good, undesirable_weight * (1 - torch.sigmoid(beta * (p.shared - p.score))))


def bco_unpaired(p, beta=0.1):
    u = beta * p.score - p.shared
    return _by_kind(p, -logsigmoid(u), -logsigmoid(-u))


def apo_zero_unpaired(p, beta=0.1):
    return _by_kind(p, 1 - torch.sigmoid(beta * p.score), torch.sigmoid(beta * p.score))


def apo_down_unpaired(p, beta=0.1):
    """arXiv 2408.06266 (8), the other response of the pair at the shared log-ratio."""
    good = torch.sigmoid(beta * p.score) + 1 - torch.sigmoid(beta * (p.score - p.shared))
    return _by_kind(p, good, 1 - torch.sigmoid(beta * (p.shared - p.score)))


def npo(p, beta=0.1):
    """arXiv 2404.05868 (3)."""
    return _by_kind(p, torch.zeros_like(p.score), -2 / beta * logsigmoid(-beta * p.score))


def retain(p):
    return _by_kind(p, -p.score, torch.zeros_like(p.score))


def dro(p, tau=1.0):
    """arXiv 2405.19107 (6)."""
    return 0.5 * (p.extra - tau * p.score) ** 2
