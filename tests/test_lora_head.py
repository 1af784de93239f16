"""A head with a low-rank part under a policy loss: its factors' gradients, and none of the weight's size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast.ops import lora
from tests.cases import few, interpreted
from tests.linear_policy_cases import (
    BONUS,
    BUDGETS,
    DEPTH,
    FORMS,
    QUICK,
    RANK,
    VOCAB,
    case_of,
    check,
    drawn,
    oracle,
    run,
)
from tests.numerics import assert_gradient, assert_same_bits, by_name

OP = "linear_token_logps"
pytestmark = pytest.mark.usefixtures("small_chunks")
LEARNED = ("hidden", "bias", "lora_a", "lora_b")


def lora_case(name: str = "grpo", **rest):
    """A row of the table over a head with a low-rank part."""
    return case_of(name, lora=0.75, rows=few(64, 8), **{"needs": LEARNED} | rest)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", FORMS if not interpreted() else FORMS[1:])
@pytest.mark.parametrize("name", ("ppo", "grpo", "vespo") if not interpreted() else ("grpo",))
def test_every_way(backend, device, name, form, budget):
    check(lora_case(name, form=form, budget=budget), backend, device)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_narrow_heads(backend, device, dtype, budget):
    """What the factors have in float32 is not rounded to the weight's dtype on the way."""
    check(lora_case(dtype=dtype, budget=budget, options=BONUS), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "needs", (("hidden",), ("bias",), ("lora_a",), ("lora_b",), ("lora_a", "lora_b")), ids="+".join
)
def test_only_what_is_needed(backend, device, needs, budget):
    check(lora_case(needs=needs, budget=budget), backend, device)


@pytest.mark.backends(*QUICK)
def test_options_of_the_head(backend, device):
    rest = {"temperature": 0.75, "softcap": 8.0, "logit_scale": 0.5}
    check(lora_case(rest=rest, upstream=-1.5), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("budget", BUDGETS)
def test_beside_an_exact_kl(backend, device, budget):
    """Against the head with the factors in its weight, which has the same logits."""
    case = lora_case(options={"kl": "full", "beta": 0.25}, budget=budget)
    out, gradients = run(case, backend, device)
    truth, wanted = oracle(case, torch.float64)
    _, own = by_name(lambda seed: oracle(case, torch.float32, seed))
    assert abs(out.loss.item() - truth["loss"].item()) < 1e-5
    for name, g in gradients.items():
        assert_gradient(name, g.cpu().view(wanted[name].shape), wanted[name], own[name])


@pytest.mark.backends(*QUICK)
def test_without_a_bias(backend, device):
    case = lora_case(needs=("hidden", "lora_a", "lora_b"))
    check(replace(case, data=case.data | {"bias": None}), backend, device)


@pytest.mark.backends("torch", "cpu")
def test_a_gate_that_masks(backend, device):
    """What the loss divides by is known when all log-probs are: two passes."""
    gate = rlfast.Correction(gate="token", gate_low=-0.1, gate_high=0.1, masks=True)
    case = lora_case(options={"correction": gate})
    check(replace(case, data={k: x for k, x in case.data.items() if k != "old_logp"}), backend, device)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_pieces_are_the_whole(dtype):
    data = drawn(6, 5)
    hidden, a, b = (data[k].nan_to_num().to(dtype) for k in ("hidden", "lora_a", "lora_b"))
    hidden = hidden.flatten(0, 1)
    wide, _ = lora.widened(hidden, data["weight"].to(dtype), None, lora.Lora(a, b, 0.75))
    whole = 0.75 * (hidden.float() @ a.float().T)
    pieces = wide[:, DEPTH:].float().unflatten(1, (3, RANK)).sum(1)
    # three float16 numbers reach down to the smallest of them
    smallest = 0.0 if dtype == torch.bfloat16 else 2.0**-25
    assert ((pieces - whole).abs() <= whole.abs() * 2.0**-22 + smallest).all()


@pytest.mark.backends("torch", "cpu")
def test_no_gradient_as_large_as_the_weight(backend, device, monkeypatch):
    """Nothing of V × D in float32 is made."""
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **k: made.append(size) or zeros(*size, **k))
    run(lora_case(), backend, device)
    assert (torch.Size((VOCAB, DEPTH)),) not in made and (torch.Size((VOCAB, RANK)),) in made


@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_plan(backend, device, budget):
    case = lora_case(budget=budget)
    data, size = case.data, 4 * VOCAB
    leaves = {k: data[k].clone().requires_grad_() for k in LEARNED}
    rows = int(data["live"].sum()) if backend == "cpu" else data["live"].numel()
    room = {"recompute": 0, "a sequence": 7, "some sequences": 63, "keep": 1 << 22}[budget] * size
    with rlfast.use_backend(backend):
        plan = rlfast.plan(
            case.loss, leaves["hidden"], data["weight"], data["targets"], leaves["bias"], memory_budget=room,
            lora=(leaves["lora_a"], leaves["lora_b"], 0.75), **{k: data[k] for k in case.fields()},
        )  # fmt: skip
    again = budget == "recompute"
    assert plan.way == ("twice" if again else "chunks") and plan.products == 2 + again
    assert plan.flop == 2 * rows * VOCAB * ((2 + again) * (DEPTH + RANK) + RANK)
    assert "TFLOP" in str(plan)


@pytest.mark.backends("torch", "cpu")
def test_a_second_backward_is_right(backend, device):
    case = lora_case()
    a = case.data["lora_a"].clone().requires_grad_()
    with rlfast.use_backend(backend):
        out = case.loss.linear(
            case.data["hidden"], case.data["weight"], case.data["targets"],
            lora=(a, case.data["lora_b"], 0.75), **{k: case.data[k] for k in case.fields()},
        )  # fmt: skip
    once = [torch.autograd.grad(out.loss, a, retain_graph=True)[0].clone() for _ in range(2)]
    assert_same_bits("gradient", *once)


def test_autocast():
    """Factors are cast as ``torch.nn.functional.linear`` casts a weight."""
    case = lora_case()
    names = ("hidden", "weight", "bias", "lora_a", "lora_b")
    wide = {k: case.data[k].to(torch.bfloat16).float() for k in names}
    with torch.autocast("cpu", torch.bfloat16):
        out, gradients = run(replace(case, data=case.data | wide), "cpu")
    narrow = {k: x.to(torch.bfloat16) for k, x in wide.items()}
    expected, other = run(replace(case, data=case.data | narrow), "cpu")
    assert_same_bits("loss", out.loss.detach(), expected.loss.detach())
    for name, g in gradients.items():
        assert_same_bits(name, g, other[name].float())


BAD = {
    "one": (torch.zeros(2, 4), TypeError, "lora: expected (a, b, scale), got Tensor"),
    "two": ((torch.zeros(2, 4), torch.zeros(7, 2)), TypeError, "lora: expected (a, b, scale), got tuple"),
    "width": ((torch.zeros(2, 5), torch.zeros(7, 2), 1.0), ValueError, "lora[0]: expected shape (r, 4) to match"),
    "vector": ((torch.zeros(4), torch.zeros(7, 2), 1.0), ValueError, "lora[0]: expected shape (r, 4), got (4,)"),
    "rank": (
        (torch.zeros(2, 4), torch.zeros(7, 3), 1.0), ValueError, "lora[1]: expected shape (V, 2) to match lora[0]",
    ),
    "rows": (
        (torch.zeros(2, 4), torch.zeros(8, 2), 1.0), ValueError, "lora[1]: expected shape (7, 2) like the rows",
    ),
    "dtype": (
        (torch.zeros(2, 4).double(), torch.zeros(7, 2), 1.0), TypeError, "lora[0]: expected dtype torch.float32 like",
    ),
    "scale": ((torch.zeros(2, 4), torch.zeros(7, 2), "1"), TypeError, "lora[2]: expected"),
    "nan": ((torch.zeros(2, 4), torch.zeros(7, 2), float("nan")), ValueError, "lora[2]: expected"),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_wrong_input_is_named(said):
    given, kind, words = BAD[said]
    head = torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(kind) as error:
        rlfast.loss("reinforce").linear(*head, adv=torch.zeros(2), lora=given)
    assert words in str(error.value)


def test_a_weight_that_learns_beside_it_is_refused():
    head = torch.zeros(2, 3, 4), torch.zeros(7, 4, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight: expected a tensor that needs no gradient, beside lora"):
        rlfast.loss("reinforce").linear(*head, adv=torch.zeros(2), lora=(torch.zeros(2, 4), torch.zeros(7, 2), 1.0))


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_compiled_whole(backend, device):
    """Without a graph break."""
    data = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in drawn().items()}
    loss = rlfast.loss("ppo")

    def run(hidden, a, b):
        given = {k: data[k] for k in ("adv", "old_logp", "mask")}
        return loss.linear(hidden, data["weight"], data["targets"], lora=(a, b, 0.5), **given).loss

    leaves = [data[k].clone().requires_grad_() for k in ("hidden", "lora_a", "lora_b")]
    with rlfast.use_backend(backend):
        found = [f(*leaves) for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))]
        gradients = [torch.autograd.grad(x, leaves) for x in found]
    assert_same_bits("loss", found[1].detach(), found[0].detach())
    for name, one, other in zip(("hidden", "a", "b"), *gradients, strict=True):
        assert_same_bits(name, other, one)
