"""A vocabulary that 1, 2 or 4 processes share gives what one has, under the one tolerance, and says what it sends."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.loss_table import LOSSES
from tests import cases, divergence_cases, shared
from tests import linear_policy_cases as policy
from tests import test_linear_preference_loss as preference
from tests import vocab_cases as work
from tests.adversarial import ROWS
from tests.cases import ALL, DIFFERENTIABLE, Problem, head_of, label, logits_of, pairwise, problem_of, targets_of
from tests.divergence_cases import Pair, heads_of, logits_pair
from tests.linear_policy_cases import BONUS, case_of
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero, by_name
from tests.rank_pool import SIZE
from tests.vocab_cases import ALONG, mismatches, on_ranks, together

BACKENDS = tuple(name for name in ("cpu", "torch") if backends.why_not(name) is None)


def reordered(case, seed: int) -> tuple[dict, dict]:
    """The float32 oracle with the vocabulary shuffled too, as ranks that share it sum it in another order."""
    if not seed:
        return policy.oracle(case, torch.float32)
    vocab = case.data["weight"].shape[0]
    order = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()
    data = {k: x[order] if k in ALONG and x is not None else x for k, x in case.data.items()}
    data["targets"] = torch.where(data["targets"] < 0, data["targets"], place[data["targets"].clamp(min=0)])
    values, gradients = policy.oracle(replace(case, data=data), torch.float32, seed)
    return values, {k: g[place] if k in ALONG else g for k, g in gradients.items()}


def check_policy(ranks, case, backend: str) -> None:
    """``linear_policy_cases.check`` by 1, 2 and 4 ranks."""
    results = together(ranks.run(on_ranks, case, backend))
    truth, wanted = policy.oracle(case, torch.float64)
    own, own_gradients = by_name(lambda seed: reordered(case, seed))
    live = case.data["live"]
    for size, (out, gradients) in results.items():
        loss, _, logp, entropy = out
        assert_value(f"loss of {size}", loss, truth["loss"], own["loss"], truth["size"])
        for name, got in (("logp", logp), ("entropies", entropy)):
            got = got.view(live.shape)
            assert_zero(f"{name} of masked tokens", got[~live])
            assert_value(f"{name} of {size}", got, truth[name], own[name])
        for name, got in gradients.items():
            assert got.dtype == case.data[name].dtype
            got = got.view(wanted[name].shape)
            assert_gradient(f"gradient of {name} of {size}", got, wanted[name], own_gradients[name])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(ranks, name):
    check_policy(ranks, case_of(name), BACKENDS[0])


WAYS = {
    "bonus": ("grpo", {"options": BONUS}),
    "a mean bonus": ("ppo", {"options": BONUS | {"entropy_mean": True}}),
    "packed": ("gspo", {"form": "packed"}),
    "recompute": ("ppo", {"budget": "recompute", "options": BONUS}),
    "a sequence": ("grpo", {"budget": "a sequence"}),
    "keep": ("grpo", {"budget": "keep", "options": BONUS}),
    "bf16": ("grpo", {"dtype": "bf16", "options": BONUS}),
    "f16, one chunk": ("ppo", {"dtype": "f16", "budget": "keep"}),
    "options": ("ppo", {"rest": {"temperature": 0.75, "softcap": 8.0, "logit_scale": 0.5}, "upstream": -1.5}),
    "frozen": ("grpo", {"needs": ("hidden",)}),
    "weight": ("grpo", {"needs": ("weight",), "budget": "keep"}),
    "full kl": ("ppo", {"options": {"kl": "full", "beta": 0.25} | BONUS}),
    "full kl, again": ("gspo", {"options": {"kl": "full", "beta": 0.25}, "budget": "recompute"}),
    "lora": ("grpo", {"lora": 1.5, "needs": ("hidden", "bias", "lora_a", "lora_b")}),
    "lora, bf16": ("ppo", {"lora": 1.5, "needs": ("hidden", "lora_a", "lora_b"), "dtype": "bf16", "budget": "keep"}),
    "lora, again": ("grpo", {"lora": 1.5, "needs": ("hidden", "lora_a", "lora_b"), "budget": "recompute"}),
}


OTHERS = ("bonus", "recompute", "keep", "bf16", "options", "full kl", "lora")  # of them, on the torch backend too


@pytest.mark.parametrize(
    ("kernels", "way"), [(name, way) for name in BACKENDS for way in (WAYS if name == BACKENDS[0] else OTHERS)]
)
def test_every_way(ranks, way, kernels):
    name, rest = WAYS[way]
    check_policy(ranks, case_of(name, **rest), kernels)


@pytest.mark.parametrize("budget", ("recompute", "a pair", "keep"))
@pytest.mark.parametrize("form", ("padded", "rows"))
def test_preferences(ranks, form, budget):
    case = preference.case_of(form=form, budget=budget)
    for out, gradients in together(ranks.run(on_ranks, case, BACKENDS[0])).values():
        preference.hold(case, out, gradients)


def combinations(op: str) -> list[dict]:
    """Those of the options, and of vocabularies that four can share."""
    axes = cases.LOGITS_AXES if op == "token_logps" else cases.LINEAR_AXES
    return pairwise(axes | {"vocab": (1000, 17, 1025, 2051)})[::3]


@pytest.mark.parametrize("product", (False, pytest.param(True, marks=pytest.mark.slow)))
@pytest.mark.parametrize("op", ("token_logps", "linear_token_logps"))
def test_options_pairwise(ranks, op, product):
    every = combinations(op)
    for combination in every if product else every[::4]:
        problem = problem_of(op, combination)
        backend = BACKENDS[0]
        solution = cases.solution_of(problem)
        for size, (out, gradients) in together(ranks.run(on_ranks, problem, backend)).items():
            try:
                cases.hold(problem, out, gradients, *solution)
            except AssertionError as error:
                raise AssertionError(f"{size} ranks, {backend}, {label(combination)}: {error}") from error


LARGE = ("13-vocabulary_151669", "21-entropy_of_256k_bf16")  # seconds each


@pytest.mark.parametrize("row", [pytest.param(row, marks=pytest.mark.slow if row in LARGE else ()) for row in ROWS])
def test_row(ranks, row):
    """What broke other kernels, with a shard's end within it."""
    for op in ("token_logps", "linear_token_logps"):
        problem, truth, yardstick = shared.solved(op, row)
        for out, gradients in together(ranks.run(on_ranks, problem, BACKENDS[0])).values():
            cases.hold(problem, out, gradients, truth, yardstick)


@pytest.mark.parametrize("margin", shared.MARGINS)
def test_relative_precision_as_p_nears_one(ranks, margin):
    logits = torch.zeros(4, 1500)
    logits[torch.arange(4), shared.CERTAIN] = margin
    problem = Problem({"logits": logits}, shared.CERTAIN, {}, DIFFERENTIABLE, ("logp",), upstream="ones")
    for out, gradients in together(ranks.run(on_ranks, problem, BACKENDS[0])).values():
        shared.hold_relative(out.logp, gradients["logits"].gather(1, shared.CERTAIN.unsqueeze(1)), problem)


OPTIONS = {"temperature": 0.75, "ref_temperature": 1.25, "softcap": 4.0, "ref_logit_scale": 0.5, "beta": 0.25}


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        pytest.param(kind, name, marks=pytest.mark.slow if name != BACKENDS[0] and kind != "jsd" else ())
        for kind in divergence_cases.KINDS
        for name in BACKENDS
    ],
)
def test_divergences(ranks, kind, kernels):
    n, vocab = 64, 1301
    targets, mask = targets_of(n, vocab, 2), torch.arange(n) % 5 != 2
    targets[7] = -100
    plain = {"kind": kind}
    rich = plain | OPTIONS | {"targets": targets, "mask": mask}
    everything = {"outputs": ("lse", "entropy", "ref_lse"), "grads": ("value", "logp", "lse", "entropy", "ref_lse")}
    pairs = (
        Pair(logits_pair(n, vocab), plain),
        Pair(logits_pair((4, 16), vocab, torch.bfloat16), plain),
        Pair(logits_pair(n, vocab, apart=0.01), rich, **everything),
        Pair(logits_pair(n, vocab), plain | {"top_k": 20, "tail": "bucket"}),
        Pair(heads_of(n, (33, 20), vocab, bias=True), rich, **everything),
        Pair(heads_of(n, (33, 20), vocab), plain, call={"memory_budget": 0}),
    )
    for number, pair in enumerate(pairs):
        solution = divergence_cases.solved(pair)
        for size, result in together(ranks.run(on_ranks, pair, kernels)).items():
            try:
                divergence_cases.hold(pair, *result, solution)
            except AssertionError as error:
                raise AssertionError(f"{size} ranks, pair {number}: {error}") from error


@pytest.mark.parametrize("kernels", BACKENDS)
def test_the_bits_do_not_depend_on_the_number_of_ranks(ranks, kernels):
    """Where shards begin at multiples of the width; but ∂hidden is a sum over the ranks."""
    vocab, width, rest = 4 * 1024 + 70, 512, {"outputs": ALL, "grads": DIFFERENTIABLE}
    pieces = {"width": width}
    for inputs in ({"logits": logits_of(37, vocab)}, head_of(37, 20, vocab, bias=True)):
        problem = Problem(inputs, targets_of(37, vocab), {"top_k": 3}, **rest)
        results = together(ranks.run(on_pieces, problem, kernels, pieces))
        expected, gradients = results[1]
        for out, found in results.values():
            for name, got in out._asdict().items():
                assert_same_bits(name, got, getattr(expected, name))
            for name in set(gradients) - {"hidden"}:
                assert_same_bits(name, found[name], gradients[name])
        cases.hold(problem, *results[SIZE], *cases.solution_of(problem))


FUSED = {
    "chunks": ("grpo", {"options": BONUS}),
    "all": ("ppo", {"budget": "keep", "options": BONUS}),
    "a sequence": ("gspo", {"budget": "a sequence", "dtype": "bf16"}),
    "again": ("ppo", {"budget": "recompute"}),
    "full kl": ("ppo", {"options": {"kl": "full", "beta": 0.25}}),
    "lora": ("grpo", {"lora": 1.5, "needs": ("hidden", "bias", "lora_b")}),
}


@pytest.mark.parametrize("way", (*FUSED, "preference"))
def test_the_bits_of_fused_losses(ranks, way):
    """Chunks are of the whole vocabulary where a width is given, so they are the same for every number of ranks."""
    case = preference.case_of() if way == "preference" else case_of(FUSED[way][0], **FUSED[way][1])
    results = together(ranks.run(on_pieces, case, BACKENDS[0], {"width": 128}))
    expected, gradients = results[1]
    for size in (2, SIZE):
        out, found = results[size]
        for number, (got, wanted) in enumerate(zip(out, expected, strict=True)):
            if isinstance(got, torch.Tensor):
                assert_same_bits(f"output {number} of {size}", got, wanted)
        for name in set(gradients) - {"hidden"}:
            assert_same_bits(f"{name} of {size}", found[name], gradients[name])


def on_pieces(case, backend: str, share: dict) -> dict:
    """``on_ranks`` with the options of ``VocabParallel``."""
    return on_ranks(case, backend, **share)


def test_padded_vocabularies(ranks):
    """Columns beyond the vocabulary are as if they were not there, on a rank that has no other too."""
    vocab, padded = 1301, 2000
    for inputs, along in (({"logits": logits_of(40, padded)}, -1), (head_of(40, 20, padded, bias=True), 0)):
        problem = Problem(inputs, targets_of(40, vocab), {}, outputs=ALL, grads=DIFFERENTIABLE)
        names = ("logits",) if along else ("weight", "bias")
        cut = {k: x.narrow(along, 0, vocab) if k in names else x for k, x in inputs.items()}
        real = Problem(cut, problem.targets, {}, outputs=ALL, grads=DIFFERENTIABLE)
        for out, gradients in together(ranks.run(on_pieces, problem, BACKENDS[0], {"vocab_size": vocab})).values():
            for name in names:
                assert_zero(f"{name} of padding", gradients[name].narrow(along, vocab, padded - vocab))
                gradients[name] = gradients[name].narrow(along, 0, vocab)
            cases.hold(real, out, gradients, *cases.solution_of(real))


def test_ranks_that_differ(ranks):
    """Every rank is told what differs, and where; afterwards the group works."""
    for answer in ranks.run(mismatches):
        assert "same depth" in answer["depth"] and "9 on rank 2" in answer["depth"]
        assert "same dtype" in answer["dtype"] and "on rank 1" in answer["dtype"]
        assert "same bias" in answer["bias"] and "1 on rank 3" in answer["bias"]
        assert "same vocab size" in answer["vocab_size"] and "21 on rank 3" in answer["vocab_size"]
        assert "at least 25 columns" in answer["too few columns"] and "6 on rank 0" in answer["too few columns"]
        assert answer["target"].startswith("ValueError: targets: expected values in [0, 24)")
        assert answer["group"].startswith("TypeError: process_group: expected a ProcessGroup or a DeviceMesh")
        assert answer["no group"].startswith("ValueError: group: expected a group, since the weight is no DTensor")
        assert answer["plain"].startswith("ValueError: weight: expected a DTensor")
        assert answer["batch_invariant"].startswith("ValueError: batch_invariant: expected False")
        assert answer["dimension"].startswith("ValueError: weight: expected a DTensor sharded on dimension 0")
        assert answer["mesh"].startswith("ValueError: process_group: expected a DeviceMesh of one dimension")
        assert answer["backend"].startswith("ValueError: process_group: expected None on the reference backend")
        assert answer["after"] == ""
        assert answer["two heads"] == [True, True, False]


def test_a_rank_that_fails(ranks):
    """It says why; the others raise within the timeout, and say whom they waited for."""
    answers = ranks.run(work.a_rank_fails)
    assert answers[1][0].startswith("ValueError: targets")
    for rank in (0, 2, 3):
        error, seconds = answers[rank]
        others = [r for r in range(SIZE) if r != rank]
        assert error.startswith(f"RuntimeError: process_group: rank {rank} waited in vain for ranks {others}")
        assert seconds < 10.0


def test_a_rank_with_other_rows(ranks):
    """It is said on every rank before anything else is sent, also where hands were shaken."""
    for error in ranks.run(work.other_shapes):
        wanted = "ranks with the same rows, got 5 on rank 0, 5 on rank 1, 6 on rank 2, 5 on rank 3"
        assert error == f"ValueError: process_group: expected {wanted}"


@pytest.mark.parametrize("named", ("its own mesh", "a mesh", "options"))
def test_heads_that_are_dtensors(ranks, named):
    """Sharded over the vocabulary, every rank with all tokens: gradients have the layout of the parameters."""
    for inputs in (head_of(64, 20, 1301, bias=True), {"logits": logits_of(64, 1301)}):
        problem = Problem(inputs, targets_of(64, 1301), {}, ("entropy",), DIFFERENTIABLE[:1])
        for out, gradients in ranks.run(work.on_mesh, problem, BACKENDS[0], named):
            cases.hold(problem, out, gradients, *cases.solution_of(problem))


@pytest.mark.parametrize("way", ("gathered for the call", "gathered before", "kept by the root"))
def test_a_lora_body_under_fsdp2(ranks, way):
    """The step of a model of which FSDP2 has a shard on each rank is that of one process."""
    model = work.Lora().double()
    batch = {name: x.double() if x.is_floating_point() else x for name, x in work.lora_batch().items()}
    truth, wanted = work.lora_step(model, batch)
    own, own_gradients = work.lora_step(work.Lora(), work.lora_batch())
    for loss, gradients in ranks.run(work.sharded_lora, way):
        assert_value("loss", loss, truth, own, truth.abs() + 1.0)
        assert set(gradients) == set(wanted) == {"a", "b", "head.weight"}
        for name, got in gradients.items():
            assert_gradient(name, got, wanted[name], own_gradients[name])


def test_megatrons_names(ranks):
    """Values and gradients are those of PyTorch with the whole vocabulary."""
    problem = Problem(head_of(64, 20, 1301), targets_of(64, 1301))
    answers = ranks.run(work.megatrons, problem)
    truth, own = (by_hand(problem, dtype) for dtype in (torch.float64, torch.float32))
    for name in ("head", "log-prob", "loss", "entropy"):
        value, *gradients = zip(*(answer[name] for answer in answers), strict=True)
        assert_value(name, value[0], truth[name][0], own[name][0])
        if name == "head":
            assert_gradient("hidden", sum(gradients[0]), truth[name][1], own[name][1])
        along = 0 if name == "head" else -1
        assert_gradient(name, torch.cat(gradients[-1], along), truth[name][-1], own[name][-1])
    for name in ("mean", "squares"):
        assert_value(name, answers[3][name], truth[name], own[name], truth[name].abs() + 1.0)


def by_hand(problem: Problem, dtype: torch.dtype) -> dict:
    """The same by autograd."""
    hidden, weight = (problem.inputs[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    given = (problem.inputs["hidden"] @ problem.inputs["weight"].T).to(dtype).requires_grad_()

    def of(logits):
        log_p = torch.log_softmax(logits, -1)
        return log_p.gather(-1, problem.targets.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1), log_p

    logp, entropy, _ = of(hidden @ weight.T)
    found = {"head": (logp.detach(), *torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight)))}
    found["mean"] = logp.detach().mean()
    logp, entropy, log_p = of(given)
    for name, value in (("log-prob", logp), ("loss", -logp), ("entropy", entropy)):
        found[name] = value.detach(), *torch.autograd.grad(value.sum(), given, retain_graph=True)
    return found | {"squares": log_p.detach().exp().square().sum(-1)}


def test_a_weight_that_is_partitioned():
    """It is gathered for the forward and for the backward, and the gradient is that of the whole."""
    inputs, targets = head_of(64, 20, 1301), targets_of(64, 1301)
    problem = Problem(inputs, targets, {}, ("entropy",), upstream="ones")
    hidden, weight = inputs["hidden"].clone().requires_grad_(), torch.nn.Parameter(inputs["weight"].clone())
    around = work.Partitions(weight)
    whole = rlfast.distributed.Partitioned(around)
    out = rlfast.linear_token_logps(hidden, weight, targets, outputs=("entropy",), memory_budget=0, process_group=whole)
    assert not weight.numel() and around.uses == 1
    gradients = torch.autograd.grad(out.logp.sum(), (hidden, weight))
    assert not weight.numel() and around.uses == 2
    cases.hold(problem, out, dict(zip(("hidden", "weight"), gradients, strict=True)), *cases.solution_of(problem))
    loss = (
        rlfast.loss("reinforce")
        .linear(hidden.view(8, 8, -1), weight, targets.view(8, 8), adv=torch.ones(8), process_group=whole)
        .loss
    )
    assert around.uses == 3
    again = torch.autograd.grad(loss, (hidden, weight))
    assert around.uses == 3 and again[1].shape == (1301, 20)
    with pytest.raises(TypeError, match="gather: expected a function"):
        rlfast.distributed.Partitioned(None)
