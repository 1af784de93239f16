"""The arithmetic of a log-prob: from a logit to z, from the sum of the others to log p, and back.

Triton's ``exp`` is one multiplication and one ``ex2.approx``: its relative error grows as |x|·2⁻²⁴. Where that would
show (gradients, the last steps of a row), ``exp`` below is used, which reduces the argument first.
"""

from rlfast.kernels.lang import jit, tl

# What a transform has to do; a plain softmax pays for neither a division nor a tanh.
IDENTITY = tl.constexpr(0)
SCALED = tl.constexpr(1)
SOFTCAPPED = tl.constexpr(2)

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts. The first has 16 bits, so that n·LN2_HIGH is exact for every |n| < 256 (Cody and Waite, 1980).
LN2_HIGH = tl.constexpr(0.693145751953125)
LN2_LOW = tl.constexpr(1.4286068203094172e-06)


@jit
def exp(x):
    """e^x for x ≤ 88, to about 2 ulps: 2ⁿ·e^r, n = ⌊x·log₂e + ½⌋, |r| ≤ ½ ln 2."""
    x = tl.where(x < -126.0, -126.0, x)  # e^−126 is 0 in float32; −inf would give inf − inf below
    n = tl.floor(x * LOG2_E + 0.5)
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    return tl.exp(r) * tl.exp2(n)


@jit
def expm1(x):
    """e^x − 1 for x ≤ 0. Taylor's series to x¹¹ down to −1 (remainder < 2·10⁻⁹), where the difference would cancel."""
    near = tl.where(x > -1.0, x, -1.0)
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
    return tl.where(x > -1.0, s, exp(x) - 1.0)


@jit
def log1p(u):
    """log(1 + u) for u in [0, 1]: 2·artanh(s), s = u / (2 + u) ≤ 1/3, to s¹⁷ (remainder < 10⁻⁹)."""
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
def transformed(x, temperature, softcap, logit_scale, KIND: tl.constexpr):
    """z = softcap·tanh(logit_scale·x / softcap) / temperature, or what of it KIND asks for."""
    z = x
    if KIND != IDENTITY:
        z = z * logit_scale
        if KIND == SOFTCAPPED:
            z = softcap * tanh(tl.div_rn(z, softcap))
        z = tl.div_rn(z, temperature)
    return z


@jit
def pulled_back(g, x, temperature, softcap, logit_scale, KIND: tl.constexpr):
    """∂L/∂x from g = ∂L/∂z: dz/dx = logit_scale·sech²(logit_scale·x / softcap) / temperature."""
    if KIND != IDENTITY:
        g = tl.div_rn(g, temperature)
        if KIND == SOFTCAPPED:
            q = exp(-2.0 * tl.abs(tl.div_rn(x * logit_scale, softcap)))
            g = g * tl.div_rn(4.0 * q, (1.0 + q) * (1.0 + q))
        g = g * logit_scale
    return g


@jit
def logp_of(peak, total, z):
    """log p = −softplus(lse_others − z), lse_others = peak + log total: never positive, exact as p → 1."""
    return -softplus((peak - z) + tl.log(total))


@jit
def z_gradient(p, log_p, g_lse, g_entropy, entropy):
    """∂L/∂z of log-sum-exp and entropy: g_lse·p − g_entropy·p·(log p + H); 0 where p is 0."""
    return g_lse * p - g_entropy * tl.where(p > 0.0, p * (log_p + entropy), p)
