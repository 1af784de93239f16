"""The noise that a sampled token is the argmax with: Gumbel numbers of integers."""

from rlfast.kernels.formulas.elementary import log1p
from rlfast.kernels.lang import jit, tl


@jit
def gumbel(n):
    """−log(−log u), u = (n + ½)·2⁻²⁴, of integers 0 ≤ n < 2²⁴: of u and 1 − u, the one at most ½ is a float32."""
    u = (n + 0.5) * 5.9604644775390625e-08
    v = ((16777216.0 - n) - 0.5) * 5.9604644775390625e-08
    return -tl.log(tl.where(n < 8388608.0, -tl.log(u), -log1p(-v)))
