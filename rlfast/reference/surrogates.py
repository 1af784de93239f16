"""Surrogates and KL estimators as their papers write them: values alone, autograd does the rest.

t.logp carries the gradient; t.log_ratio is log π/π_old of the unit, with its gradient; t.ratio = exp(t.log_ratio).
"""

import torch


def ppo_clip(t, eps_low=0.2, eps_high=0.2, dual_clip=float("inf"), delta=float("inf")):
    """arXiv 1707.06347 (7); dual clip 1912.09729 (4); δ 2505.07291."""
    objective = torch.min(t.ratio.clamp(max=delta) * t.adv, t.ratio.clamp(1 - eps_low, 1 + eps_high) * t.adv)
    if dual_clip < float("inf"):
        objective = torch.where(t.adv < 0, torch.max(objective, dual_clip * t.adv), objective)
    return -objective


def reinforce(t):
    """Williams 1992."""
    return -t.adv * t.logp


def nll(t):
    return -t.logp


def ratio_weighted(t):
    """arXiv 2507.20673 (5), outside of the clip, which is the unit's."""
    return -t.ratio * t.adv


def cispo(t, eps_low=0.2, eps_high=0.2):
    """arXiv 2506.13585 (4)."""
    return -t.ratio.clamp(1 - eps_low, 1 + eps_high).detach() * t.adv * t.logp


def cispo_capped(t, cap=1.0):
    return -t.ratio.clamp(max=cap).detach() * t.adv * t.logp


def topr(t, cap=1.0):
    """arXiv 2503.14286 (8)."""
    return -torch.where(t.adv > 0, torch.ones_like(t.ratio), t.ratio.clamp(0, cap)).detach() * t.adv * t.logp


def sapo(t, tau_pos=1.0, tau_neg=1.05):
    """arXiv 2511.20347."""
    tau = torch.where(t.adv > 0, torch.full_like(t.adv, tau_pos), torch.full_like(t.adv, tau_neg))
    return -torch.sigmoid(tau * (t.ratio - 1)) * 4 / tau * t.adv


def vespo(t, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0):
    """arXiv 2602.10693: φ(W) = e^λ·W^k·e^(−λW), of the whole sequence."""
    gain = t.adv >= 0
    k = torch.where(gain, torch.full_like(t.adv, k_pos), torch.full_like(t.adv, k_neg))
    rate = torch.where(gain, torch.full_like(t.adv, lambda_pos), torch.full_like(t.adv, lambda_neg)).clamp(min=1e-4)
    phi = torch.exp(rate + k * t.log_ratio - rate * t.ratio).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return -phi.detach() * t.adv * t.logp


def squared_residual(t, tau=0.1, scale=1.0):
    """arXiv 2501.12599 (3), 2405.19107 (6), 2505.20686 (4)."""
    return scale * (t.adv - tau * t.log_ratio) ** 2


def quadratic_penalty(t, tau=0.1, scale=1.0):
    return scale * (-t.adv * t.logp + tau / 2 * t.log_ratio**2)


def apa(t, inv_lambda=10.0):
    """arXiv 2306.02231 (4)."""
    return (t.log_ratio - t.adv * inv_lambda) ** 2


def awr(t, coef=1.0, max_weight=20.0):
    """arXiv 1910.00177."""
    return -torch.exp(coef * t.adv).clamp(max=max_weight) * t.logp


def a_lol(t, eps_low=0.2, eps_high=0.2):
    """arXiv 2305.14718 (3)."""
    return -t.ratio.clamp(1 - eps_low, 1 + eps_high).detach() * t.adv.clamp(min=0) * t.logp


def dppo_tv(t, eps_low=0.2, eps_high=0.2, cap=20.0):
    """arXiv 2602.04879: the binary total variation."""
    moved = t.logp.exp() - t.old_logp.exp()
    inside = torch.where(t.adv > 0, moved <= eps_high, moved >= -eps_low)
    return -t.adv * (t.ratio.clamp(max=cap) * inside).detach() * t.logp


def dppo_kl(t, eps_low=0.2, eps_high=0.2, cap=20.0):
    """arXiv 2602.04879: the binary KL(old‖new)."""
    p, q = t.logp.exp(), t.old_logp.exp()
    divergence = q * (t.old_logp - t.logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    inside = torch.where(t.adv > 0, (divergence <= eps_high) | (p <= q), (divergence <= eps_low) | (p >= q))
    return -t.adv * (t.ratio.clamp(max=cap) * inside).detach() * t.logp


def kl_cov(t, coef=1.0):
    """arXiv 2505.22617 (13)."""
    return -t.adv * t.ratio + coef * t.extra * t.log_ratio.abs()


def cpgd(t, eps_low=0.2, eps_high=0.2, alpha=0.1):
    """arXiv 2505.12504: the clip of log r, and the drift from the old policy."""
    low, high = torch.log1p(torch.tensor(-eps_low)), torch.log1p(torch.tensor(eps_high))
    bounded = torch.minimum(torch.maximum(t.log_ratio, low.to(t.log_ratio)), high.to(t.log_ratio))
    return -torch.min(t.log_ratio * t.adv, bounded * t.adv) + alpha * (t.ratio - 1 - t.log_ratio)


def nash_md(t, pull=0.1):
    """arXiv 2312.00886: P − ½ as the advantage, and the reference policy as the old one."""
    return -t.adv * t.logp + pull * (t.logp - t.old_logp).detach() * t.logp


def value_clipped(t, clip=float("inf")):
    """logp is V, old_logp is V_old, adv the return."""
    bounded = torch.minimum(torch.maximum(t.logp, t.old_logp - clip), t.old_logp + clip)
    return 0.5 * torch.max((t.logp - t.adv) ** 2, (bounded - t.adv) ** 2)


def value_huber(t, delta=1.0, clip=float("inf")):
    bounded = torch.minimum(torch.maximum(t.logp, t.old_logp - clip), t.old_logp + clip)
    worst = torch.max((t.logp - t.adv).abs(), (bounded - t.adv).abs())
    return torch.nn.functional.huber_loss(worst, torch.zeros_like(worst), reduction="none", delta=delta)


def kl_estimate(name, d, d_max=float("inf"), kl_max=float("inf")):
    """Of KL(π‖π_ref), from d = log π_ref − log π. A "+" keeps the value and takes the gradient of k2."""
    bounded = d.clamp(-d_max, d_max)
    value = {
        "k1": -bounded,
        "k2": bounded**2 / 2,
        "k3": torch.expm1(bounded) - bounded,
        "absolute": bounded.abs(),
    }[name.removesuffix("+")].clamp(-kl_max, kl_max)
    if not name.endswith("+"):
        return value
    k2 = d**2 / 2
    return k2 - k2.detach() + value.detach()


def clipped(name, t, hyper):
    """The tokens where a bound of the surrogate is active."""
    rule, r, defaults = BOUNDS.get(name), t.ratio, {"eps_low": 0.2, "eps_high": 0.2, "cap": 1.0}
    if rule is None:
        return torch.zeros_like(r, dtype=torch.bool)
    return rule(t, r, defaults | hyper)


def _ppo_clipped(t, r, h):
    c, delta, high = h.get("dual_clip", float("inf")), h.get("delta", float("inf")), 1 + h["eps_high"]
    down = (r < 1 - h["eps_low"]) | (r > min(c, max(delta, high)))
    return ((t.adv > 0) & (r > min(delta, high))) | ((t.adv < 0) & down)


def _outside(t, r, h):
    return (r < 1 - h["eps_low"]) | (r > 1 + h["eps_high"])


def _tv_clipped(t, r, h):
    moved = t.logp.exp() - t.old_logp.exp()
    return torch.where(t.adv > 0, moved > h["eps_high"], moved < -h["eps_low"])


def _kl_clipped(t, r, h):
    p, q = t.logp.exp(), t.old_logp.exp()
    divergence = q * (t.old_logp - t.logp) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    up, down = (divergence > h["eps_high"]) & (p > q), (divergence > h["eps_low"]) & (p < q)
    return torch.where(t.adv > 0, up, down)


def _value_clipped(t, r, h):
    c = h.get("clip", float("inf"))
    bounded = torch.minimum(torch.maximum(t.logp, t.old_logp - c), t.old_logp + c)
    return (bounded - t.adv) ** 2 > (t.logp - t.adv) ** 2


BOUNDS = {
    "ppo_clip": _ppo_clipped,
    "cispo": _outside,
    "a_lol": _outside,
    "cispo_capped": lambda t, r, h: r > h["cap"],
    "topr": lambda t, r, h: (t.adv < 0) & (r > h["cap"]),
    "dppo_tv": _tv_clipped,
    "dppo_kl": _kl_clipped,
    "cpgd": lambda t, r, h: ((t.adv > 0) & (r > 1 + h["eps_high"])) | ((t.adv < 0) & (r < 1 - h["eps_low"])),
    "value_clipped": _value_clipped,
    "value_huber": _value_clipped,
}
