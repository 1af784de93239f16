"""Arithmetic on state dicts against its equations in float64."""

from __future__ import annotations

import math

import pytest
import torch

import rlfast
from rlfast import weights
from tests.numerics import assert_value

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def model(seed: int, dtype=torch.float32) -> dict:
    """A few tensors, one of them no float and one not contiguous."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "head": torch.randn(7, 5, generator=rng).to(dtype), "bias": torch.randn(5, generator=rng).to(dtype),
        "turned": torch.randn(4, 6, generator=rng).to(dtype).T, "steps": torch.tensor(3),
        "scalar": torch.randn((), generator=rng).to(dtype),
    }  # fmt: skip


def held(got: dict, formula, *models: dict) -> None:
    """Every tensor against a formula of float64 tensors."""
    for key, x in got.items():
        if not x.is_floating_point():
            assert x == models[0][key]
            continue
        truth = formula(*(m[key].double() for m in models))
        own = formula(*(m[key].float() for m in models))
        assert x.dtype == models[0][key].dtype and x.shape == truth.shape
        assert_value(key, x, truth, own.to(x.dtype))


@pytest.fixture(params=(1 << 22, 3))
def chunk(request, monkeypatch):
    """Whole tensors, and three elements at a time."""
    monkeypatch.setattr(weights, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_equations(dtype):
    a, b, c = (model(seed, dtype) for seed in range(3))
    average = {k: x.clone() for k, x in a.items()}
    rlfast.ema_update(average, b, decay=0.75)
    held(average, lambda x, y: 0.75 * x + 0.25 * y, a, b)
    held(rlfast.extrapolate(a, b, alpha=0.5), lambda y, x: y + 0.5 * (y - x), b, a)
    held(rlfast.merge([a, b, c], weights=[0.5, 0.25, 1.0]), lambda x, y, z: 0.5 * x + 0.25 * y + z, a, b, c)
    held(rlfast.merge([a, b]), lambda x, y: (x + y) / 2, a, b)


def great_circle(x, y, base, weight):
    """WARP (3)."""
    u, v = (x - base).flatten(), (y - base).flatten()
    angle = torch.arccos((u.double() @ v.double()) / (u.double().norm() * v.double().norm())).item()
    if abs(math.sin(angle)) < 1e-4:
        return base + (1 - weight) * (x - base) + weight * (y - base)
    a, b = (math.sin(w * angle) / math.sin(angle) for w in (1 - weight, weight))
    return base + a * (x - base) + b * (y - base)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("weight", (0.0, 0.25, 1.0))
def test_slerp(weight):
    a, b, base = model(0), model(1), model(2)
    a["scalar"] = base["scalar"] + 1  # parallel differences
    b["scalar"] = base["scalar"] + 3
    held(rlfast.slerp(a, b, weight=weight, base=base), lambda x, y, o: great_circle(x, y, o, weight), a, b, base)


def test_slerp_of_equal_models_is_the_model():
    a = model(0)
    for key, x in rlfast.slerp(a, a, weight=0.3).items():
        torch.testing.assert_close(x, a[key])


def test_the_ends_are_exact():
    a, b = model(0), model(1)
    for decay, wanted in ((1.0, a), (0.0, b)):
        average = {k: x.clone() for k, x in a.items()}
        rlfast.ema_update(average, b, decay=decay)
        assert all(torch.equal(x, wanted[k]) for k, x in average.items())


def test_bad_input_is_named():
    a, b = model(0), model(1)
    with pytest.raises(ValueError, match=r"decay: expected a float in \[0, 1\]"):
        rlfast.ema_update(a, b, decay=1.5)
    with pytest.raises(ValueError, match="model: expected the keys of average, got a difference in extra"):
        rlfast.ema_update(a, b | {"extra": torch.zeros(1)}, decay=0.5)
    with pytest.raises(ValueError, match=r"base\['head'\]: expected shape \(7, 5\) like tuned"):
        rlfast.extrapolate(a | {"head": torch.zeros(5, 7)}, b, alpha=0.5)
    with pytest.raises(ValueError, match=r"models\[1\]\['steps'\]: expected what models\[0\] has"):
        rlfast.merge([a, b | {"steps": torch.tensor(4)}])
    with pytest.raises(ValueError, match=r"second\['head'\]: expected a direction that is not the opposite"):
        rlfast.slerp(a, {k: -x if x.is_floating_point() else x for k, x in a.items()})
    with pytest.raises(ValueError, match="weights: expected 2 numbers, one a model"):
        rlfast.merge([a, b], weights=[1.0])
    with pytest.raises(ValueError, match="models: expected at least one"):
        rlfast.merge([])


def test_tied_weights_are_averaged_once():
    """Two keys of one tensor, as of an embedding and its head."""
    average, model = ({"embedding": x, "head": x} for x in (torch.ones(3, 2), torch.full((3, 2), 3.0)))
    rlfast.ema_update(average, model, decay=0.75)
    assert average["head"].eq(1.5).all() and average["embedding"] is average["head"]


def test_an_average_takes_what_is_no_float():
    average = model(0)
    rlfast.ema_update(average, model(1) | {"steps": torch.tensor(4)}, decay=0.5)
    assert average["steps"] == 4


@pytest.mark.parametrize("decay", (0.0, 1.0))
def test_a_factor_of_0_leaves_no_nan(decay):
    """A hard update starts again from a model that is sound, and an average that keeps all of itself stays so."""
    sound, broken = {"w": torch.ones(3)}, {"w": torch.full((3,), torch.nan)}
    average, other = (broken, sound) if decay == 0.0 else (sound, broken)
    rlfast.ema_update(average, other, decay=decay)
    assert average["w"].eq(1.0).all()


def test_numbers_have_no_direction():
    a, b = {"scale": torch.tensor([1.0])}, {"scale": torch.tensor([-3.0])}
    assert rlfast.slerp(a, b, weight=0.25)["scale"].item() == 0.0
