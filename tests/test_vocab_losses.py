"""Losses over a shared head that are not in ``test_vocab_parallel.py``: every preference, padded vocabularies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast.preference_table import PREFERENCES
from rlfast.reference.linear_token_logps import linear_token_logps as reference
from tests import cases, divergence_cases
from tests import linear_policy_cases as policy
from tests import test_linear_preference_loss as preference
from tests.cases import DIFFERENTIABLE, Problem, head_of, logits_of, targets_of
from tests.divergence_cases import Pair, heads_of, logits_pair
from tests.linear_policy_cases import BONUS
from tests.numerics import assert_same_bits, assert_zero
from tests.rank_pool import SIZE
from tests.test_vocab_parallel import check_policy
from tests.vocab_cases import ALONG, Partitions, on_ranks, together

OP = "token_logps"
NAMES = [name for name, loss in PREFERENCES.items() if not loss.kl]  # what reads a KL takes no hidden states
PADDED = 1500


def pairs_of(name: str, form: str) -> preference.Case:
    """A row of the table, with what else it needs, and a reference so near that squares do not eat their digits."""
    case = preference.case_of(name, form=form)
    if name == "sppo_hard":  # its loss is of the size of 1/(2β)², 250000 by default: a log-prob's last digit counts
        case = replace(case, loss=rlfast.preference_loss(name, beta=0.5))
    given = (case.data[k] for k in ("hidden", "weight", "targets", "bias"))
    near = reference(*given, mask=case.data["live"], dtype=torch.float64)["logp"].float()
    case = replace(case, data=case.data | {"ref": near * torch.where(case.data["live"], 0.9, 0.0)})
    pairs, draw = case.data["targets"].shape[0] // 2, torch.Generator().manual_seed(8)
    fields = {k: torch.rand(pairs, generator=draw) for k in ("margin", "extra", "weights")} | {"shared": 0.25}
    return replace(case, rest={k: fields[k] for k in case.loss.needs})


def preferences(names: list[str], form: str, sizes: tuple) -> dict:
    """{name: what ``on_ranks`` gives}."""
    return {name: on_ranks(pairs_of(name, form), "cpu", sizes) for name in names}


@pytest.mark.parametrize(("form", "size"), (("padded", SIZE), ("packed", 2), ("packed rows", SIZE)))
@pytest.mark.parametrize("at", range(4))
def test_every_preference(ranks, at, form, size):
    names = NAMES[at::4] if form == "padded" else NAMES[at::12]
    answers = ranks.run(preferences, names, form, (size,))
    for name in names:
        ((out, gradients),) = together([answer[name] for answer in answers]).values()
        try:
            preference.hold(pairs_of(name, form), out, gradients)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def padded(inputs: dict, vocab: int) -> dict:
    """The same with columns beyond the vocabulary, which hold what may not be read."""
    found = {}
    for name, x in inputs.items():
        if name not in ALONG or x is None:
            found[name] = x
            continue
        shape = list(x.shape)
        shape[ALONG[name]] = PADDED - vocab
        found[name] = torch.cat((x, torch.full(shape, 50.0, dtype=x.dtype)), ALONG[name])
    return found


def of_padded(case, sizes: tuple, vocab: int) -> dict:
    """``on_ranks`` with a padded vocabulary: the gradients of the columns that there are, and of those beyond."""
    return on_ranks(case, "cpu", sizes, vocab_size=vocab)


def without_padding(gradients: dict, vocab: int) -> dict:
    """Those of the vocabulary; what is beyond has none."""
    found = {}
    for name, x in gradients.items():
        if name not in ALONG:
            found[name] = x
            continue
        assert_zero(f"{name} of padding", x.narrow(ALONG[name], vocab, x.shape[ALONG[name]] - vocab))
        found[name] = x.narrow(ALONG[name], 0, vocab)
    return found


@pytest.mark.parametrize("kind", divergence_cases.KINDS)
def test_padded_divergences(ranks, kind):
    n, vocab = 24, 1301
    for pair in (
        Pair(logits_pair(n, vocab), {"kind": kind}),
        Pair(heads_of(n, (33, 20), vocab, bias=True), {"kind": kind}),
        Pair(logits_pair(n, vocab), {"kind": kind, "top_k": 20}),
    ):
        solution, wide = divergence_cases.solved(pair), replace(pair, inputs=padded(pair.inputs, vocab))
        for out, gradients in together(ranks.run(of_padded, wide, (2, SIZE), vocab)).values():
            divergence_cases.hold(pair, out, without_padding(gradients, vocab), solution)


class Narrow:
    """A pool whose answers have no columns beyond the vocabulary."""

    def __init__(self, ranks, vocab: int):
        self.ranks, self.vocab = ranks, vocab

    def run(self, function, case, backend):
        wide = replace(case, data=padded(case.data, self.vocab))
        found = self.ranks.run(of_padded, wide, (SIZE,), self.vocab)
        ((out, gradients),) = together(found).values()
        return [{SIZE: (out, without_padding(gradients, self.vocab))}]


@pytest.mark.parametrize("kind", divergence_cases.KINDS)
def test_no_rows(ranks, kind):
    for pair in (Pair(logits_pair(0, 101), {"kind": kind}), Pair(heads_of(0, (33, 20), 101), {"kind": kind})):
        for out, gradients in together(ranks.run(on_ranks, pair, "cpu", (2,))).values():
            assert out.value.shape == (0,)
            assert all(x.shape == pair.inputs[name].shape and not x.any() for name, x in gradients.items())


@pytest.mark.parametrize(
    ("name", "rest"),
    (
        ("grpo", {"options": BONUS}),
        ("ppo", {"budget": "keep", "options": {"kl": "full", "beta": 0.25}}),
        ("grpo", {"budget": "recompute", "lora": 1.5, "needs": ("hidden", "lora_a", "lora_b")}),
    ),
)
def test_padded_losses(ranks, name, rest):
    check_policy(Narrow(ranks, policy.VOCAB), policy.case_of(name, **rest), "cpu")


def policy_loss(hidden, weight, targets, **more):
    return rlfast.loss("reinforce").linear(hidden, weight, targets, adv=torch.arange(4.0) - 1.5, **more).loss


def rows_in_one(hidden, weight, targets, **more):
    return rlfast.preference_loss("simpo").linear_rows(hidden, weight, targets, **more).loss


def two_sides(hidden, weight, targets, **more):
    (w, l_), (w_ids, l_ids) = hidden.chunk(2), targets.chunk(2)
    return rlfast.preference_loss("cpo").linear(w, l_, weight, w_ids, l_ids, **more).loss


PARTITIONED = {  # how often the weight is asked for: by the loss, by it and its backward
    "a policy's": (policy_loss, torch.float32, {}, (1, 1)),
    "rounded gradients": (policy_loss, torch.bfloat16, {}, (1, 2)),
    "logits made again": (policy_loss, torch.float32, {"memory_budget": 0}, (1, 2)),
    "pairs": (two_sides, torch.float32, {}, (1, 2)),
    "pairs in one": (rows_in_one, torch.float32, {"memory_budget": 0}, (1, 2)),
}


@pytest.mark.parametrize("way", PARTITIONED)
def test_losses_of_a_weight_that_is_partitioned(way):
    """What of a loss and its backward reads the weight finds it; the gradients are those of one that is whole."""
    loss, dtype, options, uses = PARTITIONED[way]
    inputs = head_of(32, 20, 101)
    hidden, weight = (inputs[name].to(dtype) for name in ("hidden", "weight"))
    hidden, weight = hidden.view(4, 8, -1).requires_grad_(), torch.nn.Parameter(weight)
    targets = targets_of(32, 101).view(4, 8)
    wanted = torch.autograd.grad(0.3 * loss(hidden, weight, targets, **options), (hidden, weight))
    around = Partitions(weight)
    value = loss(hidden, weight, targets, process_group=rlfast.distributed.Partitioned(around), **options)
    assert around.uses == uses[0] and not weight.numel()
    found = torch.autograd.grad(0.3 * value, (hidden, weight))
    assert around.uses == uses[1] and not weight.numel()
    whole = rlfast.distributed.Partitioned(around)
    value = loss(hidden, weight, targets, process_group=whole, **options)
    with whole.around():
        (0.3 * value).backward()
    assert around.uses == uses[1] + 2 and not weight.numel()
    assert_same_bits("hidden.grad", hidden.grad, found[0])
    assert_same_bits("weight.grad", weight.grad, found[1])
    rtol = 1e-5 if dtype == torch.float32 else 2**-7
    for got, whole in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, whole, rtol=rtol, atol=rtol * whole.abs().max().item())


@pytest.mark.backends("triton")
def test_tritons_kernels(ranks, backend):
    """Their records merge as those of the others do."""
    n, vocab = 3, 40
    for inputs in ({"logits": logits_of(n, vocab)}, head_of(n, 16, vocab)):
        outputs = ("entropy", "lse", "is_top1", "log_sum_sq_probs")
        problem = Problem(inputs, targets_of(n, vocab), {"temperature": 0.75}, outputs, DIFFERENTIABLE)
        ((out, gradients),) = together(ranks.run(on_ranks, problem, backend, (2,))).values()
        cases.hold(problem, out, gradients, *cases.solution_of(problem))
