"""The ``rlfast::affine_scan`` op: schema, backend choice, fake kernel, autograd.

A backend module provides

    forward(inputs, options) -> [advantages and returns, *tokens]

with the records of ``scan_records.py``. With V' and G' the value and the return after token t,

    G_t = r_t + γ·((1 − λ)·V' + λ·G')                                       advantage G_t − V_t
    G_t = V_t + min(ρ̄, ρ_t)·δ_t + γλ·min(c̄, ρ_t)·(G' − V')                  VTRACE, δ_t = r_t + γV' − V_t
          advantage min(ρ̄_pg, ρ_t)·(δ_t + γλ·(G' − V'))
    G_t = b_t + a_t·G'                                                      with coefficients a

over the valid tokens of a row. A masked token is left out (V' and G' pass it by), or with ZERO counts as r = V = 0. Its
outputs are 0, those of the bare scan are G'. What a masked position holds has no effect.

The derivative of A_t = b_t + a_t·A_{t+1} is the same recurrence the other way: B_t = g_t + a_{t−1}·B_{t−1} gives
∂L/∂b_t = B_t and ∂L/∂a_t = B_t·A_{t+1}.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native import affine_scan as native
from rlfast.ops.dispatch import LIB, first_derivatives_only, refuse_forward_mode, unobserved
from rlfast.ops.scan_records import (
    ADVANTAGES,
    DECOUPLED,
    RETURNS,
    REVERSE,
    VTRACE,
    ZERO,
    Inputs,
    Options,
    allocate,
    dtype_of,
)

NAME = "affine_scan"

LIB.define(
    "affine_scan("
    + ", ".join(f"Tensor? {name}" for name in Inputs._fields)
    + ", float gamma, float lam, float critic_lam, float kl_coef, float clip_rho, float clip_c, float clip_pg,"
    " int options, int whiten, float eps, str backend) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
op = torch.ops.rlfast.affine_scan.default

TENSORS = len(Inputs._fields)
_NO_OPTIONS = Options(1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, RETURNS, 0, 0.0)


def _forward(*args):
    x, backend = Inputs(*args[:TENSORS]), args[-1]
    kernel = backends.implementation(NAME, backends.select(NAME, x.tokens.device.type, dtype_of(x), backend))
    return kernel.forward(x, Options(*args[TENSORS:-1]))


def _fake(*args):
    return allocate(Inputs(*args[:TENSORS]), Options(*args[TENSORS:-1]))


def _below_autograd(*args):
    """Past the dispatcher where nobody would see the op there: see ``token_logps.py``."""
    if unobserved(*args[:TENSORS]):
        return _forward(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def scan(a, b, x: Inputs, reverse: bool, backend: str):
    """The bare scan of b with coefficients a, over the rows and the mask of ``x``."""
    options = _NO_OPTIONS._replace(options=RETURNS | (REVERSE if reverse else 0))
    nothing = Inputs(*[None] * TENSORS)
    bare = nothing._replace(rewards=b, coefficients=a, mask=x.mask, cu_seqlens=x.cu_seqlens)
    return _below_autograd(*bare, *options, backend)[0]


def walk(b, rate, stops, x: Inputs, backend: str):
    """B_t = b_t + γ_t·B_{t−1} over the rows and the mask of ``x``, none where ``stops``; γ is a float or float64."""
    many = rate if isinstance(rate, torch.Tensor) else None
    options = _NO_OPTIONS._replace(gamma=rate if many is None else 1.0)
    nothing = Inputs(*[None] * TENSORS)
    bare = nothing._replace(rewards=b, mask=x.mask, done=stops, gammas=many, cu_seqlens=x.cu_seqlens)
    return _below_autograd(*bare, *options, backend)[0]


def _neighbour(y, x: Inputs, ahead: bool, backend: str):
    """y of the next valid token of the row (of the one before, if not ``ahead``), 0 where there is none."""
    held = y if x.mask is None else scan(torch.zeros_like(y), y, x, ahead, backend)
    moved = torch.zeros_like(held)
    if ahead:
        moved[..., :-1] = held[..., 1:]
    else:
        moved[..., 1:] = held[..., :-1]
    if x.cu_seqlens is None:
        return moved
    # the edges of empty rows are edges of others, or fall on the one place too many
    edge = x.cu_seqlens[1:] - 1 if ahead else x.cu_seqlens[:-1]
    inner = torch.ones(y.shape[0] + 1, dtype=torch.bool, device=y.device).index_fill(0, edge, False)[:-1]
    return torch.where(inner, moved, 0.0)


def _before(rates, x: Inputs, like, backend: str):
    """The rate of the valid token before, of one a token in float64: in three float32, which hold its bits."""
    if like.dtype == torch.float64:
        return _neighbour(rates, x, False, backend)
    moved, rest = torch.zeros_like(rates), rates
    for _ in range(3):
        part = rest.float()
        moved, rest = moved + _neighbour(part, x, False, backend), rest - part
    return moved


def _by_token(rate, x: Inputs) -> bool:
    """Whether a rate is one a token; else it is a float, or one a row."""
    if not isinstance(rate, torch.Tensor):
        return False
    return rate.dim() > 1 or not (x.cu_seqlens is None or rate.shape[0] == x.cu_seqlens.shape[0] - 1)


def _spread(rate, x: Inputs, like):
    """A number a row as it broadcasts over the tokens; any other rate as it is."""
    if not isinstance(rate, torch.Tensor) or _by_token(rate, x):
        return rate
    if x.cu_seqlens is None:
        return rate.unsqueeze(-1)
    return rate.repeat_interleave(x.cu_seqlens.diff(), output_size=like.shape[0])


def _product(gamma, lam, x: Inputs, like):
    """γλ, a number for all, a row or a token."""
    if _by_token(gamma, x) != _by_token(lam, x):
        return _spread(gamma, x, like) * _spread(lam, x, like)
    return gamma * lam


def _by_row(y, x: Inputs):
    """Σ y over each row."""
    if x.cu_seqlens is None:
        return y.sum(-1)
    sums = torch.zeros(x.cu_seqlens.shape[0] - 1, dtype=y.dtype, device=y.device)
    lengths = x.cu_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=y.device), lengths, output_size=y.shape[0])
    return sums.index_add(0, rows, y)


class _Flow:
    """How the valid tokens of a call are tied together: what its backward walks along."""

    def __init__(self, x: Inputs, o: Options, g, backend: str):
        valid = torch.ones_like(g, dtype=torch.bool) if x.mask is None else x.mask
        # with ZERO every token takes part in the recurrence, with r = V = 0 where it is masked
        self.x = x._replace(mask=None) if o.has(ZERO) else x
        self.valid = valid
        one = torch.where(valid, 1.0, 0.0).to(g.dtype)
        last = 1.0 - _neighbour(one if not o.has(ZERO) else torch.ones_like(one), self.x, True, backend).clamp(max=1.0)
        self.last = last * (torch.ones_like(one) if o.has(ZERO) else one)
        # the last valid token has a row's reward, whatever follows it
        counted = scan(torch.ones_like(one), one, self.x, True, backend)
        later = _neighbour(counted, self.x, True, backend)
        self.final = torch.where(valid & (later == 0), 1.0, 0.0).to(g.dtype)
        done = torch.zeros_like(valid) if x.done is None else x.done & valid
        cut = torch.zeros_like(valid) if x.truncated is None else x.truncated & valid
        first = torch.zeros_like(valid) if x.next_values is None else self.final > 0
        self.given = ((cut | first) & ~done).to(g.dtype)  # V' and G' are next_values
        stop = done | cut | first
        self.goes_on = (~stop).to(g.dtype)  # V' and G' are those of the next token
        ends = x.done is not None or x.truncated is not None or x.next_values is not None
        self.stops = _neighbour(stop.to(g.dtype), self.x, False, backend) != 0 if ends else None
        gamma = o.gamma if x.gammas is None else x.gammas
        lam, critic = o.lam if x.lams is None else x.lams, o.critic_lam if x.critic_lams is None else x.critic_lams
        self.gamma = _spread(gamma, x, g)
        self.lams = [_product(gamma, lam, x, g)] * 2
        if o.has(DECOUPLED):
            self.lams[1] = _product(gamma, critic, x, g)


def _gradients(x: Inputs, o: Options, out_gradient, backend: str) -> Inputs:
    """∂L/∂ of rewards, values, kl, next_values, row_rewards and bootstrap of G_t = r_t + γ(1 − λ)·V' + γλ·G'."""
    parts = iter(out_gradient)
    g_adv = next(parts) if o.has(ADVANTAGES) else None
    g_ret = next(parts) if o.has(RETURNS) else None
    flow = _Flow(x, o, out_gradient[0], backend)
    zero = torch.zeros_like(out_gradient[0])
    chains = ((g_adv, flow.lams[0]), (g_ret, flow.lams[1]))
    total, g_value, g_given, g_start = zero, zero, zero, zero
    for g, later in chains:
        if g is None:
            continue
        source = torch.where(flow.valid, g, 0.0)
        rates = _before(later, flow.x, g, backend) if _by_token(later, x) else later
        into = walk(source, rates, flow.stops, flow.x, backend)
        total = total + into
        ahead = (into * (flow.gamma - _spread(later, x, g))).to(g.dtype)  # ∂L/∂V'
        g_value = g_value + _neighbour(ahead * flow.goes_on, flow.x, False, backend)
        g_given = g_given + into * flow.gamma * flow.given
        g_start = g_start + into * flow.gamma * flow.last * flow.goes_on
    if g_adv is not None:
        g_value = g_value - torch.where(flow.valid, g_adv, 0.0)
    g_reward = torch.where(flow.valid, total, 0.0)
    return Inputs(*[None] * TENSORS)._replace(
        rewards=g_reward,
        values=torch.where(flow.valid, g_value, 0.0),
        kl=-o.kl_coef * g_reward,
        next_values=g_given,
        row_rewards=_by_row(g_reward * flow.final, x) if x.row_rewards is not None else None,
        bootstrap=_by_row(g_start, x) if x.bootstrap is not None else None,
    )


def _scan_gradients(x: Inputs, o: Options, out, g, backend: str) -> Inputs:
    """∂L/∂ of b, a and the first state of the bare scan, by the scan the other way."""
    reverse = o.has(REVERSE)
    valid = torch.ones_like(g, dtype=torch.bool) if x.mask is None else x.mask
    # a masked token hands on G': what reaches it goes to the valid one that G' is of
    held = x._replace(mask=None)
    a = x.coefficients.to(g.dtype) if x.mask is None else torch.where(valid, x.coefficients.to(g.dtype), 1.0)
    into = scan(_neighbour(a, held, not reverse, backend), g, held, not reverse, backend)
    state = _neighbour(out, held, reverse, backend)
    if x.bootstrap is not None:
        edge = 1.0 - _neighbour(torch.ones_like(g), held, reverse, backend)
        start = x.bootstrap.to(g.dtype)
        state = state + _spread(start, x, g) * edge
        g_start = _by_row(into * a * edge, x)
    return Inputs(*[None] * TENSORS)._replace(
        rewards=torch.where(valid, into, 0.0),
        coefficients=torch.where(valid, into * state, 0.0),
        bootstrap=g_start if x.bootstrap is not None else None,
    )


class _AffineScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out = _below_autograd(*args)
        ctx.save_for_backward(*args[:TENSORS], out)
        # the oracle's loop over time rounds each step to float32, which is a yardstick and no gradient
        ctx.options, ctx.backend = Options(*args[TENSORS:-1]), args[-1].replace("reference", "torch")
        return out

    @staticmethod
    @first_derivatives_only
    def backward(ctx, g):
        *tensors, out = ctx.saved_tensors
        x, o, g = Inputs(*tensors), ctx.options, g.contiguous()
        if x.coefficients is None:
            found = _gradients(x, o, g, ctx.backend)
        else:
            found = _scan_gradients(x, o, out[0], g[0], ctx.backend)
        needed = zip(found, x, ctx.needs_input_grad, strict=False)
        grads = [y.to(like.dtype) if need and y is not None else None for y, like, need in needed]
        return (*grads, *(None,) * (len(Options._fields) + 1))


def _with_autograd(*args):
    tensors = args[:TENSORS]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        refuse_forward_mode(NAME, *tensors)
        options = Options(*args[TENSORS:-1])
        if not options.has(VTRACE) and not options.whiten:
            return _AffineScan.apply(*args)
    return _below_autograd(*args)


def call(*args):
    """The op; in eager mode its autograd kernel is called from here, which saves the dispatcher's way to it."""
    return op(*args) if torch.compiler.is_compiling() else _with_autograd(*args)


def _dense(x, like) -> bool:
    if type(x) is not torch.Tensor or x.shape != like.shape or x.device != like.device:
        return False
    return x.is_contiguous() and not x.requires_grad


def usual(rewards, values, mask, gamma, lam):
    """GAE as every training step calls it, past what its other arguments and the dispatcher take (25 µs); else None.

    Dense float32 rows on the CPU, floats in [0, 1], no gradient, on kernels that are there, and nobody who looks on.
    """
    if torch.compiler.is_compiling() or type(values) is not torch.Tensor or values.dim() != 2:
        return None
    if not (type(gamma) is type(lam) is float and 0.0 <= gamma <= 1.0 and 0.0 <= lam <= 1.0):
        return None
    if not (_dense(values, values) and _dense(rewards, values) and rewards.dtype is values.dtype is torch.float32):
        return None
    if mask is not None and not (_dense(mask, values) and mask.dtype is torch.bool):
        return None
    wanted = backends.requested()
    if wanted not in ("", "cpu") or backends.select(NAME, values.device.type, torch.float32, wanted) != "cpu":
        return None
    return native.gae(rewards, values, mask, gamma, lam) if unobserved(rewards, values, mask) else None


for _key in ("CPU", "CUDA"):
    LIB.impl("affine_scan", _forward, _key)
LIB.impl("affine_scan", _with_autograd, "Autograd")
torch.library.register_fake("rlfast::affine_scan", _fake, lib=LIB)
