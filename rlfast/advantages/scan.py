"""Estimators over the tokens of a row: each is one affine scan, A_t = b_t + a_t·A_{t+1}."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from rlfast import backends, validate
from rlfast.advantages.rows import Rows, estimate
from rlfast.distributed.ranks import ranks_of
from rlfast.ops import affine_scan as scan_op
from rlfast.ops.scan_records import ADVANTAGES, RETURNS, REVERSE, Inputs, Options
from rlfast.reductions import WHITENINGS, Whiten, checked_whiten, preset

BOTH = ADVANTAGES | RETURNS


class Preset(NamedTuple):
    """How a trainer computes GAE."""

    masking: str
    whitens: bool  # unasked; OpenRLHF does so later, over the whole batch of experience
    whiten: Whiten = Whiten()


LIKE = {
    "trl": Preset("zero", True, WHITENINGS["trl"]),  # its PPO trainer, as long as it had one
    "verl": Preset("carry", True, WHITENINGS["verl"]),
    "openrlhf": Preset("zero", False, WHITENINGS["openrlhf"]),
    "nemo-rl": Preset("carry", False),
    "torchrl": Preset("carry", False, WHITENINGS["torchrl"]),
}


def _gae_options(like, masking, whiten) -> tuple[str, Whiten | None]:
    chosen = preset(LIKE, like) or Preset("carry", False)
    masking = chosen.masking if masking is None else masking
    if isinstance(whiten, Whiten):
        return masking, checked_whiten(whiten)
    if whiten is not None and not isinstance(whiten, bool):
        validate.fail("whiten", "a bool or rlfast.Whiten", type(whiten).__name__, TypeError)
    return masking, chosen.whiten if (chosen.whitens if whiten is None else whiten) else None


def _coefficient(kl, kl_coef) -> float:
    kl_coef = validate.finite("kl_coef", kl_coef)
    if kl is None and kl_coef != 0.0:
        validate.fail("kl", f"a tensor, since kl_coef is {kl_coef}", "None", TypeError)
    return kl_coef


def gae(
    rewards, values, mask=None, *, gamma, lam, masking=None, done=None, truncated=None, bootstrap=None, cu_seqlens=None,
    critic_lam=None, kl=None, kl_coef=0.0, whiten=None, like=None, process_group=None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Generalised advantage estimation: advantages and returns, in one pass over the inputs.

    δ_t = r_t + γV_{t+1} − V_t;  A_t = δ_t + γλA_{t+1};  R_t = A_t + V_t

    Args:
        rewards: [*, T] float, one a token; or [*], one a row, earned at its last valid token.
        values: [*, T] float. Packed rows: [N], with ``cu_seqlens``.
        mask: [*, T], 0 where a token does not count. Its outputs are 0, and what it holds has no effect.
        gamma, lam: floats in [0, 1], or tensors of them, one a row [*] or one a token. Those of masked tokens are not
            looked at, except with "zero", where such tokens take part.
        masking: "carry" (default): a masked token is left out, the tokens around it are neighbours. "zero": it is a
            token of r = V = 0.
        done: [*, T], nonzero where an episode ends: nothing of what comes after counts.
        truncated: [*, T], nonzero where an episode is cut: only the value after it counts, from ``bootstrap``, which is
            then one a token.
        bootstrap: [*], the value after a row's last token (0 if not given); or [*, T], the value after each token,
            read at truncated tokens and at the last valid one.
        cu_seqlens: int [rows + 1], the offsets of packed rows from 0 to N. Where rows are as many as tokens, a
            tensor of that shape is one a token if it is rewards, or bootstrap beside truncated; else it is one a row.
        critic_lam: λ of the returns, where it is another than that of the advantages (VC-PPO, VAPO: ``vapo_lam``).
        kl: [*, T], a penalty on each token: r_t − kl_coef·kl_t.
        kl_coef: a float; 0 without kl.
        whiten: True, which is ``like``'s whitening, or an ``rlfast.Whiten``: the advantages whitened over the valid
            tokens of the batch.
        like: "trl", "verl", "openrlhf", "nemo-rl", "torchrl": the masking and whitening of that trainer. Valid tokens
            have its values; masked ones are 0, where verl leaves what it carried. TRL's PPO has two masks: see
            docs/advantages.md.
        process_group: ranks, or a ``DeviceMesh`` of one dimension, over which the rows of the batch are spread: the
            whitening is over all of it. (Of rows whose tokens are spread: ``rlfast.distributed.gae``.)

    Returns:
        (advantages, returns), float32 (float64 for float64), shaped like values. Differentiable in rewards, values,
        kl and bootstrap.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, device or range. On a GPU, and in compiled code,
            tensors of γ and λ and the offsets are not looked at.

    Reference:
        GAE 1506.02438; decoupled λ: VC-PPO 2503.01491, VAPO 2504.05118.

    Example:
        >>> adv, ret = rlfast.gae(torch.tensor([1.0]), torch.tensor([[0.5, 0.4]]), gamma=1.0, lam=0.95)
        >>> adv
        tensor([[0.4700, 0.6000]])
    """
    plain = done is truncated is bootstrap is cu_seqlens is critic_lam is kl is masking is whiten is like is None
    if plain and process_group is None:
        out = scan_op.usual(rewards, values, mask, gamma, lam) if kl_coef == 0.0 else None
        if out is not None:
            return out[0], out[1]
    masking, whiten = _gae_options(like, masking, whiten)
    if process_group is not None and whiten is None:
        validate.fail("process_group", "None: nothing is whitened", type(process_group).__name__)
    return estimate(
        Rows("values", values, cu_seqlens), wanted=BOTH, gamma=gamma, lam=lam, critic_lam=critic_lam, rewards=rewards,
        values=values, kl=kl, kl_coef=_coefficient(kl, kl_coef), mask=mask, masking=masking, done=done,
        truncated=truncated, bootstrap=bootstrap, whiten=whiten, ranks=ranks_of(process_group),
    )  # fmt: skip


def lambda_returns(
    rewards, values, mask=None, *, gamma, lam, masking="carry", done=None, truncated=None, bootstrap=None,
    cu_seqlens=None,
) -> torch.Tensor:  # fmt: skip
    """λ-returns, the targets of a critic.

    G_t = r_t + γ[(1 − λ)V_{t+1} + λG_{t+1}]

    Args:
        rewards, values, mask, gamma, lam, masking, done, truncated, bootstrap, cu_seqlens: as in ``gae``.

    Returns:
        [*, T] float32; differentiable.

    Raises:
        TypeError, ValueError: as in ``gae``.

    Example:
        >>> rlfast.lambda_returns(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.4]]), gamma=1.0, lam=0.5)
        tensor([[0.7000, 1.0000]])
    """
    return estimate(
        Rows("values", values, cu_seqlens), wanted=RETURNS, gamma=gamma, lam=lam, rewards=rewards, values=values,
        mask=mask, masking=masking, done=done, truncated=truncated, bootstrap=bootstrap,
    )[1]  # fmt: skip


def td_residuals(
    rewards, values, mask=None, *, gamma, masking="carry", done=None, truncated=None, bootstrap=None, cu_seqlens=None
) -> torch.Tensor:
    """One-step temporal-difference errors.

    δ_t = r_t + γV_{t+1} − V_t

    Args:
        rewards, values, mask, gamma, masking, done, truncated, bootstrap, cu_seqlens: as in ``gae``.

    Returns:
        [*, T] float32; differentiable.

    Raises:
        TypeError, ValueError: as in ``gae``.

    Example:
        >>> rlfast.td_residuals(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), gamma=1.0)
        tensor([[-0.2500,  0.7500]])
    """
    return estimate(
        Rows("values", values, cu_seqlens), wanted=ADVANTAGES, gamma=gamma, lam=0.0, rewards=rewards, values=values,
        mask=mask, masking=masking, done=done, truncated=truncated, bootstrap=bootstrap,
    )[0]  # fmt: skip


def discounted_returns(
    rewards, mask=None, *, gamma, masking="carry", done=None, bootstrap=None, cu_seqlens=None, kl=None, kl_coef=0.0
) -> torch.Tensor:
    """Discounted sums of the rewards to come.

    G_t = r_t + γG_{t+1}

    Args:
        rewards: [*, T] float; or [*], one a row, earned at its last valid token, with a mask or ``kl`` of [*, T].
        mask, gamma, masking, done, cu_seqlens, kl, kl_coef: as in ``gae``.
        bootstrap: [*], what G is after a row's last token; 0 if not given.

    Returns:
        [*, T] float32; differentiable.

    Raises:
        TypeError, ValueError: as in ``gae``.

    Example:
        >>> rlfast.discounted_returns(torch.tensor([[1.0, 0.0, 2.0]]), gamma=0.5)
        tensor([[1.5000, 1.0000, 2.0000]])
    """
    name, like = ("rewards", rewards) if kl is None else ("kl", kl)
    if kl is None and all(isinstance(x, torch.Tensor) for x in (rewards, mask)) and rewards.shape != mask.shape:
        name, like = "mask", mask  # one reward a row: the tokens are those of the mask
    return estimate(
        Rows(name, like, cu_seqlens), wanted=RETURNS, gamma=gamma, lam=1.0, rewards=rewards, mask=mask, masking=masking,
        done=done, bootstrap=bootstrap, kl=kl, kl_coef=_coefficient(kl, kl_coef),
    )[1]  # fmt: skip


def reward_to_go(rewards, mask=None, *, masking="carry", done=None, cu_seqlens=None) -> torch.Tensor:
    """Sums of the rewards to come.

    G_t = r_t + G_{t+1}

    Args:
        rewards, mask, masking, done, cu_seqlens: as in ``discounted_returns``. Without γ both maskings are the same.

    Returns:
        [*, T] float32; differentiable.

    Raises:
        TypeError, ValueError: as in ``gae``.

    Example:
        >>> rlfast.reward_to_go(torch.tensor([[1.0, 0.0, 2.0]]))
        tensor([[3., 2., 2.]])
    """
    return discounted_returns(rewards, mask, gamma=1.0, masking=masking, done=done, cu_seqlens=cu_seqlens)


def _clip(name: str, x) -> float:
    return math.inf if x is None or x == math.inf else validate.at_least(name, x, 0.0)


def vtrace(
    rewards, values, log_ratio, mask=None, *, gamma, lam=1.0, clip_rho=1.0, clip_c=1.0, clip_pg_rho=1.0,
    masking="carry", done=None, truncated=None, bootstrap=None, cu_seqlens=None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """V-trace: off-policy advantages and value targets.

    δ_t = min(ρ̄, ρ_t)(r_t + γV_{t+1} − V_t);  e_t = δ_t + γλ·min(c̄, ρ_t)·e_{t+1};  target = V + e;
    A_t = min(ρ̄_pg, ρ_t)(r_t + γ[λ·target_{t+1} + (1 − λ)V_{t+1}] − V_t)

    Args:
        rewards, values, mask, gamma, lam, masking, done, truncated, bootstrap, cu_seqlens: as in ``gae``.
        log_ratio: [*, T] float, log ρ = log π(a) − log μ(a) of the policy and the sampler.
        clip_rho, clip_c, clip_pg_rho: ρ̄, c̄ and ρ̄_pg, floats ≥ 0; None: not clipped.

    Returns:
        (advantages, targets), float32: constants, through which no gradient flows.

    Raises:
        TypeError, ValueError: as in ``gae``.

    Reference:
        IMPALA 1802.01561.

    Example:
        >>> adv, target = rlfast.vtrace(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.zeros(1, 2), gamma=1.0)
        >>> adv
        tensor([[1., 1.]])
    """
    clips = (_clip("clip_rho", clip_rho), _clip("clip_c", clip_c), _clip("clip_pg_rho", clip_pg_rho))
    if log_ratio is None:
        validate.fail("log_ratio", "a torch.Tensor", "NoneType", TypeError)
    with torch.no_grad():
        return estimate(
            Rows("values", values, cu_seqlens), wanted=BOTH, gamma=gamma, lam=lam, rewards=rewards, values=values,
            log_ratio=log_ratio, clips=clips, mask=mask, masking=masking, done=done, truncated=truncated,
            bootstrap=bootstrap,
        )  # fmt: skip


def per_decision_td(
    rewards, values, log_ratio, mask=None, *, gamma, lam, masking="carry", done=None, truncated=None, bootstrap=None,
    cu_seqlens=None,
) -> torch.Tensor:  # fmt: skip
    """TD(λ) errors with an importance weight for each decision, none of them clipped.

    e_t = δ_t + γλρ_{t+1}e_{t+1};  the result is ρ_t·e_t

    Args:
        rewards, values, mask, gamma, lam, masking, done, truncated, bootstrap, cu_seqlens: as in ``gae``.
        log_ratio: as in ``vtrace``, of which this is the case without clips.

    Returns:
        [*, T] float32: constants.

    Raises:
        TypeError, ValueError: as in ``gae``.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> rlfast.per_decision_td(torch.tensor([[0.0, 1.0]]), zeros, zeros, gamma=1.0, lam=0.5)
        tensor([[0.5000, 1.0000]])
    """
    return vtrace(
        rewards, values, log_ratio, mask, gamma=gamma, lam=lam, clip_rho=None, clip_c=None, clip_pg_rho=None,
        masking=masking, done=done, truncated=truncated, bootstrap=bootstrap, cu_seqlens=cu_seqlens,
    )[0]  # fmt: skip


def affine_scan(a, b, reverse=True, *, mask=None, initial=None, cu_seqlens=None) -> torch.Tensor:
    """The bare recurrence, in float64 inside.

    A_t = b_t + a_t·A_{t+1}, or b_t + a_t·A_{t−1} where not ``reverse``

    Args:
        a, b: [*, T] float, or packed [N] with ``cu_seqlens``. Any a, also beyond 1.
        reverse: from a row's end to its start; False: from its start.
        mask: [*, T], 0 where a token hands on what it gets.
        initial: [*], what A is before a row's first step; 0 if not given.
        cu_seqlens: int [rows + 1], the offsets of packed rows.

    Returns:
        [*, T] float32; differentiable in a, b and initial. Its derivative is the scan the other way.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or device.

    Example:
        >>> rlfast.affine_scan(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 0.0, 2.0]))
        tensor([1.5000, 1.0000, 2.0000])
    """
    rows = Rows("b", b, cu_seqlens)
    validate.tensor("a", a)
    start = rows.by_row("initial", initial)
    if initial is not None and start is None:
        validate.fail("initial", f"shape {tuple(rows.lead)}, one a row", validate.shape(initial))
    inputs = Inputs(
        *[None] * len(Inputs._fields)
    )._replace(
        rewards=rows.tokens("b", b), coefficients=rows.tokens("a", a), mask=rows.flags("mask", mask), bootstrap=start,
        cu_seqlens=rows.cu,
    )  # fmt: skip
    options = Options(1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, RETURNS | (REVERSE if reverse else 0), 0, 0.0)
    out = scan_op.call(*inputs, *options, backends.requested())[0]
    return out if out.shape == b.shape else out.reshape(b.shape)


def vapo_lam(lengths, *, alpha=0.05) -> torch.Tensor:
    """VAPO's λ of the policy, which grows with the answer.

    λ = 1 − 1/(α·length), and 0 up to a length of 1/α

    Args:
        lengths: [*] int or float ≥ 0, the valid tokens of each row: ``mask.sum(-1)``.
        alpha: a float > 0.

    Returns:
        [*] float64, for ``gae(..., lam=vapo_lam(mask.sum(-1)), critic_lam=1.0)``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or range.

    Reference:
        VAPO 2504.05118.

    Example:
        >>> rlfast.vapo_lam(torch.tensor([10, 100, 1000]))
        tensor([0.0000, 0.8000, 0.9800], dtype=torch.float64)
    """
    validate.tensor("lengths", lengths, validate.COUNTS)
    alpha = validate.positive("alpha", alpha)
    if validate.looked_at(lengths) and not bool((lengths >= 0).all()):
        validate.fail("lengths", "numbers ≥ 0", lengths[~(lengths >= 0)][0].item())
    return (1.0 - 1.0 / (alpha * lengths.double().clamp(min=0.0))).clamp(min=0.0)
