"""Group advantages by their definitions, a group at a time, in the dtype of the rewards."""

import torch


def groups_of(n, group_size=None, ids=None):
    """Lists of the samples of each group, in the order in which groups come."""
    keys = [i // group_size for i in range(n)] if ids is None else torch.as_tensor(ids).tolist()
    found = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    return list(found.values())


def deviation(r, bessel):
    """√(Σ(r − mean)²/(n − 1)), n in place of n − 1 if not bessel; 0 of too few."""
    n = r.shape[0] - int(bessel)
    return torch.zeros_like(r[0]) if n <= 0 else (((r - r.mean()) ** 2).sum() / n).sqrt()


def group_advantage(
    rewards, *, group_size=None, ids=None, mask=None, baseline="mean", scale="none", bessel=True, eps=0.0, weights=None,
    tau=1.0, lone_raw=False, skip_zero=False,
):  # fmt: skip
    """(advantages [N], [groups, groups of equal rewards, Σ of their means, Σ of their stds])."""
    out = torch.zeros_like(rewards)
    statistics = torch.zeros(4, dtype=torch.float64)
    for group in groups_of(rewards.shape[0], group_size, ids):
        group = [i for i in group if mask is None or bool(mask[i])]
        if not group:
            continue
        r, n = rewards[group], len(group)
        std = deviation(r, bessel)
        statistics += torch.tensor([1.0, float((r == r[0]).all()), r.mean().item(), std.item()])
        for place, i in enumerate(group):
            others = torch.cat((r[:place], r[place + 1 :]))
            if n == 1:
                s = 1.0 + eps if scale != "none" else 1.0
                out[i] = r[0] / s if lone_raw else 0.0
                continue
            if baseline == "mean":
                b = r.mean()
            elif baseline == "leave one out":
                b = others.mean()
            elif baseline == "weighted":
                w = weights[group].to(r.dtype)
                b = (w * r).sum() / w.sum()
            elif baseline == "soft":
                b = tau * ((r / tau).logsumexp(0) - torch.tensor(float(n), dtype=r.dtype).log())
            else:
                b = others.max()
            s = 1.0
            if scale != "none":
                s = std if scale == "std" else deviation(others, bessel)
                s = torch.ones_like(s) if skip_zero and s == 0 else s + eps
            first = place == int(r.argmax())
            out[i] = 0.0 if baseline == "second" and not first else (rewards[i] - b) / s
    return out, statistics
