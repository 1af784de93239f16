"""torchrl's value functions on rlfast equal torchrl's, value and gradient; ``rlfast.patch("torchrl")`` and its undo."""

from __future__ import annotations

import importlib
import itertools
import logging
import subprocess
import sys

import pytest
import torch
from torchrl.objectives.value import functional

import rlfast
from rlfast.integrations import patching
from rlfast.integrations import torchrl as ours

SHAPES = {  # (shape, time_dim)
    "one feature": ((4, 19, 1), -2),
    "features": ((4, 19, 3), -2),
    "two batches": ((2, 3, 11, 2), -2),
    "no batch": ((19, 2), -2),
    "time last": ((4, 2, 19), -1),
    "time first": ((19, 4, 2), 0),
    "time alone": ((19,), -1),
}
TERMS = ("state_value", "next_state_value", "reward", "log_pi", "log_mu")


def draws(shape, seed=0) -> dict:
    """float64, with episodes that end and that are cut."""
    torch.manual_seed(seed)
    found = {name: torch.randn(shape, dtype=torch.float64) for name in ("state_value", "next_state_value", "reward")}
    found |= {name: 0.5 * torch.randn(shape, dtype=torch.float64) for name in ("log_pi", "log_mu")}
    done = torch.rand(shape) < 0.25
    return found | {"done": done, "terminated": done & (torch.rand(shape) < 0.5)}


def per_step(shape, low, high):
    """A rate of each step."""
    return low + (high - low) * torch.rand(shape, dtype=torch.float64)


CASES = {
    "generalized_advantage_estimate": ("gamma", "lmbda", "state_value", "next_state_value", "reward", "done"),
    "vec_generalized_advantage_estimate": ("gamma", "lmbda", "state_value", "next_state_value", "reward", "done"),
    "td_lambda_return_estimate": ("gamma", "lmbda", "next_state_value", "reward", "done"),
    "vec_td_lambda_return_estimate": ("gamma", "lmbda", "next_state_value", "reward", "done"),
    "td1_return_estimate": ("gamma", "next_state_value", "reward", "done"),
    "vec_td1_return_estimate": ("gamma", "next_state_value", "reward", "done"),
    "vtrace_advantage_estimate": ("gamma", "log_pi", "log_mu", "state_value", "next_state_value", "reward", "done"),
    "reward2go": ("reward", "done", "gamma"),
}
KINDS = ("numbers", "one element", "each step")


def arguments(name: str, shape, kind: str, terminated: bool) -> tuple[list, dict, list]:
    """(positional, keywords, the leaves among them)."""
    given = draws(shape)
    rates = {"gamma": 31 / 32, "lmbda": 15 / 16}  # torchrl multiplies a number in float32, whatever the inputs are
    if kind == "one element":
        rates = {key: torch.tensor(x, dtype=torch.float64) for key, x in rates.items()}
    if kind == "each step":
        rates = {"gamma": per_step(shape, 0.8, 1.0), "lmbda": per_step(shape, 0.7, 1.0)}
    given |= rates
    leaves = [given[key].requires_grad_() for key in TERMS if key in CASES[name]]
    more = {"terminated": given["terminated"]} if terminated and name != "reward2go" else {}
    return [given[key] for key in CASES[name]], more, leaves


def outcome(module, name: str, shape, time_dim: int, kind: str, terminated: bool) -> list:
    """Outputs and gradients."""
    args, more, leaves = arguments(name, shape, kind, terminated)
    if time_dim != -2:
        more["time_dim"] = time_dim
    out = getattr(module, name)(*args, **more)
    out = out if isinstance(out, tuple) else (out,)
    pulls = [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape) for x in out]
    total = sum((x * pull).sum() for x, pull in zip(out, pulls, strict=True))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return [*(x.detach() for x in out), *gradients]


def compare(got: list, expected: list, name: str) -> None:
    """torchrl's convolutions leave out weights below 1e-7."""
    rtol, atol = (1e-5, 1e-6) if name.startswith("vec") or name == "reward2go" else (1e-11, 1e-12)
    assert len(got) == len(expected)
    for x, y in zip(got, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def torchrl_can(name: str, shape, kind: str) -> bool:
    """What torchrl's own function does as its documentation says."""
    if kind == "each step":
        if name == "reward2go" or (name == "vec_td_lambda_return_estimate"):
            return False
        return not (name.startswith("vec") and (len(shape) != 3 or shape[-1] != 1))
    return not (kind == "one element" and name == "reward2go")


GRID = [
    (name, where, kind)
    for name, where, kind in itertools.product(CASES, SHAPES, KINDS)
    if torchrl_can(name, SHAPES[where][0], kind)
]


@pytest.mark.parametrize("name, where, kind", GRID)
def test_equals_torchrl(name, where, kind):
    shape, time_dim = SHAPES[where]
    for terminated in (False, True):
        both = (outcome(m, name, shape, time_dim, kind, terminated) for m in (ours, functional))
        compare(*both, name)


@pytest.mark.parametrize("name", CASES)
def test_an_error_of_one_percent_is_noticed(name):
    got = outcome(ours, name, (4, 19, 1), -2, "numbers", True)
    compare(got, outcome(functional, name, (4, 19, 1), -2, "numbers", True), name)
    for i, x in enumerate(got):
        if x is not None:
            with pytest.raises(AssertionError):
                compare([*got[:i], 1.01 * x, *got[i + 1 :]], got, name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_dtypes(dtype):
    args, more, _ = arguments("generalized_advantage_estimate", (4, 19, 2), "numbers", True)
    rounded = [x.detach().to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    truth = functional.generalized_advantage_estimate(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in rounded), **more
    )
    for x, y in zip(ours.generalized_advantage_estimate(*rounded, **more), truth, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


def test_gradients_of_the_rates():
    for kind in ("one element", "each step"):
        found = []
        for module in (ours, functional):
            args, more, _ = arguments("generalized_advantage_estimate", (4, 19, 2), kind, True)
            args[0].requires_grad_(), args[1].requires_grad_()
            advantage, target = module.generalized_advantage_estimate(*args, **more)
            found.append(torch.autograd.grad((advantage * target).sum(), args[:2]))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_errors_name_the_argument():
    given = draws((2, 5, 1))
    v, n, r, d = (given[x] for x in ("state_value", "next_state_value", "reward", "done"))
    with pytest.raises(ValueError, match="rolling_gamma: expected True or None"):
        ours.td_lambda_return_estimate(0.9, 0.9, n, r, d, rolling_gamma=False)
    with pytest.raises(ValueError, match=r"gamma: expected shape \(2, 5, 1\) like reward, or one element"):
        ours.generalized_advantage_estimate(torch.rand(5), 0.9, v, n, r, d)
    with pytest.raises(ValueError, match=r"state_value: expected shape"):
        ours.generalized_advantage_estimate(0.9, 0.9, v[:1, :2], n, r, d)
    with pytest.raises(ValueError, match="time_dim: expected a dimension of reward"):
        ours.reward2go(r, d, 0.9, time_dim=3)


def bindings() -> dict:
    """Every global of torchrl's modules."""
    return {
        (name, key): value
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "torchrl"
        for key, value in list(vars(module).items())
    }


def changed(before: dict) -> set[str]:
    after = bindings()
    return {".".join(key) for key in before if after.get(key) is not before[key]}


def test_patch_reaches_every_name_and_undo_restores_it(monkeypatch):
    importlib.import_module("torchrl.objectives.value.advantages")
    before, calls, scan = bindings(), [], ours.affine_scan
    monkeypatch.setattr(ours, "affine_scan", lambda a, b: calls.append(1) or scan(a, b))
    with rlfast.patch("torchrl") as patch:
        names = changed(before)
        assert names == set(patch.replaced)
        assert {f"torchrl.objectives.value.functional.{name}" for name in ours.NAMES} <= names
        assert "torchrl.objectives.value.advantages.vec_generalized_advantage_estimate" in names
        with rlfast.patch("torchrl") as again:
            assert again.replaced == patch.replaced and changed(before) == names
        assert changed(before) == names
        given = draws((2, 5, 1))
        four = [given[x] for x in ("state_value", "next_state_value", "reward", "done")]
        functional.td_lambda_advantage_estimate(0.9, 0.8, *four)  # torchrl's own, which calls the returns
        functional.vec_td1_advantage_estimate(0.9, *four)
        assert len(calls) == 2
    assert not changed(before) and not patch.active


def test_the_estimators_of_torchrl_take_it():
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.objectives.value import GAE, VTrace

    torch.manual_seed(0)
    value = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])
    flags = {"done": torch.rand(2, 7, 1) < 0.3, "terminated": torch.zeros(2, 7, 1, dtype=torch.bool)}
    batch = TensorDict({"obs": torch.randn(2, 7, 3), "next": {
        "obs": torch.randn(2, 7, 3), "reward": torch.randn(2, 7, 1), **flags}}, [2, 7])  # fmt: skip
    assert VTrace is not None
    found = []
    for context in (lambda: rlfast.patch("torchrl"), lambda: torch.enable_grad()):
        with context():
            out = GAE(gamma=0.95, lmbda=0.9, value_network=value)(batch.clone())
            found.append((out["advantage"].detach(), out["value_target"].detach()))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_originals_run_where_rlfast_cannot_and_say_so_once(caplog):
    given = draws((2, 5, 1))
    n, r, d = (given[x] for x in ("next_state_value", "reward", "done"))
    rate = torch.rand(2, 5, 1, dtype=torch.float64)
    calls = {
        "rolling_gamma=False": lambda: functional.td_lambda_return_estimate(rate, 0.9, n, r, d, rolling_gamma=False),
        "neither one number": lambda: functional.generalized_advantage_estimate(rate[:, :1], 0.9, n, n, r, d),
        "from the start of the row": lambda: functional.vec_td_lambda_return_estimate(0.9, rate[0], n[0], r[0], d[0]),
        "done torch.float64": lambda: functional.generalized_advantage_estimate(0.9, 0.9, n, n, r, d.double()),
        "shapes differ": lambda: functional.reward2go(r, d[:1], 0.9),
    }
    for reason, call in calls.items():
        patching.say_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("torchrl"):
            patched = [attempt(call) for _ in range(2)]
        assert len(caplog.records) == 1 and reason in caplog.text and "runs as it is" in caplog.text, reason
        own = attempt(call)
        assert type(patched[0]) is type(own)
        if isinstance(own, torch.Tensor):
            assert torch.equal(patched[0], own)


def attempt(call):
    """What it returns or raises."""
    try:
        return call()
    except Exception as error:
        return error


def test_versions_and_signatures_that_are_not_known(monkeypatch, caplog):
    import torchrl

    monkeypatch.setattr(torchrl, "__version__", "0.15.0")
    with pytest.raises(RuntimeError, match=r"tested with torchrl 0\.14, found 0\.15\.0.*untested=True"):
        rlfast.patch("torchrl")
    monkeypatch.setattr(functional, "reward2go", lambda reward, done: reward)
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("torchrl", untested=True) as patch:
        assert "torchrl.objectives.value.functional.reward2go" not in patch.replaced
        assert "torchrl.objectives.value.functional.td1_return_estimate" in patch.replaced
    assert "reward2go takes (reward, done), expected (reward, done, gamma, time_dim)" in caplog.text
    monkeypatch.setattr(torchrl, "__version__", "0.14.1")
    with pytest.raises(RuntimeError, match="does not look as it should"):
        rlfast.patch("torchrl")


def test_importing_rlfast_imports_no_torchrl():
    code = (
        "import sys, rlfast; from rlfast.integrations import torchrl, transformers, flash_attn, openrlhf;"
        "assert not {'torchrl', 'transformers', 'flash_attn', 'openrlhf'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
