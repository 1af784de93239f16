"""Losses of ranked groups: each is a function of whole groups, its value and its derivative by every candidate's score.

The text runs on tiles of [groups, candidates] and of [groups, i, j]; C++ has its own in csrc/cpu/ranked_forms.h. In the
equations candidates are in their order, the best first: i < j where i is ahead of j.
"""

from typing import NamedTuple

from rlfast.kernels.formulas.elementary import exp, log1p, softplus
from rlfast.kernels.lang import jit, tl

LN_2 = tl.constexpr(0.6931471805599453)
INFINITE = tl.constexpr(float("inf"))


class Group(NamedTuple):
    """Groups, a row each. What is not valid holds 0."""

    x: object  # [G, K]: what is compared
    reward: object  # [G, K]
    valid: object  # [G, K]: the candidates that count
    ahead: object  # [G, i, j]: both count, and i has the larger reward, or the same and comes first
    place: object  # [G, K]: how many are ahead
    count: object  # [G]: how many count


class Ranking(NamedTuple):
    """The temperature of the rewards; how many places of a sequential form count."""

    tau: float = 1.0
    top: float = float("inf")


@jit
def log_of_sum(rest):
    """log(1 + rest), rest ≥ 0: n·ln 2 + log(1 + v) with 1 + rest = 2ⁿ·(1 + v); all digits of a rest near 0."""
    n = tl.floor(tl.log2(1.0 + rest))
    v = tl.where(n > 0.0, (1.0 + rest) * tl.exp2(-n) - 1.0, rest)
    return n * LN_2 + log1p(v)


@jit
def logistic(x):
    """σ(x) = 1/(1 + e^−x), of any x."""
    e = exp(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)


@jit
def log_softmax(x, g):
    """(log softmax, softmax) of each group; zeros of an empty one."""
    empty = g.count == 0.0
    peak = tl.where(empty, 0.0, tl.max(tl.where(g.valid, x, -INFINITE), 1))[:, None]
    e = exp(tl.where(g.valid, x - peak, -INFINITE))
    total = tl.where(empty, 1.0, tl.sum(e, 1))[:, None]
    return tl.where(g.valid, (x - peak) - log_of_sum(total - 1.0), 0.0), tl.div_rn(e, total)


@jit
def target(g, tau):
    """(log q, q) of q = softmax(r/τ)."""
    return log_softmax(tl.div_rn(g.reward, (0.0 * g.count + tau)[:, None]), g)


@jit
def flow(lost):
    """∂/∂x of terms that depend on x_j − x_i with the derivatives lost_ij: what j gains, i loses."""
    return tl.sum(lost, 1) - tl.sum(lost, 2)


@jit
def in_turn(g, own, z, h):
    """(−log p_i, p_ij): p_i = e^own_i/(e^own_i + Σ_{j>i} e^z_ij), and the share of j.

    1 − p_i is Σ_j p_ij, not a difference.
    """
    z = tl.where(g.ahead, z, -INFINITE)
    peak = tl.maximum(own, tl.max(z, 2))
    here, away = exp(own - peak), exp(z - peak[:, :, None])
    rest = tl.sum(away, 2)
    counts = g.valid & (g.place < h.top)
    value = (peak - own) + log_of_sum(tl.where(own >= peak, rest, (here + rest) - 1.0))
    share = tl.div_rn(tl.where(counts, 1.0, 0.0), here + rest)
    return tl.where(counts, value, 0.0), away * share[:, :, None]


@jit
def plackett_luce(g: Group, h: Ranking):
    """ℓ = Σ_{i ≤ top} [log Σ_{j≥i} e^x_j − x_i].

    ∂ℓ/∂x_k = Σ_{i≤k} p_ik − 1, p_ik = e^x_k/Σ_{j≥i} e^x_j. arXiv 2301.11270, 2305.18290.
    """
    value, p = in_turn(g, g.x, g.x[:, None, :], h)
    return tl.sum(value, 1), flow(p)


@jit
def pro(g: Group, h: Ranking):
    """ℓ = Σ_i [log(e^{x_i·T_i} + Σ_{j>i} e^{x_j·T_ij}) − x_i·T_i], T_ij = r_i − r_j, T_i = max_j T_ij.

    ∂ℓ/∂x_k = Σ_{i<k} T_ik·p_ik − T_k·Σ_{j>k} p_kj. arXiv 2306.17492.
    """
    t = tl.where(g.ahead, g.reward[:, :, None] - g.reward[:, None, :], 0.0)
    most = tl.max(t, 2)
    value, p = in_turn(g, g.x * most, g.x[:, None, :] * t, h)
    return tl.sum(value, 1), tl.sum(p * t, 1) - most * tl.sum(p, 2)


@jit
def bradley_terry(g: Group, h: Ranking):
    """ℓ = mean over the pairs with r_i > r_j of −log σ(x_i − x_j).

    ∂ℓ/∂(x_j − x_i) = σ(x_j − x_i)/pairs. InstructGPT, arXiv 2203.02155.
    """
    better = g.ahead & (g.reward[:, :, None] > g.reward[:, None, :])
    z = g.x[:, None, :] - g.x[:, :, None]
    pairs = tl.maximum(tl.sum(tl.sum(tl.where(better, 1.0, 0.0), 2), 1), 1.0)
    value = tl.sum(tl.sum(tl.where(better, softplus(z), 0.0), 2), 1)
    return tl.div_rn(value, pairs), tl.div_rn(flow(tl.where(better, logistic(z), 0.0)), pairs[:, None])


@jit
def hinge(g: Group, h: Ranking):
    """ℓ = Σ over the pairs with r_i > r_j of max(0, x_j − x_i).

    ∂ℓ/∂(x_j − x_i) = 1 where it is above 0. RRHF, arXiv 2304.05302.
    """
    z = g.x[:, None, :] - g.x[:, :, None]
    wrong = g.ahead & (g.reward[:, :, None] > g.reward[:, None, :]) & (z > 0.0)
    return tl.sum(tl.sum(tl.where(wrong, z, 0.0), 2), 1), flow(tl.where(wrong, 1.0, 0.0))


@jit
def reverse_kl(g: Group, h: Ranking):
    """ℓ = KL(p‖q) = Σ_k p_k·(log p_k − log q_k), p = softmax(x), q = softmax(r/τ).

    ∂ℓ/∂x_k = p_k·(log p_k − log q_k − ℓ). EXO, arXiv 2402.00856.
    """
    log_p, p = log_softmax(g.x, g)
    log_q, _ = target(g, h.tau)
    gap = log_p - log_q
    value = tl.sum(p * gap, 1)
    return value, p * (gap - value[:, None])


@jit
def cross_entropy(g: Group, h: Ranking):
    """ℓ = −Σ_k q_k·log p_k, p = softmax(x), q = softmax(r/τ).

    ∂ℓ/∂x_k = p_k − q_k. InfoNCA, arXiv 2402.05369.
    """
    log_p, p = log_softmax(g.x, g)
    _, q = target(g, h.tau)
    return -tl.sum(q * log_p, 1), p - q


@jit
def nca(g: Group, h: Ranking):
    """ℓ = −Σ_k [q_k·log σ(x_k) + log σ(−x_k)/K], q = softmax(r/τ).

    ∂ℓ/∂x_k = σ(x_k)/K − q_k·σ(−x_k). NCA, arXiv 2402.05369.
    """
    _, q = target(g, h.tau)
    each = tl.div_rn(1.0, tl.maximum(g.count, 1.0))[:, None]
    value = tl.where(g.valid, q * softplus(-g.x) + each * softplus(g.x), 0.0)
    return tl.sum(value, 1), tl.where(g.valid, each * logistic(g.x) - q * logistic(-g.x), 0.0)
