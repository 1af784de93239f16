"""Advantage estimators by the recurrences of their papers, a token at a time, in the dtype of the inputs.

Every function takes one row [T], or rows side by side [R, T], and goes through time in a Python loop.
"""

import torch


def columns(x, like):
    """x as [..., T]: a number, one a row, or one a token."""
    x = torch.as_tensor(x, dtype=like.dtype, device=like.device)
    if x.dim() < like.dim() and x.dim() > 0:
        x = x.unsqueeze(-1)
    return x.expand(like.shape)


def flags(x, like):
    return torch.zeros(like.shape, dtype=torch.bool, device=like.device) if x is None else x != 0


def affine_scan(a, b, mask=None, reverse=True, initial=0.0):
    """A_t = b_t + a_t·A_{t+1} (A_{t−1} if not reverse); a masked token hands on what it gets."""
    if b.shape[-1] == 0:
        return a * b
    valid = torch.ones_like(b, dtype=torch.bool) if mask is None else mask != 0
    state, out = columns(initial, b[..., :1])[..., 0], [None] * b.shape[-1]
    for t in reversed(range(b.shape[-1])) if reverse else range(b.shape[-1]):
        state = torch.where(valid[..., t], b[..., t] + a[..., t] * state, state)
        out[t] = state
    return torch.stack(out, -1)


def shaped_rewards(rewards, like, mask=None, row_rewards=None, kl=None, kl_coef=0.0):
    """r_t − kl_coef·kl_t, and at the last valid token what a whole row earned; 0 where masked."""
    valid = torch.ones_like(like, dtype=torch.bool) if mask is None else mask != 0
    r = torch.zeros_like(like) if rewards is None else rewards
    if kl is not None:
        r = r - kl_coef * kl
    if row_rewards is not None:
        behind = valid.flip(-1).long().cumsum(-1).flip(-1)
        r = r + torch.where(valid & (behind == 1), row_rewards.to(like.dtype).unsqueeze(-1), 0.0)
    return torch.where(valid, r, 0.0)


def following(values, *, mask=None, zero=False, done=None, truncated=None, next_values=None, bootstrap=0.0):
    """(V_{t+1}, whether A_{t+1} counts) of each token.

    Left out, masked tokens make V_{t+1} the value of the next valid one; as zeros (``zero``) they are tokens of V = 0.
    """
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    done, truncated = flags(done, values) & valid, flags(truncated, values) & valid
    value, seen = columns(bootstrap, values[..., :1])[..., 0], torch.zeros_like(valid[..., 0])
    ahead, counts = [None] * values.shape[-1], [None] * values.shape[-1]
    for t in reversed(range(values.shape[-1])):
        cut = truncated[..., t]
        if next_values is not None:
            cut = cut | (valid[..., t] & ~seen)
        given = torch.zeros_like(value) if next_values is None else next_values[..., t]
        ahead[t] = torch.where(done[..., t], 0.0, torch.where(cut, given, value))
        counts[t] = ~(done[..., t] | cut)
        here = torch.where(valid[..., t], values[..., t], 0.0)
        value = here if zero else torch.where(valid[..., t], here, value)
        seen = seen | valid[..., t]
    return torch.stack(ahead, -1), torch.stack(counts, -1)


def gae(rewards, values, *, gamma, lam, mask=None, zero=False, bootstrap=0.0, **ends):
    """δ_t = r_t + γV_{t+1} − V_t,  A_t = δ_t + γλA_{t+1},  R = A + V  (1506.02438). Returns (A, R), 0 where masked."""
    if values.shape[-1] == 0:
        return values, values
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    values = torch.where(valid, values, 0.0)
    gamma, lam = columns(gamma, values), columns(lam, values)
    ahead, counts = following(values, mask=mask, zero=zero, bootstrap=bootstrap, **ends)
    delta = rewards + gamma * ahead - values
    coefficients = torch.where(counts, gamma * lam, 0.0)
    advantages = affine_scan(coefficients, delta, None if zero else mask)
    return torch.where(valid, advantages, 0.0), torch.where(valid, advantages + values, 0.0)


def vtrace(
    rewards, values, log_ratio, *, gamma, lam=1.0, clip_rho=1.0, clip_c=1.0, clip_pg=1.0, mask=None, zero=False,
    bootstrap=0.0, **ends,
):  # fmt: skip
    """V-trace (1802.01561): (advantages, targets), 0 where masked.

    δ_t = min(ρ̄, ρ_t)(r_t + γV_{t+1} − V_t),  e_t = δ_t + γλ min(c̄, ρ_t) e_{t+1},  target = V + e,
    q = r + γ[λ·target_{t+1} + (1 − λ)V_{t+1}],  A = min(ρ̄_pg, ρ)(q − V)
    """
    if values.shape[-1] == 0:
        return values, values
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    values = torch.where(valid, values, 0.0)
    rho = torch.where(valid, log_ratio, 0.0).exp()
    gamma, lam = columns(gamma, values), columns(lam, values)
    ahead, counts = following(values, mask=mask, zero=zero, bootstrap=bootstrap, **ends)
    delta = rho.clamp(max=clip_rho) * (rewards + gamma * ahead - values)
    coefficients = torch.where(counts, gamma * lam * rho.clamp(max=clip_c), 0.0)
    left_out = None if zero else mask
    errors = affine_scan(coefficients, delta, left_out)
    # what the next token's error is, 0 beyond the end: the state of the recurrence, one token on
    after = torch.cat((errors[..., 1:], torch.zeros_like(errors[..., :1])), -1)
    q = rewards + gamma * (ahead + lam * torch.where(counts, after, 0.0))
    advantages = rho.clamp(max=clip_pg) * (q - values)
    return torch.where(valid, advantages, 0.0), torch.where(valid, values + errors, 0.0)


def lambda_returns(rewards, values, *, gamma, lam):
    """G_t = r_t + γ[(1 − λ)V_{t+1} + λG_{t+1}], with V and G = 0 after the last token."""
    state, ahead, out = torch.zeros_like(values[..., 0]), torch.zeros_like(values[..., 0]), []
    for t in reversed(range(values.shape[-1])):
        state = rewards[..., t] + gamma * ((1 - lam) * ahead + lam * state)
        ahead = values[..., t]
        out.append(state)
    return torch.stack(out[::-1], -1)


def per_decision(rewards, values, log_ratio, *, gamma, lam):
    """e_t = δ_t + γλρ_{t+1}e_{t+1}, returned as ρ_t·e_t."""
    rho, zero = log_ratio.exp(), torch.zeros_like(values[..., :1])
    delta = rewards + gamma * torch.cat((values[..., 1:], zero), -1) - values
    after = torch.cat((rho[..., 1:], zero), -1)
    return rho * affine_scan(gamma * lam * after, delta)


def n_step_returns(rewards, values, *, gamma, n, bootstrap=0.0):
    """G_t = Σ_{k<n} γᵏ r_{t+k} + γⁿ V_{t+n}; beyond the end of the row, r = 0 and V the bootstrap value."""
    steps, out = rewards.shape[-1], []
    last = columns(bootstrap, rewards[..., :1])[..., 0]
    for t in range(steps):
        end = min(t + n, steps)
        total = gamma ** (end - t) * (values[..., end] if end < steps else last)
        for k in range(t, end):
            total = total + gamma ** (k - t) * rewards[..., k]
        out.append(total)
    return torch.stack(out, -1)


def masked_whiten(x, mask, *, bessel=True, eps=1e-8, where="inside", shift_mean=True):
    """(x − mean)·(var + eps)^−½ over the valid elements, 0 elsewhere."""
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    chosen = x[valid]
    mean = chosen.mean()
    var = chosen.var(correction=int(bessel)) if len(chosen) > 1 else torch.zeros_like(mean)
    root = {"inside": (var + eps).sqrt(), "outside": var.sqrt() + eps, "floor": var.clamp(min=eps).sqrt()}[where]
    return torch.where(valid, (x - mean) / root + (0.0 if shift_mean else mean), 0.0)
