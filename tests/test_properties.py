"""What must hold for any shape and any options, found by hypothesis."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rlfast
from rlfast.kernels.formulas import PAIRS, SCORES
from tests.cases import ALL, DIFFERENTIABLE, Problem, check, f32, few, head_of, interpreted, logits_of, run, targets_of
from tests.numerics import assert_value
from tests.preference_cases import FORMS, PairCase, drawn, hyper_of, read_by, rest_of
from tests.preference_cases import check as check_pairs

OP = "linear_token_logps"  # whose backends both ops have
CALM = settings(
    max_examples=8 if interpreted() else 40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# Links of scores within a range; and those of RPO that are small differences of what is as large as the scores, whose
# rounding is an accident that hypothesis finds (up to twice that of torch, as autograd arranges the same terms).
NARROW = ("odds_ratio", "barrier", "exponential")


@st.composite
def problems(draw, op: str):
    """A call of the op with a shape, a dtype and options of any kind."""
    # Enough rows for a maximum of errors to mean something: hypothesis would find the accident otherwise.
    n, vocab = draw(st.integers(16, 20)), draw(st.integers(64, 1500))
    lead = few(draw(st.sampled_from(((8 * n,), (2, 4 * n), (n, 2, 4)))), draw(st.sampled_from(((3,), (1, 3)))))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    seed = draw(st.integers(0, 2**16))
    if op == "token_logps":
        inputs = {"logits": logits_of(lead, vocab, dtype, seed, draw(st.sampled_from((0.1, 2.0, 30.0))))}
        call = {"inplace_backward": draw(st.booleans())}
    else:
        inputs = head_of(lead, draw(st.integers(8, 80)), vocab, dtype, draw(st.booleans()), seed)
        # Multiples of 1/8 have exact logits in any order of summation: else hypothesis searches for an unlucky order.
        inputs = {name: x if x is None else (x.float() * 8).round().div(8).to(x.dtype) for name, x in inputs.items()}
        call = {"memory_budget": draw(st.sampled_from((0, 1 << 30)))}
    rng = torch.Generator().manual_seed(seed)
    targets = targets_of(lead, vocab, draw(st.sampled_from((0, 2))), seed)
    targets[torch.rand(targets.shape, generator=rng) < draw(st.sampled_from((0.0, 0.2)))] = -100
    options = {
        "temperature": f32(draw(st.floats(0.2, 5.0))),
        "softcap": draw(st.sampled_from((None, 5.0, 30.0))),
        "logit_scale": f32(draw(st.sampled_from((1.0, 0.1, 3.0)))),
        "top_k": draw(st.sampled_from((None, 3))),
    }
    if draw(st.booleans()):
        options["mask"] = torch.rand(lead, generator=rng) < 0.7
    grads = draw(st.sampled_from((("logp",), ("entropy",), DIFFERENTIABLE)))
    return Problem(inputs, targets, options, ALL, grads, call=call)


def hold_at_most(name: str, x, bound: float) -> None:
    """x ≤ bound, but for what the contract allows a value that equals it."""
    bound = torch.full(x.shape, bound, dtype=torch.float64)
    assert_value(name, torch.maximum(x.cpu().double(), bound), bound, bound.float())


# Not the torch backend: it computes log Σp² as the yardstick does, and a search would find the unlucky order of two.
@pytest.mark.backends("reference", "cpu", "triton", "cuda")
@pytest.mark.parametrize("op", ("token_logps", "linear_token_logps"))
def test_any_problem_is_right(backend, device, op):
    @CALM
    @given(problems(op))
    def holds(problem):
        check(problem, backend, device)

    holds()


@CALM
@given(rows=st.integers(1, 6), vocab=st.integers(2, 1500), spread=st.floats(0.0, 300.0), seed=st.integers(0, 999))
def test_what_a_distribution_obeys(backend, device, rows, vocab, spread, seed):
    """Σp = 1, log p ≤ 0, 0 ≤ H ≤ log V, −log V ≤ log Σp² ≤ 0; top-1 is the largest log p."""
    logits = logits_of(rows, vocab, seed=seed, spread=spread)
    every = torch.arange(vocab).expand(rows, vocab)
    if interpreted():
        every = every[:, :4].contiguous()
    problem = Problem({"logits": logits}, every, {"top_k": min(3, vocab)}, ALL, ())
    out, _ = run(problem, backend, device)
    logp = out.logp.cpu()
    assert (logp <= 0).all() and (out.entropy >= 0).all()
    hold_at_most("H", out.entropy, math.log(vocab))
    hold_at_most("−log Σp²", -out.log_sum_sq_probs, math.log(vocab))
    hold_at_most("Σp²", out.log_sum_sq_probs.exp(), 1.0)
    if not interpreted():
        total = logp.double().exp().sum(-1)
        own = torch.log_softmax(logits, -1).double().exp().sum(-1)
        assert_value("Σp", total, torch.ones_like(total), own)
        assert (out.is_top1.sum(-1) == 1).all()
        assert torch.equal(logp.gather(-1, out.topk_ids.cpu()).argmax(-1), torch.zeros(rows).long())


@CALM
@given(offset=st.floats(-1e4, 1e4), seed=st.integers(0, 999))
def test_a_common_offset_changes_nothing_but_lse(backend, device, offset, seed):
    """log p, entropy and gradients of (z + c) are those of z, where z + c is exact."""
    logits = torch.randint(-40, 40, (3, 700), generator=torch.Generator().manual_seed(seed)).float() / 4
    moved = logits + round(offset)
    problem = Problem({"logits": logits}, targets_of(3, 700, seed=seed), {}, ("logp", "entropy"), ("logp", "entropy"))
    here, grads = run(problem, backend, device)
    there, moved_grads = run(
        Problem({"logits": moved}, problem.targets, {}, problem.outputs, problem.grads), backend, device
    )
    for name in ("logp", "entropy"):
        a, b = getattr(there, name).cpu(), getattr(here, name).cpu()
        assert_value(name, a, b.double(), b)
    assert_value("gradient", moved_grads["logits"].cpu(), grads["logits"].cpu().double(), grads["logits"].cpu())


@CALM
@given(
    link=st.sampled_from([link for link in PAIRS if link not in NARROW]),
    score=st.sampled_from(sorted(SCORES)),
    mean=st.booleans(),
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(("f32", "bf16", "f16", "mixed")),
    pairs=st.integers(128, 300),  # enough for a maximum of errors to mean something
    length=st.integers(1, 40),
    tail=st.sampled_from((1.0, 0.25)),
    seed=st.integers(0, 999),
)
def test_any_pairs_are_right(backend, device, link, score, mean, form, dtype, pairs, length, tail, seed):
    pairs, length = few(pairs, 32), few(length, min(length, 9))
    score_hyper = {"alpha": f32(0.4)} if score in ("power", "alpha_divergence") else {}
    parts = (rlfast.Part(link, hyper_of(link, PAIRS), score, score_hyper, mean),)
    objective = rlfast.PreferenceLoss(parts, tail=1.0 if "sum" in form else tail)
    tokens, rest = drawn(pairs, length, dtype, seed), read_by(objective, rest_of(pairs, dtype, seed + 1))
    check_pairs(PairCase(objective, tokens, rest, form), backend, device)


def test_the_poison_works():
    """Memory that nothing wrote is NaN, garbage or True here."""
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
    assert torch.ones(1).new_empty(2).isnan().all() and (torch.empty(2, dtype=torch.int64) < -(1 << 40)).all()
    assert torch.empty(2, dtype=torch.bool).all()
    assert rlfast.token_logps(torch.zeros(2, 3), torch.tensor([0, 1])).logp.isfinite().all()
