"""The arithmetic of a choice between two, of log-odds x: its likelihood, its KL to another, without cancellation."""

from rlfast.kernels.formulas.elementary import exp, expm1, log1p, sigmoid, softplus
from rlfast.kernels.lang import jit, tl

NEAR = tl.constexpr(2.0)
FAR = tl.constexpr(1e30)  # in place of infinity, which times 0 is no number


@jit
def cross_entropy(x, wrong):
    """−(1 − ε)·log σ(x) − ε·log σ(−x), ε = wrong: ε·x⁺ + (1 − ε)·x⁻ + log(1 + e^−|x|); 0 times infinity is 0."""
    a = tl.abs(x)
    rate = tl.where(x > 0.0, wrong, 1.0 - wrong)
    return tl.where(rate == 0.0, 0.0, rate * a) + log1p(exp(-a))


@jit
def choice_kl_slope(q, t):
    """d/dt of log(1 + q(e^t − 1)) − qt, without the factor q(1 − q)."""
    grown = expm1(t)
    return grown / (1.0 + q * grown)


@jit
def choice_kl(a, b):
    """KL of a choice with log-odds a to one with log-odds b, without the cancellation of its four terms.

    log(1 + q(e^s − 1)) − qs, s = |b − a|, q = σ(A), A = ±a and B = ±b so that B ≥ A. Up to s = 2 the integral of its
    slope, which is positive, by the rule of Gauss of six points (relative error < 10⁻⁹); beyond, the same as
    s(1 − q) + log σ(A) − log σ(B) or, for A < 0, log σ(−A) − log σ(−B) − qs.
    """
    up = b > a
    low, high, s = tl.where(up, a, -a), tl.where(up, b, -b), tl.minimum(tl.abs(b - a), FAR)
    q, rest = sigmoid(low), sigmoid(-low)
    near = tl.minimum(s, NEAR)
    outer = choice_kl_slope(q, 0.03376524289842397 * near) + choice_kl_slope(q, 0.966234757101576 * near)
    middle = choice_kl_slope(q, 0.16939530676686776 * near) + choice_kl_slope(q, 0.8306046932331322 * near)
    inner = choice_kl_slope(q, 0.3806904069584015 * near) + choice_kl_slope(q, 0.6193095930415985 * near)
    mean = 0.08566224618958518 * outer + 0.1803807865240693 * middle + 0.23395696728634552 * inner
    near = near * (q * rest) * mean
    far = tl.where(
        low < 0.0,
        softplus(high) - softplus(low) - q * s,
        s * rest - softplus(-low) + softplus(-high),
    )
    return tl.where(s <= NEAR, near, far)


@jit
def slope_difference(a, b, gap):
    """σ'(a) − σ'(b), σ' = σ(u)σ(−u) = ¼/cosh²(u/2), gap = a − b, without the cancellation.

    Of sinh(x + y)·sinh(x − y) = cosh²x − cosh²y.
    """
    u, v = 1.0 + exp(-tl.abs(a)), 1.0 + exp(-tl.abs(b))
    size = expm1(-tl.abs(gap)) * expm1(-tl.abs(a + b)) * exp(-tl.minimum(tl.abs(a), tl.abs(b))) / (u * u * v * v)
    return tl.where(gap * (a + b) > 0.0, -size, size)
