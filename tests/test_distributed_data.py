"""A batch spread over ranks: losses, normalisers, selections and statistics are those of one process."""

from __future__ import annotations

import functools
import inspect
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import rlfast
from rlfast.advantages.group import METHODS
from rlfast.distributed import ranks as ranks_module
from tests.numerics import assert_gradient, assert_same_bits, assert_value
from tests.rank_pool import sent

ROWS, STEPS, GROUP = 12, 9, 3
SIZES = (2, 4)
LOOK = 80  # bytes an argument: how many rows the others have
EDGES = {2: [0, 7, ROWS], 4: [0, 5, 5, 10, ROWS]}  # the ranks' rows: not as many each, and none on one


def mine(group, x):
    """This rank's rows of a tensor or a list of the whole batch."""
    rank, edges = dist.get_rank(group), EDGES[dist.get_world_size(group)]
    return x[edges[rank] : edges[rank + 1]] if isinstance(x, torch.Tensor | list) else x


@functools.cache
def batch() -> dict:
    """What a step has, the same in every process."""
    draw = torch.Generator().manual_seed(4)
    rewards = torch.randint(3, (ROWS,), generator=draw).float()
    lengths = torch.randint(1, STEPS + 1, (ROWS,), generator=draw)
    lengths[4] = 0
    return {
        "logp": -torch.rand(ROWS, STEPS, generator=draw) - 0.1,
        "old_logp": -torch.rand(ROWS, STEPS, generator=draw) - 0.1,
        "adv": torch.randn(ROWS, generator=draw),
        "mask": torch.arange(STEPS) < lengths.unsqueeze(1),
        "values": torch.randn(ROWS, STEPS, generator=draw) + 3.0,
        "rewards": rewards,
        "lengths": lengths.clamp(min=1),
        "sums": torch.randn(4, ROWS, generator=draw) - 20.0,
    }


def mean_of(losses):
    """What a trainer makes of the ranks' losses or gradients."""
    return sum(losses) / len(losses)


# Losses

OBJECTIVES = {
    "dapo": {}, "grpo": {"beta": 0.0}, "dr_grpo": {}, "gspo": {}, "reinforce": {"reduce": "seq_mean_token_sum"},
    "ppo": {"reduce": "token_sum"}, "cispo": {"reduce": "seq_mean_token_mean", "count_empty": True},
}  # fmt: skip


def losses(group, dtype) -> dict:
    """(loss, gradient) of this rank's rows by each objective, padded and packed."""
    b, found = {k: mine(group, x) for k, x in batch().items() if k != "sums"}, {}
    for name, options in OBJECTIVES.items():
        objective = rlfast.loss(name, **options)
        share = rlfast.distributed.share(objective, b["mask"], process_group=group)
        call = {"adv": b["adv"].to(dtype), "old_logp": b["old_logp"].to(dtype), "mask": b["mask"]}
        logp = b["logp"].to(dtype).requires_grad_()
        loss = objective(logp, **call, **share._asdict()).loss
        found[name] = loss.detach(), *torch.autograd.grad(loss, logp)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_the_loss_of_ranks_is_that_of_one(ranks, size):
    """In values and gradients, which trainers average; a rank without rows takes part."""
    found, b = ranks.run(losses, torch.float32, size=size), batch()
    for name, options in OBJECTIVES.items():
        objective = rlfast.loss(name, **options)
        one = []
        for dtype in (torch.float64, torch.float32):
            logp = b["logp"].to(dtype).requires_grad_()
            call = {k: b[k].to(dtype) for k in ("adv", "old_logp")} | {"mask": b["mask"]}
            with rlfast.use_backend("reference"):
                loss = objective(logp, **call).loss
            one.append((loss.detach(), *torch.autograd.grad(loss, logp)))
        (truth, gradient), (own, own_gradient) = one
        value = mean_of([x[name][0].double() for x in found]).float()
        size_of_terms = objective(b["logp"], **call | {"adv": b["adv"].abs()}).loss.double().abs()
        assert_value(name, value, truth, own, size=size_of_terms)
        got = torch.cat([x[name][1] for x in found]) / size
        assert_gradient(name, got, gradient, own_gradient)


def shares(group) -> dict:
    """n by everything that is counted."""
    share = functools.partial(rlfast.distributed.share, process_group=group)
    mask = mine(group, batch()["mask"])
    lengths = mask.sum(-1)
    packed, ends = mask[mask], torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    pairs = rlfast.preference_loss("dpo")
    return {
        "tokens": share("token_mean", mask), "micro-batches": share("token_mean", [mask, mask.int()]),
        "sequences": share("seq_mean_token_mean", mask), "packed": share("seq_mean_token_sum", packed, cu_seqlens=ends),
        "empty": share(rlfast.loss("grpo", count_empty=True), mask), "sum": share("token_sum", mask),
        "empty packed": share(rlfast.loss("grpo", count_empty=True), packed, cu_seqlens=ends),
        "pairs": share(pairs, 2 + dist.get_rank(group)), "sum of pairs": share(pairs.with_options(reduce="sum"), 3),
        "nothing": share("token_mean", torch.zeros(1, 2)), "rewards": share(rlfast.reward_loss("bradley_terry"), 2),
    }  # fmt: skip


def test_what_is_counted(ranks):
    tokens = float(batch()["mask"].sum())
    wanted = {
        "tokens": tokens, "micro-batches": 2 * tokens, "sequences": ROWS - 1.0, "packed": ROWS - 1.0,
        "empty": float(ROWS), "empty packed": float(ROWS), "sum": 1.0, "pairs": 14.0, "sum of pairs": 1.0,
        "nothing": 1.0, "rewards": 8.0,
    }  # fmt: skip
    for found in ranks.run(shares, size=4):
        assert {k: x.num_items.item() for k, x in found.items()} == wanted
        assert {x.world_size for x in found.values()} == {4}


def others(group) -> dict:
    """(loss, gradient) of losses of other kinds; None: of the whole batch, in one process."""
    b = {k: x if group is None else mine(group, x) for k, x in batch().items() if k != "sums"}
    sums = [x if group is None else mine(group, x) for x in batch()["sums"]]
    pair = {} if group is None else {"process_group": group}

    def shared(objective, counted):
        return {} if group is None else rlfast.distributed.share(objective, counted, **pair)._asdict()

    n, found, leaf = len(sums[0]), {}, [x.clone().requires_grad_() for x in sums[:2]]
    dpo, kto = rlfast.preference_loss("dpo", reference_free=True), rlfast.unpaired_loss("kto", beta=0.5)
    bradley_terry, z = rlfast.reward_loss("bradley_terry"), rlfast.kto_reference_point(sums[2] + 1.0, sums[3], **pair)
    values, clip = b["values"].clone().requires_grad_(), {"returns": b["logp"], "mask": b["mask"]}
    hidden = b["values"].unsqueeze(-1).repeat(1, 1, 8).requires_grad_()
    head, dapo = torch.linspace(-1.0, 1.0, 16 * 8).sin().reshape(16, 8), rlfast.loss("dapo")
    ids, call = b["mask"].long(), {"adv": b["adv"], "mask": b["mask"], **shared(dapo, b["mask"])}
    calls = {
        "dpo": (dpo(*leaf, **shared(dpo, n)), leaf[0]),
        "kto": (kto(leaf[0], sums[0] > -20, ref_logps=sums[2], shared=z, **shared(kto, n)), leaf[0]),
        "rewards": (bradley_terry(*leaf, **shared(bradley_terry, n)), leaf[1]),
        "values": (rlfast.value_loss(values, None, clip=None, **clip, **shared("token_mean", b["mask"])), values),
        "linear": (dapo.linear(hidden, head, ids, **call), hidden),
    }
    for name, (out, x) in calls.items():
        found[name] = out.loss.detach(), *torch.autograd.grad(out.loss, x)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_other_losses_of_ranks_are_those_of_one(ranks, size):
    """Pairs, responses, rewards, values, and from hidden states."""
    found, wanted = ranks.run(others, size=size), others(None)
    for name, (loss, gradient) in wanted.items():
        torch.testing.assert_close(mean_of([x[name][0] for x in found]), loss, msg=name)
        torch.testing.assert_close(torch.cat([x[name][1] for x in found]) / size, gradient, msg=name)


def aot(group):
    chosen, rejected, ref_chosen, ref_rejected = (mine(group, x) for x in batch()["sums"])
    own = [x.clone().requires_grad_() for x in (chosen, rejected)]
    whole = rlfast.distributed.gather_batch(*own, ref_chosen, ref_rejected, None, process_group=group)
    assert whole[4] is None
    loss = rlfast.preference_loss("aot", beta=0.3)(
        *whole[:2], ref_chosen_logps=whole[2], ref_rejected_logps=whole[3]
    ).loss
    return loss.detach(), *torch.autograd.grad(loss, own)


@pytest.mark.parametrize("size", SIZES)
def test_aot_sorts_the_whole_batch(ranks, size):
    """To the bit: every rank sees all pairs; and the mean of the ranks' gradients is the gradient."""
    sums = batch()["sums"]
    chosen, rejected = (x.clone().requires_grad_() for x in sums[:2])
    loss = rlfast.preference_loss("aot", beta=0.3)(
        chosen, rejected, ref_chosen_logps=sums[2], ref_rejected_logps=sums[3]
    ).loss
    wanted = torch.autograd.grad(loss, (chosen, rejected))
    found = ranks.run(aot, size=size)
    for got, *_ in found:
        assert_same_bits("loss", got, loss.detach())
    for i, gradient in enumerate(wanted):
        torch.testing.assert_close(torch.cat([x[1 + i] for x in found]) / size, gradient)


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


def grouped(group) -> dict:
    found = {}
    for name, (given, options) in calls_of_methods().items():
        part = {k: mine(group, x) for k, x in given.items()}
        found[name] = rlfast.group_advantage(**part, **options, process_group=group)
    b = {k: mine(group, x) for k, x in batch().items() if k != "sums"}
    found["statistics"] = rlfast.group_statistics(b["rewards"], group_size=GROUP, process_group=group)
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
        "share": ([8], []), "mean": ([16], [32]), "whiten": ([24], [48]), "gae": ([24], []),
        "groups": ([5 * LOOK, 24], []), "z": ([16], []), "delta": ([32], []), "beta": ([LOOK, 24], []),
        "seen": ([24], []), "kl": ([8], []), "kl_cov": ([24, LOOK, 7 * 4], []), "top": ([LOOK, 120], []),
        "rows": ([LOOK, 120], [240]),
    }  # fmt: skip
    assert ranks.run(volumes, size=2) == [wanted] * 2


# What goes wrong


def refused(group, what: str):
    """Calls that are wrong on one rank or on all."""
    rank, x = dist.get_rank(group), torch.ones(4)
    second = rank == 1
    calls = {
        "shapes": lambda: rlfast.distributed.gather_batch(torch.ones(2, 3 + second), process_group=group),
        "dtypes": lambda: rlfast.distributed.gather_batch(x.double() if second else x, process_group=group),
        "presence": lambda: rlfast.group_advantage(
            x, group_size=2, mask=x if second else None, process_group=group
        ),
        "rows": lambda: rlfast.group_advantage(x, group_ids=torch.arange(3), process_group=group),
        "group size": lambda: rlfast.group_advantage(x, group_size=3, process_group=group),
        "no group": lambda: rlfast.masked_mean(x, process_group="dp"),
        "share": lambda: rlfast.distributed.share("token_mean", x, process_group=None),
        "dim": lambda: rlfast.masked_mean(x, dim=0, process_group=group),
        "not whitened": lambda: rlfast.gae(x, x, gamma=1.0, lam=1.0, process_group=group),
        "gate": lambda: rlfast.distributed.share(
            rlfast.Loss("ppo_clip", correction=rlfast.Correction(gate="token", gate_high=1.0, masks=True)), x,
            process_group=group,
        ),
        "objective": lambda: rlfast.distributed.share("mean_of_all", x, process_group=group),
        "boundaries": lambda: rlfast.distributed.share("seq_mean_token_sum", x, process_group=group),
    }  # fmt: skip
    calls[what]()


REFUSED = {
    "shapes": r"tensors\[0\]: expected one dtype, and one shape beyond the rows, on all ranks, got \(2, 3\) float32 on "
    r"rank 0, \(2, 4\) float32 on rank 1",
    "dtypes": r"got \(4,\) float32 on rank 0, \(4,\) float64 on rank 1",
    "presence": r"mask: expected .* got None on rank 0, \(4,\) float32 on rank 1",
    "rows": r"group_ids: expected 4 rows like rewards, got \(3,\)",
    "group size": "group_size: expected a divisor of the 8 rewards, got 3",
    "no group": "process_group: expected a ProcessGroup or a DeviceMesh, got str",
    "share": "process_group: expected the ranks over which the batch is spread, got None",
    "dim": "dim: expected None beside process_group, got 0",
    "not whitened": "process_group: expected None: nothing is whitened, got ProcessGroup",
    "gate": r"objective: expected one whose gate leaves n alone: put rollout_keep\(...\) into the mask",
    "objective": "objective: expected one of 'token_mean', .* 'mean', 'sum', got 'mean_of_all'",
    "boundaries": "cu_seqlens: expected the boundaries of packed sequences: n counts sequences, got None",
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named_on_every_rank(ranks, what):
    for well, said in ranks.outcomes(refused, what, size=2):
        assert not well and said[0] in ("ValueError", "TypeError"), said
        with pytest.raises(ValueError, match=REFUSED[what]):
            raise ValueError(said[1])


def late(group, what: str):
    """Rank 1 raises before its collective."""
    patient = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        raise ZeroDivisionError("of rank 1")
    x = torch.ones(2, 3).requires_grad_(what == "backward")
    if what == "objects":
        ranks_module.gathered_objects(x, ranks_module.ranks_of(patient), "RankPool")
    rlfast.masked_mean(x, process_group=patient)


@pytest.mark.parametrize("what", ["tensors", "objects"])
def test_a_rank_that_fails_raises_on_all(ranks, what):
    """Its own error there, and within the group's timeout on the others; who waited says so."""
    for rank, (well, said) in enumerate(ranks.outcomes(late, what, size=4)):
        assert not well
        if rank == 1:
            assert said[:2] == ("ZeroDivisionError", "of rank 1")
        else:
            name = "RankPool" if what == "objects" else "masked_mean"
            assert said[0] == "RuntimeError" and f"{name}: rank {rank} did not get what it waited for" in said[1]
            assert "of ranks [0, 1, 2, 3]" in said[1]


def outside(group):
    pair = dist.new_group([0, 1])
    if dist.get_rank() > 1:
        rlfast.masked_mean(torch.ones(2), process_group=pair)


def test_a_rank_outside_the_group(ranks):
    for rank, (well, said) in enumerate(ranks.outcomes(outside, size=4)):
        assert well is (rank < 2)
        assert well or said[1] == f"process_group: expected a group that this process is in, got one without {rank}"


def meshed(group):
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = rlfast.masked_mean(torch.tensor([float(dist.get_rank())]), process_group=mesh["dp"])
    try:
        rlfast.masked_mean(torch.ones(2), process_group=mesh)
    except ValueError as error:
        return found.item(), str(error)


def test_a_mesh_has_one_dimension(ranks):
    said = "process_group: expected a DeviceMesh of one dimension, such as mesh[\"dp\"], got one of 2: ('dp', 'tp')"
    assert ranks.run(meshed, size=4) == [(mean, said) for mean in (1.0, 2.0, 1.0, 2.0)]


def test_without_torch_distributed():
    with pytest.raises(
        ValueError, match=r"process_group: expected None: torch.distributed is not initialised, got int"
    ):
        rlfast.masked_mean(torch.ones(2), process_group=3)


def documented(group) -> int:
    """The examples of the docstrings, on every rank."""
    from tests.test_docs import run_examples

    own = rlfast.distributed.share, rlfast.distributed.gather_batch, rlfast.distributed.shifted_targets
    return sum(run_examples(inspect.getdoc(x), x.__name__, group=group) for x in own)


def test_docstring_examples_run(ranks):
    assert min(ranks.run(documented, size=2)) > 8
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        rlfast.distributed.nothing  # noqa: B018
