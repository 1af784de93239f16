"""Formulas as torch functions: ``lang.torch_version``, its vocabulary, and how exact the log-prob's arithmetic is."""

from __future__ import annotations

import pytest
import torch

from rlfast.kernels import lang
from rlfast.kernels.formulas import elementary, logit
from rlfast.kernels.lang import TorchVocabulary, torch_version
from tests.numerics import assert_gradient, assert_value

NEGATIVE = -torch.logspace(-6, 1.9, 4001)
BOTH = torch.cat((NEGATIVE, -NEGATIVE))
FORMULAS = {
    "exp": (NEGATIVE, torch.exp),
    "expm1": (BOTH, torch.expm1),
    "log1p": (torch.linspace(0, 1, 1001), torch.log1p),
    "softplus": (BOTH, lambda x: torch.nn.functional.softplus(x, threshold=1e9)),
    "tanh": (BOTH, torch.tanh),
    "sigmoid": (BOTH, torch.sigmoid),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_accuracy(name):
    x, torch_function = FORMULAS[name]
    assert_value(name, torch_version(getattr(elementary, name))(x), torch_function(x.double()), torch_function(x))


@pytest.mark.parametrize("name", ("expm1", "softplus"))
def test_derivative_by_autograd(name):
    x, torch_function = FORMULAS[name]
    x = x[x.abs() > 1e-3]
    grads = []
    for function, dtype in ((torch_version(getattr(elementary, name)), None), (torch_function, torch.float64)):
        leaf = x.to(dtype or torch.float32).requires_grad_()
        (g,) = torch.autograd.grad(function(leaf).sum(), leaf)
        grads.append(g)
    leaf = x.clone().requires_grad_()
    (own,) = torch.autograd.grad(torch_function(leaf).sum(), leaf)
    assert_gradient(name, *grads, own)


@pytest.mark.parametrize("kind", (logit.IDENTITY, logit.SCALED, logit.SOFTCAPPED))
def test_pulled_back_is_the_derivative_of_transformed(kind):
    kind = getattr(kind, "value", kind)
    x = torch.linspace(-90, 90, 999, dtype=torch.float64).requires_grad_()
    z = torch_version(logit.transformed)(x, 0.7, 30.0, 1.3, kind)
    (truth,) = torch.autograd.grad(z.sum(), x)
    got = torch_version(logit.pulled_back)(torch.ones_like(x), x, 0.7, 30.0, 1.3, kind)
    # the formula's constants are float32's
    assert_gradient("dz/dx", got.float(), truth.detach(), truth.detach().float())


def test_edges():
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([-inf, -200.0, 0.0, nan])
    assert torch_version(elementary.exp)(x).tolist()[:3] == [0.0, 0.0, 1.0]
    assert torch_version(elementary.softplus)(torch.tensor([-inf, inf])).tolist() == [0.0, inf]
    assert torch_version(elementary.expm1)(x).tolist()[:3] == [-1.0, -1.0, 0.0]
    assert torch_version(elementary.tanh)(torch.tensor([-inf, inf, 0.0])).tolist() == [-1.0, 1.0, 0.0]
    for f in (elementary.exp, elementary.softplus, elementary.expm1, elementary.tanh):
        assert torch_version(f)(x)[3].isnan()


def test_a_nested_helper_is_rebuilt_and_keeps_its_name():
    rebuilt = torch_version(elementary.softplus)
    assert rebuilt.__name__ == "softplus" and rebuilt.__doc__
    assert rebuilt.__globals__["tl"] is TorchVocabulary
    assert rebuilt.__globals__["log1p"].__globals__["tl"] is TorchVocabulary


@pytest.mark.skipif(not lang.NATIVE, reason="no triton")
def test_the_vocabulary_has_only_words_of_triton():
    for name in vars(TorchVocabulary):
        assert name.startswith("__") or hasattr(lang.tl, name), name


def test_the_vocabulary_takes_scalars_and_keeps_float64():
    x = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    tl = TorchVocabulary
    assert tl.maximum(x, 0.0).tolist() == [0.0, 2.0] and tl.maximum(x, 0.0).dtype == torch.float64
    assert tl.minimum(0.0, x).tolist() == [-1.0, 0.0]
    assert tl.clamp(x, -0.5, 0.5).tolist() == [-0.5, 0.5]
    assert tl.exp(0.0).item() == 1.0 and tl.fma(x, x, x).tolist() == [0.0, 6.0]
