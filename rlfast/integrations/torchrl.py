"""torchrl's value functions under torchrl's names and signatures: each recurrence is one scan of rlfast.

Those of ``torchrl.objectives.value.functional``: tensors are [*B, T, *F], with time in ``time_dim``; γ and λ are
numbers, tensors of one element, or shaped like the rewards. They are differentiable in all of them, as torchrl's are,
need no torchrl, and can be called directly. ``rlfast.patch("torchrl")`` puts them in place; TD(0), which has no
recurrence, and the advantages of TD(1) and TD(λ), which call the returns, stay torchrl's.
"""

from __future__ import annotations

import importlib
import inspect

import torch

from rlfast import validate
from rlfast.advantages import affine_scan
from rlfast.integrations.patching import (
    Swap,
    or_original,
    refuse_strange,
    refuse_untested,
    takes,
    tensor_unsupported,
)

TESTED = ("0.14",)


class _Time:
    """Moves time to the end and back, for tensors of one shape."""

    def __init__(self, time_dim: int, name: str, like: torch.Tensor):
        validate.tensor(name, like)
        dim = time_dim - like.dim() if time_dim >= 0 else time_dim
        if not -like.dim() <= dim < 0:
            validate.fail("time_dim", f"a dimension of {name}, {validate.shape(like)}", str(time_dim))
        self.dim, self.name, self.like = dim, name, like

    def last(self, name: str, x):
        """A tensor of the shape, [..., T]; what has one element stays as it is."""
        if not isinstance(x, torch.Tensor):
            return x
        if x.shape == self.like.shape:
            return x.movedim(self.dim, -1)
        if x.numel() != 1:
            wanted = f"shape {validate.shape(self.like)} like {self.name}, or one element"
            validate.fail(name, wanted, validate.shape(x))
        return x.reshape(())

    def back(self, x, dtype) -> torch.Tensor:
        """[..., T] as it came."""
        return x.movedim(-1, self.dim).to(dtype)


def _flag(time: _Time, name: str, x) -> torch.Tensor:
    """Flags as numbers, 1 where they are not set."""
    validate.like(name, x, time.name, time.like, validate.MASKS)
    return (x.movedim(time.dim, -1) == 0).to(time.like.dtype)


def _scan(a, b) -> torch.Tensor:
    """A_t = b_t + a_t·A_{t+1}."""
    return affine_scan(torch.as_tensor(a, dtype=b.dtype, device=b.device).expand_as(b), b)


def generalized_advantage_estimate(
    gamma, lmbda, state_value, next_state_value, reward, done, terminated=None, *, time_dim=-2
) -> tuple[torch.Tensor, torch.Tensor]:
    """GAE: (advantage, value_target).

        δ_t = r_t + γ(1 − terminated_t)V'_t − V_t;   A_t = δ_t + γλ(1 − done_t)A_{t+1};   target = A + V

    Args:
        state_value, next_state_value, reward: [*B, T, *F] float: V, V' and r.
        done, terminated: the same, bool; ``terminated`` is ``done`` if None.
        time_dim: where T is.
    """
    time = _Time(time_dim, "reward", reward)
    terminated = done if terminated is None else terminated
    gamma, lmbda = time.last("gamma", gamma), time.last("lmbda", lmbda)
    value, after = time.last("state_value", state_value), time.last("next_state_value", next_state_value)
    delta = time.last("reward", reward) + gamma * _flag(time, "terminated", terminated) * after - value
    advantage = _scan(gamma * lmbda * _flag(time, "done", done), delta)
    dtype = next_state_value.dtype
    return time.back(advantage, dtype), time.back(advantage + value, dtype)


def vec_generalized_advantage_estimate(
    gamma, lmbda, state_value, next_state_value, reward, done, terminated=None, *, time_dim=-2
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same; torchrl's is a convolution, which leaves out weights below 1e-7."""
    return generalized_advantage_estimate(
        gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim=time_dim
    )


def _returns(gamma, lmbda, next_state_value, reward, cut, terminated, rolling_gamma, time_dim) -> torch.Tensor:
    """G_t = r_t + γ_t[(1 − λ_t·(1 − cut_t))V'_t + λ_t(1 − cut_t)G_{t+1}], V' = 0 where terminated, cut at the end."""
    if rolling_gamma is False:
        validate.fail("rolling_gamma", "True or None: γ of each step is its own", "False")
    time = _Time(time_dim, "reward", reward)
    gamma, lmbda = time.last("gamma", gamma), time.last("lmbda", lmbda)
    after = time.last("next_state_value", next_state_value) * _flag(time, "terminated", terminated)
    going = _flag(time, "done", cut)
    going = torch.cat((going[..., :-1], torch.zeros_like(going[..., -1:])), -1)
    weight = lmbda * going
    returns = _scan(gamma * weight, time.last("reward", reward) + gamma * (1 - weight) * after)
    return time.back(returns, next_state_value.dtype)


def td_lambda_return_estimate(
    gamma, lmbda, next_state_value, reward, done, terminated=None, rolling_gamma=None, *, time_dim=-2
) -> torch.Tensor:
    """λ-returns.

        G_t = r_t + γ[(1 − λ)V'_t + λG_{t+1}];   V'_t in place of G_{t+1} where done, 0 in place of V' where terminated

    Args:
        next_state_value, reward, done, terminated, time_dim: as in ``generalized_advantage_estimate``.
        rolling_gamma: None or True; False, γ of a step for all that comes after it, is not one scan.
    """
    terminated = done if terminated is None else terminated
    return _returns(gamma, lmbda, next_state_value, reward, done, terminated, rolling_gamma, time_dim)


def vec_td_lambda_return_estimate(
    gamma, lmbda, next_state_value, reward, done, terminated=None, rolling_gamma=None, *, time_dim=-2
) -> torch.Tensor:
    """The same; torchrl's is a convolution, which leaves out weights below 1e-7."""
    terminated = done if terminated is None else terminated
    return _returns(gamma, lmbda, next_state_value, reward, done, terminated, rolling_gamma, time_dim)


def td1_return_estimate(
    gamma, next_state_value, reward, done, terminated=None, rolling_gamma=None, *, time_dim=-2
) -> torch.Tensor:
    """The same with λ = 1: G_t = r_t + γG_{t+1}, V'_t in place of G_{t+1} where done, and 0 where terminated."""
    cut = done if terminated is None else done | terminated
    terminated = done if terminated is None else terminated
    return _returns(gamma, 1.0, next_state_value, reward, cut, terminated, rolling_gamma, time_dim)


def vec_td1_return_estimate(
    gamma, next_state_value, reward, done, terminated=None, rolling_gamma=None, time_dim=-2
) -> torch.Tensor:
    """The same; torchrl's is a convolution, which leaves out weights below 1e-7."""
    terminated = done if terminated is None else terminated
    return _returns(gamma, 1.0, next_state_value, reward, done, terminated, rolling_gamma, time_dim)


def vtrace_advantage_estimate(
    gamma, log_pi, log_mu, state_value, next_state_value, reward, done, terminated=None, rho_thresh=1.0, c_thresh=1.0,
    time_dim=-2,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """V-trace: (advantages, value targets).

        ρ = e^(log π − log μ);   δ_t = min(ρ̄, ρ_t)(r_t + γV'_t − V_t);   e_t = δ_t + γ·min(c̄, ρ_t)e_{t+1}
        v = V + e;   A_t = min(ρ̄, ρ_t)(r_t + γv_{t+1} − V_t), V'_t in place of v_{t+1} where done and at the end

    Args:
        log_pi, log_mu: log-probs of the policy and of the sampler, shaped like the rest.
        rho_thresh, c_thresh: ρ̄ and c̄, numbers or tensors of one element.
    """
    time = _Time(time_dim, "reward", reward)
    going, gamma = _flag(time, "done", done), time.last("gamma", gamma)
    alive = going if terminated is None else _flag(time, "terminated", terminated)
    value, after = time.last("state_value", state_value), time.last("next_state_value", next_state_value)
    rho = (time.last("log_pi", log_pi) - time.last("log_mu", log_mu)).exp()
    at_most, at_most_c = (
        rho.clamp_max(time.last(name, x)) for name, x in (("rho_thresh", rho_thresh), ("c_thresh", c_thresh))
    )
    reward = time.last("reward", reward)
    delta = at_most * (reward + gamma * alive * after - value)
    target = _scan(gamma * going * at_most_c, delta) + value
    following = torch.where(going == 0, after, torch.cat((target[..., 1:], after[..., -1:]), -1))
    advantage = at_most * (reward + gamma * alive * following - value)
    return time.back(advantage, next_state_value.dtype), time.back(target, next_state_value.dtype)


def reward2go(reward, done, gamma, *, time_dim=-2) -> torch.Tensor:
    """Discounted sums of the rewards to come: G_t = r_t + γ(1 − done_t)G_{t+1}.

    Args:
        reward: [*B, T, *F] float. done: the same, bool.
    """
    time = _Time(time_dim, "reward", reward)
    rate = time.last("gamma", gamma) * _flag(time, "done", done)
    return time.back(_scan(rate, time.last("reward", reward)), reward.dtype)


SAME_SHAPE = ("state_value", "next_state_value", "done", "terminated", "log_pi", "log_mu")
RATES = ("gamma", "lmbda", "rho_thresh", "c_thresh")
# Not as torchrl computes it: its weights of a step are products of λ from the row's start on, whatever the step.
SCALAR_LAMBDA = "vec_td_lambda_return_estimate"
NAMES = (
    "generalized_advantage_estimate",
    "vec_generalized_advantage_estimate",
    "td1_return_estimate",
    "vec_td1_return_estimate",
    "td_lambda_return_estimate",
    "vec_td_lambda_return_estimate",
    "vtrace_advantage_estimate",
    "reward2go",
)


def _why_not(name: str, signature: inspect.Signature):
    """Why a call goes to torchrl, by the arguments of ``signature``."""

    def why_not(*args, **kwargs) -> str | None:
        given = signature.bind(*args, **kwargs).arguments
        reward = given["reward"]
        reason = tensor_unsupported(**{k: x for k, x in given.items() if isinstance(x, torch.Tensor)})
        if reason is not None:
            return reason
        if not reward.is_floating_point() or given["done"].dtype != torch.bool:
            return f"reward is {reward.dtype} and done {given['done'].dtype}"
        if (reward.dim() < 2 and given.get("time_dim", -2) == -2) or not reward.numel():
            return f"reward has shape {tuple(reward.shape)}"
        if any(given.get(x) is not None and given[x].shape != reward.shape for x in SAME_SHAPE):
            return "shapes differ"
        rates = [given[x] for x in RATES if isinstance(given.get(x), torch.Tensor) and given[x].numel() != 1]
        if any(x.shape != reward.shape for x in rates):
            return "a rate is neither one number nor shaped like the rewards"
        if given.get("rolling_gamma") is False:
            return "rolling_gamma=False is not one scan"
        if name == SCALAR_LAMBDA and isinstance(given["lmbda"], torch.Tensor) and given["lmbda"].numel() != 1:
            return "its λ of each step are taken from the start of the row"
        return None

    return why_not


def replacements(untested: bool):
    """What to swap in the installed torchrl: a function that lists the swaps, and torchrl's version.

    Raises:
        RuntimeError: the version is not one of ``TESTED`` and ``untested`` is False, or a signature is not as known.
    """
    version = str(importlib.import_module("torchrl").__version__)
    refuse_untested("torchrl", version, TESTED, untested)
    place, strange, found = importlib.import_module("torchrl.objectives.value.functional"), [], []
    for name in NAMES:
        original, ours = getattr(place, name, None), globals()[name]
        signature = inspect.signature(ours)
        if takes(original, signature.parameters, f"{place.__name__}.{name}", strange):
            found.append(Swap(original, or_original(ours, original, _why_not(name, signature)), prefix="torchrl"))
    refuse_strange("torchrl", version, strange, untested)
    if not found:
        raise RuntimeError(f'rlfast.patch("torchrl"): nothing in torchrl {version} has a signature that rlfast knows')
    return lambda: found, version
