"""The arithmetic of a log-prob: from a logit to z, from the sum of the others to log p, and back.

Where the error of Triton's own ``exp`` would show (gradients, the last steps of a row), that of ``elementary`` is used.
"""

from rlfast.kernels.formulas.elementary import exp, softplus, tanh
from rlfast.kernels.lang import jit, tl

# What a transform has to do; a plain softmax pays for neither a division nor a tanh.
IDENTITY = tl.constexpr(0)
SCALED = tl.constexpr(1)
SOFTCAPPED = tl.constexpr(2)


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
