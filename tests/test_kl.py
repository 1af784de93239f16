"""``kl_penalty``: every estimator against autograd, and the trainers' own functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlfast
from rlfast.kl import KL_KINDS
from rlfast.presets import KL_BOUNDS
from tests import golden_inputs
from tests.numerics import assert_gradient, assert_value, assert_zero

GOLDEN = json.loads((Path(__file__).parent / "data" / "trainers.json").read_text(encoding="utf-8"))["estimates"]
POINTS = (-80.0, -25.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0, 25.0, 80.0)


def plain(d, kind: str):
    """An estimator as it is written down."""
    return {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - 1 - d, "absolute": d.abs()}[kind]


def oracle(logp, ref_logp, kind: str):
    """Value and gradient by autograd."""
    d = ref_logp - logp
    value = plain(d, kind.removesuffix("+"))
    through = plain(d, "k2") if kind.endswith("+") else value
    return value.detach(), torch.autograd.grad(through.sum(), logp)[0]


def ours(logp, ref_logp, kind: str, like=None):
    """Value and gradient of ours."""
    leaf = logp.detach().requires_grad_()
    value = rlfast.kl_penalty(leaf, ref_logp, kind=kind, like=like)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KL_KINDS)
def test_an_estimator_is_what_autograd_says(kind, dtype):
    ref = torch.tensor(POINTS) - 90.0
    logp = torch.full_like(ref, -90.0)
    truth = oracle(logp.double().requires_grad_(), ref.double(), kind)
    own = oracle(logp.clone().requires_grad_(), ref, kind)
    value, gradient = ours(logp.to(dtype), ref.to(dtype), kind)
    assert value.dtype == dtype and gradient.dtype == dtype
    assert_value("value", value, truth[0], own[0])
    assert_gradient("gradient", gradient, truth[1], own[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['trainer']}-{c['kind']}")
def test_the_estimate_is_the_trainers(case, dtype):
    fields = golden_inputs.batch("far")
    logp, ref = fields["logp"].to(dtype), fields["ref_logp"].to(dtype)
    value, gradient = ours(logp, ref, case["kind"], case["trainer"])
    wanted, slope = (torch.tensor(case[name], dtype=torch.float64) for name in ("value", "gradient"))
    # in float32 the yardstick is the plain estimator on the tokens that no bound touches
    own = oracle(fields["logp"].float().requires_grad_(), fields["ref_logp"].float(), case["kind"])
    bounded = (wanted.abs() >= 10.0) | ((ref - logp).abs() >= 10.0)
    own = [torch.where(bounded, truth.float(), x) for truth, x in zip((wanted, slope), own, strict=True)]
    exact = dtype == torch.float64
    assert_value("value", value, wanted, wanted if exact else own[0])
    assert_gradient("gradient", gradient, slope, slope if exact else own[1])


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_nemo_rl_bounds_both_the_difference_and_the_estimate(kind):
    d = torch.tensor([-25.0, -3.0, 2.0, 25.0], dtype=torch.float64)
    leaf = torch.zeros_like(d).requires_grad_()
    bounded = plain((d - leaf).clamp(-20.0, 20.0), kind).clamp(-10.0, 10.0)
    slope = torch.autograd.grad(bounded.sum(), leaf)[0]
    value, gradient = ours(torch.zeros_like(d), d, kind, "nemo-rl")
    assert_value("value", value, bounded.detach(), bounded.detach())
    assert_gradient("gradient", gradient, slope, slope)


@pytest.mark.parametrize("like", ["trl", "liger"])
def test_no_bounds_where_the_trainer_has_none(like):
    assert like not in KL_BOUNDS
    assert rlfast.kl_penalty(torch.zeros(1), torch.full((1,), 30.0), like=like).item() > 1e12


def test_a_half_precision_input_gives_float32():
    logp = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16, requires_grad=True)
    value = rlfast.kl_penalty(logp, torch.tensor([-1.0, -2.0], dtype=torch.bfloat16))
    value.sum().backward()
    assert value.dtype == torch.float32 and logp.grad.dtype == torch.bfloat16
    assert_zero("at the reference itself", value)


@pytest.mark.parametrize("plus", ("", "+"))
def test_abs_is_absolute(plus):
    """As verl calls it."""
    x = torch.tensor([-1.0, -2.0])
    assert torch.equal(
        rlfast.kl_penalty(x, x.flip(0), kind=f"abs{plus}"), rlfast.kl_penalty(x, x.flip(0), kind=f"absolute{plus}")
    )
    assert (
        rlfast.loss("grpo", kl=f"abs{plus}").kl
        == rlfast.loss("ppo", like="verl", kl=f"abs{plus}").kl
        == f"absolute{plus}"
    )


def test_errors_name_the_argument():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"ref_logp: expected shape \(3,\) like logp, got \(2,\)"):
        rlfast.kl_penalty(x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"kind: expected one of 'k1', .*, got 'k4'"):
        rlfast.kl_penalty(x, x, kind="k4")
    with pytest.raises(ValueError, match=r"like: expected one of 'trl', .*, got 'trlx'"):
        rlfast.kl_penalty(x, x, like="trlx")


def test_the_second_derivative_is_refused():
    logp = torch.zeros(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(rlfast.kl_penalty(logp, torch.ones(3)).square().sum(), logp, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
