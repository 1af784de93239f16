"""The formulas of the recipes in plain float64 PyTorch: autograd through the models of transformers, nothing of ours.

``Truth`` is given the initial weights and the sampled tokens, and takes the same steps by itself.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid, mse_loss, relu

TOLERANCE = 1e-6
OF_WEIGHTS = 1e-5  # AdamW divides a gradient by its own size, and so the rounding of one near 0


def same(what: str, got, wanted, tolerance: float = TOLERANCE) -> None:
    """Within 1e-6 of the larger of 1 and the number."""
    got, wanted = torch.as_tensor(got).double(), torch.as_tensor(wanted).double()
    assert got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(wanted.shape)}"
    error = ((got - wanted).abs() / wanted.abs().clamp(min=1.0)).max() if got.numel() else torch.tensor(0.0)
    assert error <= tolerance, f"{what}: off by {error:.3e}"  # NaN is off too


# Models


def padded(prompts, responses, skip=0):
    """(ids, attention, mask of the responses' tokens), the last of them one shorter."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    rows = [(*p, *r, *[0] * (width - len(p) - len(r))) for p, r in zip(prompts, responses, strict=True)]
    there = [[1] * (len(p) + len(r)) + [0] * (width - len(p) - len(r)) for p, r in zip(prompts, responses, strict=True)]
    mask = torch.zeros(len(rows), width - 1)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        mask[i, len(p) - 1 + skip : len(p) + len(r) - 1] = 1
    return torch.tensor(rows), torch.tensor(there), mask.double()


def logits_of(model, batch):
    return model(input_ids=batch[0], attention_mask=batch[1]).logits[:, :-1]


def logp_of(model, batch):
    logp = logits_of(model, batch).log_softmax(-1)
    return logp.gather(-1, batch[0][:, 1:, None])[..., 0] * batch[2]


def entropy_of(model, batch):
    logp = logits_of(model, batch).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def hidden_of(scorer, batch):
    return scorer.body(input_ids=batch[0], attention_mask=batch[1]).last_hidden_state


def attributes_of(scorer, batch):
    last = batch[1].sum(1) - 1
    return hidden_of(scorer, batch)[torch.arange(len(last)), last] @ scorer.head.T


def reward_of(scorer, batch):
    return attributes_of(scorer, batch).mean(1)


def values_of(scorer, batch):
    return (hidden_of(scorer, batch)[:, :-1] @ scorer.head.T)[..., 0]


# Reward models


def pair_of(rewards, group):
    """(best, worst) rows of each group that has two rewards."""
    found = []
    for i in range(0, len(rewards), group):
        some = rewards[i : i + group].tolist()
        if max(some) > min(some):
            found.append((i + some.index(max(some)), i + some.index(min(some))))
    return [i for i, _ in found], [j for _, j in found]


def reward_model_loss(s, scorer, batch, rewards, group):
    if s["loss"] == "regression":
        out = attributes_of(scorer, batch)
        return mse_loss(out, rewards[:, None].expand_as(out))
    r = reward_of(scorer, batch)
    if s["loss"] == "all_pairs":
        losses = []
        for i in range(0, len(r), group):
            pairs = [(a, b) for a in range(i, i + group) for b in range(i, i + group) if rewards[a] > rewards[b]]
            losses.append(sum(-logsigmoid(r[a] - r[b]) for a, b in pairs) / max(len(pairs), 1))
        return sum(losses) / len(losses)
    if s["loss"] == "plackett_luce":
        losses = []
        for i in range(0, len(r), group):
            order = sorted(range(i, i + group), key=lambda k: -rewards[k])  # stable: the first of equals first
            losses.append(sum(r[order[j:]].logsumexp(0) - r[order[j]] for j in range(group)))
        return sum(losses) / len(losses)
    w, l_ = pair_of(rewards, group)
    gap = r[w] - r[l_]
    if s["loss"] == "soft_label":
        p = (rewards[w] - rewards[l_]).sigmoid()
        return -(p * logsigmoid(gap) + (1 - p) * logsigmoid(-gap)).mean()
    if s["loss"] == "focal_barrier":
        p = gap.sigmoid()
        focal = (1 - 2 * relu(p - 0.5)) ** s["gamma"] * -logsigmoid(gap)
        bound = 5 - 1e-3
        walls = [-(5 - x.clamp(-bound, bound)).log() - (5 + x.clamp(-bound, bound)).log() for x in (r[w], r[l_])]
        return (focal + s["barrier"] * sum(walls)).mean()
    return -logsigmoid(gap).mean()


# Advantages


def gae(rewards, values, mask, gamma, lam):
    adv, returns = torch.zeros_like(values), torch.zeros_like(values)
    for i in range(len(values)):
        next_value = next_adv = 0.0
        for t in reversed(mask[i].nonzero()[:, 0].tolist()):
            delta = rewards[i, t] + gamma * next_value - values[i, t]
            next_adv = adv[i, t] = delta + gamma * lam * next_adv
            next_value = values[i, t]
            returns[i, t] = adv[i, t] + values[i, t]
    return adv, returns


def over_groups(kind, r, group):
    g = r.view(-1, group)
    centred = g - g.mean(1, keepdim=True)
    if kind == "grpo":
        return (centred / (g.std(1, keepdim=True) + 1e-4)).flatten()
    if kind == "rloo":
        return (g - (g.sum(1, keepdim=True) - g) / (group - 1)).flatten()
    if kind == "batch_std":
        return centred.flatten() / (r.std() + 1e-4)
    if kind == "whitened":
        a = centred.flatten()
        return (a - a.mean()) / (a.var() + 1e-8).sqrt()
    assert kind == "centred"
    return centred.flatten()


def length_rewards(lengths, right, group):
    found = []
    for i in range(0, len(lengths), group):
        some = lengths[i : i + group]
        low, high = min(some), max(some)
        for n, ok in zip(some, right[i : i + group], strict=True):
            x = 0.5 - (n - low) / (high - low) if high > low else 0.0
            found.append(x if ok else min(0.0, x))
    return torch.tensor(found).double()


# Policies and preferences


def k3(lp, ref):
    return (ref - lp).exp() - (ref - lp) - 1


def policy_loss(s, lp, old, mask, adv, ref=None, rollout=None):
    """A mean over tokens, or over sequences of their means."""
    adv = adv[:, None].expand_as(lp) if adv.dim() == 1 else adv
    x = (lp - old) * mask
    ratio = x.exp()
    if s["loss"] in ("ppo", "grpo"):
        bounded = ratio.clamp(1 - s["low"], 1 + s["high"])
        each = torch.maximum(-adv * ratio, -adv * bounded)
    elif s["loss"] == "apa":
        each = (x - s["inv_lambda"] * adv) ** 2
    elif s["loss"] == "reinforce":
        each = -adv * lp
    elif s["loss"] == "cispo":
        each = -ratio.detach().clamp(max=s["cap"]) * adv * lp
    else:
        assert s["loss"] == "kimi"
        return ((adv[:, 0] - s["tau"] * x.sum(1)) ** 2).mean()
    if "tis" in s:
        each = each * (old - rollout).exp().clamp(max=s["tis"])
    if s["loss"] == "grpo":
        each = each + s["beta"] * k3(lp, ref)
    if s["loss"] in ("grpo", "cispo"):
        return ((each * mask).sum(1) / mask.sum(1)).mean()
    return (each * mask).sum() / mask.sum()


def value_loss(values, old, returns, mask, clip):
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return 0.5 * (error * mask).sum() / mask.sum()


def nll(lp, mask):
    return -(lp * mask).sum() / mask.sum()


def preference_loss(s, w, l_, ref_w, ref_l, n_w, n_l, margin):
    """w and l_ are sums over the responses."""
    if s["loss"] == "orpo":
        w, l_ = w / n_w, l_ / n_l
        odds = (w - l_) - (torch.log1p(-w.exp()) - torch.log1p(-l_.exp()))
        return (-w - s["beta"] * logsigmoid(odds)).mean()
    d_w, d_l = w - ref_w, l_ - ref_l
    if s["loss"] == "dpo_norm":
        return -logsigmoid(s["beta"] * (d_w / n_w - d_l / n_l)).mean()
    x = s["beta"] * (d_w - d_l)
    if s["loss"] == "rpo":
        a = s["eta"] * margin
        p, q = a.sigmoid(), (-a).sigmoid()
        each = p * (logsigmoid(a) - logsigmoid(x)) + q * (logsigmoid(-a) - logsigmoid(-x))
    else:
        each = -logsigmoid(x)
    return (each - s.get("nll", 0.0) * w / n_w.clamp(min=1)).mean()


def jsd(student, teacher, mask, beta):
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    m = ((1 - beta) * s.exp() + beta * t.exp()).log()
    each = beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    return (each * mask).sum() / mask.sum()


def slerp(a, b, base, weight):
    found = {}
    for k in a:
        u, v = a[k] - base[k], b[k] - base[k]
        norm = u.norm() * v.norm()
        angle = torch.acos(((u * v).sum() / norm).clamp(-1, 1)) if norm > 0 else torch.tensor(0.0)
        if math.sin(angle) < 1e-6:
            found[k] = base[k] + (1 - weight) * u + weight * v
        else:
            found[k] = base[k] + (((1 - weight) * angle).sin() * u + (weight * angle).sin() * v) / angle.sin()
    return found


def copied(model):
    return {k: x.detach().clone() for k, x in model.state_dict().items()}
