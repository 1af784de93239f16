"""Losses of ranked groups: the definition, a group at a time, by autograd alone.

loss = factor/n · Σ_g w_g·[ℓ(x_g, r_g) − nll·(K − 1)²·s_best], over the groups of two candidates or more
"""

import math

import torch
from torch.nn.functional import logsigmoid, relu

# Each form takes the scores x and the rewards r of one group, in descending order of r.


def plackett_luce(x, r, tau, top):
    """arXiv 2305.18290: the candidates are chosen one after the other."""
    return sum(torch.logsumexp(x[j:], 0) - x[j] for j in range(min(len(x), top)))


def pro(x, r, tau, top):
    """arXiv 2306.17492; its temperatures are the inverses of differences of rewards."""
    total = 0.0 * x[0]
    for k in range(min(len(x) - 1, top)):
        t = r[k] - r[k + 1 :]
        own = x[k] * t.max()
        total = total + torch.logsumexp(torch.cat((own.reshape(1), x[k + 1 :] * t)), 0) - own
    return total


def _pairs(x, r):
    """Differences x_i − x_j of the pairs whose i has the larger reward."""
    i, j = torch.triu_indices(len(x), len(x), 1)
    better = r[i] > r[j]
    return x[i][better] - x[j][better]


def bradley_terry(x, r, tau, top):
    """arXiv 2203.02155: the mean over the pairs."""
    z = _pairs(x, r)
    return -logsigmoid(z).sum() / max(len(z), 1)


def hinge(x, r, tau, top):
    """arXiv 2304.05302."""
    return relu(-_pairs(x, r)).sum()


def reverse_kl(x, r, tau, top):
    """arXiv 2402.00856."""
    log_p, log_q = torch.log_softmax(x, 0), torch.log_softmax(r / tau, 0)
    return (log_p.exp() * (log_p - log_q)).sum()


def cross_entropy(x, r, tau, top):
    """arXiv 2402.05369."""
    return -(torch.softmax(r / tau, 0) * torch.log_softmax(x, 0)).sum()


def nca(x, r, tau, top):
    """arXiv 2402.05369."""
    return -(torch.softmax(r / tau, 0) * logsigmoid(x) + logsigmoid(-x) / len(x)).sum()


FORMS = {f.__name__: f for f in (plackett_luce, pro, bradley_terry, hinge, reverse_kl, cross_entropy, nca)}


def ranked_loss(
    scores,  # [P, K]
    ref_scores=None,
    rewards=None,  # None: the best comes first
    divisor=None,
    mask=None,  # bool [P, K]
    weights=None,  # [P]
    *,
    form,
    beta=1.0,
    tau=1.0,
    top=math.inf,
    nll=0.0,
    nll_by_size=False,
    n=None,
    factor=1.0,
):
    """(loss, metrics)."""
    zero = scores.new_zeros(())
    losses, sizes = [zero] * scores.shape[0], [zero] * scores.shape[0]
    seen = {name: [] for name in ("candidates", "pairs", "right", "best_reward", "best_score")}
    for g in range(scores.shape[0]):
        kept = torch.ones_like(scores[g], dtype=torch.bool) if mask is None else mask[g]
        size = int(kept.sum())
        if size < 2 or (weights is not None and weights[g] == 0):
            continue
        place = torch.arange(scores.shape[1], dtype=scores.dtype)
        r = (-place if rewards is None else rewards[g])[kept]
        order = torch.argsort(r, descending=True, stable=True)
        r, s = r[order], scores[g][kept][order]
        d = torch.ones_like(s) if divisor is None else divisor[g][kept][order]
        x = beta * (s if ref_scores is None else s - ref_scores[g][kept][order]) / d
        likelihood = -nll * ((size - 1) ** 2 if nll_by_size else 1) * s[0]
        value = FORMS[form](x, r, tau, int(min(size, top)))
        weight = 1.0 if weights is None else weights[g]
        losses[g] = weight * (value + likelihood if nll else value)
        sizes[g] = weight * (value.abs() + likelihood.abs())
        z = _pairs(x.detach(), r)
        found = (size, len(z), int((z > 0).sum()), 0.0 if rewards is None else r[0].detach(), x[0].detach())
        for name, y in zip(seen, found, strict=True):
            seen[name].append(torch.as_tensor(y, dtype=scores.dtype))
    losses = torch.stack(losses) if losses else scores.new_zeros(0)
    scale = factor / (n if n is not None else max(scores.shape[0], 1))
    loss = scale * losses.sum()
    seen = {name: torch.stack(x) if x else scores.new_zeros(0) for name, x in seen.items()}
    groups = len(seen["pairs"])

    def mean(x):
        return x.sum() / max(groups, 1)

    metrics = {
        "loss": loss.detach(), "groups": scores.new_tensor(groups), "candidates": seen["candidates"].sum(),
        "accuracy": seen["right"].sum() / seen["pairs"].sum().clamp(min=1), "best_reward": mean(seen["best_reward"]),
        "best_score": mean(seen["best_score"]),
    }  # fmt: skip
    of = {name: mean(seen[name].abs()) for name in ("best_reward", "best_score")}  # Σ|terms| of what is one sum
    of["losses"] = torch.stack(sizes).detach().abs() if sizes else losses.detach()
    of["loss"] = scale * of["losses"].sum()
    return loss, metrics | {"losses": losses.detach(), "sizes": of}
