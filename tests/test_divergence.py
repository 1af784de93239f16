"""``divergence`` on every backend: the options, the inputs that break such kernels, what two distributions add."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.ops import divergence as logits_op
from rlfast.reference.divergence import divergence as reference
from tests.cases import few, interpreted, logits_of, targets_of
from tests.divergence_cases import (
    ALL,
    KINDS,
    ROWS,
    Pair,
    check,
    combination_label,
    combinations,
    logits_pair,
    pair_of,
    row_of,
    run,
    same_run,
    solved,
)
from tests.numerics import assert_same_bits, assert_value, assert_zero
from tests.shared import check_replay, skip_unless_memory

COMBINATIONS = combinations(linear=False)
KERNELS = ("cpu", "triton", "cuda")


@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_label)
def test_options_pairwise(backend, device, combination):
    check(pair_of(combination, linear=False), backend, device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_row(backend, device, row, kind):
    check(row_of(row, kind), backend, device)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.backends("cpu")
def test_row_on_every_isa(backend, device, row, kind, isa):
    with backends.use_isa(isa):
        check(row_of(row, kind), backend, device)


@pytest.mark.parametrize("isa", backends.isas()[:-1])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=combination_label)
@pytest.mark.backends("cpu")
def test_options_on_every_isa(backend, device, combination, isa):
    with backends.use_isa(isa):
        check(pair_of(combination, linear=False), backend, device)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", (1.0, 0.7))
@pytest.mark.backends("torch", *KERNELS)
def test_equal_distributions(backend, device, kind, temperature):
    """p = q: a divergence of exactly 0, and no gradient on either side."""
    x = logits_of(few(20, 4), 2100)
    x[:, 5:400] = -torch.inf
    options = {"kind": kind, "beta": 0.3, "temperature": temperature, "softcap": None}
    out, gradients = run(Pair({"logits": x, "ref_logits": x.clone()}, options), backend, device)
    assert_zero("value", out.value)
    for name, g in gradients.items():
        assert_zero(f"gradient of {name}", g)


@pytest.mark.parametrize("beta", (0.0, 1.0))
def test_the_ends_of_a_jsd_are_the_two_kls(backend, device, beta):
    pair = Pair(logits_pair(9, 1100), {"kind": "jsd", "beta": beta})
    kl = replace(pair, options={"kind": "reverse_kl" if beta else "forward_kl"})
    same_run(run(pair, backend, device), run(kl, backend, device))


@pytest.mark.backends("torch", *KERNELS)
def test_disjoint_supports(backend, device):
    """A JSD of two distributions that share nothing is the entropy of (β, 1 − β), and infinite KLs are that."""
    x, y = torch.zeros(3, 2500), torch.zeros(3, 2500)
    x[:, 1200:] = y[:, :1200] = -torch.inf
    for beta in (0.5, 0.25):
        out, _ = run(Pair({"logits": x, "ref_logits": y}, {"kind": "jsd", "beta": beta}), backend, device)
        expected = torch.full((3,), -beta * math.log(beta) - (1 - beta) * math.log(1 - beta), dtype=torch.float64)
        assert_value("JSD", out.value.detach(), expected, expected.float())
    for kind in KINDS[:2]:
        assert bool(
            (
                run(Pair({"logits": x, "ref_logits": y}, {"kind": kind}, (), ()), backend, device)[0].value == torch.inf
            ).all()
        )


@pytest.mark.backends(*KERNELS)
def test_the_student_has_the_bits_of_token_logps(backend, device):
    logits, targets = logits_pair(few(12, 3), 3000), targets_of(few(12, 3), 3000)
    options = {"targets": targets.to(device), "temperature": 0.7, "outputs": ("lse", "entropy")}
    with rlfast.use_backend(backend):
        one = rlfast.divergence(logits["logits"].to(device), logits["ref_logits"].to(device), **options)
        other = rlfast.token_logps(logits["logits"].to(device), **options)
    for name in ("logp", "lse", "entropy"):
        assert_same_bits(name, getattr(one, name), getattr(other, name))


@pytest.mark.backends(*KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_neither_the_batch_nor_the_threads(backend, device, kind, threads):
    n = few(40, 5)
    options = {"kind": kind, "targets": targets_of(n, 2600)}
    pair = Pair(logits_pair(n, 2600), options, ALL[1:], ("value", "logp", "entropy"))
    whole = run(pair, backend, device)
    for count in (1, 2, 3):
        threads(count)
        same_run(run(pair, backend, device), whole)
        one = slice(2, 3)
        part = replace(
            pair, inputs={k: x[one] for k, x in pair.inputs.items()},
            options=options | {"targets": options["targets"][one]}, grads=(),
        )  # fmt: skip
        got, _ = run(part, backend, device)
        for name in ("value", *ALL):
            assert_same_bits(name, getattr(got, name), getattr(whole[0], name)[one].detach())


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_runs_equal_bits(backend, device, kind):
    n = few(30, 3)
    pair = Pair(logits_pair(n, 2100, torch.bfloat16), {"kind": kind, "targets": targets_of(n, 2100)}, ALL[1:])
    first = run(pair, backend, device)
    for _ in range(2 if interpreted() else 19):
        same_run(run(pair, backend, device), first)


@pytest.mark.parametrize("lead", ((0,), (0, 3), (2, 0), (), (1, 1), (2, 1, 3)), ids=str)
def test_shapes(backend, device, lead):
    """No rows (still differentiable), one vector, many leading dimensions."""
    targets = targets_of(lead, 50)
    pair = Pair(logits_pair(lead, 50), {"targets": targets}, ALL[1:], ("value", "logp"))
    out, gradients = run(pair, backend, device)
    assert out.value.shape == lead and gradients["logits"].shape == (*lead, 50)
    if 0 not in lead:
        check(pair, backend, device)


def test_seventy_thousand_rows(backend, device):
    check(Pair(logits_pair(few(70_000, 300), 7), {"kind": "reverse_kl"}), backend, device)


def test_reductions(backend, device):
    x = logits_pair((3, 4), 60)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    truth = reference(x["logits"].double(), x["ref_logits"].double(), mask=mask)["value"]
    own = reference(**x, mask=mask)["value"]
    for reduce, by in (("sum", 1), ("mean", int(mask.sum())), ("batchmean", 3)):
        with rlfast.use_backend(backend):
            got = rlfast.divergence(
                **{k: v.to(device) for k, v in x.items()}, mask=mask.to(device), reduce=reduce
            ).value
        assert_value(reduce, got.cpu(), truth.sum() / by, own.sum() / by)
    with rlfast.use_backend(backend):
        none = rlfast.divergence(
            torch.zeros(0, 5, device=device), torch.zeros(0, 5, device=device), reduce="mean"
        ).value
    assert none.item() == 0.0


@pytest.mark.parametrize("support", ("teacher", "student"))
@pytest.mark.parametrize("kind", KINDS)
def test_top_k(backend, device, kind, support):
    n = few(30, 12)
    options = {"kind": kind, "top_k": 20, "support": support, "targets": targets_of(n, 900)}
    check(Pair(logits_pair(n, 900), options, ("lse", "entropy"), ("value", "logp")), backend, device)


# A bucket holds 1 − Σ p, and so the rounding of its log-probs: those of the reference and of Triton are rounded once
# more.
@pytest.mark.backends("torch", "cpu")
@pytest.mark.parametrize("support", ("teacher", "student"))
@pytest.mark.parametrize("kind", KINDS)
def test_top_k_with_a_bucket(backend, device, kind, support):
    options = {"kind": kind, "top_k": 20, "tail": "bucket", "support": support, "targets": targets_of(30, 900)}
    check(Pair(logits_pair(30, 900), options, ("lse", "entropy"), ("value", "logp")), backend, device)


def test_top_k_of_the_whole_vocabulary_is_none(backend, device):
    x = logits_pair(5, 40)
    for tail in ("renormalize", "bucket"):
        same_run(run(Pair(x, {"top_k": 40, "tail": tail}), backend, device), run(Pair(x), backend, device))


def test_second_backward_and_second_derivative(backend, device):
    x, y = (v.to(device).requires_grad_() for v in logits_pair(4, 30).values())
    with rlfast.use_backend(backend):
        value = rlfast.divergence(x, y).value
    one = torch.autograd.grad(value.sum(), [x, y], retain_graph=True)
    other = torch.autograd.grad(value.sum(), [x, y], retain_graph=True)
    for a, b in zip(one, other, strict=True):
        assert_same_bits("two backwards", a, b)
    g = torch.autograd.grad(value.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def samples(backend: str):
    """(op, arguments): plain and with every option, forward and backward."""
    x, y = logits_pair(6, 40).values()
    mask, t = torch.tensor([True, True, False, True, True, True]), torch.linspace(0.5, 1.5, 6)
    plain = (None, None, None, None, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0, 0.5, 0, backend)
    full = (targets_of(6, 40, 2), mask, t, t.flip(0), 1.0, 1.0, 20.0, 30.0, 0.5, 1.5, 2, 0.3, 1 | 16 | 32, backend)
    for args in (plain, full):
        args = (x.clone().requires_grad_(), y.clone().requires_grad_(), *args)
        yield logits_op.op, args
        aux = logits_op.op(*args)[1].detach()
        many = args[2] is not None
        s = 5 if many else 2
        grads = (torch.ones(6), torch.ones(6, 2) if many else None, torch.ones(6) if many else None, torch.ones(6))
        grads = grads if many else (*grads[:3], None)
        saved = (aux[:s].clone(), aux[s : s + 2].clone(), aux[s + 2 : s + 4].clone())
        yield logits_op.op_backward, (x.clone(), y.clone(), *args[2:14], *saved, *grads, backend)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu", "cuda")
def test_opcheck(backend, device):
    for op, args in samples(backend if device == "cpu" else "torch"):
        args = tuple(
            a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args
        )
        torch.library.opcheck(op, args)


@pytest.mark.unpoisoned
@pytest.mark.backends("torch", "cpu")
def test_compiled_without_a_graph_break(backend, device):
    def loss(x, y, targets):
        out = rlfast.divergence(
            x, y, kind="jsd", temperature=0.75, targets=targets, outputs=("entropy",), reduce="mean"
        )
        return out.value + out.logp.sum() + out.entropy.sum()

    torch._dynamo.reset()
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, y = (v.requires_grad_() for v in logits_pair((2, 5), 70).values())
        with rlfast.use_backend(backend):
            function(x, y, targets_of((2, 5), 70)).backward()
        results.append((x.grad, y.grad))
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits("gradient", compiled, eager)


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    x = {k: v.double() for k, v in logits_pair(7, 300).items()}
    for kind in KINDS:
        check(Pair(x, {"kind": kind, "softcap": 5.0, "targets": targets_of(7, 300)}, ALL[1:]), backend, device)


X = torch.randn(4, 11)
BAD = {
    "ref-shape": ({"ref_logits": X[:, :-1]}, ValueError, "ref_logits: expected shape (4, 11) like logits, got (4, 10)"),
    "ref-dtype": ({"ref_logits": X.bfloat16()}, TypeError, "ref_logits: expected dtype torch.float32 like logits"),
    "ref-list": ({"ref_logits": [1.0]}, TypeError, "ref_logits: expected a torch.Tensor, got list"),
    "ref-device": ({"ref_logits": X.to("meta")}, ValueError, "ref_logits: expected device cpu like logits, got meta"),
    "logits-empty": ({"logits": X[:, :0]}, ValueError, "logits: expected shape [*, V] with V > 0, got (4, 0)"),
    "kind": ({"kind": "kl"}, ValueError, "kind: expected one of 'forward_kl', 'reverse_kl', 'jsd', got 'kl'"),
    "beta": ({"beta": 1.5}, ValueError, "beta: expected a float from 0 to 1, got 1.5"),
    "beta-str": ({"beta": "half"}, TypeError, "beta: expected a float, got 'half'"),
    "temperature": ({"ref_temperature": 0.0}, ValueError, "ref_temperature: expected a finite float > 0, got 0.0"),
    "temperatures": ({"ref_temperature": torch.ones(3)}, ValueError, "ref_temperature: expected shape (4,)"),
    "softcap": ({"ref_softcap": -1.0}, ValueError, "ref_softcap: expected a finite float > 0, got -1.0"),
    "scale": ({"ref_logit_scale": math.nan}, ValueError, "ref_logit_scale: expected a finite float, got nan"),
    "mask": ({"mask": torch.ones(5)}, ValueError, "mask: expected shape (4,) like the rows of logits, got (5,)"),
    "targets": ({"targets": torch.full((4,), 11)}, ValueError, "targets: expected values in [0, 11) or -100, got 11"),
    "outputs": ({"outputs": ("entropi",)}, ValueError, "outputs: expected names among"),
    "outputs-str": ({"outputs": "lse"}, TypeError, "outputs: expected a tuple of names"),
    "outputs-logp": ({"outputs": ("logp",)}, ValueError, "targets: expected a tensor, since outputs asks for 'logp'"),
    "reduce": ({"reduce": "average"}, ValueError, "reduce: expected one of 'none', 'mean', 'sum', 'batchmean'"),
    "top-k": ({"top_k": 12}, ValueError, "top_k: expected 1 to the vocabulary of 11, got 12"),
    "top-k-float": ({"top_k": 2.0}, TypeError, "top_k: expected an int, got 2.0"),
    "tail": ({"tail": "drop"}, ValueError, "tail: expected one of 'renormalize', 'bucket', got 'drop'"),
    "support": ({"support": "both"}, ValueError, "support: expected one of None, 'teacher', 'student', got 'both'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    with pytest.raises(error) as caught:
        rlfast.divergence(**({"logits": X, "ref_logits": X} | change))
    assert message in str(caught.value)


@pytest.mark.large
@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("kind", KINDS)
def test_full_size(backend, device, kind):
    """A real vocabulary, with rows enough to fill a GPU."""
    pair, solution = full_size(kind)
    check(pair, backend, device, solution)


@functools.cache
def full_size(kind):
    """The problem and its truth, once for all backends."""
    inputs = logits_pair(few(144, 2), 151936, torch.bfloat16)
    pair = Pair(inputs, {"kind": kind, "softcap": None}, ("value",))
    return pair, solved(pair)


@pytest.mark.large
@pytest.mark.backends("cpu", "cuda", *(() if interpreted() else ("triton",)))  # 2³¹ interpreted elements take days
def test_row_11_a_gradient_of_more_than_2_31_elements(backend, device):
    """A dense gradient whose last rows lie beyond 2³¹ elements; its rows but the last are masked, and must be zeros."""
    skip_unless_memory(device, 12)
    vocab, rows = 151_936, 14_200
    assert rows * vocab > 1 << 31
    row, other = (x.to(device) for x in logits_pair(1, vocab, torch.bfloat16).values())
    logits, ref = row.expand(rows, vocab).detach().requires_grad_(), other.expand(rows, vocab)
    mask = torch.zeros(rows, dtype=torch.bool, device=device)
    mask[-2:] = True
    with rlfast.use_backend(backend):
        value = rlfast.divergence(logits, ref, kind="jsd", mask=mask).value
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        one = row.clone().requires_grad_()
        rlfast.divergence(one, other, kind="jsd").value.sum().backward()
    assert_same_bits("last row", gradient[-1], one.grad[0])
    assert int(sum(torch.count_nonzero(part) for part in gradient[:-2].split(500))) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.backends("triton", "cuda")
def test_in_a_cuda_graph(backend, device, kind):
    x, y = (v.to(device) for v in logits_pair(5, 900).values())
    x.requires_grad_()

    def step():
        value = rlfast.divergence(x, y, kind=kind, reduce="mean").value
        return value, *torch.autograd.grad(value, x)

    with rlfast.use_backend(backend):
        check_replay(step, x)
