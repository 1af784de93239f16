"""Heads in other layouts: FSDP2's meshes, DTensors, Megatron's layers; and ranks that ask for other things."""

from __future__ import annotations

import pytest
import torch

from tests import cases
from tests import vocab_layouts as work
from tests.cases import Problem, head_of, targets_of
from tests.numerics import assert_gradient, assert_same_bits, assert_value
from tests.rank_pool import SIZE

BACKEND = "cpu"


@pytest.mark.parametrize("layout", work.LAYOUTS)
@pytest.mark.parametrize("mean", (False, True), ids=("sum", "mean"))
def test_heads_that_are_gathered(ranks, mean, layout):
    """Tokens of their own on each rank of the mesh: the gradient is the sum over all, or the mean of the ranks'."""
    problem = Problem(head_of(64, 20, 1301, bias=True), targets_of(64, 1301), {}, grads=("logp",), upstream="ones")
    answers = ranks.run(work.on_own_tokens, problem, BACKEND, mean, layout)
    out = type(answers[0][0])(torch.cat([out.logp for out, _ in answers]))
    solution = cases.solution_of(problem)
    for _, found in answers:
        gradients = found | {"hidden": torch.cat([g["hidden"] for _, g in answers])}
        if mean:
            gradients |= {name: gradients[name] * SIZE for name in ("weight", "bias")}
        cases.hold(problem, out, gradients, *solution)


def gradient_of(dtype: torch.dtype, entropy: bool = False):
    """(∂hidden, ∂weight) of the mean log-prob of all tokens; or of the sum, with entropies."""
    hidden, weight, targets = work.drawn()
    hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    logp = log_p.gather(-1, targets.unsqueeze(-1))
    value = logp.sum() - (log_p.exp() * log_p).sum() if entropy else logp.mean()
    return torch.autograd.grad(value, (hidden, weight))


@pytest.mark.parametrize("kind", ("HSDP", "FSDP2 over tensor parallel"))
def test_beside_fsdp2(ranks, kind):
    """What ``Gathered`` gives is what FSDP2's own backward gives, the mean over every rank of the mesh."""
    truth, own = gradient_of(torch.float64)[1], gradient_of(torch.float32)[1]
    for ours, theirs in ranks.run(work.beside_fsdp2, kind):
        assert_gradient("weight", ours, truth, own)
        if kind == "HSDP":
            assert_gradient("FSDP2's", theirs, truth, own)


def test_a_weight_that_is_wider_than_the_hidden_states(ranks):
    """Said, it is gathered in their dtype; its gradient has its own."""
    hidden, weight, targets = work.drawn()
    rows, leaf = hidden.bfloat16().double(), weight.bfloat16().double().requires_grad_()
    truth = torch.log_softmax(rows @ leaf.T, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    (wanted,) = torch.autograd.grad(truth.sum(), leaf)
    for answer in ranks.run(work.narrow_weights):
        assert answer["unsaid"].startswith("TypeError: weight: expected dtype torch.bfloat16 like hidden")
        assert answer["dtype"].startswith("ValueError: dtype: expected None or one of")
        assert answer["twice"]
        for name in ("call", "before"):
            logp, gradient = answer[name]
            torch.testing.assert_close(logp, truth.detach().float(), rtol=1e-5, atol=1e-5)
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, wanted.float(), rtol=2**-7, atol=2**-7)


def test_a_rank_that_is_missing_from_a_gather(ranks):
    answers = ranks.run(work.a_rank_is_missing)
    for rank in (0, 2, 3):
        error, seconds = answers[rank]
        others = [r for r in range(SIZE) if r != rank]
        assert error.startswith(f"RuntimeError: process_group: rank {rank} waited in vain for ranks {others}")
        assert "the gather of weight" in error
        assert seconds < 10.0


def test_dtensors_beside_the_head(ranks):
    """What every rank has whole may be a DTensor that is replicated; one that is sharded is named in an error."""
    for answer in ranks.run(work.dtensors):
        for name in ("hidden", "layout", "a", "lora, gathered", "ref_hidden"):
            assert answer[name] is True, name
        for name, argument in (("tokens", "hidden"), ("a, sharded", "lora[0]"), ("ref_hidden, sharded", "ref_hidden")):
            assert answer[name].startswith(
                f"ValueError: {argument}: expected a tensor of this rank's own, or a DTensor"
            )
        assert answer["b, replicated"].startswith("ValueError: lora[1]: expected a DTensor sharded on one dimension")
        assert answer["two dimensions"].startswith("ValueError: weight: expected a DTensor sharded on one dimension")
        assert answer["its dimension"] is True


def test_dtensors_of_another_group(ranks):
    """The ranks that share the one are not those that share the other: it is named, and both are."""
    others = {
        "another dimension": "weight", "another group": "weight", "another bias": "bias",
        "another reference": "ref_weight", "another teacher": "ref_logits", "another factor": "lora[1]",
    }  # fmt: skip
    for rank, answer in enumerate(ranks.run(work.dtensors)):
        column, row = [rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]
        for name, argument in others.items():
            wanted, found = (row, column) if argument != "weight" else (column, row)
            wanted = [0, 1, 2, 3] if name == "another group" else wanted
            said = (
                f"{argument}: expected a DTensor sharded over ranks {wanted}, those of process_group, got ranks {found}"
            )
            assert answer[name] == f"ValueError: {said}"


def test_gradients_added_to_a_dtensor(ranks):
    hidden, weight, targets = work.drawn(8)
    leaf = weight.double().requires_grad_()
    logp = torch.log_softmax(hidden.double() @ leaf.T, -1).gather(-1, targets.unsqueeze(-1))
    (wanted,) = torch.autograd.grad(-logp.mean(), leaf)
    for answer in ranks.run(work.accumulated):
        torch.testing.assert_close(answer["once"].double(), wanted, rtol=1e-5, atol=1e-6)
        assert_same_bits("twice", answer["twice"], 2 * answer["once"])
        assert answer["gathered"].startswith("ValueError: accumulate_grad: expected False with Gathered")


@pytest.mark.parametrize("function", ("verl's", "one chunk", "chunks", "again"))
def test_behind_a_gather_that_sums(ranks, function):
    """Each rank's ∂hidden is its columns' part, whose sum that gather takes."""
    answers = ranks.run(work.under_megatron, function)
    hidden, weight = (torch.cat(parts) for parts in zip(*answers, strict=True))
    sign = 1.0 if function == "verl's" else -1.0
    for name, got, place in (("hidden", hidden, 0), ("weight", weight, 1)):
        truth, own = (gradient_of(dtype, function == "verl's")[place] for dtype in (torch.float64, torch.float32))
        count = 1.0 if function == "verl's" else SIZE * work.ROWS
        assert_gradient(name, got * sign, truth * count, own * count)


def test_ranks_that_ask_for_other_things(ranks):
    """A ValueError on every rank, with what each has; afterwards the group works."""
    wanted = {
        "outputs": "outputs", "outputs of logits": "outputs", "top_k": "top k", "targets": "number of targets a row",
        "function": "function", "kind": "kind", "top_k of a divergence": "top k", "tail": "tail", "loss": "loss",
        "entropy": "outputs", "memory_budget": "memory budget", "sum_hidden": "sum hidden", "preference": "loss",
        "rejected rows": "rows", "mask": "tokens that count", "mask of the chosen": "tokens that count",
    }  # fmt: skip
    for answer in ranks.run(work.other_options):
        for name, said in wanted.items():
            assert answer[name].startswith(f"ValueError: process_group: expected ranks with the same {said}, got"), name
            assert all(f"on rank {rank}" in answer[name] for rank in range(SIZE))
        assert answer["after"] == ""


def test_where_nobody_looks(ranks):
    """On a GPU heads are told apart by their weights, and logits say their vocabulary."""
    for answer in ranks.run(work.where_nobody_looks):
        assert answer.pop("unsaid").startswith("ValueError: vocab_size: expected an int for logits on a GPU")
        for name, (got, truth) in answer.items():
            assert_value(name, got, truth.double(), truth)
