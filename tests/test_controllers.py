"""Controllers and running statistics: their rules, and their state."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import rlfast
from tests.numerics import assert_value

GOLDEN = json.loads((Path(__file__).parent / "data" / "trainers.json").read_text(encoding="utf-8"))["controllers"]


def test_adaptive_kl_is_verls():
    steps, control = GOLDEN["kl"], rlfast.AdaptiveKL(0.2, target=0.1, horizon=1000)
    for (kl, n), value in zip(steps["measured"], steps["values"], strict=True):
        control.update(torch.tensor(kl), n)
        assert control.value.item() == pytest.approx(value, rel=1e-6)


def test_adaptive_entropy_is_trls():
    """TRL raises the coefficient at or below the target, and applies it in the next step only if it was there."""
    control = rlfast.AdaptiveEntropy(0.01, target=0.2, delta=0.005, high=0.02)
    for step in GOLDEN["entropy"]:
        assert control.value.item() == pytest.approx(step["applied"], abs=1e-8)
        control.update(step["entropy"], 100)
        assert control.coef.item() == pytest.approx(step["coef"], rel=1e-6)
    assert len({step["applied"] > 1e-8 for step in GOLDEN["entropy"]}) == 2


def test_a_loss_sees_the_update_of_its_coefficient():
    control = rlfast.AdaptiveKL(0.5, target=1.0, horizon=1.0)
    objective = rlfast.loss("ppo", kl="k1", beta=control.value)
    logp, ref = torch.zeros(1, 2), torch.full((1, 2), -1.0)
    before = objective(logp, adv=torch.zeros(1), ref_logp=ref).loss.item()
    control.update(10.0, 1)
    after = objective(logp, adv=torch.zeros(1), ref_logp=ref).loss.item()
    assert (before, after) == (pytest.approx(0.5), pytest.approx(0.6))


def test_running_statistics_are_those_of_everything_seen():
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(5, 7, generator=draw) * 3.0 + 1000.0 for _ in range(4)]
    masks = [torch.rand(5, 7, generator=draw) < 0.6 for _ in parts]
    seen = rlfast.RunningMeanStd()
    for x, mask in zip(parts, masks, strict=True):
        seen.update(torch.where(mask, x, torch.nan), mask)
    whole = torch.cat([x[mask] for x, mask in zip(parts, masks, strict=True)]).double()
    assert_value("mean", seen.mean, whole.mean(), whole.mean())
    assert_value("std", seen.std, whole.std(), whole.std())
    scaled = seen.normalize(whole)
    assert scaled.mean().abs() < 1e-6 and abs(scaled.std() - 1.0) < 1e-6


def test_nothing_seen_is_harmless():
    seen = rlfast.RunningMeanStd()
    seen.update(torch.zeros(3), torch.zeros(3))
    assert seen.mean.item() == 0.0 and seen.std.item() == 0.0 and seen.count.item() == 0.0


def test_a_measurement_that_is_no_number_changes_nothing():
    """Nor does one over nothing; the next one counts again."""
    kl, entropy = rlfast.AdaptiveKL(0.1, target=1.0, horizon=10), rlfast.AdaptiveEntropy(0.01)
    entropy.update(0.1, 4)
    before = kl.value.item(), entropy.coef.item(), entropy.value.item()
    for measured, n in ((float("nan"), 2), (torch.tensor(torch.nan), 2), (1.0, torch.tensor(torch.nan))):
        kl.update(measured, n)
        entropy.update(measured, n)
        assert (kl.value.item(), entropy.coef.item(), entropy.value.item()) == before
    kl.update(float("nan"), 0)
    assert kl.value.item() == before[0]
    kl.update(2.0, 5)
    assert kl.value.item() == pytest.approx(0.11)


STATISTICS = rlfast.RunningMeanStd()
BAD = [
    (lambda: rlfast.AdaptiveKL("a", target=1.0, horizon=1), "value: expected a float, got 'a'"),
    (lambda: MADE["kl"]().update("a", 2), "kl: expected a number or a 0-dim tensor, got 'a'"),
    (lambda: MADE["kl"]().update(torch.ones(2), 2), r"kl: expected a number or a 0-dim tensor, got \(2,\)"),
    (lambda: MADE["kl"]().update(0.1, None), "n: expected a number or a 0-dim tensor, got None"),
    (lambda: MADE["entropy"]().update([1.0], 2), r"entropy: expected a number or a 0-dim tensor, got \[1.0\]"),
    (lambda: rlfast.AdaptiveEntropy(low="a"), "low: expected a float, got 'a'"),
    (lambda: rlfast.AdaptiveEntropy(low=1.0, high=0.0), "low, high: expected low <= high, got 1.0, 0.0"),
    (lambda: STATISTICS.update([1.0]), "x: expected a torch.Tensor, got list"),
    (lambda: STATISTICS.update(torch.ones(2), [1, 1]), "mask: expected a torch.Tensor, got list"),
    (lambda: STATISTICS.update(torch.ones(2, 3), torch.ones(3)), r"mask: expected shape \(2, 3\) like x, got \(3,\)"),
    (lambda: STATISTICS.normalize([1.0]), "x: expected a torch.Tensor, got list"),
    (lambda: MADE["kl"]().load_state_dict([1]), "state: expected entries value, got list"),
    (
        lambda: MADE["kl"]().load_state_dict({"value": torch.ones(2)}),
        r"value: expected a number or a 0-dim tensor, got",
    ),
]


@pytest.mark.parametrize("call, said", BAD, ids=[said for _, said in BAD])
def test_bad_input_is_named(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


MADE = {
    "kl": lambda: rlfast.AdaptiveKL(0.2, target=0.1, horizon=10),
    "entropy": lambda: rlfast.AdaptiveEntropy(0.01),
    "statistics": lambda: rlfast.RunningMeanStd(),
}


def step(control, i: int):
    given = (torch.arange(3.0) * i,) if isinstance(control, rlfast.RunningMeanStd) else (0.1 * i, 2)
    control.update(*given)


@pytest.mark.parametrize("name", MADE)
def test_state_survives(name):
    control, other = MADE[name](), MADE[name]()
    step(control, 1)
    state = copy.deepcopy(control.state_dict())
    step(control, 3)
    held = dict(vars(other))
    other.load_state_dict(state)
    step(other, 3)
    assert all(torch.equal(control.state_dict()[k], v) for k, v in other.state_dict().items())
    assert all(vars(other)[k] is v for k, v in held.items() if isinstance(v, torch.Tensor)), "loaded in place"
    with pytest.raises(ValueError, match="state: expected entries"):
        other.load_state_dict({})
