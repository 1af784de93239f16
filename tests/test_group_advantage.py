"""``group_advantage`` on every backend: methods, groups of any kind, what trainers log."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.advantages.group import METHODS
from rlfast.ops import group_advantage as group_op
from rlfast.ops.group_records import Inputs, Options
from rlfast.ops.oracle_group import outputs
from tests import shared
from tests.cases import DTYPES, few
from tests.numerics import assert_same_bits, assert_value, assert_zero

OP = "group_advantage"
GOLDEN = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 1])
GROUPS = ("pairs", "eights", "one", "ids", "sparse ids", "ones")


def rewards_of(n: int, dtype="f32", seed=0):
    """Rewards of a few levels, so that some groups are all equal."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randint(-1, 3, (n,), generator=rng) * 0.7 + 0.1).to(DTYPES[dtype])


def groups_of(kind: str, n: int) -> dict:
    """What says which answers are to one prompt; uneven groups and groups of one among the ids."""
    rng = torch.Generator().manual_seed(4)
    ids = torch.randint(max(1, n // 5), (n,), generator=rng)
    return {
        "pairs": {"group_size": 2},
        "eights": {"group_size": 8},
        "one": {"group_size": n},
        "ones": {"group_size": 1},
        "ids": {"group_ids": ids},
        "sparse ids": {"group_ids": (ids - n // 10) * 1_000_003_579_111},
    }[kind]


def options_of(method: str, n: int) -> dict:
    """What else a method needs."""
    rng = torch.Generator().manual_seed(6)
    lengths = torch.randint(1, 900, (n,), generator=rng)
    return {"opo": {"lengths": lengths}, "remax": {"baselines": rewards_of(n, seed=8)}}.get(method, {})


def on(x, device):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in x.items()}


def oracle(rewards, dtype, **options):
    """The public function with the oracle for its op, in ``dtype``."""

    def by_reference(*args):
        return outputs(Inputs(*args[: group_op.TENSORS]), Options(*args[group_op.TENSORS : -1]), dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_op, "call", by_reference)
        return rlfast.group_advantage(rewards.to(dtype), **options)


def check(rewards, backend, device, **options):
    """One call against the oracle in float64, by the error of the oracle in float32."""
    with rlfast.use_backend(backend):
        got = rlfast.group_advantage(rewards.to(device), **on(options, device))
    assert got.dtype == (torch.float64 if rewards.dtype == torch.float64 else torch.float32)
    truth, own = oracle(rewards, torch.float64, **options), oracle(rewards.float(), torch.float32, **options)
    assert_value(f"{options}", got.cpu(), truth, own)
    return got


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "gdpo"])
def test_method(backend, device, method, groups):
    n = few(96, 32)
    more = options_of(method, n)
    check(rewards_of(n), backend, device, method=method, **groups_of(groups, n), **more)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(2)) > 0.3
    spoiled = torch.where(mask, rewards_of(n), torch.nan)
    with rlfast.use_backend(backend):
        call = {"method": method, **groups_of(groups, n), **more, "mask": mask}
        got = rlfast.group_advantage(spoiled.to(device), **on(call, device))
    check(rewards_of(n), backend, device, **call)
    assert_zero("masked", got.cpu()[~mask])
    assert bool(got.isfinite().all())


# What is added to a deviation, and whether it is Bessel's: shared/losses.md, §5, and the trainers' code.
TRAINERS = {"trl": (1e-4, True), "verl": (1e-6, True), "openrlhf": (1e-9, True), "halos": (1e-2, False),
            "open-instruct": (1e-8, False), "nemo-rl": (1e-6, True)}  # fmt: skip


def alone(r, method: str, like: str):
    """The advantages of one group of several, as a trainer writes them down."""
    eps, bessel = TRAINERS[like]
    n = len(r)
    others = torch.stack([torch.cat((r[:i], r[i + 1 :])) for i in range(n)])
    if method == "rloo":
        return r - others.mean(1)
    if method == "dr_grpo":
        return r - r.mean()
    if like == "nemo-rl":  # the others' mean and deviation; a deviation of 0 does not divide
        std = others.std(1, correction=1) if n > 2 else torch.zeros_like(r)
        return (r - others.mean(1)) / torch.where(std > 0, std + eps, 1.0)
    return (r - r.mean()) / (r.std(correction=int(bessel)) + eps)


def by_trainer(rewards, ids, method: str, like: str):
    """Those of a batch. verl keeps the reward of an answer alone, the others have 0 for it."""
    out = torch.zeros_like(rewards)
    for key in ids.unique():
        of = ids == key
        if int(of.sum()) > 1:
            out[of] = alone(rewards[of], method, like)
        elif like == "verl":
            out[of] = rewards[of] / (1.0 + (TRAINERS[like][0] if method == "grpo" else 0.0))
    return out


@pytest.mark.parametrize("like", TRAINERS)
@pytest.mark.parametrize("method", ("grpo", "rloo", "dr_grpo"))
def test_trainers(backend, device, method, like):
    """Not by our presets: by what is written down above."""
    for groups in ("eights", "ids"):
        given = groups_of(groups, 96)
        ids = given.get("group_ids", torch.arange(96) // 8)
        rewards = rewards_of(96) * 1e-2
        truth, own = (by_trainer(rewards.to(dtype), ids, method, like) for dtype in (torch.float64, torch.float32))
        with rlfast.use_backend(backend):
            got = rlfast.group_advantage(rewards.to(device), method=method, like=like, **on(given, device))
        assert_value(f"{like} {groups}", got.cpu(), truth, own)


@pytest.mark.parametrize("scale", ("none", "group", "others", "batch"))
@pytest.mark.parametrize("bessel", (True, False))
@pytest.mark.parametrize("method", ("grpo", "rloo", "opo", "pass@k"))
def test_any_baseline_over_any_deviation(backend, device, method, scale, bessel):
    more = options_of(method, 96) | ({"bessel": bessel, "eps": 1e-3} if scale != "none" else {})
    check(rewards_of(96), backend, device, method=method, scale=scale, **more, **groups_of("ids", 96))


@pytest.mark.parametrize("tau", (1e-2, 0.5, 40.0))
def test_soft_baseline(backend, device, tau):
    check(rewards_of(96), backend, device, method="kimi_soft", tau=tau, **groups_of("ids", 96))


@pytest.mark.parametrize("dtype", ("bf16", "f16"))
def test_narrow_rewards(backend, device, dtype):
    check(rewards_of(96, dtype), backend, device, group_size=8)


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    check(rewards_of(96).double(), backend, device, group_size=8)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.backends("cpu")
def test_on_every_isa(backend, device, isa):
    with backends.use_isa(isa):
        for method in ("grpo", "rloo", "opo", "pass@k", "kimi_soft", "grpo_leave_one_out"):
            check(rewards_of(96), backend, device, method=method, **groups_of("ids", 96), **options_of(method, 96))


def test_golden_values(backend, device):
    def first_two(**options):
        with rlfast.use_backend(backend):
            return rlfast.group_advantage(GOLDEN.to(device), group_size=8, **on(options, device)).cpu()[:2]

    lengths = torch.arange(10, 90, 10)
    for got, wanted in (
        (first_two(like="trl"), (1.207381, -0.724429)),
        (first_two(bessel=False, eps=0.0), (1.290994, -0.774597)),
        (first_two(method="rloo"), (0.714286, -0.428571)),
        (first_two(method="opo", lengths=lengths), (1 - 0.361111, -0.361111)),
    ):
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=0, atol=6e-7)


@pytest.mark.parametrize("delta", (None, -0.25, 0.5))
def test_asymre(backend, device, delta):
    """r − (mean + δ), arXiv 2506.20520; a group of one has −δ."""
    ids = torch.cat((torch.arange(95) // 5, torch.tensor([99])))
    mask = torch.arange(96) >= 5

    def plain(r):
        for key in ids.unique():
            r[ids == key] -= r[ids == key].mean() + (-0.1 if delta is None else delta)
        return torch.where(mask, r, 0.0)

    with rlfast.use_backend(backend):
        got = rlfast.group_advantage(
            rewards_of(96).to(device), group_ids=ids.to(device), method="asymre", delta=delta, mask=mask.to(device)
        )
    assert_value("asymre", got.cpu(), plain(rewards_of(96).double()), plain(rewards_of(96)))


def test_a_shifted_baseline_over_the_deviation_of_the_batch(backend, device):
    """(r − (b + δ)) / (s + eps), also where s is of all rewards."""

    def plain(r):
        means = r.view(12, 8).mean(1, keepdim=True).expand(12, 8).flatten()
        return (r - (means + 0.25)) / (r.std() + 1e-3)

    with rlfast.use_backend(backend):
        got = rlfast.group_advantage(rewards_of(96).to(device), group_size=8, method="batch_std", delta=0.25, eps=1e-3)
    assert_value("shifted", got.cpu(), plain(rewards_of(96).double()), plain(rewards_of(96)))


@pytest.mark.parametrize("method", ("reinforce++", "reinforce++_baseline"))
def test_eps_and_bessel_of_the_whitening(backend, device, method):
    def plain(r):
        centred = r - (r.view(12, 8).mean(1, keepdim=True).expand(12, 8).flatten() if "_" in method else 0.0)
        return (centred - centred.mean()) / (centred.var(correction=0) + 0.5).sqrt()

    with rlfast.use_backend(backend):
        got = rlfast.group_advantage(rewards_of(96).to(device), group_size=8, method=method, eps=0.5, bessel=False)
    assert_value(method, got.cpu(), plain(rewards_of(96).double()), plain(rewards_of(96)))


def test_nemo_rl_whitens_as_it_does(backend, device):
    """GDPO: leave one out, ÷ the deviation alone. REINFORCE++: Σ(A − mean)²/n over tokens, at least 1e-8."""
    columns = torch.stack([rewards_of(24, seed=i) for i in range(2)], 1)
    parts = torch.stack([
        torch.cat([alone(group, "grpo", "nemo-rl") for group in columns[:, k].double().split(4)]) for k in range(2)
    ])  # fmt: skip
    summed = parts[0] + 0.5 * parts[1]
    given = {"like": "nemo-rl", "group_size": 4}
    lengths = torch.arange(1, 25)
    centred = (columns[:, 0].double().view(6, 4) - columns[:, 0].double().view(6, 4).mean(1, keepdim=True)).flatten()
    mean = (centred * lengths).sum() / lengths.sum()
    var = ((centred - mean).square() * lengths).sum() / lengths.sum()
    with rlfast.use_backend(backend):
        got = rlfast.group_advantage(columns.to(device), method="gdpo", weights=(1.0, 0.5), **given)
        flat = rlfast.group_advantage(torch.ones(8, 2, device=device), method="gdpo", **given)
        plus = rlfast.group_advantage(
            columns[:, 0].to(device), method="reinforce++_baseline", lengths=lengths.to(device), **given
        )
    truth = (summed - summed.mean()) / summed.std()
    assert_value("gdpo", got.cpu(), truth, truth.float())
    assert_zero("no variance", flat)
    truth = (centred - mean) * var.clamp(min=1e-8).rsqrt()
    assert_value("reinforce++_baseline", plus.cpu(), truth, truth.float())


@pytest.mark.parametrize("lengths", (False, True))
def test_several_rewards(backend, device, lengths):
    """Each normalised in its group, summed, whitened over the samples or their tokens."""
    n = 48
    rewards = torch.stack([rewards_of(n, seed=i) for i in range(3)], 1)
    options = {"method": "gdpo", "weights": (1.0, 0.5, -2.0), **groups_of("ids", n)}
    if lengths:
        options["lengths"] = torch.arange(1, n + 1)
    got = check(rewards, backend, device, **options).cpu().double()
    w = options.get("lengths", torch.ones(n)).double()
    mean = (w * got).sum() / w.sum()
    assert abs(float(mean)) < 1e-6 and abs(float((w * (got - mean) ** 2).sum() / (w.sum() - 1)) - 1) < 1e-5


def test_contiguous_groups_and_ids_give_the_same_bits(backend, device):
    """And so do ids in any order, of any size, and names."""
    rewards, found = rewards_of(96), []
    ids = torch.arange(96) // 8
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    names = [f"prompt {int(i)}" for i in ids[order]]
    with rlfast.use_backend(backend):
        found.append(rlfast.group_advantage(rewards.to(device), group_size=8))
        found.append(rlfast.group_advantage(rewards.to(device), group_ids=ids.to(device)))
        found.append(rlfast.group_advantage(rewards.to(device), group_ids=(-ids).int().to(device)))
    for other in found[1:]:
        assert_same_bits("ids", other, found[0])
    with rlfast.use_backend(backend):
        by_name = rlfast.group_advantage(rewards[order].to(device), group_ids=names)
        by_id = rlfast.group_advantage(rewards[order].to(device), group_ids=ids[order].to(device))
    assert_same_bits("names", by_name, by_id)
    torch.testing.assert_close(by_id.cpu(), found[0].cpu()[order])


@pytest.mark.backends("cpu", "torch")
def test_threads_do_not_change_bits(backend, device, threads):
    shared.skip_unless_cores(2)
    rewards, found = torch.randn(40_000, generator=torch.Generator().manual_seed(0)), []
    for n in (1, 2, 3):
        threads(n)
        with rlfast.use_backend(backend):
            for options in ({"group_size": 8}, {"group_ids": torch.arange(40_000) % 777}):
                found.append(rlfast.group_advantage(rewards, method="reinforce++_baseline", **options))
                found.append(rlfast.group_statistics(rewards, **options).reward_std)
    for i in range(4, 12):
        assert_same_bits(str(i), found[i], found[i % 4])


def test_statistics(backend, device):
    rewards = torch.tensor([1.0, 1, 0, 1, 0, 0, 5, 2])
    mask = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1]).bool()
    with rlfast.use_backend(backend):
        found = rlfast.group_statistics(rewards.to(device), group_size=2)
        some = rlfast.group_statistics(rewards.to(device), group_size=2, mask=mask.to(device), bessel=False)
    assert [float(x) for x in found[:2]] == [4.0, 0.5]
    torch.testing.assert_close(found.reward_mean.cpu(), torch.tensor(1.25).double())
    torch.testing.assert_close(found.reward_std.cpu(), torch.tensor((0.5**0.5 + 4.5**0.5) / 4).double())
    assert [float(x) for x in some] == [4.0, 0.75, 0.875, 0.125]


@pytest.mark.parametrize("n", (0, 1))
def test_hardly_any_rewards(backend, device, n):
    with rlfast.use_backend(backend):
        out = rlfast.group_advantage(torch.ones(n, device=device), group_ids=torch.zeros(n).long().to(device))
        kept = rlfast.group_advantage(torch.ones(n, device=device), group_size=1, like="verl", eps=0.0)
    assert_zero("alone", out)
    assert kept.shape == out.shape == (n,) and kept.tolist() == [1.0] * n


def test_far_from_zero(backend, device):
    """A common offset does not cost the deviation its digits."""
    check(rewards_of(96) + 1e4, backend, device, group_size=8)
    check(rewards_of(96) + 1e4, backend, device, group_size=8, like="nemo-rl")


@pytest.mark.unpoisoned
def test_opcheck():
    rewards, ids = rewards_of(16), torch.arange(16) % 3
    for args in ((rewards, None, None, None, 8), (rewards, ids, ids > 0, None, 1)):
        torch.library.opcheck(group_op.op, (*args, 0, 1, True, False, False, 1e-4, 1.0, ""))


@pytest.mark.unpoisoned
def test_compiled_without_a_graph_break():
    function = torch.compile(rlfast.group_advantage, fullgraph=True, backend="aot_eager")
    for method in ("grpo", "reinforce++_baseline"):
        options = {"method": method, "group_ids": torch.arange(16) % 3}
        assert_same_bits(method, function(rewards_of(16), **options), rlfast.group_advantage(rewards_of(16), **options))
