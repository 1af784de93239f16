"""The loss of a batch that is spread over ranks is that of one process."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

import rlfast
from rlfast.loss_table import LOSSES
from tests.numerics import assert_gradient, assert_same_bits, assert_value
from tests.rank_batch import ROWS, SIZES, STEPS, batch, mean_of, mine

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


def ragged(group, double: bool = True) -> dict:
    """All fields of a loss, of this rank's rows cut to the longest of them; None: of the whole batch."""
    b, cut = batch(), (lambda x: x) if group is None else (lambda x: mine(group, x))
    more = {
        "ref_logp": b["old_logp"].roll(1, 0), "weights": b["values"].detach().abs(), "keep": b["values"] > 2.0,
        "extra": (b["values"] > 3.0).float(),
    }  # fmt: skip
    fields = {k: cut(x) for k, x in ({k: b[k] for k in ("logp", "old_logp", "adv", "mask")} | more).items()}
    longest = max([*cut(b["lengths"]).tolist(), 1])
    fields = {k: x[:, :longest] if x.dim() == 2 else x for k, x in fields.items()}
    return {k: x.double() if double and x.is_floating_point() else x for k, x in fields.items()}


def of_rows(group) -> dict:
    """(loss, gradient) by every row of the table."""
    given, found = ragged(group), {}
    for name, objective in LOSSES.items():
        share = {}
        if group is not None:
            share = rlfast.distributed.share(objective, given["mask"], process_group=group)._asdict()
        call = {k: x for k, x in given.items() if k not in ("logp", *objective.prepared.idle)}
        logp = given["logp"].clone().requires_grad_()
        loss = objective(logp, **call, **share).loss
        found[name] = loss.detach(), *torch.autograd.grad(loss, logp)
    return found


def whole(parts) -> torch.Tensor:
    """The rows of ranks that pad to lengths of their own."""
    return torch.cat([torch.nn.functional.pad(x, (0, STEPS - x.shape[1])) for x in parts])


@pytest.mark.parametrize("size", SIZES)
def test_every_loss_of_the_table(ranks, size):
    """Ranks that pad to lengths of their own have the loss and the gradient of one process."""
    found, wanted = ranks.run(of_rows, size=size), of_rows(None)
    assert len({x["dapo"][1].shape[1] for x in found}) > 1, "ranks pad to lengths of their own"
    for name, (loss, gradient) in wanted.items():
        close = {"rtol": 3e-7, "atol": 1e-7, "msg": name}  # a count that is given is float32
        torch.testing.assert_close(mean_of([x[name][0] for x in found]), loss, **close)
        torch.testing.assert_close(whole([x[name][1] for x in found]) / size, whole([gradient]), **close)
        assert gradient.any(), name


def lengths(group) -> tuple:
    """What is divided by, however it is counted; and the loss of a head."""
    share, found = functools.partial(rlfast.distributed.share, "seq_sum_over_max_len", process_group=group), {}
    given = ragged(group, double=False)
    mask, longest = given["mask"], given["mask"].shape[1]
    ends = torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0))
    found = {
        "padded": share(mask), "micro-batches": share([mask[:, :1], mask]), "said": share(mask, max_len=100),
        "packed": share(mask[mask], cu_seqlens=ends, max_len=7.5), "number": share(3, max_len=2),
    }  # fmt: skip
    hidden = torch.outer(given["logp"].reshape(-1), torch.arange(8.0)).sin().reshape(*mask.shape, 8).requires_grad_()
    head = torch.linspace(-1.0, 1.0, 16 * 8).sin().reshape(16, 8)
    call = {"adv": given["adv"], "mask": mask, **found["padded"]._asdict()}
    loss = rlfast.loss("dr_grpo").linear(hidden, head, mask.long(), **call).loss
    alone = rlfast.loss("dr_grpo").linear(hidden, head, mask.long(), adv=call["adv"], mask=mask, num_items=1, max_len=1)
    return longest, found, loss.detach(), alone.loss.detach()


def test_the_length_is_one_for_all_ranks(ranks):
    answers = ranks.run(lengths, size=4)
    longest = max(x[0] for x in answers)
    for _, found, *_ in answers:
        assert {k: x.max_len for k, x in found.items()} == {
            "padded": longest, "micro-batches": longest, "said": 100.0, "packed": 7.5, "number": 2.0,
        }  # fmt: skip
        assert {k: x.num_items.item() for k, x in found.items() if k != "micro-batches"} == {
            "padded": ROWS - 1.0, "said": ROWS - 1.0, "packed": ROWS - 1.0, "number": 12.0,
        }  # fmt: skip
        assert {x.world_size for x in found.values()} == {4}
    parts = [x[3] for x in answers]
    torch.testing.assert_close(mean_of([x[2] for x in answers]), sum(parts) / ((ROWS - 1) * longest))


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
