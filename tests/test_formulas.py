"""Every formula's hand derivative against autograd, the printed C++, and formulas made at run time."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import rlfast
from rlfast.kernels.formulas import ESTIMATORS, SURROGATES
from rlfast.kernels.formulas.kl import KlBounds
from rlfast.kernels.formulas.token import Token
from rlfast.kernels.lang import tl, torch_version
from rlfast.reference import surrogates
from tests.loss_cases import LossCase, drawn, run
from tests.numerics import assert_gradient, assert_value

OP = "token_loss"
ROOT = Path(__file__).resolve().parent.parent
BUILT_IN = [name for name in SURROGATES if hasattr(surrogates, name)]


def tokens() -> dict[str, torch.Tensor]:
    """Log-ratios on both sides of every bound, no advantage, 80 nats apart, and the ordinary."""
    rng = torch.Generator().manual_seed(4)
    x = torch.cat((torch.linspace(-1, 1.5, 101), torch.tensor([0.0, 80.0, -80.0, 3.1, -0.3])))
    x = torch.cat((x, 0.1 * torch.randn(200, generator=rng))).double()
    adv = torch.randn(x.shape, generator=rng).double()
    adv[::9] = 0.0
    old = -torch.rand(x.shape, generator=rng).double() * 3 - 0.05
    return {"old": old, "x": x, "adv": adv, "extra": (torch.rand(x.shape, generator=rng) < 0.5).double()}


def of_formula(name: str, given: dict) -> tuple:
    """(value, ∂/∂x, ∂/∂log p) by the text of the formula; log p is old + x, held below 0."""
    t = Token(given["logp"], given["old"], given["x"], given["x"].exp(), given["adv"], given["extra"])
    formula = SURROGATES[name]
    value, by_x, by_logp, _ = torch_version(formula.function)(t, formula.hyper())
    return tuple(torch.as_tensor(y).expand_as(given["x"]).to(value.dtype) for y in (value, by_x, by_logp))


def of_oracle(name: str, given: dict) -> tuple:
    """The same by autograd."""
    x, logp = (given[k].clone().requires_grad_() for k in ("x", "logp"))
    formula = SURROGATES[name]
    hyper = formula.hyper()._asdict()
    hyper.pop("unused", None)
    t = type("Seen", (), {})()
    t.logp, t.old_logp, t.log_ratio, t.ratio = logp, given["old"], x, x.exp()
    t.adv, t.extra = given["adv"], given["extra"]
    value = getattr(surrogates, name)(t, **hyper)
    found = torch.autograd.grad(value.sum(), (x, logp), allow_unused=True)
    return value.detach(), *(torch.zeros_like(x) if g is None else g for g in found)


@pytest.mark.parametrize("name", BUILT_IN)
def test_hand_derivative_is_autograds(name):
    wide = tokens()
    wide["logp"] = torch.minimum(wide["old"] + wide["x"], torch.tensor(-1e-3).double())
    single = {k: v.float() for k, v in wide.items()}
    rounded = {k: v.double() for k, v in single.items()}
    truth, own, got = of_oracle(name, rounded), of_oracle(name, single), of_formula(name, single)
    # those at 80 nats have errors that would hide every other
    for part in (wide["x"].abs() < 10, wide["x"].abs() >= 10):
        assert_value("value", got[0][part], truth[0][part], own[0][part])
        for k, what in ((1, "∂/∂x"), (2, "∂/∂log p")):
            assert_gradient(what, got[k][part], truth[k][part], own[k][part])


@pytest.mark.parametrize("hyper", ({}, {"dual_clip": 3.0}, {"delta": 1.1}), ids=str)
def test_what_is_clipped(hyper):
    """Where the loss no longer follows −A·r: also where r is 0 in float32, and never where A is."""
    formula = SURROGATES["ppo_clip"]
    x, adv = torch.tensor([-170.0, -0.3, 0.0, 0.15, 0.3, 2.0]), torch.tensor([[1.0], [-1.0], [0.0]])
    t = Token(x - 1, x * 0 - 1, x, x.exp(), adv.expand(3, 6), x * 0)
    clipped = torch_version(formula.function)(t, formula.hyper(**hyper))[3]
    beyond = {"dual_clip": (0, 1), "delta": (1, 1)}.get(*hyper, (0, 0)) if hyper else (0, 0)
    up = [0, 0, 0, beyond[0], 1, 1]
    assert clipped.tolist() == [up, [1, 1, 0, 0, int("delta" in hyper), beyond[1]], [0] * 6]


@pytest.mark.parametrize("bounds", (KlBounds(), KlBounds(0.75, 0.25)))
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name, bounds):
    d = torch.cat((torch.linspace(-2, 2, 401), torch.tensor([1e-6, -1e-6, 60.0, -60.0])))
    value, slope = torch_version(ESTIMATORS[name])(d, bounds)
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = d.to(dtype).requires_grad_()
        estimate = surrogates.kl_estimate(name, leaf, *bounds)
        found.append((estimate.detach(), -torch.autograd.grad(estimate.sum(), leaf)[0]))
    near = d.abs() < 10
    for part in (near, ~near):
        assert_value(name, value[part], found[0][0][part], found[1][0][part])
        got = torch.as_tensor(slope).expand_as(d)
        assert_gradient(name, got[part], found[0][1][part], found[1][1][part])


def emitter():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import emit_cpp
    finally:
        sys.path.pop(0)
    return emit_cpp


def test_the_printed_formulas_are_fresh():
    tool = emitter()
    assert tool.TARGET.read_text(encoding="utf-8") == tool.emit(), "run python tools/emit_cpp.py"


@pytest.mark.parametrize(
    "body",
    (
        "    if t.adv > 0:\n        return t.adv\n    return 0.0",
        "    return tl.sort(t.adv)",
        "    x = [1]\n    return x",
    ),
)
def test_the_emitter_refuses_what_it_cannot_print(body):
    import ast

    tool = emitter()
    node = ast.parse(f'def f(t: Token, h: Clip):\n    """Doc."""\n{body}\n').body[0]
    with pytest.raises((SyntaxError, KeyError)):
        tool.Formula(node, "Surrogate", {}, set()).text()


class Power(NamedTuple):
    """The exponent of the weight."""

    k: float = 0.5


@rlfast.formula
def tempered(t, h: Power):
    """ℓ = −sg(r^k)·A·log p."""
    weight = tl.exp(h.k * t.log_ratio)
    return -weight * t.adv * t.logp, 0.0, -weight * t.adv, 0.0


@pytest.mark.backends("torch", "triton")
def test_a_formula_of_ones_own(backend, device):
    fields = {k: x for k, x in drawn(4, 30, "f32").items() if k in ("logp", "old_logp", "adv", "mask")}
    out, gradients = run(LossCase(rlfast.Loss(tempered, {"k": 0.25}), fields), backend, device)
    mask, lp, old = fields["mask"], fields["logp"], fields["old_logp"]
    found = []
    for dtype in (torch.float64, torch.float32):
        leaf = lp.to(dtype).requires_grad_()
        weight = torch.exp(0.25 * (leaf - old.to(dtype))).detach()
        terms = torch.where(mask, -weight * fields["adv"].to(dtype) * leaf, 0.0) / mask.sum()
        found.append((terms.sum().detach(), torch.autograd.grad(terms.sum(), leaf)[0], terms.abs().sum().detach()))
    assert_value("loss", out.loss.detach().cpu(), found[0][0], found[1][0], found[0][2])
    assert_gradient("gradient", gradients["logp"].cpu(), found[0][1], found[1][1])


@pytest.mark.backends("cpu")
def test_the_cpu_backend_says_that_it_has_not_got_it(backend, device):
    logp = torch.zeros(1, 2)
    with rlfast.use_backend(backend), pytest.raises(RuntimeError, match="tempered has no C"):
        rlfast.Loss(tempered)(logp, adv=torch.ones(1))
    assert rlfast.Loss(tempered)(logp - 1, adv=torch.ones(1)).loss.item() == 1.0  # without a request torch serves


def of_one_value(t, h: Power):
    return h.k * t.adv, 0.0, 0.0


class Beta(NamedTuple):
    beta: float = 0.1


def with_an_option(t, h: Beta):
    return h.beta * t.adv, 0.0, 0.0, 0.0


def scaled(by: float):
    def function(t, h: Power):
        return by * h.k * t.adv, 0.0, 0.0, 0.0

    return rlfast.formula(function)


def test_formulas_of_one_factory_stay_apart():
    """A notebook that defines its formula again leaves alone the losses that have the old one."""
    logp, made = torch.zeros(1, 2), []
    for by in (2.0, 14.0):
        made.append(rlfast.Loss(scaled(by)))
        with rlfast.use_backend("torch"):
            assert [loss(logp, adv=torch.ones(1)).loss.item() for loss in made] == [1.0, 7.0][: len(made)]


def test_no_formula_has_a_hyper_parameter_that_is_an_option():
    options = {field.name for field in dataclasses.fields(rlfast.Loss)}
    for name, formula in SURROGATES.items():
        assert not options & set(formula.hyper._fields), name


@pytest.mark.parametrize(
    ("function", "said"),
    (
        (3, "function: expected a function"),
        (lambda t: t, r"expected the arguments \(t, h\)"),
        (lambda t, h: t, "a NamedTuple of floats"),
        (of_one_value, r"returns \(ℓ, ∂ℓ/∂x, ∂ℓ/∂log p, clipped\), got 3 values"),
        (with_an_option, "other names than the options of rlfast.Loss, got beta"),
    ),
)
def test_what_is_no_formula(function, said):
    with pytest.raises(TypeError, match=said):
        rlfast.formula(function)


def test_a_hyper_parameter_without_a_default():
    class Bare(NamedTuple):
        k: float

    def f(t, h: Bare):
        return t.adv, 0.0, 0.0, 0.0

    f.__annotations__["h"] = Bare
    with pytest.raises(TypeError, match="with defaults"):
        rlfast.formula(f)
