"""A token and its log-probs in plain PyTorch. Each returns (entropy, kept mass, token, raw log-prob, log-prob)."""

from __future__ import annotations

import torch


def eager(logits, top_k, top_p):
    """What everyone writes first: softmax, a sort where something is cut, multinomial, log_softmax, the entropy."""
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    kept = p
    if top_k:
        kept = p.masked_fill(logits < logits.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1.0:
        values, at = kept.sort(descending=True)
        beyond = values.cumsum(-1) - values >= top_p
        kept = torch.zeros_like(p).scatter(-1, at, values.masked_fill(beyond, 0.0))
    mass = kept.sum(-1)
    token = torch.multinomial(kept, 1)
    raw = log_p.gather(-1, token).squeeze(-1)
    return entropy, mass, token, raw, raw - mass.log()


def statistics(logits):
    """(e of x − max, its sum, the entropy) in few passes."""
    x = logits - logits.amax(-1, keepdim=True)
    e = x.exp()
    total = e.sum(-1)
    return x, e, total, total.log() - (e * x).sum(-1) / total


def race(logits, top_k, top_p):
    """One exponential pass for all of it; the token is the argmax of e over exponential noise."""
    x, e, total, entropy = statistics(logits)
    token = (e / torch.empty_like(e).exponential_()).argmax(-1, keepdim=True)
    raw = x.gather(-1, token).squeeze(-1) - total.log()
    return entropy, torch.ones_like(total), token, raw, raw


def race_of_few(logits, top_k, top_p, few=256):
    """The same among the largest alone: of top-k those k; of top-p as many as its mass takes, doubled until they do."""
    x, _, total, entropy = statistics(logits)
    while True:
        values, ids = x.topk(top_k or min(few, x.shape[-1]))
        e = values.exp()
        before = e.cumsum(-1) - e
        if top_k or few >= x.shape[-1] or bool((before[:, -1] >= top_p * total).all()):
            break
        few *= 4
    e = e if top_k else e.masked_fill(before >= top_p * total.unsqueeze(-1), 0.0)
    mass = e.sum(-1)
    at = (e / torch.empty_like(e).exponential_()).argmax(-1, keepdim=True)
    own = values.gather(-1, at).squeeze(-1)
    return entropy, mass / total, ids.gather(-1, at), own - total.log(), own - mass.log()
