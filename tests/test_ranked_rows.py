"""``RankedLoss.rows`` on every backend against the oracle: ranked groups from the tokens of their candidates."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch.autograd import forward_ad

import rlfast
from rlfast.ops.oracle_ranked import words
from rlfast.reference.ranked_loss import ranked_loss as reference
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero
from tests.preference_cases import drawn, packed, summed
from tests.ranked_cases import settings_of

OP = "ranked_loss"
CANDIDATES, LENGTH = 60, 9
ENDS = [0, *(start + end for start in range(0, CANDIDATES, 12) for end in (3, 3, 4, 9, 12))]
# Where the candidates of each group begin and end, and how a call says so.
GROUPS = {"size": (list(range(0, CANDIDATES + 1, 4)), 4), "boundaries": (ENDS, torch.tensor(ENDS))}
FORMS = (("padded", "size"), ("packed", "boundaries"), ("sums", "boundaries"), ("packed", "size"))


class Case(NamedTuple):
    """One call."""

    objective: rlfast.RankedLoss
    tokens: dict  # logp, ref_logp, mask: [C, T]
    rewards: torch.Tensor  # [C]
    form: str = "padded"
    groups: str = "size"


def case_of(name: str, form: str = "padded", groups: str = "size", dtype: str = "f32") -> Case:
    """A row of the table."""
    rewards = (4 * torch.randn(CANDIDATES, generator=torch.Generator().manual_seed(3))).round() / 2
    return Case(rlfast.RANKED[name], drawn(CANDIDATES, LENGTH, dtype)["chosen"], rewards, form, groups)


def arguments(case: Case) -> tuple[dict, torch.Tensor]:
    """(the tokens as the call has them, which of [C, T] they are)."""
    if case.form == "packed":
        found, ends, real = packed(case.tokens)
        return found | {"cu_seqlens": ends}, real
    return (summed(case.tokens) if case.form == "sums" else case.tokens), torch.ones_like(case.tokens["mask"])


def run(case: Case, backend: str, device: str):
    """(output, gradient by the log-probs as the call had them)."""
    given = {{"ref_logp": "ref_logps"}.get(k, k): x.to(device) for k, x in arguments(case)[0].items()}
    leaf = given.pop("logp").detach().requires_grad_()
    given = {k: x for k, x in given.items() if k != "ref_logps" or case.objective.referenced}
    groups = GROUPS[case.groups][1]
    groups = groups.to(device) if isinstance(groups, torch.Tensor) else groups
    with rlfast.use_backend(backend):
        out = case.objective.rows(leaf, groups, rewards=case.rewards.to(device), per_group=True, **given)
    return out, torch.autograd.grad(out.loss, leaf)[0]


def oracle(case: Case, dtype: torch.dtype, seed: int | None = None) -> tuple:
    """(loss, losses, their sizes, gradient by the tokens); a seed shuffles the sums over tokens and over groups."""
    draw, ends = torch.Generator().manual_seed(seed or 0), GROUPS[case.groups][0]
    order = slice(None) if seed is None else torch.randperm(LENGTH, generator=draw)
    rows = torch.arange(len(ends) - 1) if seed is None else torch.randperm(len(ends) - 1, generator=draw)
    if case.form == "sums":
        sums = summed(case.tokens)
        leaf, ref, n = (sums[k].to(dtype) for k in ("logp", "ref_logp", "lengths"))
        s = leaf.requires_grad_()
    else:
        leaf, mask = case.tokens["logp"].to(dtype).requires_grad_(), case.tokens["mask"]
        s, ref = (torch.where(mask, x, 0.0)[:, order].sum(1) for x in (leaf, case.tokens["ref_logp"].to(dtype)))
        n = mask.sum(1).clamp(min=1).to(dtype)
    sizes = [b - a for a, b in pairwise(ends)]
    real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]

    def grouped(x):
        return x.new_zeros(real.shape).masked_scatter(real, x)[rows]

    divisor = None if not case.objective.alpha else torch.where(real[rows], grouped(n), 1.0)
    loss, found = reference(
        grouped(s), grouped(ref) if case.objective.referenced else None, grouped(case.rewards.to(dtype)), divisor,
        real[rows], **words(case.objective.form, settings_of(case.objective)),
    )  # fmt: skip
    (g,) = torch.autograd.grad(loss, leaf)
    back = rows.argsort()
    return loss.detach(), found["losses"][back], found["sizes"]["loss"], found["sizes"]["losses"][back], g


def check(case: Case, backend: str, device: str = "cpu") -> None:
    """Loss, each group's, and the gradient of the tokens."""
    out, gradient = run(case, backend, device)
    truth = oracle(case, torch.float64)
    own = list(zip(*(oracle(case, torch.float32, seed) for seed in (None, 1, 2, 3)), strict=True))
    assert_value("loss", out.loss.detach().cpu(), truth[0], list(own[0]), truth[2])
    assert_value("losses", out.losses.cpu(), truth[1], list(own[1]), truth[3])
    given, real = arguments(case)
    wanted, plain = truth[4], list(own[4])
    if case.form == "packed":
        wanted, plain = wanted[real], [x[real] for x in plain]
    assert gradient.dtype == given["logp"].dtype
    assert_gradient("gradient", gradient.cpu(), wanted, plain)
    if "mask" in given:
        assert_zero("gradient of masked tokens", gradient.cpu()[~given["mask"]])


@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16", "mixed"))
@pytest.mark.parametrize("form, groups", FORMS)
@pytest.mark.parametrize("name", rlfast.RANKED)
def test_every_row(backend, device, name, form, groups, dtype):
    check(case_of(name, form, groups, dtype), backend, device)


@pytest.mark.parametrize("form", ("padded", "packed"))
def test_every_option(backend, device, form):
    """A likelihood beside log-ratios takes both sums of a candidate."""
    case = case_of("dpo_list", form)
    objective = case.objective.with_options(nll=0.5, alpha=0.5, top=2, nll_by_size=True)
    case = case._replace(objective=objective)
    out, gradient = run(case, backend, device)
    real = arguments(case)[1]
    sums = summed({k: x.double() if x.is_floating_point() else x for k, x in case.tokens.items()})
    leaf = sums["logp"].view(-1, 4).requires_grad_()
    with rlfast.use_backend("reference"):
        loss = objective(
            leaf, ref_scores=sums["ref_logp"].view(-1, 4), lengths=sums["lengths"].view(-1, 4),
            rewards=case.rewards.view(-1, 4).double(),
        ).loss  # fmt: skip
    torch.testing.assert_close(out.loss.detach().cpu().double(), loss.detach(), rtol=1e-5, atol=0.0)
    each = torch.where(case.tokens["mask"], torch.autograd.grad(loss, leaf)[0].view(-1, 1), 0.0)
    torch.testing.assert_close(gradient.cpu().double(), each[real] if form == "packed" else each, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", ("padded", "packed"))
def test_garbage_under_the_mask_and_a_candidate_without_tokens(backend, device, form):
    case = case_of("rrhf", form)
    case.tokens["mask"][2] = False
    for name in ("logp", "ref_logp"):
        case.tokens[name] = torch.where(case.tokens["mask"], case.tokens[name], torch.nan)
    case = case._replace(tokens=case.tokens)
    out, gradient = run(case, backend, device)
    assert out.loss.isfinite() and gradient.isfinite().all()
    sums = summed(case.tokens)
    with rlfast.use_backend(backend):
        loss = case.objective(
            sums["logp"].to(device).view(-1, 4), lengths=sums["lengths"].clamp(min=1).to(device).view(-1, 4),
            rewards=case.rewards.to(device).view(-1, 4),
        ).loss  # fmt: skip
    torch.testing.assert_close(out.loss, loss)


def test_packed_is_padded(backend, device):
    """To the bit: the sums are made in double."""
    padded, packed_ = (run(case_of("exo", form), backend, device)[0] for form in ("padded", "packed"))
    assert_same_bits("losses", packed_.losses, padded.losses)


def test_policy_and_reference_in_one_pass(monkeypatch):
    """One launch sums both; another one is the loss."""
    from rlfast.ops import ranked_loss, unpaired_loss

    calls = []
    for op in (ranked_loss, unpaired_loss):
        monkeypatch.setattr(op, "call", lambda *args, name=op.NAME, call=op.call: calls.append(name) or call(*args))
    run(case_of("exo"), "torch", "cpu")
    assert calls == ["unpaired_loss", "ranked_loss"]


def test_ranks_and_order(backend, device):
    """Ranks are rewards with the sign turned; without either the best comes first."""
    case, rows = case_of("plackett_luce"), rlfast.ranked_loss("plackett_luce").rows
    logps, mask = (case.tokens[k].to(device) for k in ("logp", "mask"))
    ranks = torch.arange(CANDIDATES, device=device) % 4
    with rlfast.use_backend(backend):
        losses = [rows(logps, 4, mask=mask, **x).loss for x in ({}, {"ranks": ranks}, {"rewards": -ranks.float()})]
    assert losses[0] == losses[1] == losses[2]


def test_derivatives_that_are_not_there_are_refused(backend, device):
    logps = torch.zeros(4, 3, device=device, requires_grad=True)
    with rlfast.use_backend(backend):
        loss = rlfast.ranked_loss("plackett_luce").rows(logps, 2).loss
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(loss, logps, create_graph=True)[0].sum().backward()
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="ranked_loss: forward-mode"):
            rlfast.ranked_loss("plackett_luce").rows(forward_ad.make_dual(logps.detach(), torch.ones_like(logps)), 2)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("form, groups", FORMS)
@pytest.mark.backends("torch", "cpu")
def test_compiled_without_a_graph_break(backend, device, form, groups):
    torch._dynamo.reset()
    case, results = case_of("exo", form, groups), []
    groups = GROUPS[groups][1]

    def function(logps, ref, rewards, rest):
        return 2 * case.objective.rows(logps, groups, ref_logps=ref, rewards=rewards, **rest).loss

    for one in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        given = dict(arguments(case)[0])
        leaf, ref = given.pop("logp").clone().requires_grad_(), given.pop("ref_logp")
        with rlfast.use_backend(backend):
            loss = one(leaf, ref, case.rewards, given)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits("compiled", b, a)


WRONG = {
    "groups: expected an int that divides 12 candidates, or a tensor of boundaries, got 5": {"groups": 5},
    "groups: expected an int that divides 12 candidates, or a tensor of boundaries, got 0": {"groups": 0},
    "groups: expected 0 = c[0] <= c[1] <= … <= c[B] = 12, got [0, 5]": {"groups": torch.tensor([0, 5])},
    "ranks: expected shape (12,), one a candidate, got (3, 4)": {"ranks": torch.zeros(3, 4)},
    "ranks: expected None beside rewards, got both": {"ranks": torch.zeros(12), "rewards": torch.zeros(12)},
    "ref_logps: expected a tensor: dpo_list needs it, got None": {"ref_logps": None},
    "ref_logps: expected shape (12, 9) like logps, got (12,)": {"ref_logps": torch.zeros(12)},
    "mask: expected shape (12, 9) like logps, got (12,)": {"mask": torch.ones(12)},
    "lengths: expected None beside tokens, which are counted, got a tensor": {"lengths": torch.ones(12)},
    "weights: expected shape (3,), one a group, got (12,)": {"weights": torch.ones(12)},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_named(message):
    given = {"groups": 4, "ref_logps": torch.zeros(12, 9)} | WRONG[message]
    with pytest.raises(ValueError) as error:
        rlfast.ranked_loss("dpo_list").rows(torch.zeros(12, 9), **given)
    assert str(error.value) == message
    with pytest.raises(ValueError, match=r"lengths: expected a tensor \[B\]: rrhf divides by it"):
        rlfast.ranked_loss("rrhf").rows(torch.zeros(12), 4)
    with pytest.raises(ValueError, match="rewards: expected a tensor: exo needs it"):
        rlfast.ranked_loss("exo").rows(torch.zeros(12), 4, ref_logps=torch.zeros(12))
