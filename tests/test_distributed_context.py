"""Rows spread over ranks: scans, estimators and targets, against the oracle of the whole rows."""

from __future__ import annotations

import functools
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import rlfast
from tests.numerics import assert_gradient, assert_value
from tests.rank_pool import sent
from tests.scan_cases import Call, call_of, draw, gradients, oracle

ROWS, STEPS = 3, 40
NAMES = ("gae", "lambda_returns", "discounted_returns", "vtrace", "affine_scan")
MASKS = ("none", "right", "left", "holes")
LAYOUTS = ("contiguous", "zigzag")


def places(layout: str, rank: int, size: int, steps: int = STEPS) -> torch.Tensor:
    """Which tokens of a row a rank has; in the contiguous layout not as many as the others."""
    if layout == "contiguous":
        edges = [0, 7, 19, 20, steps] if size == 4 else [0, 23, steps]
        return torch.arange(edges[rank], edges[rank + 1])
    chunks = torch.arange(steps).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def part(x, at):
    """Of what is one a token, a rank's."""
    tokens = isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[-1] == STEPS
    return x[..., at] if tokens else x


def run_part(group, layout: str, call: Call, names=()):
    """A rank's outputs, and its gradients by ``names``."""
    at = places(layout, dist.get_rank(group), dist.get_world_size(group))
    inputs = {k: part(v, at).clone().requires_grad_(k in names) for k, v in call.inputs.items()}
    options = {k: part(v, at).clone().requires_grad_() if k in names else part(v, at) for k, v in call.options.items()}
    out = getattr(rlfast.distributed, call.name)(**inputs, **options, process_group=group, layout=layout)
    out = out if isinstance(out, tuple) else (out,)
    if not names:
        return out, ()
    weights = [draw((ROWS, STEPS), seed=9 + i)[:, at] for i in range(len(out))]
    loss = sum((x * w).sum() for x, w in zip(out, weights, strict=True))
    grads = torch.autograd.grad(loss, [inputs.get(name, options.get(name)) for name in names])
    return tuple(x.detach() for x in out), grads


def run_parts(group, layout: str, calls):
    """Of several calls."""
    return [run_part(group, layout, *call) for call in calls]


def joined(parts, layout: str):
    """The ranks' parts as whole rows; of what is one a row, the sum of the ranks' gradients."""
    if parts[0].shape[-1:] == (ROWS,) and parts[0].dim() == 1:
        return sum(parts)
    out = torch.zeros(*parts[0].shape[:-1], STEPS, dtype=parts[0].dtype)
    for rank, x in enumerate(parts):
        out[..., places(layout, rank, len(parts))] = x
    return out


def check(ranks, calls, layout: str, size: int) -> None:
    """Outputs and gradients of calls by the one tolerance."""
    found = ranks.run(run_parts, layout, calls, size=size)
    for i, (call, *names) in enumerate(calls):
        names = names[0] if names else ()
        outs = [joined([x[i][0][k] for x in found], layout) for k in range(len(found[0][i][0]))]
        for k, got in enumerate(outs):
            assert_value(f"{call.name}[{k}]", got, oracle(call, torch.float64)[k], oracle(call, torch.float32)[k])
        if not names:
            continue
        wide = Call(call.name, {k: v.double() for k, v in call.inputs.items()}, call.options)
        truth = gradients(wide, names, lambda c: oracle(c, torch.float64))
        own = gradients(call, names, lambda c: oracle(c, torch.float32))
        for k, name in enumerate(names):
            got = joined([x[i][1][k] for x in found], layout)
            assert_gradient(f"{call.name}: {name}", got, truth[name].double(), own[name])


def some(p: float, seed: int):
    return torch.rand(ROWS, STEPS, generator=torch.Generator().manual_seed(seed)) < p


def options() -> dict:
    """name → options of gae and vtrace."""
    rates = torch.Generator().manual_seed(3)
    by_row, by_token = draw((ROWS,), seed=6), draw((ROWS, STEPS), seed=7)
    return {
        "done": {"done": some(0.15, 3)},
        "bootstrap": {"bootstrap": by_row},
        "done and truncated": {"done": some(0.15, 3), "truncated": some(0.15, 4), "bootstrap": by_token},
        "value after the last token": {"bootstrap": by_token},
        "rates a row": {"gamma": torch.rand(ROWS, generator=rates), "lam": torch.rand(ROWS, generator=rates)},
        "rates a token": {"gamma": torch.rand(ROWS, STEPS, generator=rates)},
        "no discount": {"gamma": 1.0, "lam": 1.0},
        "no trace": {"lam": 0.0},
    }


@pytest.mark.parametrize("size, layout", [(2, "contiguous"), (4, "contiguous"), (4, "zigzag")])
def test_estimators_of_rows_over_ranks(ranks, size, layout):
    """Every option, masks and both maskings: ends, holes and padding fall on both sides of the boundaries."""
    calls = [(call_of(name, ROWS, STEPS, mask=mask),) for name in NAMES for mask in MASKS]
    for name in ("gae", "vtrace"):
        for given in options().values():
            calls += [
                (call_of(name, ROWS, STEPS, mask=mask, masking=masking, **given),)
                for mask, masking in (("none", "carry"), ("holes", "carry"), ("right", "zero"), ("left", "zero"))
            ]
    calls += [(call_of("gae", ROWS, STEPS, mask="holes", critic_lam=1.0),)]
    clips = {"clip_rho": 1.4, "clip_c": 0.9, "clip_pg_rho": 1.2}
    calls += [(call_of("vtrace", ROWS, STEPS, mask="holes", **clips),)]
    by_row = call_of("gae", ROWS, STEPS, mask="right")
    calls += [(Call("gae", by_row.inputs | {"rewards": draw((ROWS,), seed=4)}, by_row.options),)]
    calls += [(call_of("affine_scan", ROWS, STEPS, mask="holes", reverse=False, initial=draw((ROWS,), seed=5)),)]
    check(ranks, calls, layout, size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_rows_over_ranks(ranks, layout):
    calls = [
        (
            call_of("gae", ROWS, STEPS, mask="holes", bootstrap=draw((ROWS,), seed=6)),
            ("rewards", "values", "bootstrap"),
        ),
        (call_of("gae", ROWS, STEPS, mask="right", masking="zero", done=some(0.1, 3)), ("rewards", "values")),
        (call_of("gae", ROWS, STEPS, critic_lam=1.0), ("values",)),
        (call_of("lambda_returns", ROWS, STEPS, mask="left"), ("rewards", "values")),
        (call_of("discounted_returns", ROWS, STEPS, mask="holes"), ("rewards",)),
        (call_of("affine_scan", ROWS, STEPS, mask="holes", initial=draw((ROWS,), seed=5)), ("a", "b", "initial")),
        (call_of("affine_scan", ROWS, STEPS, reverse=False, initial=draw((ROWS,), seed=5)), ("a", "b", "initial")),
    ]
    check(ranks, calls, layout, 4)


def initial_gradients(group) -> list:
    """Whether this rank has a gradient of the state before the first step, from the right and from the left."""
    found, x = [], torch.ones(2, 4)
    for reverse in (True, False):
        initial = torch.ones(2).requires_grad_()
        out = rlfast.distributed.affine_scan(x, x, reverse, initial=initial, process_group=group)
        found.append(bool(torch.autograd.grad(out.sum(), initial)[0].any()))
    return found


def test_who_has_the_first_step_has_the_gradient_of_what_was_before(ranks):
    assert ranks.run(initial_gradients, size=4) == [[False, True], [False, False], [False, False], [True, False]]


def test_a_long_row_is_as_exact_as_in_one_process(ranks):
    """A common offset of the values, which cancels in δ, and no discount: nothing of it is lost at a boundary."""
    call = call_of("gae", ROWS, STEPS, gamma=1.0, lam=1.0)
    call.inputs["values"] += 1e4
    check(ranks, [(call,), (call_of("gae", ROWS, STEPS, "bf16", "holes"),)], "contiguous", 4)
    wide = call_of("gae", ROWS, STEPS)
    wide = Call("gae", {k: v.double() for k, v in wide.inputs.items()}, wide.options)
    (out, _), *_ = ranks.run(run_part, "contiguous", wide, size=2)
    assert out[0].dtype == torch.float64


def targets_of(group, layout, ids):
    at = places(layout, dist.get_rank(group), dist.get_world_size(group))
    return rlfast.distributed.shifted_targets(ids[..., at], process_group=group, layout=layout)


@pytest.mark.parametrize("size, layout", [(2, "contiguous"), (4, "contiguous"), (2, "zigzag"), (4, "zigzag")])
def test_targets_cross_the_boundaries(ranks, size, layout):
    ids = torch.randint(100, (2, ROWS, STEPS), generator=torch.Generator().manual_seed(1))
    found = ranks.run(targets_of, layout, ids, size=size)
    whole = torch.cat((ids[..., 1:], torch.full_like(ids[..., :1], -100)), -1)
    assert torch.equal(joined(found, layout), whole)
    assert torch.equal(joined(ranks.run(targets_of, layout, ids[0, 0], size=size), layout), whole[0, 0])


def logps_of(group, logits, ids):
    at = places("contiguous", dist.get_rank(group), dist.get_world_size(group))
    targets = rlfast.distributed.shifted_targets(ids[:, at], process_group=group)
    return rlfast.token_logps(logits[:, at], targets, mask=targets != -100).logp


def test_log_probs_of_a_sequence_over_ranks(ranks):
    """A rank's log-probs have the bits of the whole sequence's."""
    draw_ = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(2, STEPS, 64, generator=draw_), torch.randint(64, (2, STEPS), generator=draw_)
    whole = rlfast.token_logps(logits[:, :-1], ids[:, 1:]).logp
    found = torch.cat(ranks.run(logps_of, logits, ids, size=4), 1)
    assert torch.equal(found[:, :-1], whole)


LOOK = 160  # bytes: of what kind the others' call is, and how many rows they have, where that may be looked at


def volumes(group, layout: str) -> dict:
    """Bytes that a rank sends, forward and backward."""
    x, found = [torch.randn(ROWS, 8).requires_grad_() for _ in range(3)], {}
    options = {"process_group": group, "layout": layout}
    rates = options | {"gamma": 0.9, "lam": 0.8}
    calls = {
        "targets": lambda: rlfast.distributed.shifted_targets(torch.zeros(ROWS, 8, dtype=torch.int64), **options),
        "scan": lambda: rlfast.distributed.affine_scan(*x[:2], **options),
        "gae": lambda: rlfast.distributed.gae(*x[:2], **rates)[0],
        "two λ": lambda: sum(rlfast.distributed.gae(*x[:2], critic_lam=1.0, **rates)),
        "returns": lambda: rlfast.distributed.discounted_returns(x[0], gamma=0.9, **options),
        "by row": lambda: rlfast.distributed.gae(torch.ones(ROWS), x[1], **rates)[0],
        "vtrace": lambda: rlfast.distributed.vtrace(*x, **rates)[0],
    }
    for name, call in calls.items():
        with sent() as forward:
            out = call()
        with sent() as backward:
            if out.requires_grad:
                out.sum().backward()
        found[name] = forward, backward
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_on_the_wire(ranks, layout):
    """What docs/distributed.md says of a row and part, whatever the number of tokens."""
    one = ROWS * {"contiguous": 1, "zigzag": 2}[layout]
    wanted = {
        "targets": ([8], []), "scan": ([16], [8]), "gae": ([16] * 2, [8] * 2), "two λ": ([16] * 3, [8] * 3),
        "returns": ([16] * 2, [8]), "by row": ([16] * 3, [8] * 2), "vtrace": ([16] * 2, []),
    }  # fmt: skip
    for found in ranks.run(volumes, layout, size=2):
        for name, (forward, backward) in wanted.items():
            assert found[name] == ([LOOK, *(one * n for n in forward)], [one * n for n in backward]), name


def refused(group, what: str):
    """Calls that are wrong on one rank or on all."""
    second = dist.get_rank(group) == 1
    layout = {"process_group": group, "layout": "zigzag" if second else "contiguous"}
    gae = functools.partial(rlfast.distributed.gae, gamma=1.0, lam=1.0, process_group=group)
    scan = functools.partial(rlfast.distributed.affine_scan, process_group=group)
    x = torch.zeros(2 + second, 4) if what == "rows" else torch.zeros(2, 4)
    trained, one = x.clone().requires_grad_(second), torch.ones(2)
    calls = {
        "layouts": lambda: rlfast.distributed.gae(x, x, gamma=1.0, lam=1.0, **layout),
        "layouts of targets": lambda: rlfast.distributed.shifted_targets(x.long(), **layout),
        "layouts of a scan": lambda: rlfast.distributed.affine_scan(x, x, **layout),
        "functions": lambda: gae(x, x) if second else scan(x, x),
        "estimators": lambda: (
            rlfast.distributed.vtrace(x, x, x, gamma=1.0, process_group=group) if second else gae(x, x)
        ),
        "bootstraps": lambda: gae(x, x, bootstrap=x if second else None),
        "bootstraps of rows": lambda: gae(x, x, bootstrap=one if second else x),
        "rewards": lambda: gae(one if second else x, x),
        "critic_lam": lambda: gae(x, x, critic_lam=0.5 if second else None),
        "maskings": lambda: gae(x, x, masking="zero" if second else "carry"),
        "directions": lambda: scan(x, x, not second),
        "initial": lambda: scan(x, x, initial=one if second else None),
        "gradients": lambda: gae(x, trained),
        "gradients of a scan": lambda: scan(trained, x),
        "rows": lambda: gae(x, x),
        "targets": lambda: rlfast.distributed.shifted_targets(x[: 1 + second].long(), process_group=group),
        "no group": lambda: rlfast.distributed.gae(x, x, gamma=1.0, lam=1.0, process_group=None),
        "layout": lambda: rlfast.distributed.affine_scan(x, x, process_group=group, layout="striped"),
        "odd": lambda: rlfast.distributed.affine_scan(x[:, :3], x[:, :3], process_group=group, layout="zigzag"),
        "bootstrap": lambda: rlfast.distributed.gae(x, x, gamma=1.0, lam=1.0, bootstrap=x[0], process_group=group),
        "masking": lambda: rlfast.distributed.gae(x, x, gamma=1.0, lam=1.0, masking="drop", process_group=group),
        "clip": lambda: rlfast.distributed.vtrace(x, x, x, gamma=1.0, clip_c=-1.0, process_group=group),
    }
    calls[what]()


ALIKE = "expected the same on all ranks, got"
REFUSED = {
    "layouts": f"layout: {ALIKE} contiguous on rank 0, zigzag on rank 1",
    "layouts of targets": f"layout: {ALIKE} contiguous on rank 0, zigzag on rank 1",
    "layouts of a scan": f"layout: {ALIKE} contiguous on rank 0, zigzag on rank 1",
    "functions": f"function: {ALIKE} affine_scan on rank 0, gae on rank 1",
    "estimators": f"function: {ALIKE} gae on rank 0, vtrace on rank 1",
    "bootstraps": f"bootstrap: {ALIKE} None on rank 0, one a token on rank 1",
    "bootstraps of rows": f"bootstrap: {ALIKE} one a token on rank 0, one a row on rank 1",
    "rewards": f"rewards: {ALIKE} one a token on rank 0, one a row on rank 1",
    "critic_lam": f"critic_lam: {ALIKE} None on rank 0, given on rank 1",
    "maskings": f"masking: {ALIKE} carry on rank 0, zero on rank 1",
    "directions": f"reverse: {ALIKE} True on rank 0, False on rank 1",
    "initial": f"initial: {ALIKE} None on rank 0, one a row on rank 1",
    "gradients": f"values.requires_grad: {ALIKE} False on rank 0, True on rank 1",
    "gradients of a scan": f"a.requires_grad: {ALIKE} False on rank 0, True on rank 1",
    "rows": r"values: expected one dtype, and one shape, on all ranks, got \(2, 0\) float32 on rank 0, \(3, 0\)",
    "targets": r"ids: expected one dtype, and one shape, on all ranks, got \(1, 0\) int64 on rank 0, \(2, 0\)",
    "no group": "process_group: expected the ranks over which rows are spread, got None",
    "layout": "layout: expected one of 'contiguous', 'zigzag', got 'striped'",
    "odd": r"a: expected tokens in 2 chunks of one length, in a zigzag layout, got \(2, 3\)",
    "bootstrap": r"bootstrap: expected shape \(2,\), one a row, or \(2, 4\), got \(4,\)",
    "masking": r"masking: expected one of 'carry', 'zero', got 'drop'",
    "clip": "clip_c: expected a float ≥ 0, got -1.0",
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_named_on_every_rank(ranks, what):
    for well, said in ranks.outcomes(refused, what, size=2):
        assert not well and said[0] in ("ValueError", "TypeError")
        with pytest.raises(ValueError, match=REFUSED[what]):
            raise ValueError(said[1])


def late(group, what: str):
    """Rank 1 fails between two collectives: on an argument of its own, or before the backward."""
    patient = dist.new_group(timeout=timedelta(seconds=1))
    second, x = dist.get_rank() == 1, torch.ones(2, 4).requires_grad_()
    mask = torch.ones(2, 5 if second and what == "mask" else 4)
    adv, _ = rlfast.distributed.gae(x, x, mask, gamma=1.0, lam=1.0, process_group=patient)
    if second:
        raise ZeroDivisionError("of rank 1")
    adv.sum().backward()


@pytest.mark.parametrize("what", ["mask", "backward"])
def test_a_rank_that_fails_raises_on_all(ranks, what):
    """Its own error there, and within the group's timeout on the others; who waited says so."""
    backward = what == "backward"
    own = "of rank 1" if backward else "mask: expected shape (2, 4) like values, got (2, 5)"
    for rank, (well, said) in enumerate(ranks.outcomes(late, what, size=4)):
        assert not well
        if rank == 1:
            assert said[1] == own
        else:
            waited = "the maps of the scan" + (", backward" if backward else "")
            assert said[0] == "RuntimeError" and f"{waited}: rank {rank} did not get what it waited for" in said[1]


def losses_of_parts(group, logp, old, mask):
    """A rank's loss by tokens and by the sums of pairs, from its tokens, and its gradients by them."""
    size, at = dist.get_world_size(group), places("contiguous", dist.get_rank(group), dist.get_world_size(group))
    own, mask = logp[:, at].clone().requires_grad_(), mask[:, at]
    objective, adv = rlfast.loss("dapo"), torch.arange(float(len(logp)))
    share = rlfast.distributed.share(objective, mask, process_group=group)
    by_token = objective(own, old_logp=old[:, at], adv=adv, mask=mask, **share._asdict()).loss
    (sums,) = rlfast.distributed.gather_batch((own * mask).sum(1), process_group=group)
    by_pair = rlfast.preference_loss("dpo", reference_free=True)(*sums.unflatten(0, (size, -1)).sum(0).chunk(2)).loss
    return [(loss.detach(), torch.autograd.grad(loss, own)[0]) for loss in (by_token, by_pair)]


@pytest.mark.parametrize("size", (2, 4))
def test_losses_of_rows_over_ranks(ranks, size):
    """What trainers take, the mean over the ranks of losses and gradients, is that of the whole rows."""
    logp, old = -draw((4, STEPS), seed=1).abs(), -draw((4, STEPS), seed=2).abs()
    mask = torch.rand(4, STEPS, generator=torch.Generator().manual_seed(3)) < 0.7
    whole = logp.clone().requires_grad_()
    by_token = rlfast.loss("dapo")(whole, old_logp=old, adv=torch.arange(4.0), mask=mask).loss
    by_pair = rlfast.preference_loss("dpo", reference_free=True)(*(whole * mask).sum(1).chunk(2)).loss
    found = ranks.run(losses_of_parts, logp, old, mask, size=size)
    for i, loss in enumerate((by_token, by_pair)):
        torch.testing.assert_close(sum(x[i][0] for x in found) / size, loss.detach(), rtol=1e-5, atol=1e-6)
        got, (wanted,) = torch.cat([x[i][1] for x in found], 1) / size, torch.autograd.grad(loss, whole)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item())
