"""``Loss.linear`` on every backend of the head: every loss, its chunks and its other way, its forms, its memory."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import rlfast
from rlfast.loss_table import LOSSES
from rlfast.ops import linear_loss
from rlfast.ops.linear_token_logps import op, op_accumulate
from tests.cases import KERNELS, as_head, few, interpreted
from tests.linear_policy_cases import (
    BONUS,
    BUDGETS,
    DEPTH,
    FORMS,
    OF_VOCABULARY,
    QUICK,
    VOCAB,
    Case,
    case_of,
    check,
    drawn,
    oracle,
    run,
)
from tests.numerics import assert_gradient, assert_same_bits, assert_zero, by_name

OP = "linear_token_logps"
# One of each kind: of tokens, of means over sequences, of sums over them, of their ratio, of a fixed length.
KINDS = ("ppo", "grpo", "vespo", "gspo", "dr_grpo", "reinforce")
pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS if not interpreted() else ("ppo", "gspo"))
def test_every_way(backend, device, name, form, budget):
    check(case_of(name, form=form, budget=budget), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(backend, device, name, form):
    check(case_of(name, form=form), backend, device)


@pytest.mark.backends("torch", "cpu", "cuda")
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_over_a_frozen_head(backend, device, name):
    """Padded and packed, in chunks and in one."""
    check(case_of(name, form="padded", needs=("hidden",)), backend, device)
    check(case_of(name, form="packed", budget="keep", needs=("hidden",)), backend, device)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_narrow_heads(backend, device, dtype, budget):
    """The sums over chunks are float32, whatever the weight's dtype, and rounded once: after the upstream gradient."""
    check(case_of(dtype=dtype, budget=budget, options=BONUS, upstream=-1.5), backend, device)


@pytest.mark.backends("torch", "cpu")
def test_a_factor_that_would_round_twice(backend, device):
    """bfloat16 gradients of one chunk are made again, as often as they are asked for; not if weights have moved."""
    data = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in drawn(dtype="bf16").items()}
    hidden, weight = (data[k].clone().requires_grad_() for k in ("hidden", "weight"))
    given = {k: data[k] for k in ("adv", "old_logp", "mask")}
    with rlfast.use_backend(backend):
        loss = rlfast.loss("ppo").linear(hidden, weight, data["targets"], **given).loss
        once, again, twice = (
            torch.autograd.grad(loss * g, (hidden, weight), retain_graph=True) for g in (1 / 3, 1 / 3, 2 / 3)
        )
        for one, other, double in zip(once, again, twice, strict=True):
            assert_same_bits("again", other, one)
            assert_same_bits("twice", double, 2 * one)
        with torch.no_grad():
            weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="has been changed in place since the loss was computed"):
            torch.autograd.grad(loss / 3, weight)


@pytest.mark.backends("torch", "cpu", "cuda")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ("grpo", "dr_grpo", "sapo", "reinforce"))
def test_chunks_end_within_sequences(backend, device, name, form):
    """A loss that reads no more of a sequence than its length; with its own bonus, and one of the mean over tokens."""
    for mean in (False, True):
        options = BONUS | {"entropy_mean": mean}
        if name == "reinforce":
            options |= {"reduce": "seq_mean_token_sum", "kl": "k3", "beta": 0.1}
        case = case_of(name, form=form, budget="part of one", options=options)
        check(replace(case, data=drawn(16, 32)), backend, device)


@pytest.mark.parametrize("name, way", (("grpo", "chunks"), ("dapo", "chunks"), ("gspo", "again")))
def test_within_sequences_there_are_three_products(name, way):
    """Of one sequence whose logits are over any budget; a ratio of the whole sequence cannot be had in parts."""
    tokens, width = 8192, 131072
    hidden, weight = torch.zeros(1, 1, 1).expand(1, tokens, 4), torch.zeros(1, 4).expand(width, 4).requires_grad_()
    given = {"adv": torch.zeros(1), "old_logp": torch.zeros(1, tokens)}
    loss = rlfast.loss(name, **({"kl": None} if name == "grpo" else {}))
    plan = rlfast.plan(loss, hidden, weight, torch.zeros(1, tokens, dtype=torch.int64), **given)
    assert plan.way == way and plan.logits_bytes <= 2 << 30
    shorter = rlfast.plan(
        rlfast.loss("gspo"), hidden[:, :2048], weight, torch.zeros(1, 2048, dtype=torch.int64), adv=torch.zeros(1),
        old_logp=torch.zeros(1, 2048),
    )  # fmt: skip
    assert shorter.way == "chunks" and shorter.logits_bytes == 2048 * width * 4


@pytest.mark.backends("torch", "reference")
@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_float64(backend, device, budget):
    case = case_of(budget=budget)
    data = {k: x.double() if x.is_floating_point() else x for k, x in case.data.items()}
    check(replace(case, data=data), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("mean", (False, True), ids=("by tokens", "a mean"))
@pytest.mark.parametrize("name", ("ppo", "grpo", "gspo"))
def test_an_entropy_bonus(backend, device, name, mean, budget):
    """Its weight is the loss's own, or that of a mean over all kept tokens, of which a chunk has some."""
    check(case_of(name, budget=budget, options=BONUS | {"entropy_mean": mean}), backend, device)


CORRECTIONS = {
    "tis": rlfast.corrections.tis(1.1),
    "sequence_tis": rlfast.corrections.sequence_tis(1.1),
    "geometric_mask": rlfast.corrections.geometric_mask(0.93, 1.06),
    "masked_tokens": rlfast.Correction(gate="token", gate_low=-0.1, gate_high=0.1, masks=True),
    "masked_sequences": rlfast.Correction(gate="seq_sum", gate_kind="k3", gate_high=0.02, masks=True),
}


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("old", (True, False), ids=("old", "on policy"))
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_correction(backend, device, correction, old):
    """A gate that masks tokens changes what the loss divides by, which a chunk has to know."""
    case = case_of("grpo", options={"correction": CORRECTIONS[correction]} | BONUS)
    data = case.data if old else {k: x for k, x in case.data.items() if k != "old_logp"}
    check(replace(case, data=data), backend, device)


@pytest.mark.parametrize("needs", (("hidden",), ("weight",), ("bias",), ("hidden", "weight")), ids="+".join)
def test_only_what_is_needed(backend, device, needs):
    check(case_of(needs=needs), backend, device)


@pytest.mark.parametrize("name", ("ppo", "gspo"))
def test_options_of_the_head(backend, device, name):
    rest = {"temperature": 0.75, "softcap": 8.0, "logit_scale": 0.5}
    check(case_of(name, rest=rest, upstream=-1.5), backend, device)


def test_a_temperature_a_token(backend, device):
    warm = torch.rand(drawn()["targets"].shape, generator=torch.Generator().manual_seed(2)) + 0.5
    check(case_of("ppo", rest={"temperature": warm}), backend, device)


@pytest.mark.parametrize("name", ("ppo", "grpo"))
def test_numbers_of_the_trainer(backend, device, name):
    check(case_of(name, rest={"num_items": 7.0, "world_size": 4, "accumulation": 2}), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("options", ({}, {"kl": "full", "beta": 0.25} | BONUS), ids=("plain", "full"))
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("lora", (0.0, 0.75))
def test_masked_rows_in_no_product(backend, device, lora, budget, options, monkeypatch):
    """With ``sync`` on every backend; the kernels of the CPU leave them out anyway."""
    rows = []
    for name in ("linear_token_logps", "linear_divergence"):
        module = getattr(linear_loss, name)
        fake = SimpleNamespace(**vars(module))
        fake.op = lambda hidden, *rest, op=module.op: rows.append(len(hidden)) or op(hidden, *rest)
        monkeypatch.setattr(linear_loss, name, fake)
    needs = ("hidden", "bias", "lora_a", "lora_b") if lora else ("hidden", "weight", "bias")
    case = case_of("grpo", options=options, budget=budget, rest={"sync": True}, lora=lora, needs=needs)
    if lora and options:
        run(case, backend, device)
    else:
        check(case, backend, device)
    if backend != "cpu":
        live = int(case.data["live"].sum())
        assert sum(rows) in (live, 2 * live)  # a low-rank head makes logits that do not fit twice


def test_no_bias(backend, device):
    case = case_of(needs=("hidden", "weight"))
    check(replace(case, data=case.data | {"bias": None}), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("name", ("ppo", "gspo"))
@pytest.mark.parametrize("budget", BUDGETS)
def test_logits_of_minus_infinity(backend, device, name, budget):
    """A whole leading block of them."""
    case = case_of(name, budget=budget)
    bias = case.data["bias"].clone()
    bias[:1100] = -torch.inf
    data = case.data | {"bias": bias, "targets": case.data["targets"].clamp(min=1100)}
    data["live"] = data["mask"]
    data["hidden"] = data["hidden"].nan_to_num()
    fields = ("old_logp", "ref_logp", "rollout_logp")
    data |= {k: case.data[k].nan_to_num(nan=-4.0) for k in fields}
    check(replace(case, data=data, needs=("hidden", "weight")), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", FORMS)
def test_chunks_without_a_token(backend, device, form, budget):
    case = case_of("gspo", form=form, budget=budget)
    data = case.data | {"mask": case.data["mask"].clone()}
    data["mask"][1:4] = False
    data["live"] = data["mask"] & (data["targets"] != -100)
    check(replace(case, data=data), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (3, 4)), ids=str)
def test_nothing_that_counts(backend, device, shape, budget):
    """No sequence, no token, or only masked ones: a loss of 0, and no gradient."""
    rows, length = shape
    data = drawn(few(6, 4), few(9, 4))
    data = {k: x if k in OF_VOCABULARY else x[:rows] for k, x in data.items()}
    data = {k: x if k in (*OF_VOCABULARY, "adv") else x[:, :length] for k, x in data.items()}
    data["mask"] = torch.zeros_like(data["mask"])
    out, gradients = run(Case(rlfast.loss("grpo"), data, budget=budget), backend, device)
    assert out.loss == 0.0
    for name, g in gradients.items():
        assert_zero(name, g)


@pytest.mark.backends(*KERNELS)  # torch's own products have other bits for other numbers of rows
@pytest.mark.parametrize("name", KINDS if not interpreted() else ("gspo",))
def test_the_chunks_do_not_change_the_loss(backend, device, name):
    """The log-probs of a row are the same bits in any chunk, and the loss is of all of them."""
    outs = [run(case_of(name, budget=budget), backend, device)[0] for budget in BUDGETS]
    for out in outs[1:]:
        for field_ in ("logp", "entropy", "loss"):
            assert_same_bits(field_, getattr(out, field_).detach(), getattr(outs[0], field_).detach())
        assert_same_bits("metrics", out.metrics["approx_kl_k3"], outs[0].metrics["approx_kl_k3"])


@pytest.mark.parametrize("name", ("ppo", "grpo"))
def test_micro_batches_make_one_batch(backend, device, name):
    """The sum of their gradients, each with the whole batch's count, is the batch's own."""
    case = case_of(name)
    data = {k: x.to(device) for k, x in case.data.items()}
    counts = {"ppo": data["live"].sum(), "grpo": data["live"].any(1).sum()}
    half = data["targets"].shape[0] // 2
    parts = []
    for at in (slice(None, half), slice(half, None)):
        part = {k: x if k in OF_VOCABULARY else x[at] for k, x in data.items()}
        parts.append(run(replace(case, data=part, rest={"num_items": counts[name]}), backend, device)[1])
    _, wanted = oracle(case, torch.float64)
    _, own = by_name(lambda seed: oracle(case, torch.float32, seed))
    for k in ("weight", "bias"):
        assert_gradient(k, (parts[0][k] + parts[1][k]).cpu(), wanted[k], own[k])
    assert_gradient("hidden", torch.cat([p["hidden"] for p in parts]).cpu(), wanted["hidden"], own["hidden"])


def test_a_gradient_scaler(backend, device):
    """float16 gradients that are too small for float16 before the scaler's factor."""
    case = replace(case_of("ppo", dtype="f16"), rest={"num_items": 1e7}, upstream=float(1 << 20))
    check(case, backend, device)
    _, gradients = run(case, backend, device)
    assert all((g != 0).any() for g in gradients.values())


def test_autocast(backend, device):
    """A float32 head is cast as ``torch.nn.functional.linear`` casts it, and has float32 gradients."""
    case = case_of()
    wide = {k: case.data[k].to(torch.bfloat16).float() for k in ("hidden", "weight", "bias")}
    narrow = {k: x.to(torch.bfloat16) for k, x in wide.items()}
    with torch.autocast(device, torch.bfloat16):
        out, gradients = run(replace(case, data=case.data | wide), backend, device)
    expected, other = run(replace(case, data=case.data | narrow), backend, device)
    assert_same_bits("loss", out.loss.detach(), expected.loss.detach())
    for name, g in gradients.items():
        assert_same_bits(name, g, other[name].float())


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing_around_it(backend, device, reentrant):
    case = case_of()
    _, expected = run(case, backend, device)
    data = {k: x.to(device) for k, x in case.data.items()}
    rest = {k: data[k] for k in case.fields()}
    hidden, weight = (data[k].clone().requires_grad_() for k in ("hidden", "weight"))

    def loss(hidden, weight):
        return case.loss.linear(
            hidden, weight, data["targets"], data["bias"], memory_budget=9 * 4 * VOCAB * hidden.shape[1], **rest
        ).loss

    with rlfast.use_backend(backend):
        out = checkpoint(loss, hidden, weight, use_reentrant=reentrant)
        out.backward()
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        assert_same_bits(name, leaf.grad, expected[name])


def test_a_second_backward_is_right(backend, device):
    case = case_of()
    with rlfast.use_backend(backend):
        data = {k: x.to(device) for k, x in case.data.items()}
        hidden = data["hidden"].clone().requires_grad_()
        out = case.loss.linear(
            hidden, data["weight"], data["targets"], **{k: data[k] for k in case.fields()},
            memory_budget=4 * VOCAB * hidden.shape[1],
        )  # fmt: skip
        once = [torch.autograd.grad(out.loss, hidden, retain_graph=True)[0].clone() for _ in range(2)]
    assert_same_bits("gradient", *once)


@pytest.mark.backends("torch", "cpu")
def test_no_gradient_of_gradients(backend, device):
    case = case_of()
    hidden = case.data["hidden"].clone().requires_grad_()
    out = case.loss.linear(hidden, case.data["weight"], case.data["targets"],
                           **{k: case.data[k] for k in case.fields()})  # fmt: skip
    (g,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


@pytest.mark.backends(*KERNELS)
def test_without_gradients(backend, device):
    out, _ = run(case_of(needs=()), backend, device)
    with_gradients, _ = run(case_of(), backend, device)
    assert not out.loss.requires_grad
    assert_same_bits("loss", out.loss, with_gradients.loss.detach())


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_opcheck(backend, device):
    """The backward of a chunk, of log-probs and entropies."""
    data = drawn(2, 3)
    hidden, targets = data["hidden"].nan_to_num().flatten(0, 1), data["targets"].flatten()
    head = (hidden, data["weight"], data["bias"], targets, None, None, 1.0, 0.0, 1.0)
    logp, aux, entropy, kept = op(*head, 1, 0, True, backend)
    sums = torch.ones(VOCAB, DEPTH), torch.ones(VOCAB)
    args = (*head, aux.clone(), kept.clone(), torch.ones_like(logp), torch.ones_like(entropy), *sums, True, backend)
    torch.library.opcheck(op_accumulate, args)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("name", ("ppo", "grpo", "gspo"))
def test_compiled_whole(backend, device, name):
    case = case_of(name)
    data = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in case.data.items()}
    rest = {k: data[k] for k in case.fields()}

    def loss(hidden, weight):
        return case.loss.linear(
            hidden, weight, data["targets"], data["bias"], memory_budget=8 * VOCAB * hidden.shape[1], **rest
        ).loss

    _, wanted = oracle(case, torch.float64)
    _, own = by_name(lambda seed: oracle(case, torch.float32, seed))
    losses = []
    with rlfast.use_backend(backend):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = {k: data[k].clone().requires_grad_() for k in ("hidden", "weight")}
            losses.append(function(*leaves.values()))
            grads = torch.autograd.grad(losses[-1], list(leaves.values()))
            for k, g in zip(leaves, grads, strict=True):
                assert_gradient(k, g, wanted[k], own[k])
    assert_same_bits("loss", losses[1].detach(), losses[0].detach())


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("budget", ("chunks", "keep"))
@pytest.mark.parametrize("name", ("ppo", "grpo"))
def test_compiled_for_more_than_one_shape(backend, device, name, budget):
    """The second shape makes sizes symbolic."""
    loss = rlfast.loss(name, **({"kl": None} if name == "grpo" else {}))
    weight = torch.randn(301, DEPTH, requires_grad=True)
    room = {"chunks": 4 * 301 * 12, "keep": 1 << 30}[budget]

    def run(hidden, targets, adv, old):
        return loss.linear(hidden, weight, targets, adv=adv, old_logp=old, memory_budget=room).loss

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with rlfast.use_backend(backend):
        for rows, length in ((4, 6), (5, 7), (6, 8)):
            targets = torch.randint(301, (rows, length))
            given = torch.randn(rows, length, DEPTH), targets, torch.randn(rows), torch.full((rows, length), -6.0)
            (g,), (expected,) = (torch.autograd.grad(f(*given), weight) for f in (compiled, run))
            assert (g - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.backends("torch", "cpu")
def test_many_backwards_are_right_or_say_why_not(backend, device):
    case = case_of()
    hidden = case.data["hidden"].clone().requires_grad_()
    with rlfast.use_backend(backend):
        out = case.loss.linear(
            hidden, case.data["weight"], case.data["targets"], **{k: case.data[k] for k in case.fields()}
        )
    (once,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    kept = once.clone()
    (twice,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    assert_same_bits("gradient", twice, kept)
    once.zero_()
    with pytest.raises(RuntimeError, match="another backward of this loss: the gradients that one has handed out"):
        torch.autograd.grad(out.loss, hidden)


@pytest.mark.backends("torch", *KERNELS)
def test_a_certain_token(backend, device):
    """Log-probs near 0: what is left of 1 − p reaches the gradient."""
    logits = torch.zeros(4, 1500)
    logits[torch.arange(4), 7] = 40.0
    head = {k: x.to(device) for k, x in as_head(logits).items()}
    weight = head["weight"].requires_grad_()
    with rlfast.use_backend(backend):
        out = rlfast.loss("reinforce").linear(
            head["hidden"], weight, torch.full((4,), 7, device=device), adv=torch.ones(4, device=device)
        )
        out.loss.backward()
    rest = 1499 * math.exp(-40.0)
    expected = torch.full((4,), -0.25 * rest, dtype=torch.float64)
    assert_gradient("gradient", weight.grad[7].cpu(), expected, expected.float())


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_packed_sequences_compile(backend, device):
    """Their ends cannot be looked at in a trace: one chunk of all, which needs none of them, or logits made again."""
    case = case_of("gspo", form="packed")
    rows, length = case.data["targets"].shape
    data = {k: case.data[k].flatten(0, 1) for k in ("hidden", "targets", *case.fields()) if k != "adv"}
    data |= {"adv": case.data["adv"], "cu_seqlens": torch.arange(rows + 1) * length}
    hidden, weight = data.pop("hidden"), case.data["weight"].clone().requires_grad_()

    def loss(budget):
        return case.loss.linear(hidden, weight, bias=case.data["bias"], memory_budget=budget, **data).loss

    with rlfast.use_backend(backend):
        for budget in (0, 1 << 30):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(budget)
            assert_same_bits("loss", compiled.detach(), loss(budget).detach())
            assert torch.autograd.grad(compiled, weight)[0].any()


GOOD = {
    "hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(2, 3, dtype=torch.int64),
    "adv": torch.zeros(2), "old_logp": torch.zeros(2, 3), "ref_logp": torch.zeros(2, 3),
}  # fmt: skip
BAD = {
    "hidden": ({"hidden": torch.zeros(4)}, ValueError, "hidden: expected shape [B, T, D], or"),
    "width": ({"weight": torch.zeros(7, 5)}, ValueError, "weight: expected shape (V, 4) to match hidden"),
    "targets": ({"targets": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "targets: expected shape (2, 3)"),
    "candidates": (
        {"targets": torch.zeros(2, 3, 2, dtype=torch.int64)}, ValueError,
        "targets: expected shape (2, 3) like the rows of hidden, got (2, 3, 2)",
    ),
    "vocabulary": ({"targets": torch.full((2, 3), 7)}, ValueError, "targets: expected values in [0, 7) or -100"),
    "old": (
        {"old_logp": torch.zeros(2, 4)}, ValueError, "old_logp: expected shape (2, 3) like targets, got (2, 4)",
    ),
    "adv": ({"adv": torch.zeros(3)}, ValueError, "adv: expected shape (2, 3) like targets, or (2,), one a sequence"),
    "no adv": ({"adv": None}, ValueError, "adv: expected a tensor: grpo needs it"),
    "no reference": ({"ref_logp": None}, ValueError, "ref_logp: expected a tensor: grpo needs it"),
    "mask": ({"mask": torch.ones(2, 4)}, ValueError, "mask: expected shape (2, 3) like targets"),
    "budget": ({"memory_budget": -1}, ValueError, "memory_budget: expected a float ≥ 0, got -1"),
    "entropy": ({"entropy": torch.zeros(2, 3)}, TypeError, "entropy: expected True or False"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a finite float > 0"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected a finite float > 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    given = {k: x.clone().requires_grad_() if k == "weight" else x for k, x in GOOD.items()} | change
    with pytest.raises(error) as caught:
        rlfast.loss("grpo").linear(**given)
    assert message in str(caught.value)


def test_packed_tokens_of_a_loss_of_sequences_need_their_ends():
    given = {k: x.flatten(0, 1) if x.dim() > 1 and k != "weight" else x for k, x in GOOD.items()}
    with pytest.raises(ValueError, match="cu_seqlens: expected the boundaries of packed sequences: grpo"):
        rlfast.loss("grpo").linear(**given | {"adv": torch.zeros(6)})
