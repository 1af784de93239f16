"""``PreferenceLoss.linear`` on every backend of the head: its three ways to the gradients, its forms, its memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch

import rlfast
from rlfast.ops.linear_token_logps import op, op_accumulate
from rlfast.parity import ORDERS
from rlfast.reference.linear_token_logps import linear_token_logps as reference
from tests.cases import DTYPES, few
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero

OP = "linear_token_logps"
VOCAB, DEPTH = 1300, 24
# Bytes of logits at once: none, those of one or two pairs, all.
BUDGETS = ("recompute", "a pair", "two pairs", "keep")
FORMS = ("padded", "packed", "rows", "packed rows")
LOSSES = {
    "dpo": {}, "ipo": {"mean": True}, "simpo": {}, "ld_dpo": {"tail": 0.25}, "orpo": {}, "cpo": {}, "aot": {},
    "irpo": {}, "dpop": {},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("small_chunks")


@dataclass(frozen=True)
class Case:
    """One call; ``data`` has both sides' responses as rows [2B, T], the chosen first."""

    loss: rlfast.PreferenceLoss
    data: dict
    form: str = "padded"
    budget: str = "a pair"
    rest: dict = field(default_factory=dict)  # margin, weights, temperature, …
    sums: bool = False  # the reference as sums of responses
    needs: tuple = ("hidden", "weight", "bias")
    upstream: float = 1.0


def drawn(pairs: int = 0, length: int = 0, dtype: str = "f32", seed: int = 0) -> dict:
    """Responses of different lengths, with a mask, labels of −100 and NaN where neither counts."""
    pairs, length = pairs or few(5, 3), length or few(9, 4)
    rng = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    hidden = torch.randn(rows, length, DEPTH, generator=rng).to(DTYPES[dtype])
    weight = (torch.randn(VOCAB, DEPTH, generator=rng) * 2 / DEPTH**0.5).to(DTYPES[dtype])
    targets = torch.randint(VOCAB, (rows, length), generator=rng)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=rng)
    mask[0, :2], targets[0, 0] = True, -100
    live = mask & (targets != -100)
    hidden[~live] = torch.nan
    ref = -torch.rand(rows, length, generator=rng) * 9
    bias = torch.randn(VOCAB, generator=rng).to(DTYPES[dtype])
    return {
        "hidden": hidden, "weight": weight, "bias": bias, "targets": targets, "mask": mask,
        "ref": torch.where(live, ref, torch.zeros(())), "live": live,
    }  # fmt: skip


def case_of(name: str = "dpo", dtype: str = "f32", **options) -> Case:
    """A row of the table on drawn data."""
    return Case(rlfast.preference_loss(name, **LOSSES.get(name, {})), drawn(dtype=dtype), **options)


def cut(case: Case, x: torch.Tensor) -> dict:
    """Rows of tokens [2B, T, ...] as this form has them, by side; "" is both."""
    pairs = x.shape[0] // 2
    parts = {"": x} if case.form.endswith("rows") else {"chosen": x[:pairs], "rejected": x[pairs:]}
    return {side: part.flatten(0, 1) if "packed" in case.form else part for side, part in parts.items()}


def run(case: Case, backend: str, device: str = "cpu") -> tuple:
    """(output, {name: gradient})."""
    data = {k: x if x is None else x.to(device) for k, x in case.data.items()}
    leaves = {k: data[k].detach().clone().requires_grad_() for k in case.needs if data[k] is not None}
    data |= leaves
    rows, length = data["targets"].shape
    named = {}
    for name, kind in (
        ("hidden", "{}_hidden"),
        ("targets", "{}_targets"),
        ("mask", "{}_mask"),
        ("ref", "ref_{}_logps"),
    ):
        sides = cut(case, data[name])
        if name == "ref" and case.sums:
            sides = cut(replace(case, form=case.form.removeprefix("packed ").replace("packed", "")), data[name].sum(-1))
        named |= {kind.format(side).strip("_").replace("__", "_"): x for side, x in sides.items()}
    if "packed" in case.form:
        for side in cut(case, data["mask"]):
            count = rows if side == "" else rows // 2
            named[f"{side}_cu_seqlens".strip("_")] = torch.arange(count + 1, device=device) * length
    counted = 4 * VOCAB * (8 if data["hidden"].dtype == torch.float64 else 4) // 4
    budget = {"recompute": 0, "a pair": 2, "two pairs": 4, "keep": 1 << 20}[case.budget] * length * counted
    rest = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in case.rest.items()}
    call = case.loss.linear_rows if "hidden" in named else case.loss.linear
    with rlfast.use_backend(backend):
        out = call(weight=data["weight"], bias=data["bias"], memory_budget=budget, per_pair=True, **named, **rest)
        grads = torch.autograd.grad(out.loss * case.upstream, list(leaves.values())) if leaves else ()
    return out, dict(zip(leaves, grads, strict=True))


def oracle(case: Case, dtype: torch.dtype, order=slice(None)) -> tuple[dict, dict]:
    """(loss, losses, rewards, size of a pair's log-probs), gradients; ``order`` shuffles the sum over the depth."""
    data = case.data
    clean = torch.where(data["live"].unsqueeze(-1), data["hidden"], torch.zeros((), dtype=data["hidden"].dtype))
    leaves = {k: x.to(dtype) for k, x in (("hidden", clean), ("weight", data["weight"]), ("bias", data["bias"]))
              if x is not None}  # fmt: skip
    leaves = {k: x.clone().requires_grad_(k in case.needs) for k, x in leaves.items()}
    options = {k: case.rest[k] for k in ("temperature", "softcap", "logit_scale") if k in case.rest}
    rest = {k: x for k, x in case.rest.items() if k not in options}
    logp = reference(
        leaves["hidden"][..., order], leaves["weight"][:, order], data["targets"], leaves.get("bias"),
        mask=data["live"], dtype=dtype, **options,
    )["logp"]  # fmt: skip
    with rlfast.use_backend("reference"):
        out = case.loss.rows(logp, ref_logps=data["ref"].to(dtype), mask=data["live"], per_pair=True, **rest)
    wanted = {k: x for k, x in leaves.items() if x.requires_grad}
    found = dict(zip(wanted, torch.autograd.grad(out.loss * case.upstream, list(wanted.values())), strict=True))
    pairs = logp.shape[0] // 2
    size = (logp.detach().abs() + data["ref"].abs()).sum(-1)
    values = {"loss": out.loss.detach(), "losses": out.losses, "chosen_rewards": out.chosen_rewards}
    values |= {"rejected_rewards": out.rejected_rewards, "size": size[:pairs] + size[pairs:]}
    return {k: x.detach() for k, x in values.items()}, found


def check(case: Case, backend: str, device: str = "cpu") -> None:
    """The loss, each pair's loss and rewards, and the gradients."""
    hold(case, *run(case, backend, device))


def hold(case: Case, out, gradients) -> None:
    """Assert the contract for one run."""
    truth, wanted = oracle(case, torch.float64)
    orders = [torch.randperm(DEPTH, generator=torch.Generator().manual_seed(seed)) for seed in range(1, ORDERS)]
    own = [oracle(case, torch.float32, order) for order in (slice(None), *orders)]
    sizes = {"loss": truth["size"].mean()} | dict.fromkeys(
        ("losses", "chosen_rewards", "rejected_rewards"), truth["size"]
    )
    for name, size in sizes.items():
        assert_value(name, getattr(out, name).detach().cpu(), truth[name], [x[0][name] for x in own], size.double())
    for name, got in gradients.items():
        assert got.dtype == case.data[name].dtype
        assert_gradient(f"gradient of {name}", got.cpu(), wanted[name], [x[1][name] for x in own])
    if "hidden" in gradients:
        dead = cut(case, ~case.data["live"])
        flat = torch.cat([x.reshape(-1) for x in dead.values()])
        assert_zero("gradient of masked tokens", gradients["hidden"].cpu().reshape(-1, DEPTH)[flat])


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(backend, device, form, budget):
    check(case_of(form=form, budget=budget), backend, device)


@pytest.mark.parametrize("budget", BUDGETS[:2])
@pytest.mark.parametrize("name", LOSSES)
def test_every_kind_of_loss(backend, device, name, budget):
    check(case_of(name, budget=budget), backend, device)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_narrow_heads(backend, device, dtype, budget):
    """The sums over pairs are float32, whatever the weight's dtype."""
    check(case_of(dtype=dtype, budget=budget), backend, device)


@pytest.mark.backends("torch", "reference")
@pytest.mark.parametrize("budget", BUDGETS[:2])
def test_float64(backend, device, budget):
    case = case_of(budget=budget)
    data = {k: x.double() if x.is_floating_point() else x for k, x in case.data.items()}
    check(replace(case, data=data), backend, device)


@pytest.mark.parametrize("budget", BUDGETS[:3])
@pytest.mark.parametrize("form", FORMS)
def test_a_reference_of_sums(backend, device, form, budget):
    check(case_of(form=form, budget=budget, sums=True), backend, device)


@pytest.mark.parametrize("form", ("packed", "packed rows"))
def test_the_reference_of_a_response_without_tokens_goes_nowhere(backend, device, form):
    """Not to the first token of the next response."""
    outs = []
    for shape in (form, form.replace("packed", "padded").replace("padded rows", "rows")):
        case = case_of(form=shape, sums=True)
        case.data["mask"][1] = False
        case.data["ref"][1] = -7.0
        outs.append(run(case, backend, device)[0])
    assert_same_bits("losses", outs[0].losses, outs[1].losses)


@pytest.mark.parametrize("needs", (("hidden",), ("weight",), ("bias",), ("weight", "bias")), ids="+".join)
def test_only_what_is_needed(backend, device, needs):
    check(case_of(needs=needs), backend, device)


def test_options_of_the_head(backend, device):
    rest = {"temperature": 0.75, "softcap": 8.0, "logit_scale": 0.5}
    check(case_of(rest=rest, upstream=-1.5), backend, device)


def test_fields_of_the_pairs(backend, device):
    case = case_of("dpo")
    pairs = case.data["targets"].shape[0] // 2
    rng = torch.Generator().manual_seed(5)
    rest = {"margin": torch.randn(pairs, generator=rng), "weights": torch.rand(pairs, generator=rng)}
    check(replace(case, rest=rest | {"num_items": 7.0, "world_size": 4, "accumulation": 2}), backend, device)


@pytest.mark.parametrize("reduce", ("mean", "sum", "batch"))
def test_a_likelihood(backend, device, reduce):
    """The mean over the chosen tokens of the batch is no matter of a chunk."""
    loss = rlfast.preference_loss("dpo", nll=0.5, nll_reduce=reduce)
    check(replace(case_of(), loss=loss), backend, device)


def test_a_sum(backend, device):
    check(replace(case_of(), loss=rlfast.preference_loss("dpo", reduce="sum")), backend, device)


@pytest.mark.backends("torch", "cpu")
def test_a_likelihood_from_elsewhere(backend, device):
    """Its gradient passes, beside those that are known."""
    nll = torch.tensor(2.0, requires_grad=True)
    data, loss = drawn(), rlfast.preference_loss("dpo", nll=0.5)
    hidden = data["hidden"].nan_to_num().requires_grad_()
    with rlfast.use_backend(backend):
        out = loss.linear_rows(
            hidden, data["weight"], data["targets"], ref_logps=data["ref"], nll=nll,
            memory_budget=8 * VOCAB * hidden.shape[1],
        )  # fmt: skip
    g, g_hidden = torch.autograd.grad(out.loss, (nll, hidden))
    assert g == 0.5 and g_hidden.any()


def test_no_bias(backend, device):
    case = case_of(needs=("hidden", "weight"))
    check(replace(case, data=case.data | {"bias": None}), backend, device)


def test_the_chunks_do_not_change_the_loss(backend, device):
    """The log-probs of a row are the same bits in any chunk, and the loss is of all of them."""
    outs = [run(case_of(budget=budget), backend, device)[0] for budget in BUDGETS]
    for out in outs[1:]:
        assert_same_bits("loss", out.loss.detach(), outs[0].loss.detach())
        assert_same_bits("metrics", out.metrics.values, outs[0].metrics.values)


def test_a_second_backward_is_right(backend, device):
    case = case_of()
    with rlfast.use_backend(backend):
        hidden = case.data["hidden"].to(device).nan_to_num().requires_grad_()
        rest = {k: case.data[k].to(device) for k in ("mask", "targets")}
        out = case.loss.linear_rows(
            hidden, case.data["weight"].to(device), ref_logps=case.data["ref"].to(device),
            memory_budget=8 * VOCAB * hidden.shape[1], **rest,
        )  # fmt: skip
        once = [torch.autograd.grad(out.loss, hidden, retain_graph=True)[0].clone() for _ in range(2)]
    assert_same_bits("gradient", *once)


@pytest.mark.backends("torch", "cpu")
def test_no_gradient_of_gradients(backend, device):
    case = case_of()
    hidden = case.data["hidden"].nan_to_num().requires_grad_()
    out = case.loss.linear_rows(
        hidden, case.data["weight"], case.data["targets"], ref_logps=case.data["ref"],
        memory_budget=8 * VOCAB * hidden.shape[1],
    )  # fmt: skip
    (g,) = torch.autograd.grad(out.loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


@pytest.mark.parametrize("pairs", (0, 1))
@pytest.mark.parametrize("budget", BUDGETS)
def test_few_pairs(backend, device, pairs, budget):
    case = case_of(budget=budget)
    data = {k: x[: 2 * pairs] if k not in ("weight", "bias") else x for k, x in case.data.items()}
    case = replace(case, data=data)
    if pairs:
        return check(case, backend, device)
    out, gradients = run(case, backend, device)
    assert out.loss == 0
    for name, g in gradients.items():
        assert_zero(name, g)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sums", (False, True))
def test_responses_without_tokens(backend, device, form, budget, sums):
    """All of them: a difference of 0, and no gradient."""
    case = case_of(form=form, budget=budget, sums=sums)
    names = ("hidden", "targets", "mask", "ref", "live")
    case = replace(case, data=case.data | {name: case.data[name][:, :0] for name in names})
    out, gradients = run(case, backend, device)
    assert_value("loss", out.loss.detach().cpu(), torch.tensor(2.0).double().log(), torch.tensor(2.0).log())
    for name, g in gradients.items():
        assert_zero(name, g)


def test_without_gradients(backend, device):
    out, _ = run(case_of(needs=()), backend, device)
    with_gradients, _ = run(case_of(), backend, device)
    assert not out.loss.requires_grad
    assert_same_bits("loss", out.loss, with_gradients.loss.detach())


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_opcheck(backend, device):
    """The backward of a chunk, which adds to the sums that it is given."""
    data = drawn(2, 3)
    hidden, targets = data["hidden"].nan_to_num().flatten(0, 1), data["targets"].flatten()
    head = (hidden, data["weight"], data["bias"], targets, None, None, 1.0, 0.0, 1.0)
    logp, aux, kept = op(*head, 0, 0, True, backend)
    sums = torch.ones(VOCAB, DEPTH), torch.ones(VOCAB)
    args = (*head, aux.clone(), kept.clone(), torch.ones_like(logp), None, *sums, True, backend)
    torch.library.opcheck(op_accumulate, args)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("form", ("padded", "rows"))
def test_compiled_whole(backend, device, form):
    case = case_of(form=form)
    data = {k: x.nan_to_num() if k == "hidden" else x for k, x in case.data.items()}
    pairs = data["targets"].shape[0] // 2
    budget = 8 * VOCAB * data["targets"].shape[1]

    def loss(hidden, weight):
        both = data["targets"], data["ref"]
        if form == "rows":
            return case.loss.linear_rows(hidden, weight, both[0], ref_logps=both[1], memory_budget=budget).loss
        (tw, tl), (rw, rl) = ((x[:pairs], x[pairs:]) for x in both)
        return case.loss.linear(
            hidden[:pairs], hidden[pairs:], weight, tw, tl, ref_chosen_logps=rw, ref_rejected_logps=rl,
            memory_budget=budget,
        ).loss  # fmt: skip

    found = []
    with rlfast.use_backend(backend):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
            out = function(*leaves)
            found.append((out.detach(), *torch.autograd.grad(out, leaves)))
    for name, eager, compiled in zip(("loss", "hidden", "weight"), *found, strict=True):
        assert_same_bits(name, compiled, eager)


GOOD = {
    "chosen_hidden": torch.zeros(2, 3, 4), "rejected_hidden": torch.zeros(2, 5, 4), "weight": torch.zeros(7, 4),
    "chosen_targets": torch.zeros(2, 3, dtype=torch.int64), "rejected_targets": torch.zeros(2, 5, dtype=torch.int64),
    "ref_chosen_logps": torch.zeros(2, 3), "ref_rejected_logps": torch.zeros(2, 5),
}  # fmt: skip
BAD = {
    "hidden": ({"chosen_hidden": torch.zeros(2, 4)}, ValueError, "chosen_hidden: expected shape [B, T, D], or"),
    "width": ({"weight": torch.zeros(7, 5)}, ValueError, "weight: expected shape (V, 4) to match chosen_hidden"),
    "targets": (
        {"rejected_targets": torch.zeros(2, 4, dtype=torch.int64)}, ValueError,
        "rejected_targets: expected shape (2, 5)",
    ),
    "candidates": (
        {"chosen_targets": torch.zeros(2, 3, 2, dtype=torch.int64)}, ValueError,
        "chosen_targets: expected shape (2, 3) like the rows of chosen_hidden, got (2, 3, 2)",
    ),
    "vocabulary": (
        {"chosen_targets": torch.full((2, 3), 7)}, ValueError, "chosen_targets: expected values in [0, 7) or",
    ),
    "reference": (
        {"ref_chosen_logps": torch.zeros(2, 4)}, ValueError,
        "ref_chosen_logps: expected shape (2, 3) like chosen_targets, or (2,) of sums, got (2, 4)",
    ),
    "no reference": ({"ref_chosen_logps": None}, ValueError, "ref_chosen_logps: expected a tensor: dpo needs it"),
    "mask": ({"rejected_mask": torch.ones(2, 4)}, ValueError, "rejected_mask: expected shape (2, 5) like rejected_t"),
    "pairs": (
        {k: GOOD[k][:1] for k in ("rejected_hidden", "rejected_targets", "ref_rejected_logps")}, ValueError,
        "rejected_targets: expected 2 responses",
    ),
    "margin": ({"margin": torch.zeros(3)}, ValueError, "margin: expected shape (2,), one a pair, got (3,)"),
    "budget": ({"memory_budget": -1}, ValueError, "memory_budget: expected a float ≥ 0, got -1"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature: expected a finite float > 0"),
    "a temperature a token": ({"temperature": torch.ones(2)}, TypeError, "temperature: expected a float > 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    given = {k: x.clone().requires_grad_() if k == "weight" else x for k, x in GOOD.items()} | change
    with pytest.raises(error) as caught:
        rlfast.preference_loss("dpo").linear(**given)
    assert message in str(caught.value)


def test_an_odd_number_of_rows():
    given = {k: GOOD[f"chosen_{k}"][:1] for k in ("hidden", "targets")}
    with pytest.raises(ValueError, match="targets: expected an even number of responses"):
        rlfast.preference_loss("dpo").linear_rows(**given, weight=GOOD["weight"], ref_logps=torch.zeros(1, 3))


@pytest.mark.parametrize("budget, way, products", ((None, "chunks", 2), (1 << 30, "keep", 2), (1, "again", 3)))
def test_a_plan(budget, way, products):
    """By default as many pairs at a time as pay; 512 masked tokens of each response are in no product on the CPU."""
    hidden, targets = torch.zeros(1, 1, 1).expand(8, 1024, 4), torch.zeros(8, 1024, dtype=torch.int64)
    weight = torch.zeros(1, 4).expand(40_000, 4).requires_grad_()
    mask = (torch.arange(1024) < 512).expand(8, 1024)
    given = {} if budget is None else {"memory_budget": budget * 4 if budget > 1 else 0}
    plan = rlfast.plan(
        rlfast.preference_loss("simpo"), hidden, hidden, weight, targets, targets, chosen_mask=mask, rejected_mask=mask,
        **given,
    )  # fmt: skip
    assert (plan.way, plan.products, plan.rows) == (way, products, 8192)
    assert plan.chunks == ((3072, 3072, 2048) if way == "chunks" else ())


def test_a_divergence_beside_it_is_refused():
    with pytest.raises(ValueError, match="hidden: expected log-probs: tdpo1 reads KL"):
        rlfast.preference_loss("tdpo1").linear(**GOOD)
