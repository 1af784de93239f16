"""``accumulate_grad``: the gradient of a head's weight goes straight to where the weight keeps its own."""

from __future__ import annotations

import pytest
import torch

import rlfast
from tests.linear_policy_cases import BUDGETS, QUICK, case_of, oracle, run
from tests.numerics import assert_gradient, assert_same_bits, by_name

OP = "linear_token_logps"
pytestmark = [pytest.mark.usefixtures("small_chunks"), pytest.mark.backends(*QUICK)]
LENGTH, VOCAB = 7, 1301
ROOM = dict(zip(BUDGETS, (0, LENGTH, 9 * LENGTH, 1 << 20), strict=True))  # rows of logits


def pulled(case, backend: str, device: str, budget: str, upstream: float = 1.0, prepare=None, times: int = 1):
    """(the weight, its gradient as autograd returns it) after ``times`` losses and their backward."""
    data = {k: x.to(device) for k, x in case.data.items()}
    weight = data["weight"].clone().requires_grad_()
    if prepare is not None:
        prepare(weight)
    with rlfast.use_backend(backend):
        for _ in range(times):
            out = case.loss.linear(
                data["hidden"], weight, data["targets"], data["bias"], **{k: data[k] for k in case.fields()},
                memory_budget=ROOM[budget] * VOCAB * 4, accumulate_grad=True,
            )  # fmt: skip
            (out.loss * upstream).backward()
    return weight


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ("ppo", "gspo"))
def test_the_gradient_is_the_same(backend, device, name, budget):
    case = case_of(name, needs=("weight",))
    weight = pulled(case, backend, device, budget, 0.5)
    _, wanted = oracle(case, torch.float64)
    _, own = by_name(lambda seed: oracle(case, torch.float32, seed))
    assert_gradient("weight", 2 * weight.grad.cpu(), wanted["weight"], own["weight"])


@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_it_is_added(backend, device, budget):
    once = pulled(case_of(), backend, device, budget).grad
    assert_same_bits("twice", pulled(case_of(), backend, device, budget, times=2).grad, 2 * once)


def test_it_goes_to_main_grad(backend, device):
    """In float32 beside a weight in bfloat16, with no gradient of the weight's dtype beside it."""
    case = case_of(dtype="bf16", needs=("weight",))

    def prepare(weight):
        weight.main_grad = torch.ones(weight.shape, device=weight.device)

    weight = pulled(case, backend, device, "some sequences", prepare=prepare)
    assert weight.grad is None and weight.main_grad.dtype == torch.float32
    _, wanted = oracle(case, torch.float64)
    _, own = by_name(lambda seed: oracle(case, torch.float32, seed))
    rounding = 2.0**-23  # of the sum with 1
    excess = (weight.main_grad.cpu() - 1.0 - wanted["weight"]).abs() - rounding
    assert excess.max() <= 1.2 * max(float((x - wanted["weight"]).abs().max()) for x in own["weight"].some(4))


def test_beside_what_autograd_returns(backend, device):
    """The other leaves have their gradients as ever."""
    case = case_of()
    _, expected = run(case, backend, device)
    data = {k: x.to(device) for k, x in case.data.items()}
    leaves = {k: data[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
    with rlfast.use_backend(backend):
        out = case.loss.linear(
            **leaves, targets=data["targets"], **{k: data[k] for k in case.fields()},
            memory_budget=9 * LENGTH * VOCAB * 4, accumulate_grad=True,
        )  # fmt: skip
        out.loss.backward()
    for name, leaf in leaves.items():
        assert_same_bits(name, leaf.grad, expected[name])


def test_a_second_backward_says_why_not(backend, device):
    case = case_of()
    data = {k: x.to(device) for k, x in case.data.items()}
    weight = data["weight"].clone().requires_grad_()
    with rlfast.use_backend(backend):
        out = case.loss.linear(
            data["hidden"], weight, data["targets"], **{k: data[k] for k in case.fields()}, accumulate_grad=True
        )
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="accumulate_grad: a first backward has added the gradient"):
        out.loss.backward()


@pytest.mark.backends("cpu")
def test_wrong_input_is_named(backend, device):
    head = torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    loss, adv = rlfast.loss("reinforce"), torch.zeros(2)
    with pytest.raises(ValueError, match="weight: expected a leaf that needs a gradient, with accumulate_grad"):
        loss.linear(*head, adv=adv, accumulate_grad=True)
    with pytest.raises(TypeError, match="accumulate_grad: expected True or False"):
        loss.linear(*head, adv=adv, accumulate_grad=1)
    with torch.no_grad():
        loss.linear(*head, adv=adv, accumulate_grad=True)
