"""The ops as PyTorch sees them: schema, fake kernels, autograd, torch.compile without a graph break, derivatives."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlfast
from rlfast import backends
from rlfast.ops import dispatch
from rlfast.ops import linear_token_logps as linear_op
from rlfast.ops import token_logps as logits_op
from rlfast.ops.records import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGITS
from tests.cases import DIFFERENTIABLE, head_of, logits_of, targets_of
from tests.numerics import assert_gradient, assert_same_bits, assert_value

pytestmark = pytest.mark.unpoisoned  # a compiler traces torch.empty; a Python function in its place would be traced too

OP = "token_logps"  # of the `backend` argument; every log-prob op is called in each test
EVERY = ENTROPY | LOG_SUM_SQ_PROBS | MEAN_LOGITS | IS_TOP1
TRANSFORMS = {"plain": (None, 1.0, 0.0, 1.0), "all": (torch.linspace(0.5, 1.5, 6), 1.0, 20.0, 0.5)}
MASK = torch.tensor([True, True, False, True, True, True])


def samples(backend: str):
    """(op, arguments) of each op: plain, and with every option."""
    ids, many = targets_of(6, 40), targets_of(6, 40, 3)
    logits, head = logits_of(6, 40), head_of(6, 8, 40, bias=True)
    h, w, b = head["hidden"], head["weight"], head["bias"]
    for name, options in TRANSFORMS.items():
        targets, mask, outputs, top_k = (ids, None, 0, 0) if name == "plain" else (many, MASK, EVERY, 4)
        t = options[0] if options[0] is None else options[0].clone()
        options = (t, *options[1:])
        args = (logits.clone().requires_grad_(), targets, mask, *options, outputs, top_k, False, backend)
        yield logits_op.op, args
        aux = logits_op.op(*args)[1].detach()
        grads = (torch.ones(targets.shape), torch.ones(6), torch.ones(6) if outputs & ENTROPY else None)
        backward = (targets, mask, *options, aux, *grads, backend)
        yield logits_op.op_backward, (logits.clone(), *backward)
        yield logits_op.op_backward_, (logits.clone(), *backward)
        for keep in (False, True):
            mask = None if keep else mask  # the kept logits of a skipped row are never written, nor read
            leaves = (h.clone().requires_grad_(), w.clone().requires_grad_(), b.clone().requires_grad_())
            args = (*leaves, targets, mask, *options, outputs, top_k, keep, backend)
            yield linear_op.op, args
            *_, kept = out = linear_op.op(*args)
            rest = (targets, mask, *options, out[1].detach(), kept.detach(), *grads, [True, keep, True], keep, backend)
            yield linear_op.op_backward, (h.clone(), w.clone(), b.clone(), *rest)


@pytest.mark.backends("cpu", "cuda")
def test_opcheck(backend, device):
    """Schema, autograd registration, fake kernel and AOT dispatch of every op."""
    for op, args in samples(backend if device == "cpu" else "torch"):
        args = tuple(
            x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in args
        )
        torch.library.opcheck(op, args)


def test_fake_kernels_agree(backend, device):
    """A fake kernel gives the shapes, dtypes, strides and devices that the real one gives."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for op, args in samples(backend):
        args = tuple(x.detach().to(device) if isinstance(x, torch.Tensor) else x for x in args)
        real = op(*args)
        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            fake = op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
        if real is None:
            assert fake is None
            continue
        assert len(real) == len(fake)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride()), f"{op}"


def losses():
    """One function of each op's public face, and its leaves."""

    def from_logits(logits, targets, mask, temperature):
        out = rlfast.token_logps(
            logits, targets, mask=mask, temperature=temperature, outputs=(*DIFFERENTIABLE, "is_top1"), top_k=2
        )
        return (
            (out.logp * 2).sum() + out.entropy.sum() - out.lse.mean() + out.is_top1.sum() + out.topk_logp.detach().sum()
        )

    def from_hidden(hidden, weight, targets, mask, temperature):
        out = rlfast.linear_token_logps(
            hidden, weight, targets, mask=mask, temperature=temperature, softcap=30.0, outputs=DIFFERENTIABLE
        )
        return (out.logp * 2).sum() + out.entropy.sum() - out.lse.mean()

    def inputs(op):
        leaves = [logits_of((2, 5), 70)] if op == "token_logps" else list(head_of((2, 5), 12, 70).values())
        rest = (targets_of((2, 5), 70), torch.rand(2, 5, generator=torch.Generator().manual_seed(0)) < 0.8)
        return [x.requires_grad_() for x in leaves], rest

    return {"token_logps": from_logits, "linear_token_logps": from_hidden}, inputs


@pytest.mark.parametrize("temperature", ("float", "rows"))
@pytest.mark.parametrize("op", ("token_logps", "linear_token_logps"))
@pytest.mark.backends("torch", "cpu", "reference")
def test_compiled_without_a_graph_break(backend, device, op, temperature):
    """fullgraph=True, forward and backward, against the same function run eagerly, to the bit."""
    functions, inputs = losses()
    t = 0.75 if temperature == "float" else torch.linspace(0.5, 1.5, 10).view(2, 5)
    results = []
    torch._dynamo.reset()
    for function in (functions[op], torch.compile(functions[op], fullgraph=True, backend="aot_eager")):
        leaves, rest = inputs(op)
        with rlfast.use_backend(backend):
            loss = function(*leaves, *rest, t)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for name, eager, compiled in zip(("loss", "first gradient", "second gradient"), *results, strict=False):
        assert_same_bits(name, compiled, eager)


@pytest.mark.slow
def test_compiled_with_inductor():
    """The default compiler takes it too, and sees through a change of the row count."""
    functions, _ = losses()
    torch._dynamo.reset()
    compiled = torch.compile(functions["token_logps"], fullgraph=True, dynamic=True)
    for rows in (4, 6, 9):
        x = logits_of((2, rows), 70).requires_grad_()
        y = x.detach().clone().requires_grad_()
        targets, mask = targets_of((2, rows), 70), torch.ones(2, rows)
        one, other = compiled(x, targets, mask, 0.75), functions["token_logps"](y, targets, mask, 0.75)
        one.backward()
        other.backward()
        assert_value("loss", one.detach(), other.detach().double(), other.detach())
        assert_gradient("gradient", x.grad, y.grad.double(), y.grad)


def test_compiled_functions_follow_use_backend(monkeypatch):
    """A compiled function is compiled again for another backend, and its backward uses the backend of its forward."""
    seen = []
    for name in ("torch", "cpu"):
        module = backends.implementation("token_logps", name)
        for step in ("forward", "backward"):
            original = getattr(module, step)

            def spy(*args, original=original, mark=(name, step)):
                seen.append(mark)
                return original(*args)

            monkeypatch.setattr(module, step, spy)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, t: rlfast.token_logps(x, t).logp.sum(), fullgraph=True, backend="aot_eager")
    targets = targets_of(5, 30)
    for name in ("torch", "cpu", "torch"):
        seen.clear()
        x = logits_of(5, 30).requires_grad_()
        with rlfast.use_backend(name):
            loss = compiled(x, targets)
        loss.backward()
        assert seen == [(name, "forward"), (name, "backward")]


@pytest.mark.parametrize("candidates", (0, 3))
@pytest.mark.parametrize("softcap", (None, 3.0))
@pytest.mark.backends("torch", "reference")
def test_gradcheck_in_float64(backend, device, softcap, candidates):
    """The derivatives of every differentiable output against finite differences, through every option."""
    targets = targets_of(4, 7, candidates)
    targets[1] = -100
    mask = torch.tensor([True, True, False, True])
    head = {k: x.double().requires_grad_() for k, x in head_of(4, 3, 7, bias=True).items()}
    options = {"softcap": softcap, "logit_scale": 0.7, "temperature": torch.linspace(0.6, 1.4, 4), "mask": mask}

    def values(out):
        return out.logp, out.lse, out.entropy

    def from_logits(x):
        with rlfast.use_backend(backend):
            return values(rlfast.token_logps(x, targets, outputs=DIFFERENTIABLE, **options))

    def from_hidden(h, w, b):
        with rlfast.use_backend(backend):
            return values(rlfast.linear_token_logps(h, w, targets, b, outputs=DIFFERENTIABLE, **options))

    assert torch.autograd.gradcheck(from_logits, logits_of(4, 7).double().requires_grad_())
    assert torch.autograd.gradcheck(from_hidden, (head["hidden"], head["weight"], head["bias"]))


def test_forward_mode_is_refused():
    """A tangent that would be lost says so."""
    x, head, targets = logits_of(3, 20), head_of(3, 8, 20), targets_of(3, 20)
    for function, primal in (
        (lambda z: rlfast.token_logps(z, targets).logp, x),
        (lambda h: rlfast.linear_token_logps(h, head["weight"], targets).logp, head["hidden"]),
    ):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(function, (primal,), (primal,))


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def test_who_watches_sees_the_op():
    """In plain eager mode the kernel is called past the dispatcher; not where a mode or a profiler would miss it."""
    x, targets = logits_of(3, 20), targets_of(3, 20)
    assert dispatch.unobserved(x, targets, None, None)
    with _Seen() as seen:
        assert not dispatch.unobserved(x, targets, None, None)
        rlfast.token_logps(x, targets)
    assert logits_op.op in seen.ops
    with torch.profiler.profile() as profile:
        rlfast.token_logps(x, targets)
    assert any(event.key == "rlfast::token_logps" for event in profile.key_averages())
    with FakeTensorMode() as mode:
        fake = rlfast.token_logps(mode.from_tensor(x), mode.from_tensor(targets)).logp
    assert type(fake) is not torch.Tensor and fake.shape == (3,)


def test_a_lazily_negated_tensor():
    x, targets = logits_of(3, 20), targets_of(3, 20)
    assert_same_bits("logp", rlfast.token_logps(torch._neg_view(x), targets).logp, rlfast.token_logps(-x, targets).logp)


def _logps(x):
    return rlfast.token_logps(x, targets_of(3, 20)).logp


def _linear_logps(x):
    return rlfast.linear_token_logps(x, torch.ones(30, 20), targets_of(3, 30)).logp


def _policy_loss(x):
    return rlfast.loss("ppo")(x, old_logp=torch.zeros(3, 20), adv=torch.ones(3)).loss


def _returns(x):
    return rlfast.discounted_returns(x, gamma=0.5)


@pytest.mark.parametrize("function", (_logps, _linear_logps, _policy_loss, _returns))
def test_a_double_backward_is_refused(function):
    """What is not there says so, instead of being left out of a sum in which the rest has a gradient."""
    x = logits_of(3, 20).requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.sum() + (x * x).sum()).backward()
