"""The exact KL to a reference in a policy loss: given as a number a token, and made from two heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast.ops import linear_divergence as pair_op
from tests import loss_cases
from tests.cases import KERNELS, f32, interpreted
from tests.linear_policy_cases import (
    BONUS,
    BUDGETS,
    FORMS,
    QUICK,
    case_of,
    check,
    oracle,
    run,
)
from tests.numerics import assert_gradient, assert_same_bits, assert_zero, by_name

OP = "linear_divergence"
pytestmark = pytest.mark.usefixtures("small_chunks")
FULL = {"kl": "full", "beta": 0.25}
KINDS = ("ppo", "grpo", "gspo", "vespo", "dr_grpo")
# The interpreter's products are NumPy's, whose sums have another order for a chunk of two rows: it gets a loss whose
# chunks are whole sequences.
SEQUENCES = ("gspo",)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS if not interpreted() else SEQUENCES)
def test_every_way(backend, device, name, form, budget):
    check(case_of(name, form=form, budget=budget, options=FULL), backend, device)


@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_narrow_heads(backend, device, dtype):
    check(case_of(dtype=dtype, options=FULL | BONUS), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("mean", (False, True), ids=("by tokens", "a mean"))
@pytest.mark.parametrize("budget", BUDGETS)
def test_with_a_bonus(backend, device, budget, mean):
    check(case_of(budget=budget, options=FULL | BONUS | {"entropy_mean": mean}), backend, device)


@pytest.mark.backends(*QUICK)
def test_options_of_the_head(backend, device):
    rest = {"temperature": 0.75, "softcap": 8.0, "logit_scale": 0.5}
    check(case_of(options=FULL, rest=rest, upstream=-1.5), backend, device)


@pytest.mark.backends(*QUICK)
@pytest.mark.parametrize("needs", (("hidden",), ("weight",), ("bias",)), ids="+".join)
def test_only_what_is_needed(backend, device, needs):
    check(case_of(options=FULL, needs=needs), backend, device)


@pytest.mark.backends(*QUICK)
def test_a_coefficient_on_the_device(backend, device):
    case = case_of(options=FULL | {"beta": torch.tensor(0.25, device=device)})
    out, gradients = run(case, backend, device)
    expected, wanted = run(case_of(options=FULL), backend, device)
    assert_same_bits("loss", out.loss.detach(), expected.loss.detach())
    for name, g in gradients.items():
        assert_same_bits(name, g, wanted[name])


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("name", ("grpo", "gspo") if not interpreted() else SEQUENCES)
def test_the_chunks_do_not_change_the_loss(backend, device, name):
    outs = [run(case_of(name, budget=budget, options=FULL), backend, device)[0] for budget in BUDGETS]
    for out in outs[1:]:
        for field in ("logp", "entropy", "loss"):
            assert_same_bits(field, getattr(out, field).detach(), getattr(outs[0], field).detach())
        assert_same_bits("kl", out.metrics["kl"], outs[0].metrics["kl"])


@pytest.mark.backends(*QUICK)
def test_a_policy_that_is_its_reference(backend, device):
    """No divergence, and of it no gradient."""
    case = case_of("reinforce", options=FULL)
    data = case.data | {f"ref_{k}": case.data[k] for k in ("hidden", "weight", "bias")}
    case = replace(case, data=data | {"adv": torch.zeros_like(data["adv"])})
    out, gradients = run(case, backend, device)
    if backend != "reference":
        assert out.loss == 0.0 and out.metrics["kl"] == 0.0
        for name, g in gradients.items():
            assert_zero(name, g)


@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("beta", (0.0, 0.25))
def test_a_plan(backend, device, beta):
    """The reference's product and its logits are counted, if there are any."""
    hidden, weight = torch.zeros(2, 3, 4), torch.zeros(7, 4, requires_grad=True)
    targets, ref = (
        torch.zeros(2, 3, dtype=torch.int64),
        {"ref_hidden": torch.zeros(2, 3, 5), "ref_weight": torch.ones(7, 5)},
    )
    loss = rlfast.loss("ppo", kl="full", beta=beta)
    with rlfast.use_backend(backend):
        plan = rlfast.plan(loss, hidden, weight, targets, adv=torch.zeros(2), old_logp=torch.zeros(2, 3), **ref)
    both = beta > 0
    assert plan.products == 2 + both
    assert plan.flop == 2 * 6 * 7 * (2 * 4 + 5 * both)
    assert plan.logits_bytes == 6 * 7 * 4 * (1 + both)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("name", ("grpo", "gspo"))
def test_compiled_whole(backend, device, name):
    case = case_of(name, options=FULL)
    data = {k: x.nan_to_num() if x.is_floating_point() else x for k, x in case.data.items()}
    rest = {k: data[k] for k in (*case.fields(), *case.reference())}

    def loss(hidden, weight):
        return case.loss.linear(
            hidden, weight, data["targets"], data["bias"], memory_budget=8 * 1301 * hidden.shape[1] * 32, **rest
        ).loss

    _, wanted = oracle(case, torch.float64)
    _, own = by_name(lambda seed: oracle(case, torch.float32, seed))
    with rlfast.use_backend(backend):
        leaves = {k: data[k].clone().requires_grad_() for k in ("hidden", "weight")}
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves.values())
        for k, g in zip(leaves, torch.autograd.grad(compiled, list(leaves.values())), strict=True):
            assert_gradient(k, g, wanted[k], own[k])


@pytest.mark.backends("torch", "cpu")
def test_the_chunk_op(backend, device):
    rng = torch.Generator().manual_seed(4)
    hidden, weight, bias, ref_hidden, ref_weight = (
        torch.randn(shape, generator=rng) for shape in ((5, 6), (40, 6), (40,), (5, 7), (40, 7))
    )
    heads = (hidden, weight, bias, ref_hidden, ref_weight, None)
    given = (*heads, torch.arange(5), None, None, None, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1, 0.5)
    with rlfast.use_backend(backend):
        _, aux, logp, kept, ref_kept = pair_op.op(*given, 0, True, backend)
    ones, sums = torch.ones_like(logp), (torch.ones(40, 6), torch.ones(40))
    saved = aux[:3].clone(), aux[3:5].clone(), aux[5:7].clone()
    args = (*given, *saved, ones, ones, None, None, kept.clone(), ref_kept.clone(), *sums, True, backend)
    torch.library.opcheck(pair_op.op_accumulate, args)


@pytest.mark.backends("torch", "cpu")
def test_log_probs_are_those_of_the_head_alone(backend, device):
    """A KL beside it changes no bit of a log-prob or an entropy."""
    with_kl, _ = run(case_of(options=FULL), backend, device)
    alone, _ = run(case_of(options={"kl": None}), backend, device)
    for field in ("logp", "entropy"):
        assert_same_bits(field, getattr(with_kl, field), getattr(alone, field))


# The loss of numbers a token.
def given(options: dict, dtype: str = "f32", packed: bool = False, call: dict | None = None) -> loss_cases.LossCase:
    fields = loss_cases.drawn(24 if not interpreted() else 4, 40 if not interpreted() else 11, dtype)
    exact = torch.rand(fields["logp"].shape, generator=torch.Generator().manual_seed(5)) * 0.3
    fields = {k: x for k, x in fields.items() if k not in ("ref_logp", "extra")} | {"full_kl": exact}
    fields["full_kl"] = fields["full_kl"].to(fields["logp"].dtype)
    loss = rlfast.Loss("ppo_clip", kl="full", **options)
    return loss_cases.LossCase(loss, fields, packed, call or {}, None, ("logp", "entropy", "full_kl"), f32(0.37))


@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.parametrize("reduce", loss_cases.REDUCTIONS)
def test_every_reduction(backend, device, reduce, packed):
    call = {"max_len": 40, "world_size": 4, "accumulation": 2}
    options = {"reduce": reduce, "beta": f32(0.3), "entropy_coef": f32(0.1)}
    check_given(given(options, packed=packed, call=call), backend, device)


@pytest.mark.parametrize("mean", (False, True), ids=("by tokens", "a mean"))
@pytest.mark.parametrize("correction", loss_cases.CORRECTIONS)
def test_every_correction(backend, device, correction, mean):
    """A gate that masks takes a token's KL along; one that does not, and ``keep``, leave it."""
    correction = loss_cases.CORRECTIONS[correction]
    options = {"beta": f32(0.3), "entropy_coef": f32(0.1), "entropy_mean": mean, "correction": correction}
    check_given(given(options), backend, device)


@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_coefficients_that_are_tensors(backend, device, dtype):
    options = {"beta": torch.tensor(f32(0.3)), "entropy_coef": torch.tensor(f32(0.1))}
    check_given(given(options, dtype), backend, device)


def check_given(case, backend: str, device: str) -> None:
    """As any loss."""
    with rlfast.use_backend(backend if backend != "cuda" else "triton"):
        loss_cases.check(case, backend, device)


BAD = {
    "none given": ({"ref_hidden": None}, ValueError, "ref_hidden: expected a tensor: ppo needs it, got None"),
    "no head": ({"ref_weight": None}, ValueError, "ref_weight: expected a tensor: ppo needs it, got None"),
    "rows": ({"ref_hidden": torch.zeros(2, 4, 5)}, ValueError, "ref_hidden: expected shape (2, 3, 'E') like the rows"),
    "vocabulary": ({"ref_weight": torch.zeros(8, 5)}, ValueError, "ref_weight: expected shape (7, 5) for the vocab"),
    "gradient": (
        {"ref_weight": torch.zeros(7, 5, requires_grad=True)}, ValueError,
        "ref_weight: expected a tensor that needs no gradient, got requires_grad=True",
    ),
    "dtype": (
        {"ref_hidden": torch.zeros(2, 3, 5).double(), "ref_weight": torch.zeros(7, 5).double()}, TypeError,
        "ref_hidden: expected dtype torch.float32 like hidden, got torch.float64",
    ),
    "an estimate": ({"ref_logp": torch.zeros(2, 3)}, ValueError, "ref_logp: expected None: ppo reads none"),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_wrong_input_is_named(said):
    changes, kind, words = BAD[said]
    good = {
        "hidden": torch.zeros(2, 3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(2, 3, dtype=torch.int64),
        "adv": torch.zeros(2), "old_logp": torch.zeros(2, 3), "ref_hidden": torch.zeros(2, 3, 5),
        "ref_weight": torch.zeros(7, 5),
    }  # fmt: skip
    loss = rlfast.loss("ppo", kl="full", beta=0.1)
    loss.linear(**good)
    with pytest.raises(kind) as error:
        loss.linear(**good | changes)
    assert words in str(error.value)


def test_what_has_no_meaning_is_refused():
    logp = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="full_kl: expected a tensor: ppo needs it"):
        rlfast.loss("ppo", kl="full", beta=0.1)(logp, adv=torch.zeros(2), old_logp=logp)
    with pytest.raises(ValueError, match="full_kl: expected None: ppo reads none"):
        rlfast.loss("ppo")(logp, adv=torch.zeros(2), old_logp=logp, full_kl=logp)
    with pytest.raises(ValueError, match="kl_ratio: expected None with kl='full', got 'unit'"):
        rlfast.loss("ppo", kl="full", beta=0.1, kl_ratio="unit")
    with pytest.raises(ValueError, match="full_kl: expected shape"):
        rlfast.loss("ppo", kl="full", beta=0.1)(logp, adv=torch.zeros(2), old_logp=logp, full_kl=logp[0])
    head = torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="ref_hidden: expected None: ppo reads none"):
        rlfast.loss("ppo").linear(*head, adv=torch.zeros(2), old_logp=logp, ref_hidden=head[0], ref_weight=head[1])


@pytest.mark.parametrize("like", ("trl", "verl", "openrlhf", "nemo-rl", "liger"))
def test_a_trainers_row_with_it(like):
    """The trainer's factors of its estimate do not apply."""
    loss = rlfast.loss("grpo", like=like, kl="full", beta=0.1)
    assert loss.has_full_kl and loss.kl_ratio is None


@pytest.mark.backends("torch", "cpu")
def test_at_weight_zero_nothing_is_read(backend, device):
    """As an estimate's reference: it may come."""
    logp = torch.zeros(2, 3)
    loss = rlfast.loss("ppo", kl="full", beta=0.0)
    fields = {"adv": torch.ones(2), "old_logp": logp}
    with rlfast.use_backend(backend):
        out = loss(logp, **fields, full_kl=torch.full((2, 3), torch.nan))
        assert out.loss == loss(logp, **fields).loss
