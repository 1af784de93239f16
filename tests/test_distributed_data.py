"""A batch spread over ranks: normalisers, selections and statistics are those of one process."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist

import rlfast
from rlfast.advantages.group import METHODS
from tests.numerics import assert_gradient, assert_same_bits, assert_value
from tests.rank_batch import GROUP, ROWS, SIZES, STEPS, batch, mine
from tests.rank_pool import sent

LOOK = 80  # bytes an argument: how many rows the others have


# Whitening and means

WHITENINGS = {"default": {}, "openrlhf": {"like": "openrlhf"}, "scaled": {"shift_mean": False, "where": "outside"}}


def normalised(group) -> dict:
    b = {k: mine(group, x) for k, x in batch().items() if k != "sums"}
    weights = mine(group, torch.arange(ROWS * STEPS).reshape(ROWS, STEPS).sin())
    mesh, found = dist.DeviceMesh.from_group(group, "cpu"), {}
    for name, options in WHITENINGS.items():
        x = b["values"].clone().requires_grad_()
        out = rlfast.masked_whiten(x, b["mask"], process_group=mesh, **options)
        found[name] = out.detach(), *torch.autograd.grad((out * weights).sum(), x)
    x = b["values"].clone().requires_grad_()
    out = rlfast.masked_mean(x, b["mask"], process_group=group)
    found["mean"] = out.detach(), *torch.autograd.grad(out, x)
    options = {"gamma": 0.9, "lam": 0.8, "like": "verl", "process_group": group}
    found["gae"] = rlfast.gae(b["values"], b["values"], b["mask"], **options)
    recorded = rlfast.gae(b["values"], b["values"].clone().requires_grad_(), b["mask"], **options)
    found["recorded"] = tuple(x.detach() for x in recorded)
    return found


def on_one(dtype) -> dict:
    """The same of the whole batch."""
    b = batch()
    weights = torch.arange(ROWS * STEPS).reshape(ROWS, STEPS).sin().to(dtype)
    found = {}
    for name, options in WHITENINGS.items():
        x = b["values"].to(dtype).requires_grad_()
        out = rlfast.masked_whiten(x, b["mask"], **options)
        found[name] = out.detach(), *torch.autograd.grad((out * weights).sum(), x)
    x = b["values"].to(dtype).requires_grad_()
    out = rlfast.masked_mean(x, b["mask"])
    found["mean"] = out.detach(), *torch.autograd.grad(out, x)
    values = b["values"].to(dtype)
    with rlfast.use_backend("reference"):
        found["gae"] = found["recorded"] = rlfast.gae(values, values, b["mask"], gamma=0.9, lam=0.8, like="verl")
    return found


@pytest.mark.parametrize("size", SIZES)
def test_whitening_is_over_the_batch_of_all_ranks(ranks, size):
    """Values and gradients, whichever rank has how much; a mesh is as good as its group."""
    found, truth, own = ranks.run(normalised, size=size), on_one(torch.float64), on_one(torch.float32)
    for name in WHITENINGS:
        assert_value(name, torch.cat([x[name][0] for x in found]), truth[name][0], own[name][0])
        assert_gradient(name, torch.cat([x[name][1] for x in found]), truth[name][1], own[name][1])
    for got, _ in (x["mean"] for x in found):
        assert_value("mean", got, truth["mean"][0], own["mean"][0])
    gradient = torch.cat([x["mean"][1] for x in found]) / size  # each rank's loss is the same mean
    assert_gradient("mean", gradient, truth["mean"][1], own["mean"][1])
    for name in ("gae", "recorded"):
        for i in (0, 1):
            assert_value(name, torch.cat([x[name][i] for x in found]), truth[name][i], own[name][i])


# Groups


def calls_of_methods() -> dict:
    """name → (arguments of every sample, options)."""
    b, ids = batch(), torch.arange(ROWS) % 4
    calls = {}
    for method in METHODS:
        given = {"rewards": b["rewards"]}
        given |= {"lengths": b["lengths"]} if method == "opo" else {}
        given |= {"baselines": b["adv"]} if method == "remax" else {}
        calls[method] = given, {"method": method, "group_size": GROUP}
        calls[f"{method}, by id"] = given | {"group_ids": ids, "mask": b["mask"][:, 1]}, {"method": method}
    names = [f"prompt {i % 4}" for i in range(ROWS)]
    calls["by name"] = {"rewards": b["rewards"], "group_ids": names}, {"like": "verl"}
    several = torch.stack((b["rewards"], b["adv"]), 1)
    calls["several"] = (
        {"rewards": several},
        {"group_size": GROUP, "method": "gdpo", "weights": [1.0, 0.5], "like": "trl"},
    )
    calls["double"] = {"rewards": b["rewards"].double()}, {"group_size": ROWS, "method": "rloo"}
    return calls


def baselines(group) -> tuple:
    """(advantages, returns) over a baseline for each token, by ids and in order; None: of the whole batch."""
    b, part = batch(), (lambda x: x) if group is None else (lambda x: mine(group, x))
    rewards, logp, ratio, mask = (part(b[name]) for name in ("values", "logp", "old_logp", "mask"))
    more = {"process_group": group, "ratio": -ratio}
    by_id = rlfast.optimal_token_baseline(
        rewards, logp, logp - 0.5, mask, group_ids=part(torch.arange(ROWS) % 4), **more
    )
    return *by_id, *rlfast.optimal_token_baseline(rewards, logp, logp - 0.5, group_size=GROUP, **more)


def grouped(group) -> dict:
    found = {}
    for name, (given, options) in calls_of_methods().items():
        part = {k: mine(group, x) for k, x in given.items()}
        found[name] = rlfast.group_advantage(**part, **options, process_group=group)
    b = {k: mine(group, x) for k, x in batch().items() if k != "sums"}
    found["statistics"] = rlfast.group_statistics(b["rewards"], group_size=GROUP, process_group=group)
    found["tokens"] = baselines(group)
    found["length"] = rlfast.length_reward(b["lengths"], b["rewards"] > 0, group_size=GROUP, process_group=group)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_groups_may_straddle_ranks(ranks, size):
    """To the bit what one process computes of all samples, by every method."""
    found, b = ranks.run(grouped, size=size), batch()
    for name, (given, options) in calls_of_methods().items():
        got = torch.cat([x[name] for x in found])
        assert_same_bits(name, got, rlfast.group_advantage(**given, **options))
    wanted = rlfast.group_statistics(b["rewards"], group_size=GROUP)
    assert [x["statistics"] for x in found] == [wanted] * size
    wanted = rlfast.length_reward(b["lengths"], b["rewards"] > 0, group_size=GROUP)
    assert torch.equal(torch.cat([x["length"] for x in found]), wanted)
    for i, wanted in enumerate(baselines(None)):
        assert_same_bits(f"a baseline for each token, {i}", torch.cat([x["tokens"][i] for x in found]), wanted)


# Selections


def selected(group) -> dict:
    """What each chooses of this rank's tokens; None: of the whole batch, in one process."""
    b = batch()
    part = (lambda x: x) if group is None else (lambda x: mine(group, x))
    logp, old, adv, mask = (part(b[name]) for name in ("logp", "old_logp", "adv", "mask"))
    found = {}
    for ratio in (1e-9, 0.1, 1.0):
        more = {"ratio": ratio, "process_group": group}
        found["kl", ratio] = rlfast.kl_cov_extra(logp, adv, mask, **more)
        found["clip", ratio] = rlfast.clip_cov_keep(logp, old, adv, mask, low=0.01, seed=3, **more)
    nothing = torch.zeros_like(mask)
    found["none"] = rlfast.kl_cov_extra(logp, adv, nothing, process_group=group)
    for quantile in (0.0, 0.5, 0.8, 1.0):
        found["top", quantile] = rlfast.top_entropy_keep(-logp, mask, quantile=quantile, process_group=group)
    found["top", "none"] = rlfast.top_entropy_keep(-logp, nothing, process_group=group)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_selections_are_of_the_whole_batch(ranks, size):
    """The same tokens as in one process, as many, and the same draw."""
    found, wanted = ranks.run(selected, size=size), selected(None)
    for name, whole in wanted.items():
        assert torch.equal(torch.cat([x[name] for x in found]), whole), name
    assert wanted["kl", 1e-9].sum() == 1 < wanted["kl", 0.1].sum()
    assert (~wanted["clip", 1e-9]).sum() == 1 < (~wanted["clip", 0.1]).sum()


# Statistics and controllers


def tracked(group) -> dict:
    """Of two steps; None: in one process."""
    part = (lambda x: x) if group is None else (lambda x: mine(group, x))
    sums, b = [part(x) for x in batch()["sums"]], batch()
    pair = {} if group is None else {"process_group": group}
    delta, betas, drawn = rlfast.RunningDelta(), rlfast.DynamicBeta(filtered=0.3), rlfast.DynamicBeta(filtered=0.3)
    seen, generator = rlfast.RunningMeanStd(**pair), torch.Generator().manual_seed(5)
    if group is not None and dist.get_rank(group):
        generator.manual_seed(99)  # the first rank's counts
    found = {"z": rlfast.kto_reference_point(sums[0] + 3.0, sums[2], **pair)}
    for step in range(2):
        won = part(b["adv"]) > 0.0
        delta.update(sums[step][won], sums[2 + step][~won], **pair)
        gaps = sums[step] - sums[3]
        found["beta", step] = betas.update(gaps, beta=0.1, **pair)
        found["drawn", step] = drawn.update(gaps, beta=0.1, generator=generator, **pair)
        seen.update(part(b["values"]) + 1e3 * step, part(b["mask"]))
    empty = torch.zeros(0)
    before = betas.state_dict(), delta.state_dict()
    betas.update(empty, beta=0.1, **pair), delta.update(empty, empty, **pair)
    assert before == (betas.state_dict(), delta.state_dict())
    found["state"] = torch.tensor([*betas.state_dict().values(), *delta.state_dict().values()], dtype=torch.float64)
    found["seen"] = torch.stack((seen.mean, seen.std, seen.count))
    kl, entropy = rlfast.AdaptiveKL(0.2, target=0.1, horizon=1000, **pair), rlfast.AdaptiveEntropy(0.01, **pair)
    measured = part(torch.linspace(0.05, 0.6, ROWS))
    n = len(measured)
    kl.update(measured.mean() if n else torch.nan, n), entropy.update(measured.mean() if n else 0.0, torch.tensor(n))
    found["controllers"] = torch.stack((kl.value, entropy.coef))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_what_is_tracked_is_of_all_ranks(ranks, size):
    """β-DPO's filter and its draw too; a rank or a batch without pairs changes nothing."""
    found, wanted = ranks.run(tracked, size=size), tracked(None)
    for name, whole in wanted.items():
        if name[0] in ("beta", "drawn"):
            for i in (0, 1):
                torch.testing.assert_close(torch.cat([x[name][i] for x in found]), whole[i], msg=str(name))
            continue
        for x in found:
            torch.testing.assert_close(x[name], whole, msg=str(name))
            assert torch.equal(x[name], found[0][name]), f"{name}: the same bits on every rank"
    assert wanted["drawn", 0][1].sum() == wanted["beta", 0][1].sum() == ROWS - 3


def volumes(group) -> dict:
    """Bytes that a rank sends, forward and backward."""
    x, found = torch.randn(6, 5).requires_grad_(), {}
    pair = {"process_group": group}
    objects = rlfast.RunningDelta(), rlfast.DynamicBeta(), rlfast.RunningMeanStd(**pair)
    kl, vector = rlfast.AdaptiveKL(0.1, target=1.0, horizon=10, **pair), x.detach()[:, 0]
    calls = {
        "share": lambda: rlfast.distributed.share("token_mean", x, **pair),
        "length": lambda: rlfast.distributed.share("seq_sum_over_max_len", x, **pair),
        "mean": lambda: rlfast.masked_mean(x, **pair),
        "whiten": lambda: rlfast.masked_whiten(x, **pair),
        "gae": lambda: rlfast.gae(vector, x.detach(), gamma=1.0, lam=1.0, whiten=True, **pair),
        "groups": lambda: rlfast.group_advantage(vector, group_size=2, **pair),
        "z": lambda: rlfast.kto_reference_point(vector, vector, **pair),
        "delta": lambda: objects[0].update(vector, vector, **pair),
        "beta": lambda: objects[1].update(vector, 0.1, **pair),
        "seen": lambda: objects[2].update(vector),
        "kl": lambda: kl.update(0.1, 3),
        "kl_cov": lambda: rlfast.kl_cov_extra(x, vector, ratio=0.1, **pair),
        "top": lambda: rlfast.top_entropy_keep(x, **pair),
        "rows": lambda: rlfast.distributed.gather_batch(x, **pair)[0],
    }
    for name, call in calls.items():
        with sent() as forward:
            out = call()
        with sent() as backward:
            if isinstance(out, torch.Tensor) and out.requires_grad:
                out.sum().backward()
        found[name] = forward, backward
    return found


def test_bytes_on_the_wire(ranks):
    """What docs/distributed.md says, of 30 elements or 6 rows on each of two ranks."""
    wanted = {
        "share": ([8], []), "length": ([24], []), "mean": ([24], [48]), "whiten": ([32], [64]), "gae": ([32], []),
        "groups": ([5 * LOOK, 24], []), "z": ([16], []), "delta": ([32], []), "beta": ([LOOK, 24], []),
        "seen": ([32], []), "kl": ([8], []), "kl_cov": ([24, LOOK, 7 * 4], []), "top": ([LOOK, 120], []),
        "rows": ([LOOK + 8, 120], [240]),
    }  # fmt: skip
    assert ranks.run(volumes, size=2) == [wanted] * 2


def documented(group) -> int:
    """The examples of the docstrings, on every rank."""
    from tests.test_docs import run_examples

    own = rlfast.distributed.share, rlfast.distributed.gather_batch, rlfast.distributed.shifted_targets
    return sum(run_examples(inspect.getdoc(x), x.__name__, group=group) for x in own)


def test_docstring_examples_run(ranks):
    assert min(ranks.run(documented, size=2)) > 8
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rlfast.distributed.nothing  # noqa: B018
