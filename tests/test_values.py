"""The critic's losses: against autograd, and the trainers' own functions; the value of a policy near a prior."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rlfast
from rlfast.parity import ORDERS
from rlfast.values import two_hot
from tests import golden_inputs
from tests.numerics import assert_gradient, assert_value, assert_zero

OP = "token_loss"
GOLDEN = json.loads((Path(__file__).parent / "data" / "trainers.json").read_text(encoding="utf-8"))["value_losses"]
BINS = 11


def fields_of(dtype, device="cpu", order=None) -> dict:
    """The critic's fields, NaN where masked, the sequences in an order."""
    fields = golden_inputs.batch()
    order = torch.arange(golden_inputs.ROWS) if order is None else order
    mask = fields["mask"][order]
    given = {name: torch.where(mask, fields[name][order], torch.nan) for name in ("values", "old_values", "returns")}
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(*mask.shape, BINS, generator=draw)[order]
    return {k: v.to(device, dtype) for k, v in (given | {"logits": logits}).items()} | {"mask": mask.to(device)}


def run(options: dict, dtype, device="cpu", order=None):
    """(loss, gradient in the first order)."""
    given = fields_of(dtype, device, order)
    leaf = (given["logits"] if options.get("kind") == "categorical" else given["values"]).requires_grad_()
    out = rlfast.value_loss(leaf, given["old_values"], given["returns"], given["mask"], **options)
    out.loss.backward()
    back = slice(None) if order is None else order.argsort()
    return out.loss.detach().cpu(), leaf.grad.cpu()[back], out.metrics


def yardsticks(options: dict):
    """(losses, gradients) in float32 by the oracle, in several orders of summation."""
    orders = [torch.randperm(golden_inputs.ROWS, generator=torch.Generator().manual_seed(i)) for i in range(ORDERS)]
    with rlfast.use_backend("reference"):
        found = [run(options, torch.float32, order=order) for order in orders]
    return [x[0] for x in found], [x[1] for x in found]


def check(options: dict, truth, backend, device):
    """Float64 on the torch backend, and float32 on this one."""
    own = yardsticks(options)
    value, gradient = truth
    if backend == "torch":
        exact = run(options, torch.float64)
        assert_value("loss in float64", exact[0], value, own[0])
        assert_gradient("gradient in float64", exact[1], gradient, gradient)
    with rlfast.use_backend(backend):
        got = run(options, torch.float32, device)
    assert_value("loss", got[0], value, own[0])
    assert_gradient("gradient", got[1], gradient, own[1])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: f"{c['trainer']}-{c['options']}")
def test_the_loss_is_the_trainers(case, backend, device):
    truth = (torch.tensor(case[name], dtype=torch.float64) for name in ("value", "gradient"))
    check(case["options"] | {"like": case["trainer"]}, tuple(truth), backend, device)


def huber(error, delta: float):
    return torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=delta)


def oracle(options: dict):
    """The loss and its gradient by autograd in float64."""
    given = fields_of(torch.float64)
    mask = given["mask"]
    v, old, returns = (given[name].nan_to_num().requires_grad_(name == "values") for name in
                       ("values", "old_values", "returns"))  # fmt: skip
    kind, clip, leaf = options.get("kind", "mse"), options.get("clip", 0.2), v
    if kind == "categorical":
        leaf = given["logits"].requires_grad_()
        centres = torch.linspace(-2.0, 2.0, BINS, dtype=torch.float64)
        step = centres[1] - centres[0]
        weights = (1.0 - (returns.clamp(-2.0, 2.0)[..., None] - centres).abs() / step).clamp(min=0.0)
        per_token = -(weights * leaf.log_softmax(-1)).sum(-1)
    else:
        errors = [v - returns] + ([] if clip is None else [torch.min(torch.max(v, old - clip), old + clip) - returns])
        delta = options.get("delta", 1.0)
        parts = [0.5 * e.square() if kind == "mse" else huber(e, delta) for e in errors]
        per_token = torch.stack(parts).amax(0) if len(parts) > 1 else parts[0]
    per_token = torch.where(mask, per_token, 0.0)
    if options.get("reduce") == "seq_mean_token_sum":
        loss = per_token.sum(-1).sum() / mask.any(-1).sum()
    else:
        loss = per_token.sum() / mask.sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


OPTIONS = [
    {},
    {"clip": None},
    {"clip": 0.5, "reduce": "seq_mean_token_sum"},
    {"kind": "huber", "clip": None},
    {"kind": "huber", "delta": 0.3},
    {"kind": "huber", "delta": 0.3, "clip": 0.5},
    {"kind": "categorical", "support": (-2.0, 2.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_loss_is_what_autograd_says(options, backend, device):
    if options.get("kind") == "huber" and options.get("clip", 0.2) is not None:
        # the largest of two equal losses: autograd halves the gradient between them, and both halves are the same
        given = fields_of(torch.float64)
        moved = (given["values"] - given["old_values"]).abs() > options.get("clip", 0.2)
        assert bool(moved.any()) and not bool(moved[given["mask"]].all())
    check(options, oracle(options), backend, device)


def test_the_default_clip_is_the_trainers():
    for like, clip in ((None, 0.2), ("trl", 0.2), ("verl", 0.5), ("openrlhf", 0.5), ("nemo-rl", None)):
        got = run({"like": like}, torch.float64)
        wanted = run({"clip": clip}, torch.float64)
        assert got[0] == wanted[0], like


def test_the_clipped_part_is_reported():
    values = torch.tensor([[1.0, 1.0, 0.1, -1.0]])
    old, returns = torch.zeros(1, 4), torch.tensor([[2.0, 0.0, 1.0, 0.0]])
    out = rlfast.value_loss(values, old, returns, clip=0.2)
    assert out.metrics["clip_high"].item() == 0.25 and "approx_kl_k1" not in out.metrics.as_dict()


def test_two_hot_weighs_so_that_the_mean_is_the_return():
    support = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    returns = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.5, 3.0, 9.0])
    low, weight = two_hot(returns, support)
    mean = (1.0 - weight) * support[low] + weight * support[low + 1]
    assert torch.equal(mean, returns.clamp(-2.0, 3.0)) and int(low.max()) == 2


def test_packed_values_and_bins():
    values, returns = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 1.0, 0.0])
    cu = torch.tensor([0, 1, 3])
    out = rlfast.value_loss(values, None, returns, clip=None, reduce="seq_mean_token_mean", cu_seqlens=cu)
    assert out.loss.item() == pytest.approx((0.125 + 1.0) / 2)
    logits = torch.zeros(3, 4, requires_grad=True)
    loss = rlfast.value_loss(logits, None, returns, kind="categorical", support=(0.0, 3.0), cu_seqlens=cu).loss
    loss.backward()
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())
    assert_zero("Σ of each row", logits.grad.double().sum(-1).round(decimals=7))


BIN = {"kind": "categorical"}
LOGITS, V = torch.zeros(2, 3, 3), torch.zeros(2, 3)
BAD = [
    ({"clip": "a"}, (V, V, V), "clip: expected a float > 0, got 'a'"),
    ({}, (V, V, V, [1]), "mask: expected a torch.Tensor, got list"),
    ({}, (V, V, V, torch.ones(2, 4)), r"mask: expected shape \(2, 3\) like values, got \(2, 4\)"),
    ({"kind": "huber", "delta": -1.0}, (V, V, V), "delta: expected a finite float > 0, got -1.0"),
    (BIN | {"support": torch.tensor([1.0, 0.0, 2.0])}, (LOGITS, None, V), "support: expected centres that ascend, got"),
    (BIN | {"support": torch.tensor([0.0, 0.0, 2.0])}, (LOGITS, None, V), "support: expected centres that ascend, got"),
    (
        BIN | {"support": torch.zeros(2)},
        (LOGITS, None, V),
        r"support: expected shape \(3,\), one centre a bin, got \(2,",
    ),
    (
        BIN | {"support": 5},
        (LOGITS, None, V),
        r"support: expected \(low, high\) with low < high, or a tensor .*, got 5",
    ),
    (BIN | {"support": ("a", "b")}, (LOGITS, None, V), "support: expected a finite float, got 'a'"),
    (BIN | {"support": (1.0, 0.0)}, (LOGITS, None, V), r"support: expected \(low, high\) with low < high, or a tensor"),
    (
        BIN | {"support": (0, 1)},
        (LOGITS, None, V, torch.ones(2, 4)),
        r"mask: expected shape \(2, 3\) like returns, got",
    ),
    (BIN | {"support": (0, 1)}, (LOGITS, None, V, [1]), "mask: expected a torch.Tensor, got list"),
]


@pytest.mark.parametrize("options, given, said", BAD, ids=[said for *_, said in BAD])
def test_bad_input_is_named(options, given, said):
    with pytest.raises((ValueError, TypeError), match=said):
        rlfast.value_loss(*given, **options)


def test_errors_name_the_argument():
    x = torch.zeros(2, 3)
    for options, given, said in (
        ({}, (x, None, x), "old_values: expected a tensor: values are clipped to it, got None"),
        ({}, (x, x, x[:1]), r"returns: expected shape \(2, 3\) like values, got \(1, 3\)"),
        ({}, (x, x[:1], x), r"old_values: expected shape \(2, 3\) like values, got \(1, 3\)"),
        ({"clip": -1.0}, (x, x, x), "clip: expected a finite float > 0"),
        ({"kind": "l1"}, (x, x, x), "kind: expected one of 'mse', 'huber', 'categorical', got 'l1'"),
        ({"reduce": "mean"}, (x, x, x), "reduce: expected one of"),
        ({"like": "liger"}, (x, x, x), "like: expected one of None, 'trl', 'verl', 'openrlhf', 'nemo-rl'"),
        ({"kind": "categorical", "support": (0, 1)}, (x, x, x), r"values: expected logits of shape \(2, 3, 'bins'\)"),
        ({"kind": "categorical"}, (x[..., None].expand(2, 3, 4), None, x), "support: expected"),
        ({"kind": "categorical", "clip": 0.2}, (x, x, x), 'clip: expected None for kind="categorical"'),
    ):
        with pytest.raises(ValueError, match=said):
            rlfast.value_loss(*given, **options)


@pytest.mark.parametrize("lam", (0.05, 1.0, 30.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_the_regularised_value(lam, dtype):
    """Value, policy and gradient, against the formula in float64; an action that is not there has no part."""
    draw = torch.Generator().manual_seed(5)
    q, prior = (torch.randn(3, 4, 6, generator=draw).mul(scale).to(dtype) for scale in (2.0, 3.0))
    prior[0, 1, 2:4] = -torch.inf
    there, runs = prior != -torch.inf, []
    for to in (torch.float64, torch.float32):
        leaf = q.detach().clone().to(to).requires_grad_()
        weights = torch.where(there, prior.to(to).exp(), 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
        top = leaf.detach().amax(-1, keepdim=True)
        value = lam * (weights * ((leaf - top) / lam).exp()).sum(-1).log() + top[..., 0]
        value.sum().backward()
        runs.append((value.detach(), (weights.log() + (leaf.detach() - value.detach()[..., None]) / lam), leaf.grad))
    leaf = q.detach().clone().requires_grad_()
    got = rlfast.regularized_value(leaf, prior, lam=lam)
    assert got.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_value("value", got.value.detach(), runs[0][0], runs[1][0], size=q.double().abs().amax(-1) + lam)
    assert bool((got.logp == -torch.inf).eq(~there).all())
    size = (q.double().abs() / lam + prior.double().abs() + 1.0)[there]
    assert_value("policy", got.logp.detach()[there], runs[0][1][there], runs[1][1][there], size=size)
    got.value.sum().backward()
    assert_gradient("gradient", leaf.grad, runs[0][2], runs[1][2])


def test_the_regularised_value_is_the_best_of_all_policies():
    """max_π E_π[Q] − λ·KL(π‖π_0), of 2000 others too; near max Q for a small λ, the prior's mean for a large one."""
    draw = torch.Generator().manual_seed(0)
    q, prior = torch.randn(5, generator=draw).double(), torch.randn(5, generator=draw).double()
    found, logs = rlfast.regularized_value(q, prior, lam=0.4), prior.log_softmax(-1)

    def worth(logp):
        return (logp.exp() * (q - 0.4 * (logp - logs))).sum(-1)

    torch.testing.assert_close(worth(found.logp), found.value)
    assert (worth(torch.randn(2000, 5, generator=draw).double().log_softmax(-1)) < found.value).all()
    torch.testing.assert_close(rlfast.regularized_value(q, prior, lam=1e-3).value, q.max(), atol=5e-3, rtol=0)
    mean = (logs.exp() * q).sum()
    torch.testing.assert_close(rlfast.regularized_value(q, prior, lam=1e6).value, mean, atol=1e-5, rtol=0)


def test_the_regularised_value_refuses():
    q = torch.zeros(2, 3)
    for given, lam, said in (
        ((q, q[:1]), 1.0, r"prior_logp: expected shape \(2, 3\) like q, got \(1, 3\)"),
        ((q[:, :0], q[:, :0]), 1.0, r"q: expected shape \[\*, A\], with one action at least, got \(2, 0\)"),
        ((q, q), 0.0, "lam: expected a finite float > 0, got 0.0"),
        (([0.0], q), 1.0, "q: expected a torch.Tensor, got list"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            rlfast.regularized_value(*given, lam=lam)
