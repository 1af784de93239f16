"""``pair_loss`` on every backend against the oracle: links, scores, forms, and where losses go wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast.kernels.formulas import PAIRS, SCORES
from tests.cases import f32, few, product
from tests.numerics import assert_same_bits, assert_value
from tests.preference_cases import (
    FORMS,
    PairCase,
    check,
    drawn,
    hyper_of,
    oracle,
    pair_case,
    read_by,
    rest_of,
    run,
    summed,
)
from tests.shared import check_replay, far_apart, skip_unless_memory

OP = "pair_loss"
DTYPES = ("f32", "bf16", "f16", "mixed")
NARROW = (("sums", "f32"), ("packed", "f32"), ("sums", "f16"), ("packed", "bf16"), ("sums", "mixed"))
MEANS = {"odds_ratio", "ipo"}
BOTH = [link for link in PAIRS if link not in ("nll", "batch_nll", "weighted_nll")]  # they read both responses
# Scores, with their α; None is the default.
SCORED = (*((score, None) for score in SCORES), ("power", 0.0), ("alpha_divergence", 1.0), ("alpha_divergence", 1.5))


def scored(score: str, alpha: float | None) -> rlfast.Part:
    """DPO's loss of a score."""
    return rlfast.Part("logistic", {"beta": f32(0.13)}, score, {} if alpha is None else {"alpha": alpha})


@pytest.mark.parametrize("link", PAIRS)
@pytest.mark.parametrize("form, dtype", NARROW)
def test_every_link(backend, device, link, form, dtype):
    score = "total" if link == "odds_ratio" else "log_ratio"
    check(pair_case(link, score, link in MEANS, form, dtype), backend, device)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("mean", (False, True))
def test_every_score(backend, device, score, mean):
    check(pair_case("logistic", score, mean, "padded", reward=score, reward_mean=mean), backend, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form(backend, device, form, dtype):
    check(pair_case("logistic", mean=True, form=form, dtype=dtype), backend, device)


@pytest.mark.parametrize("form", [form for form in FORMS if "sum" not in form])
def test_a_tail(backend, device, form):
    """LD-DPO: the tokens beyond the length of the shorter response have a weight of their own."""
    check(pair_case("logistic", form=form, tail=0.3125), backend, device)


@pytest.mark.parametrize("reduce", ("mean", "sum"))
@pytest.mark.parametrize("count", (None, 17.0, "tensor"))
def test_the_normaliser(backend, device, reduce, count):
    count = {} if count is None else {"num_items": torch.tensor(17.0) if count == "tensor" else count}
    case = pair_case("logistic", reduce=reduce, world_size=4, accumulation=2, **count)
    check(replace(case, upstream=0.375), backend, device)


@pytest.mark.parametrize("needs", (("chosen",), ("rejected",)))
@pytest.mark.parametrize("form", ("sums", "padded", "packed"))
def test_one_side_needs_a_gradient(backend, device, needs, form):
    check(replace(pair_case("logistic", form=form), needs=needs), backend, device)


@pytest.mark.parametrize("form", ("sums", "packed_rows"))
def test_a_mixture(backend, device, form):
    """Several parts, and the likelihood of the chosen response beside them."""
    parts = (rlfast.Part("logistic", weight=0.75), rlfast.Part("bco", mean=True, weight=0.25), rlfast.Part("hinge"))
    case = pair_case("logistic", form=form)
    case = replace(case, objective=rlfast.PreferenceLoss(parts, nll=0.5))
    case.rest["shared"] = torch.tensor(0.5)
    check(case, backend, device)


@pytest.mark.parametrize("reduce", ("sum", "batch"))
@pytest.mark.parametrize("form", FORMS)
def test_a_likelihood(backend, device, form, reduce):
    check(pair_case("logistic", form=form, nll=0.5, nll_reduce=reduce), backend, device)


def extreme(link: str, name: str) -> PairCase:
    """Sums where formulas overflow, cancel or are at a bound."""
    case = pair_case(link, "total" if link == "odds_ratio" else "log_ratio", link in MEANS)
    ref = torch.tensor([-40.0, -40.0, -40.0, -40.0, -2.0, -1.0])
    logp = {
        "far apart": torch.tensor([-40.0, 9960.0, -10040.0, 1e-3, 60.0, -90.0]),
        "equal": ref.clone(),
        "certain": torch.tensor([-1e-30, -1e-12, -1e-6, -1e-3, -0.5, 0.0]),
    }[name]
    other = ref if name == "equal" else logp.flip(0)
    sides = {"chosen": {"logp": logp, "ref_logp": ref}, "rejected": {"logp": other, "ref_logp": ref}}
    ones = torch.ones(6, 1, dtype=torch.bool)
    tokens = {k: {n: x.unsqueeze(1) for n, x in side.items()} | {"mask": ones} for k, side in sides.items()}
    return PairCase(case.objective, tokens, read_by(case.objective, rest_of(6)), "sums")


@pytest.mark.parametrize("name", ("far apart", "equal", "certain"))
@pytest.mark.parametrize("link", PAIRS)
def test_extreme(backend, device, link, name):
    """Δ = 0, ±1e4, equal pairs, responses of one token, log-probs that approach 0."""
    if name != "certain" and link == "odds_ratio":
        name = "certain"  # there are no odds of a log-prob above 0
    if link in ("exponential", "barrier") and name == "far apart":
        name = "equal"  # e^1000 is no number
    check(extreme(link, name), backend, device)


@pytest.mark.parametrize("name", ("far apart", "equal"))
@pytest.mark.parametrize("score, alpha", SCORED)
def test_extreme_scores(backend, device, score, alpha, name):
    """Log-ratios of ±1e4, and −89, whose exponential is no float32."""
    reward = (
        "log_ratio" if name == "certain" else score
    )  # the oracle's 1 − e^1e-30 is 0, and an accuracy of equals another
    objective = rlfast.PreferenceLoss((scored(score, alpha),), reward=reward)
    check(replace(extreme("logistic", name), objective=objective), backend, device)


def test_a_forward_kl_of_ordinary_log_ratios(backend, device):
    """Finite, and so are its gradients, where e^−D is not."""
    w, l_ = (torch.tensor(x, device=device, requires_grad=True) for x in ([1.0, -95.0], [-100.0, -100.0]))
    zero = torch.zeros(2, device=device)
    with rlfast.use_backend(backend):
        row = rlfast.preference_loss("f_dpo_forward_kl")
        out = row(w, l_, ref_chosen_logps=zero, ref_rejected_logps=zero, per_pair=True)
    gradients = torch.autograd.grad(out.loss, (w, l_))
    torch.testing.assert_close(out.losses.cpu(), torch.tensor([0.0, math.log(2)]))
    assert not any(g.any() for g in gradients)


@pytest.mark.backends("torch", "cpu", "triton", "cuda")  # autograd's derivative of a clamped NaN is 0
@pytest.mark.parametrize("score, alpha", SCORED)
def test_a_nan_stays_in_its_score(backend, device, score, alpha):
    case = pair_case("logistic", form="padded")
    case = replace(case, objective=rlfast.PreferenceLoss((scored(score, alpha),)))
    case.tokens["chosen"]["logp"][2, 0] = torch.nan
    out, gradients = run(case, backend, device)
    assert out.losses.isnan().nonzero().tolist() == [[2]] and gradients["chosen"][2, 0].isnan()


@pytest.mark.parametrize("side", ("chosen", "rejected"))
@pytest.mark.parametrize("link", BOTH)
def test_a_nan_stays_in_its_pair(backend, device, link, side):
    """No minimum hides it, and the other pairs are what they were."""
    case = pair_case(link, "total" if link == "odds_ratio" else "log_ratio", link in MEANS, "padded")
    clean, _ = run(case, backend, device)
    case.tokens[side]["logp"][2, 0] = torch.nan
    out, _ = run(case, backend, device)
    assert out.loss.isnan() and out.losses[2].isnan()
    others = torch.arange(out.losses.shape[0]) != 2
    assert_same_bits("the others", out.losses.cpu()[others], clean.losses.cpu()[others])


@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("side", ("chosen", "rejected"))
@pytest.mark.parametrize("link", BOTH)
def test_a_log_prob_of_minus_infinity(backend, device, link, side):
    """The loss is the limit, be it a number or infinity, and no gradient is NaN."""
    part = rlfast.Part(link, hyper_of(link, PAIRS), "total" if link == "odds_ratio" else "log_ratio")
    hold_limit(rlfast.PreferenceLoss((part,)), side, backend, device)


@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("side", ("chosen", "rejected"))
@pytest.mark.parametrize("score, alpha", SCORED)
def test_a_score_of_minus_infinity(backend, device, score, alpha, side):
    hold_limit(rlfast.PreferenceLoss((scored(score, alpha),)), side, backend, device)


@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("side", ("chosen", "rejected"))
@pytest.mark.parametrize("name", ("dpo", "f_dpo_js", "simpo", "cal_dpo", "rpo"))
def test_a_row_of_minus_infinity(backend, device, name, side):
    hold_limit(rlfast.preference_loss(name), side, backend, device)


def hold_limit(objective, side: str, backend: str, device: str) -> None:
    """The loss where one side's log-prob is −∞ is that of −1e30 in float64; beyond 1e20 it is as good as infinite."""
    rest = read_by(objective, {"margin": torch.tensor([0.7]), "extra": torch.tensor([0.25]), "shared": 0.4})
    found = {}
    for value, dtype, one in ((-1e30, torch.float64, "reference"), (-torch.inf, torch.float32, backend)):
        place = device if one == backend else "cpu"
        logps = {"chosen": -3.0, "rejected": -2.5} | {side: value}
        leaves = [torch.tensor([x], dtype=dtype, device=place, requires_grad=True) for x in logps.values()]
        given = {k: x.to(place, dtype) if isinstance(x, torch.Tensor) else x for k, x in rest.items()}
        lengths = {f"{s}_lengths": torch.ones(1, device=place, dtype=dtype) for s in logps}
        ref = {f"ref_{s}_logps": torch.full((1,), -2.0, device=place, dtype=dtype) for s in logps}
        with rlfast.use_backend(one):
            loss = objective(*leaves, **ref, **lengths, **given).loss
        limit = loss.item() if abs(loss.item()) < 1e20 else loss.item() * torch.inf
        found[value] = limit, torch.autograd.grad(loss, leaves)
    assert found[-torch.inf][0] == pytest.approx(found[-1e30][0], rel=1e-5)
    assert not any(g.isnan().any() for g in found[-torch.inf][1])


@pytest.mark.parametrize("form", ("padded", "packed"))
def test_garbage_under_the_mask(backend, device, form):
    case = pair_case("logistic", form=form)
    for side in case.tokens.values():
        for name in ("logp", "ref_logp"):
            side[name] = torch.where(side["mask"], side[name], torch.nan)
    check(case, backend, device)


def test_a_pair_of_weight_0_has_no_effect(backend, device):
    case = pair_case("logistic")
    case.tokens["chosen"]["logp"][1] = torch.inf
    out, gradients = run(case, backend, device)
    assert out.loss.isfinite() and gradients["chosen"].isfinite().all() and gradients["chosen"][1] == 0


@pytest.mark.parametrize("form", ("sums", "padded", "packed"))
def test_an_empty_batch(backend, device, form):
    case = pair_case("logistic", form=form)
    tokens = {side: {k: x[:0] for k, x in found.items()} for side, found in case.tokens.items()}
    rest = {k: x[:0] if x.dim() else x for k, x in case.rest.items()}
    out, gradients = run(replace(case, tokens=tokens, rest=rest), backend, device)
    assert out.loss.item() == 0.0 and out.metrics["pairs"].item() == 0.0 and gradients["chosen"].numel() == 0


def test_empty_responses(backend, device):
    """A response whose tokens are all masked has a sum of 0."""
    case = pair_case("logistic", form="packed")
    case.tokens["chosen"]["mask"][1] = False
    case.tokens["rejected"]["mask"][2] = False
    check(case, backend, device)


def test_packed_is_padded_is_sums(backend, device):
    """The same pairs in every form, to the bit: sums of tokens are made in double."""
    results = {form: run(pair_case("logistic", form=form), backend, device) for form in ("padded", "packed", "rows")}
    for form, (out, _) in results.items():
        assert_same_bits(form, out.losses, results["padded"][0].losses)


@pytest.mark.parametrize("form", ("sums", "packed"))
def test_the_same_bits_run_after_run(backend, device, form, threads):
    case = PairCase(rlfast.preference_loss("dpo"), drawn(few(700, 6), few(60, 9)), {}, form)
    first, gradients = run(case, backend, device)
    for count in (1, 2) * few(5, 1):
        if backend == "cpu":
            threads(count)
        again, others = run(case, backend, device)
        assert_same_bits("metrics", again.metrics.values, first.metrics.values)
        for side, g in others.items():
            assert_same_bits(f"gradient of {side}", g, gradients[side])


def test_strides(backend, device):
    """Transposed and expanded arguments."""
    case = pair_case("logistic", form="padded")
    wide = {side: {k: torch.stack((x, x), 2)[:, :, 0] for k, x in found.items()} for side, found in case.tokens.items()}
    rest = {k: torch.stack((x, x), 1)[:, 0] if x.dim() else x for k, x in case.rest.items()}
    check(replace(case, tokens=wide, rest=rest), backend, device)
    sums = replace(case, form="sums", rest=rest | {"margin": torch.zeros(()).expand(case.rest["margin"].shape)})
    check(sums, backend, device)


def test_second_backward_and_second_derivative(backend, device):
    case = pair_case("logistic")
    sums = {side: summed(x) for side, x in case.tokens.items()}
    leaf = sums["chosen"]["logp"].to(device).requires_grad_()
    objective = rlfast.preference_loss("dpo", reference_free=True)
    with rlfast.use_backend(backend):
        loss = objective(leaf, sums["rejected"]["logp"].to(device)).loss
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert_same_bits("gradient", again, once)
    (tripled,) = torch.autograd.grad(3.0 * loss, leaf, retain_graph=True)
    assert_value("3 × gradient", tripled.cpu(), 3.0 * once.cpu().double(), 3.0 * once.cpu())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        g.sum().backward()


@pytest.mark.backends("reference", "torch", "cpu", "cuda")
def test_many_pairs(backend, device):
    case = PairCase(rlfast.preference_loss("dpo"), drawn(70_000, 1), {}, "sums")
    check(case, backend, device)


@pytest.mark.large
@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("form", ("padded", "packed_rows"))
def test_full_size(backend, device, form):
    """4M tokens."""
    case = PairCase(rlfast.preference_loss("dpo"), drawn(few(2048, 8), few(1024, 64)), {}, form)
    check(case, backend, device)


@pytest.mark.gpu
@pytest.mark.backends("triton", "cuda")
@pytest.mark.parametrize("tail", (1.0, 0.5))
def test_in_a_cuda_graph(backend, device, tail):
    tokens = {side: {k: x.to(device) for k, x in found.items()} for side, found in drawn(5, 40).items()}
    leaf, other = tokens["chosen"]["logp"].requires_grad_(), tokens["rejected"]["logp"]
    given = {f"{side}_mask": found["mask"] for side, found in tokens.items()}
    given |= {f"ref_{side}_logps": found["ref_logp"] for side, found in tokens.items()}
    objective = rlfast.PreferenceLoss((rlfast.Part("logistic"),), tail=tail)

    def step():
        loss = objective(leaf, other, **given).loss
        return loss, *torch.autograd.grad(loss, leaf)

    with rlfast.use_backend(backend):
        check_replay(step, leaf)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu", "triton", "cuda")
def test_row_11_rows_2_31_elements_apart(backend, device):
    skip_unless_memory(device, 8)
    near = [x[k].to(device) for x in drawn(2, 40, "bf16").values() for k in ("logp", "ref_logp", "mask")]
    found = []
    for w, ref_w, mask_w, l_, ref_l, mask_l in (near, far_apart(*near)):
        leaves, given = [x.requires_grad_() for x in (w, l_)], {"chosen_mask": mask_w, "rejected_mask": mask_l}
        with rlfast.use_backend(backend):
            loss = rlfast.preference_loss("dpo")(
                *leaves, ref_chosen_logps=ref_w, ref_rejected_logps=ref_l, **given
            ).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for name, one, other in zip(("loss", "chosen", "rejected"), *found, strict=True):
        assert_same_bits(name, other, one)


PRODUCT = {
    "link": ("logistic", "ipo", "bco", "exo_pair", "dpop"),
    "score": tuple(SCORES),
    "mean": (False, True),
    "form": FORMS,
    "dtype": DTYPES,
    "tail": (1.0, 0.3125),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_product(backend, device, request, form):
    """Every combination of what can interact; a few of them without --full-product."""
    whole = [c for c in product(PRODUCT | {"form": (form,)}) if c["tail"] == 1.0 or "sum" not in form]
    step = 1 if request.config.getoption("--full-product") else 41
    for combination in whole[:: step * few(1, 12)]:
        check(pair_case(**combination), backend, device)


def test_the_oracle_is_the_definition():
    """A pair by hand."""
    case = PairCase(rlfast.preference_loss("dpo"), drawn(3, 5), {}, "padded")
    values, _ = oracle(case, torch.float64)
    sums = {
        side: torch.where(x["mask"], x["logp"].double() - x["ref_logp"].double(), 0.0).sum(1)
        for side, x in case.tokens.items()
    }
    by_hand = torch.nn.functional.softplus(-0.1 * (sums["chosen"] - sums["rejected"])).mean()
    assert abs(values["loss"] - by_hand) < 1e-12
