"""Elementary functions, float32-exact on every backend: what formulas are written with.

Triton's ``exp`` is one multiplication and one ``ex2.approx``: its relative error grows as |x|·2⁻²⁴. ``exp`` below
reduces the argument first.
"""

from rlfast.kernels.lang import jit, tl

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts. The first has 16 bits, so that n·LN2_HIGH is exact for every |n| < 256 (Cody and Waite, 1980).
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.4286068203094172e-06)


@jit
def exp(x):
    """e^x to about 2 ulps: 2ⁿ·e^r, n = ⌊x·log₂e + ½⌋, |r| ≤ ½ ln 2."""
    # e^−126 is 0 in float32, e^126 infinite; an infinite x would give inf − inf below
    x = tl.where(x < -126.0, -126.0, tl.where(x > 126.0, 126.0, x))
    n = tl.floor(x * LOG2_E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp(r) * tl.exp2(n)


@jit
def expm1(x):
    """e^x − 1: where the difference would cancel, |x| < 1, Taylor's series to x¹¹ (remainder < 3·10⁻⁹)."""
    near = tl.where(tl.abs(x) < 1.0, x, 0.0)
    s = 1.0 + near * (1.0 / 11.0)
    s = 1.0 + near * (1.0 / 10.0) * s
    s = 1.0 + near * (1.0 / 9.0) * s
    s = 1.0 + near * (1.0 / 8.0) * s
    s = 1.0 + near * (1.0 / 7.0) * s
    s = 1.0 + near * (1.0 / 6.0) * s
    s = 1.0 + near * (1.0 / 5.0) * s
    s = 1.0 + near * (1.0 / 4.0) * s
    s = 1.0 + near * (1.0 / 3.0) * s
    s = near + near * (near * 0.5 * s)
    return tl.where(tl.abs(x) < 1.0, s, exp(x) - 1.0)


@jit
def log1p(u):
    """log(1 + u) for u in [−½, 1]: 2·artanh(s), s = u / (2 + u), |s| ≤ 1/3, to s¹⁷ (remainder < 10⁻⁹)."""
    s = tl.div_rn(u, 2.0 + u)
    q = s * s
    t = 1.0 / 15.0 + q * (1.0 / 17.0)
    t = 1.0 / 13.0 + q * t
    t = 1.0 / 11.0 + q * t
    t = 1.0 / 9.0 + q * t
    t = 1.0 / 7.0 + q * t
    t = 1.0 / 5.0 + q * t
    t = 1.0 / 3.0 + q * t
    return 2.0 * (s + s * (q * t))


@jit
def softplus(x):
    """log(1 + e^x) = max(x, 0) + log(1 + e^−|x|): full relative precision as x → −∞, where it is a small 1 − p."""
    return tl.where(x > 0.0, x, 0.0) + log1p(exp(-tl.abs(x)))


@jit
def tanh(x):
    """tanh x: x + x³·p(x²) below 1 (minimax, relative error 2⁻³¹), else 1 − 2q / (1 + q), q = e^−2|x|."""
    a = tl.abs(x)
    u = x * x
    t = 1.2147074449e-4 * u - 8.4113731282e-4
    t = t * u + 3.0785943381e-3
    t = t * u - 8.5951145738e-3
    t = t * u + 2.1784730256e-2
    t = t * u - 5.3953099996e-2
    t = t * u + 1.3333199918e-1
    t = t * u - 3.3333328366e-1
    q = exp(-2.0 * a)
    r = 1.0 - tl.div_rn(2.0 * q, 1.0 + q)
    return tl.where(a < 1.0, t * u * x + x, tl.where(x < 0.0, -r, r))


@jit
def sigmoid(x):
    """1 / (1 + e^−x)."""
    return tl.div_rn(1.0, 1.0 + exp(-x))
