"""``ranked_loss`` on every backend against the oracle: rows, forms, layouts, and where losses go wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import rlfast
from rlfast import backends, ranked
from rlfast.kernels.formulas import RANKINGS
from rlfast.ops import ranked_loss as op
from tests.cases import f32, few
from tests.numerics import assert_same_bits, assert_value, assert_zero
from tests.ranked_cases import FORMS, RankedCase, arguments, check, drawn, ranked_case, run, settings_of, with_groups
from tests.shared import check_replay, far_apart, skip_unless_memory

OP = "ranked_loss"
ROWS = tuple(rlfast.RANKED)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_every_row(backend, device, name, form):
    check(ranked_case(name, form), backend, device)


@pytest.mark.parametrize("dtype", ("bf16", "f16", "mixed"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_every_dtype(backend, device, name, form, dtype):
    check(ranked_case(name, form, dtype), backend, device)


@pytest.mark.parametrize("form", RANKINGS)
def test_every_option(backend, device, form):
    """All of them at once: log-ratios over powers of lengths, a temperature, two places, the likelihood."""
    objective = rlfast.RankedLoss(
        form, beta=f32(0.6), alpha=0.5, tau=f32(0.4), top=2, nll=f32(0.3), nll_by_size=True, referenced=True
    )
    check(ranked_case(objective, "packed"), backend, device)


@pytest.mark.parametrize("size", (2, 3, 4, 5, 8, 9, 17, 64))
def test_every_size(backend, device, size):
    check(ranked_case("plackett_luce", size=size), backend, device)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.backends("torch", "cpu")
def test_many_candidates(backend, device, name):
    """A sum of hundreds of terms; the C++ kernel sorts them another way."""
    case = ranked_case(name, size=200)
    groups = {k: x[:5] for k, x in case.groups.items()}
    check(RankedCase(case.objective, groups), backend, device)


@pytest.mark.parametrize("reduce", ("mean", "sum"))
@pytest.mark.parametrize("count", (None, 17.0, "tensor"))
def test_the_normaliser(backend, device, reduce, count):
    count = {} if count is None else {"num_items": torch.tensor(17.0) if count == "tensor" else count}
    objective = rlfast.ranked_loss("all_pairs", reduce=reduce)
    case = ranked_case(objective, world_size=4, accumulation=2, **count)
    check(replace(case, upstream=0.375), backend, device)


@pytest.mark.parametrize("form", FORMS)
def test_ranks_and_positions(backend, device, form):
    """Ranks are rewards with the sign turned; without either the best comes first."""
    case = ranked_case("plackett_luce", form)
    ranks = torch.argsort(torch.argsort(case.groups["rewards"], descending=True)) + 1
    by_ranks = with_groups(case, rewards=None, ranks=ranks)
    check(by_ranks, backend, device)
    by_rewards = with_groups(case, rewards=-ranks.float())
    assert_same_bits("losses", run(by_ranks, backend, device)[0].losses, run(by_rewards, backend, device)[0].losses)
    check(with_groups(case, rewards=None), backend, device)


def test_ties(backend, device):
    """Of equal rewards the first one is the better one of a sequence, and none of a pair."""
    scores = torch.tensor([[0.5, -1.0, 2.0], [2.0, 0.5, -1.0]])
    ties = RankedCase(rlfast.RANKED["plackett_luce"], {"scores": scores, "rewards": torch.zeros(2, 3)})
    in_order = with_groups(ties, rewards=None)
    assert_same_bits("losses", run(ties, backend, device)[0].losses, run(in_order, backend, device)[0].losses)
    out, gradient = run(replace(ties, objective=rlfast.RANKED["all_pairs"]), backend, device)
    assert out.loss == 0 and out.metrics["accuracy"] == 0 and out.metrics["groups"] == 2
    assert_zero("gradient", gradient)


GOLDEN = {"plackett_luce": 1.251552, "all_pairs": 0.227613, "best_of_k": 0.495182}
# Of S = −40, −55, S_ref = −42, −50, 20 and 25 tokens, by the rewards: D = 2, −5; q = (1, 0) where r is far apart.
PAIRS = (
    ("dpo_list", (1.0, 0.0), 0.403186),  # DPO's
    ("exo", (math.log(1 - 1e-3), math.log(1e-3)), 1.657292),  # EXO-pair's, ε = 1e-3
    ("info_nca", (0.0, -1e4), 0.403186),  # DPO's
    ("nca", (0.0, -1e4), 1.234247),  # NCA-pair's
    ("rrhf", (1.0, 0.0), 40.0),  # p = −2, −2.2 are in order: the NLL is left
    ("rrhf", (0.0, 1.0), 55.2),
    ("pro", (1.0, 0.0), 2.598139),  # log(1 + e^−.2) + .05·40
)


@pytest.mark.parametrize(("name", "rewards", "value"), PAIRS)
def test_golden_pairs(backend, device, name, rewards, value):
    groups = {
        "scores": [-40.0, -55.0], "ref_scores": [-42.0, -50.0], "rewards": rewards, "lengths": [20, 25],
    }  # fmt: skip
    case = RankedCase(rlfast.RANKED[name], {k: torch.tensor([x]) for k, x in groups.items()})
    case = case if case.objective.referenced else with_groups(case, ref_scores=None)
    out, _ = run(case, backend, device)
    assert abs(out.loss.item() - value) < 2e-6 * max(1.0, value)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(backend, device, name):
    """shared/losses.md, of s = [2, 1, .5, −1]."""
    with rlfast.use_backend(backend):
        out = rlfast.ranked_loss(name)(torch.tensor([[2.0, 1.0, 0.5, -1.0]], device=device))
    assert abs(out.loss.item() - GOLDEN[name]) < 1e-6
    assert out.metrics.as_dict() | {"loss": 0} == {
        "loss": 0, "groups": 1, "candidates": 4, "accuracy": 1, "best_reward": 0, "best_score": 2,
    }  # fmt: skip


def test_two_candidates_are_a_pair(backend, device):
    """DPO by its list, Bradley–Terry by its pairs."""
    groups = drawn(9, 2)
    s, ref = groups["scores"].to(device), groups["ref_scores"].to(device)
    with rlfast.use_backend(backend):
        by_list = rlfast.ranked_loss("dpo_list", beta=0.1)(s, ref_scores=ref).loss
        by_pairs = rlfast.RankedLoss("bradley_terry", beta=0.1, referenced=True)(s, ref_scores=ref).loss
    x = 0.1 * ((s - ref)[:, 0] - (s - ref)[:, 1]).double()
    truth = torch.nn.functional.softplus(-x).mean().cpu()
    for loss in (by_list, by_pairs):
        assert_value("loss", loss.cpu(), truth, torch.nn.functional.softplus(-x.float()).mean().cpu())


@pytest.mark.parametrize("kind", ("far apart", "one far above", "equal", "nearly equal"))
@pytest.mark.parametrize("name", ROWS)
def test_extreme(backend, device, name, kind):
    """Scores of ±1e4, and equal ones."""
    x = {
        "far apart": [1e4, -1e4, 0.0, 9e3],
        "one far above": [1e4, 0.0, 1.0, 2.0],
        "equal": [3.0, 3.0, 3.0, 3.0],
        "nearly equal": [3.0, 3.0000002, 3.0, 2.9999998],
    }[kind]
    scores = torch.tensor([x, x[::-1], x[1:] + x[:1]])
    groups = {"scores": scores, "rewards": torch.tensor([[3.0, 1.0, 2.0, 0.5]] * 3), "lengths": torch.ones(3, 4)}
    objective = rlfast.RANKED[name]
    groups |= {"ref_scores": torch.zeros(3, 4)} if objective.referenced else {}
    check(RankedCase(objective, groups), backend, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ROWS)
def test_garbage_under_the_mask(backend, device, name, form):
    """NaN, −inf and inf in what does not count."""
    case = ranked_case(name, form)
    mask, clean = case.groups["mask"], run(case, backend, device)
    for garbage in (torch.nan, -torch.inf, torch.inf):
        dirty = {k: x.masked_fill(~mask, garbage) for k, x in case.groups.items() if x.dtype.is_floating_point}
        out, gradient = run(with_groups(case, **dirty), backend, device)
        assert_same_bits("losses", out.losses, clean[0].losses)
        assert_same_bits("gradient", gradient, clean[1])


@pytest.mark.parametrize("field", ("scores", "rewards"))
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.backends("torch", "cpu", "triton")
def test_a_nan_stays_in_its_group(backend, device, name, field):
    """No comparison hides it, and the other groups are what they were."""
    case = ranked_case(name)
    clean, gradient = run(case, backend, device)
    dirty = case.groups[field].clone()
    at = int(case.groups["mask"][4].int().argmax())
    dirty[4, at] = torch.nan
    out, others = run(with_groups(case, **{field: dirty}), backend, device)
    keep = torch.arange(out.losses.shape[0]) != 4
    assert out.loss.isnan() and out.losses[4].isnan() and others[4, at].isnan()
    assert_same_bits("the others", out.losses.cpu()[keep], clean.losses.cpu()[keep])
    assert_same_bits("their gradients", others.cpu()[keep], gradient.cpu()[keep])


def test_a_group_of_weight_0_has_no_effect(backend, device):
    case = ranked_case("plackett_luce")
    case.groups["scores"][2] = torch.inf
    out, gradient = run(case, backend, device)
    assert out.loss.isfinite() and gradient.isfinite().all()
    assert_zero("its gradient", gradient[2])


@pytest.mark.parametrize("name", ROWS)
def test_small_groups_count_as_0(backend, device, name):
    """Groups of one candidate, or none, stay in the number of groups."""
    case = ranked_case(name)
    case.groups["mask"][:] = torch.arange(6) == 2
    case.groups["mask"][3] = False
    out, gradient = run(case, backend, device)
    assert out.loss == 0 and out.metrics["groups"] == 0 and out.metrics["candidates"] == 0
    assert_zero("gradient", gradient), assert_zero("losses", out.losses)


@pytest.mark.parametrize("shape", ((0, 4), (3, 0), (0, 0), (3, 1)))
@pytest.mark.parametrize("name", ("plackett_luce", "nca"))
def test_empty_batches(backend, device, name, shape):
    groups = {k: torch.zeros(shape) for k in ("scores", "rewards", "ref_scores")}
    out, gradient = run(RankedCase(rlfast.RANKED[name], groups), backend, device)
    assert out.loss == 0 and gradient.shape == shape and out.losses.shape == shape[:1]
    assert_zero("losses", out.losses), assert_zero("gradient", gradient), assert_zero("metrics", out.metrics.values)


def test_an_empty_packed_batch(backend, device):
    with rlfast.use_backend(backend):
        for ends in ([0], [0, 0, 0]):
            scores = torch.zeros(0, device=device, requires_grad=True)
            out = rlfast.ranked_loss("plackett_luce")(scores, cu_seqlens=torch.tensor(ends, device=device))
            out.loss.backward()
            assert out.loss == 0 and scores.grad.shape == (0,)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.backends("reference", "cpu", "triton")
def test_packed_is_padded(backend, device, name):
    """To the bit, and in C++ whatever the width of the padding; torch sums rows of another length in another order."""
    padded, packed = (run(ranked_case(name, form), backend, device)[0] for form in FORMS)
    assert_same_bits("losses", packed.losses, padded.losses)
    case = ranked_case(name)
    wide = {k: torch.nn.functional.pad(x, (0, 5)) for k, x in case.groups.items()}
    if backend == "cpu":
        assert_same_bits("losses", run(with_groups(case, **wide), backend, device)[0].losses, padded.losses)
    check(with_groups(case, **wide), backend, device)


@pytest.mark.parametrize("name", ("plackett_luce", "all_pairs", "exo"))
def test_the_same_bits_run_after_run(backend, device, name, threads):
    case = ranked_case(name)
    groups = {k: x.repeat(few(100, 3), 1) for k, x in case.groups.items()}
    case = RankedCase(case.objective, groups)
    first, gradient = run(case, backend, device)
    for count in (1, 2) * few(3, 1):
        if backend == "cpu":
            threads(count)
        again, other = run(case, backend, device)
        assert_same_bits("metrics", again.metrics.values, first.metrics.values)
        assert_same_bits("gradient", other, gradient)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.backends("cpu")
def test_every_isa(backend, device, name):
    for isa in backends.isas():
        with backends.use_isa(isa):
            check(ranked_case(name), backend, device)


def test_strides(backend, device):
    """Transposed, sliced and expanded arguments."""
    case = ranked_case("exo")
    wide = {k: x.T.contiguous().T for k, x in case.groups.items()}
    check(with_groups(case, **wide), backend, device)
    spread = {k: torch.stack((x, x), 2)[:, :, 0] for k, x in case.groups.items()}
    case = replace(case, rest={"weights": torch.ones(()).expand(case.rest["weights"].shape)})
    check(with_groups(case, **spread), backend, device)
    packed = arguments(replace(case, form="packed"))
    spread = {k: x if k == "cu_seqlens" else torch.stack((x, x), 1)[:, 0] for k, x in packed.items()}
    with rlfast.use_backend(backend):
        a, b = (
            case.objective(x["scores"].to(device), **{k: y.to(device) for k, y in x.items() if k != "scores"}).loss
            for x in (packed, spread)
        )
    assert_same_bits("loss", b, a)


@pytest.mark.backends("reference", "torch")
def test_float64(backend, device):
    """All digits of it."""
    for name in ROWS:
        case = ranked_case(name)
        case = with_groups(case, **{k: x.double() for k, x in case.groups.items() if x.dtype == torch.float32})
        case = replace(case, rest={"weights": case.rest["weights"].double()})
        out, _ = run(case, backend, device)
        with rlfast.use_backend("reference"):
            x = case.groups
            rest = {k: y for k, y in x.items() if k != "scores"}
            truth = case.objective(x["scores"], **rest, **case.rest).loss
        assert out.loss.dtype == torch.float64 and abs(out.loss - truth) <= 1e-12 * max(1.0, abs(truth))


def test_second_backward_and_second_derivative(backend, device):
    leaf = drawn(5, 4)["scores"].to(device).requires_grad_()
    with rlfast.use_backend(backend):
        loss = rlfast.ranked_loss("plackett_luce")(leaf).loss
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert_same_bits("gradient", again, once)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (g,) = torch.autograd.grad(loss, leaf, create_graph=True)
        g.sum().backward()


def test_forward_mode_is_refused(backend, device):
    scores = torch.zeros(2, 3, device=device)
    with rlfast.use_backend(backend), forward_ad.dual_level():
        dual = forward_ad.make_dual(scores, torch.ones_like(scores))
        with pytest.raises(NotImplementedError, match="ranked_loss: forward-mode"):
            rlfast.ranked_loss("plackett_luce")(dual)


@pytest.mark.backends("triton")
def test_more_candidates_than_a_tile_holds(backend, device):
    """The limit is named; without a request torch takes them."""
    scores = torch.zeros(2, 65, device=device)
    with (
        rlfast.use_backend(backend),
        pytest.raises(RuntimeError, match=r"'triton' cannot run ranked_loss: scores: expected at most 64 .* got 65"),
    ):
        rlfast.ranked_loss("plackett_luce")(scores)
    assert rlfast.ranked_loss("plackett_luce")(scores).loss.isfinite()
    with rlfast.use_backend(backend), pytest.raises((RuntimeError, ValueError), match=r"at most 64 .* got 65"):
        ends = torch.tensor([0, 65, 130], device=device)
        rlfast.ranked_loss("plackett_luce")(scores.flatten(), cu_seqlens=ends, max_candidates=65)


@pytest.mark.backends("triton")
def test_a_group_larger_than_its_bound(backend, device, monkeypatch):
    """On a GPU nobody counts the candidates of a packed group: its loss is NaN, and nothing is read beyond the tile."""
    from rlfast.kernels import ranked_loss as kernel

    scores, ends = torch.zeros(9, device=device), torch.tensor([0, 3, 9], device=device)
    monkeypatch.setattr(kernel, "most_of", lambda groups, most, limit: 4)
    with rlfast.use_backend(backend):
        out = rlfast.ranked_loss("plackett_luce")(scores, cu_seqlens=ends, per_group=True)
    assert out.losses.isnan().tolist() == [False, True]


WRONG = {
    "scores: expected shape [P, K], or [N] with cu_seqlens, got (4,)": {"scores": torch.zeros(4)},
    "ranks: expected shape (2, 3) like scores, got (2, 4)": {"ranks": torch.zeros(2, 4)},
    "ranks: expected None beside rewards, got both": {"ranks": torch.zeros(2, 3), "rewards": torch.zeros(2, 3)},
    "rewards: expected a tensor that needs no gradient, got requires_grad=True": {
        "rewards": torch.zeros(2, 3, requires_grad=True)
    },
    "mask: expected shape (2, 3) like scores, got (3,)": {"mask": torch.ones(3)},
    "weights: expected shape (2,), one a group, got (3,)": {"weights": torch.ones(3)},
    "max_candidates: expected an int ≥ 1, or None, got 0": {
        "scores": torch.zeros(4), "cu_seqlens": torch.tensor([0, 4]), "max_candidates": 0
    },
    "cu_seqlens: expected 0 = c[0] <= c[1] <= … <= c[B] = 4, got [0, 5]": {
        "scores": torch.zeros(4), "cu_seqlens": torch.tensor([0, 5])
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    given = {"scores": torch.zeros(2, 3)} | WRONG[message]
    with pytest.raises(ValueError) as error:
        rlfast.ranked_loss("plackett_luce")(given.pop("scores"), **given)
    assert str(error.value) == message


def test_wrong_options():
    scores = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"name: expected one of plackett_luce, all_pairs, .*, got 'listmle'"):
        rlfast.ranked_loss("listmle")
    with pytest.raises(TypeError, match="gamma: expected an option of exo: alpha, beta"):
        rlfast.ranked_loss("exo", gamma=1.0)
    with pytest.raises(ValueError, match="tau: expected a finite float > 0, got 0"):
        rlfast.ranked_loss("exo", tau=0)
    with pytest.raises(ValueError, match="top: expected an int ≥ 1, or None, got 0"):
        rlfast.ranked_loss("plackett_luce", top=0)
    with pytest.raises(ValueError, match="rewards: expected a tensor: info_nca needs it, got None"):
        rlfast.ranked_loss("info_nca")(scores, ref_scores=scores)
    with pytest.raises(ValueError, match="ref_scores: expected a tensor: exo needs it, got None"):
        rlfast.ranked_loss("exo")(scores, rewards=scores)
    with pytest.raises(ValueError, match="lengths: expected a tensor: rrhf divides by it, got None"):
        rlfast.ranked_loss("rrhf")(scores, rewards=scores)
    with pytest.raises(TypeError, match="scores: expected dtype float32 or"):
        rlfast.ranked_loss("plackett_luce")(scores.long())


def op_arguments(name: str, packed: bool, backend: str, device: str, grad: bool = False) -> tuple:
    """What the public function hands to the op."""
    case = ranked_case(name, "packed" if packed else "padded")
    given = {k: x.to(device) for k, x in arguments(case).items()} | {"weights": case.rest["weights"].to(device)}
    given["scores"].requires_grad_(grad)
    groups = ranked.checked(ranked.Given(*(given.get(n) for n in ranked.Given._fields)), case.objective)
    most = 0 if packed else given["scores"].shape[1]
    return (*groups, case.objective.form, list(settings_of(case.objective)), 0, most, [True, True], backend)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("plackett_luce", "pro"))
@pytest.mark.parametrize("packed", (False, True), ids=FORMS)
@pytest.mark.backends("torch", "cpu")
def test_opcheck(backend, device, name, packed):
    torch.library.opcheck(op.op, op_arguments(name, packed, backend, device, grad=True))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("packed", (False, True), ids=FORMS)
def test_the_fake_kernel_agrees(backend, device, packed):
    args = op_arguments("pro", packed, backend, device)
    real = op.op(*args)
    with FakeTensorMode() as mode:
        fake = op.op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("plackett_luce", "exo", "rrhf"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.backends("torch", "cpu")
def test_compiled_without_a_graph_break(backend, device, name, form):
    torch._dynamo.reset()
    case, results = ranked_case(name, form), []

    def function(scores, given):
        out = case.objective(scores, **given)
        return 2 * out.loss, out.metrics.values

    for one in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        given = {k: x.clone().to(device) for k, x in arguments(case).items()}
        leaf = given.pop("scores").requires_grad_()
        with rlfast.use_backend(backend):
            loss, metrics = one(leaf, given)
        loss.backward()
        results.append((loss.detach(), metrics, leaf.grad))
    for a, b in zip(*results, strict=True):
        assert_same_bits("compiled", b, a)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu", "triton")
def test_row_11_rows_2_31_elements_apart(backend, device):
    skip_unless_memory(device, 8)
    groups = drawn(4, 6, "bf16")
    near, found = [groups[k][2:].to(device) for k in ("scores", "ref_scores", "rewards", "mask")], []
    for leaf, ref, rewards, mask in (near, far_apart(*near)):
        leaf = leaf.detach().requires_grad_()
        with rlfast.use_backend(backend):
            loss = rlfast.ranked_loss("exo")(leaf, ref_scores=ref, rewards=rewards, mask=mask).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for name, one, other in zip(("loss", "gradient"), *found, strict=True):
        assert_same_bits(name, other, one)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.backends("triton")
def test_in_a_cuda_graph(backend, device, form):
    case = ranked_case("exo", form)
    given = {k: x.to(device) for k, x in arguments(case).items()}
    leaf = given.pop("scores").requires_grad_()

    def step():
        loss = case.objective(leaf, **given).loss
        return loss, *torch.autograd.grad(loss, leaf)

    with rlfast.use_backend(backend):
        check_replay(step, leaf)
