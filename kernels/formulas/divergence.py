"""The arithmetic of a divergence of two distributions, a column at a time."""

from rlfast.kernels.formulas.elementary import exp, expm1, log1p
from rlfast.kernels.lang import jit, tl

FORWARD = tl.constexpr(0)  # as in ops/divergence_records.py
REVERSE = tl.constexpr(1)
JSD = tl.constexpr(2)
FAR = tl.constexpr(110.0)  # nats beyond which e^−|u| is 0


@jit
def gap_term(e, gap, z_p, z_q):
    """e_p·gap: 0 where p is 0, infinite where q alone is."""
    term = tl.where(z_p == float("-inf"), 0.0, e * gap)
    return tl.where(z_p > float("-inf"), tl.where(z_q == float("-inf"), float("inf"), term), term)


@jit
def over_mixture(u, beta, rest):
    """(log M/S, log M/T) of u = log T − log S, M = rest·S + beta·T, rest = 1 − beta.

    With w = e^−|u|, the smaller over the larger: log M/S = log(1 + β·(w − 1)) for u ≤ 0, log M/T = log(1 + (1 − β)·(w
    − 1)) for
    u > 0, and the other is u away.
    """
    u = tl.where(u > FAR, FAR, tl.where(u < -FAR, -FAR, u))
    u = tl.where(u == u, u, 0.0)  # −inf − (−inf): neither is possible
    up = u > 0.0
    less = -tl.where(up, rest, beta) * expm1(-tl.abs(u))  # 1 − what the logarithm is of
    log = tl.where(less > 0.5, tl.log(1.0 - less), -log1p(tl.div_rn(less, 1.0 - tl.where(less > 0.5, 0.5, less))))
    log = tl.where(less > 0.5, log, tl.where(less > 0.0, log, 0.0))
    return log + tl.where(up, u, 0.0), log - tl.where(up, 0.0, u)


@jit
def divergence_gradient(d_own, d_other, own_log_sum, other_log_sum, high, low, beta, rest, MEASURE: tl.constexpr):
    """∂/∂z of the own side S, T the other, from d = z − peak.

    KL(T‖S): S − T; high and low are 1/Σe of either side, whose logarithms are rounded.  KL(S‖T): S·(gap − E_S[gap]).
    JSD: −(1 − β)·S·(log M/S + KL(S‖M)).
    """
    if MEASURE == FORWARD:
        g = exp(d_own) * high - exp(d_other) * low
    elif MEASURE == REVERSE:
        p = exp(d_own - own_log_sum)
        g = tl.where(p == 0.0, p, p * (((d_own - d_other) - high) - low))
    else:
        p = exp(d_own - own_log_sum)
        u = (d_other - d_own) - (other_log_sum - own_log_sum)
        m_over_own, _ = over_mixture(u, beta, rest)
        g = tl.where(p == 0.0, p, -rest * p * ((m_over_own + high) + low))
    return g
