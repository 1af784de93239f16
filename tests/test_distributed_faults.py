"""A batch spread over ranks: what is wrong on one is said on all, and a rank that fails ends the others' wait."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import rlfast
from rlfast.distributed import ranks as ranks_module


def refused(group, what: str):
    """Calls that are wrong on one rank or on all."""
    rank, x = dist.get_rank(group), torch.ones(4)
    second = rank == 1
    trained, length = x.clone().requires_grad_(second), "seq_sum_over_max_len"
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
        "length": lambda: rlfast.distributed.share(
            length, torch.ones(2, 3), max_len=8 if second else None, process_group=group
        ),
        "lengths": lambda: rlfast.distributed.share(length, 2, max_len=8 + second, process_group=group),
        "no length": lambda: rlfast.distributed.share(
            length, x, cu_seqlens=torch.tensor([0, 4]), process_group=group
        ),
        "gradient of a mean": lambda: rlfast.masked_mean(trained, process_group=group),
        "gradient of whitening": lambda: rlfast.masked_whiten(trained, process_group=group),
        "gradient of gae": lambda: rlfast.gae(x, trained, gamma=1.0, lam=1.0, whiten=True, process_group=group),
        "gradient of rows": lambda: rlfast.distributed.gather_batch(x, trained, process_group=group),
        "boundaries": lambda: rlfast.distributed.share("seq_mean_token_sum", x, process_group=group),
    }  # fmt: skip
    calls[what]()


ALONE = "expected the same on all ranks, got False on rank 0, True on rank 1"
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
    "length": "max_len: expected the same on all ranks, got None on rank 0, 8.0 on rank 1",
    "lengths": "max_len: expected the same on all ranks, got 8.0 on rank 0, 9.0 on rank 1",
    "no length": r"max_len: expected the length of seq_sum_over_max_len, where counted is not masks \[B, T\], got None",
    "gradient of a mean": f"masked_mean, requires_grad: {ALONE}",
    "gradient of whitening": f"masked_whiten, requires_grad: {ALONE}",
    "gradient of gae": f"masked_whiten, requires_grad: {ALONE}",
    "gradient of rows": rf"tensors\[1\].requires_grad: {ALONE}",
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
    x = torch.ones(2, 3).requires_grad_(what == "backward")
    mean = rlfast.masked_mean(x, process_group=patient) if what == "backward" else None
    if dist.get_rank() == 1:
        raise ZeroDivisionError("of rank 1")
    if what == "objects":
        ranks_module.gathered_objects(x, ranks_module.ranks_of(patient), "RankPool")
    elif what == "backward":
        mean.backward()
    else:
        rlfast.masked_mean(x, process_group=patient)


LATE = {"tensors": "masked_mean", "objects": "RankPool", "backward": "masked_mean, backward"}


@pytest.mark.parametrize("what", LATE)
def test_a_rank_that_fails_raises_on_all(ranks, what):
    """Its own error there, and within the group's timeout on the others; who waited says so."""
    for rank, (well, said) in enumerate(ranks.outcomes(late, what, size=4)):
        assert not well
        if rank == 1:
            assert said[:2] == ("ZeroDivisionError", "of rank 1")
        else:
            assert said[0] == "RuntimeError"
            assert f"{LATE[what]}: rank {rank} did not get what it waited for" in said[1]
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
