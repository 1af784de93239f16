"""``unpaired_loss`` on every backend against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast.kernels.formulas import SINGLES
from tests.cases import few
from tests.numerics import assert_same_bits
from tests.preference_cases import SingleCase, check_single, drawn, read_by, run_single, single_case
from tests.shared import check_replay, far_apart, skip_unless_memory

OP = "unpaired_loss"


@pytest.mark.parametrize("link", SINGLES)
@pytest.mark.parametrize("form", ("sums", "padded", "packed"))
@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16", "mixed"))
def test_every_link(backend, device, link, form, dtype):
    check_single(single_case(link, form, dtype), backend, device)


@pytest.mark.parametrize("reduce", ("mean", "sum"))
@pytest.mark.parametrize("count", (None, 17.0, "tensor"))
def test_the_normaliser(backend, device, reduce, count):
    case = single_case("kto", reduce=reduce)
    count = {} if count is None else {"num_items": torch.tensor(17.0) if count == "tensor" else count}
    case = replace(case, rest=case.rest | count | {"world_size": 4, "accumulation": 2}, upstream=0.375)
    check_single(case, backend, device)


def test_a_mixture(backend, device):
    more = (rlfast.Part("retain", score="total", mean=True), rlfast.Part("dro", weight=0.5))
    check_single(single_case("npo", "packed", more=more), backend, device)


@pytest.mark.parametrize("kind", (True, False))
def test_one_kind_alone(backend, device, kind):
    case = single_case("kto")
    check_single(replace(case, desirable=torch.full_like(case.desirable, kind)), backend, device)


def test_far_from_the_reference(backend, device):
    case = single_case("kto")
    case.tokens["logp"][::2] = case.tokens["logp"][::2] * 1000
    for link in ("kto", "bco_unpaired", "apo_zero_unpaired", "apo_down_unpaired", "npo"):
        objective = rlfast.UnpairedLoss((rlfast.Part(link),))
        check_single(replace(case, objective=objective, rest=read_by(objective, case.rest)), backend, device)


@pytest.mark.backends("reference", "torch", "cpu", "cuda")
def test_many_responses(backend, device):
    tokens = drawn(70_000, 1)["chosen"]
    check_single(SingleCase(rlfast.unpaired_loss("apo_zero"), tokens, alternating(tokens), {}, "sums"), backend, device)


@pytest.mark.large
@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("form", ("padded", "packed"))
def test_full_size(backend, device, form):
    """4M tokens."""
    tokens = drawn(few(4096, 8), few(1024, 64))["chosen"]
    check_single(SingleCase(rlfast.unpaired_loss("apo_zero"), tokens, alternating(tokens), {}, form), backend, device)


def alternating(tokens: dict) -> torch.Tensor:
    """Which responses are desirable."""
    return torch.arange(tokens["logp"].shape[0]) % 3 != 0


@pytest.mark.parametrize("form", ("sums", "packed"))
def test_an_empty_batch(backend, device, form):
    case = single_case("kto", form)
    empty = {k: x[:0] for k, x in case.tokens.items()}
    rest = {k: x[:0] if x.dim() else x for k, x in case.rest.items()}
    out, gradients = run_single(replace(case, tokens=empty, rest=rest, desirable=case.desirable[:0]), backend, device)
    assert out.loss.item() == 0.0 and gradients["logps"].numel() == 0


@pytest.mark.parametrize("link", [link for link in SINGLES if link != "retain"])
def test_a_nan_stays_in_its_response(backend, device, link):
    case = single_case(link, "padded")
    clean, _ = run_single(case, backend, device)
    case.tokens["logp"][3, 0] = torch.nan  # an undesirable one: some losses do not read the others
    out, _ = run_single(case, backend, device)
    others = torch.arange(out.losses.shape[0]) != 3
    assert out.loss.isnan() and out.losses[3].isnan()
    assert_same_bits("the others", out.losses.cpu()[others], clean.losses.cpu()[others])


def test_the_same_bits_run_after_run(backend, device, threads):
    case = single_case("kto", "packed")
    first, gradients = run_single(case, backend, device)
    for count in (1, 2) * few(5, 1):
        if backend == "cpu":
            threads(count)
        again, others = run_single(case, backend, device)
        assert_same_bits("metrics", again.metrics.values, first.metrics.values)
        assert_same_bits("gradient", others["logps"], gradients["logps"])


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu", "triton", "cuda")
def test_row_11_rows_2_31_elements_apart(backend, device):
    skip_unless_memory(device, 8)
    tokens = drawn(2, 40, "bf16")["chosen"]
    near, found = [tokens[k].to(device) for k in ("logp", "ref_logp", "mask")], []
    for leaf, ref, mask in (near, far_apart(*near)):
        leaf, good = leaf.requires_grad_(), torch.tensor([True, False], device=device)
        with rlfast.use_backend(backend):
            loss = rlfast.unpaired_loss("kto")(leaf, good, ref_logps=ref, mask=mask, shared=0.5).loss
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for name, one, other in zip(("loss", "gradient"), *found, strict=True):
        assert_same_bits(name, other, one)


@pytest.mark.gpu
@pytest.mark.backends("triton", "cuda")
def test_in_a_cuda_graph(backend, device):
    tokens = {k: x.to(device) for k, x in drawn(5, 40)["chosen"].items()}
    leaf, good = tokens["logp"].requires_grad_(), torch.arange(5, device=device) % 2 == 0

    def step():
        out = rlfast.unpaired_loss("kto")(leaf, good, ref_logps=tokens["ref_logp"], mask=tokens["mask"], shared=0.5)
        return out.loss, *torch.autograd.grad(out.loss, leaf)

    with rlfast.use_backend(backend):
        check_replay(step, leaf)
