"""``token_loss`` as PyTorch sees it: schema, fake kernel, autograd, torch.compile, CUDA graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rlfast
from rlfast import loss_inputs
from rlfast.ops import token_loss as op
from tests.loss_cases import drawn
from tests.numerics import assert_same_bits
from tests.shared import check_replay

OP = "token_loss"
pytestmark = pytest.mark.unpoisoned  # a compiler traces torch.empty

OBJECTIVES = {
    "ppo": rlfast.loss("ppo"),
    "everything": rlfast.loss("gspo", kl="k3", beta=0.5, entropy_coef=0.25, correction="icepop", off_policy=0.1),
}


def inputs(device: str = "cpu", packed: bool = False, name: str = "ppo") -> dict:
    """Every field of a few short sequences that the objective has a use for."""
    fields = {k: x for k, x in drawn(3, 7, "f32").items() if k not in OBJECTIVES[name].prepared.idle}
    if packed:
        ends = torch.tensor([0, 7, 7, 21])
        fields = {k: x.flatten() for k, x in fields.items()} | {"adv": fields["adv"].squeeze(1), "cu_seqlens": ends}
    else:
        fields["adv"] = fields["adv"].squeeze(1)
    return {k: x.to(device) for k, x in fields.items()}


def arguments(objective: rlfast.Loss, given: dict, backend: str) -> tuple:
    """What the public function hands to the op."""
    surrogate, kl, plan, settings, hyper, bounds, needs, idle = objective.prepared
    names = loss_inputs.Given._fields
    batch = loss_inputs.checked(loss_inputs.Given(*(given.get(n) for n in names)), "loss", needs, idle, (0.5, 0.25))
    return (*batch, surrogate, kl, list(plan), list(settings), hyper, bounds, [True, True], backend)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("packed", (False, True), ids=("padded", "packed"))
@pytest.mark.backends("torch", "cpu", "cuda")
def test_opcheck(backend, device, name, packed):
    given = inputs(device, packed, name)
    given = {k: x.requires_grad_() if k in ("logp", "entropy") else x for k, x in given.items()}
    torch.library.opcheck(op.op, arguments(OBJECTIVES[name], given, backend))
    gradient, scale = torch.randn(3, 7, device=device), torch.rand((), device=device)
    torch.library.opcheck(op.op_backward, (gradient, scale, torch.ones_like(scale), torch.bfloat16))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fake_kernel_agrees(backend, device, name):
    args = arguments(OBJECTIVES[name], inputs(device, name=name), backend)
    real = op.op(*args)
    with FakeTensorMode() as mode:
        fake = op.op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.backends("torch", "cpu")
def test_compiled_without_a_graph_break(backend, device, name):
    """fullgraph=True, forward and backward, against the same function run eagerly, to the bit."""
    torch._dynamo.reset()
    results = []

    def function(logp, entropy, rest):
        out = OBJECTIVES[name](logp, entropy=entropy, **rest)
        return 2 * out.loss, out.metrics.values

    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        given = inputs(device, name=name)
        leaves = [given.pop(k).requires_grad_() for k in ("logp", "entropy")]
        with rlfast.use_backend(backend):
            loss, metrics = run(*leaves, given)
        loss.backward()
        results.append((loss.detach(), metrics.detach(), *(x.grad for x in leaves)))
    for what, eager, compiled in zip(("loss", "metrics", "gradient", "of the entropy"), *results, strict=True):
        assert_same_bits(what, compiled, eager)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("ppo", "gspo"))
@pytest.mark.backends("cpu")
def test_compiled_by_the_default_compiler(backend, device, name):
    """inductor, forward and backward, as run eagerly."""
    torch._dynamo.reset()
    results, old, adv = [], torch.randn(3, 7), torch.randn(3)

    def function(logp):
        out = rlfast.loss(name)(logp, old_logp=old, adv=adv)
        return out.loss, out.metrics.values

    for run in (function, torch.compile(function, fullgraph=True)):
        leaf = (old + 0.1).requires_grad_()
        with rlfast.use_backend(backend):
            loss, metrics = run(leaf)
        loss.backward()
        results.append((loss.detach(), metrics.detach(), leaf.grad))
    for what, eager, compiled in zip(("loss", "metrics", "gradient"), *results, strict=True):
        assert_same_bits(what, compiled, eager)


HELPERS = {
    **{f"kl_penalty {kind}": partial(rlfast.kl_penalty, kind=kind) for kind in ("k1", "k2", "k3", "absolute", "k3+")},
    "shape_rewards": lambda x, y: rlfast.shape_rewards(x[:, 0], x, y, beta=0.1),
    "value_loss": lambda x, y: rlfast.value_loss(x, y, y + 0.5, x < -1).loss,
    "masked_mean": lambda x, y: rlfast.masked_mean(x, y < -1),
    "masked_whiten": lambda x, y: rlfast.masked_whiten(x, y < -1),
    "clip_cov_keep": lambda x, y: x * rlfast.clip_cov_keep(x, y, y, ratio=0.2, low=0.0),
    "kl_cov_extra": lambda x, y: x * rlfast.kl_cov_extra(x, y, ratio=0.2),
    "top_entropy_keep": lambda x, y: x * rlfast.top_entropy_keep(y),
    "rollout_keep": lambda x, y: x * rlfast.rollout_keep(x, y),
    "overlong_penalty": lambda x, y: x[:, 0] * rlfast.overlong_penalty((y < -1).sum(1), max_len=7, buffer=3),
    "preference_loss": lambda x, y: (
        rlfast.preference_loss("ipo")(x, y, ref_chosen_logps=y.detach(), ref_rejected_logps=x.detach() + 1).loss
    ),
    "unpaired_loss": lambda x, y: rlfast.unpaired_loss("npo")(x, y[:, 0] < -1, ref_logps=y).loss,
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_compile_without_a_graph_break(name):
    """fullgraph=True, forward and backward, as run eagerly."""
    torch._dynamo.reset()
    results = []
    for run in (HELPERS[name], torch.compile(HELPERS[name], fullgraph=True, backend="aot_eager")):
        x, y = (drawn(3, 7, "f32")[name] for name in ("logp", "ref_logp"))
        x.requires_grad_()
        out = run(x, y)
        if out.requires_grad:
            out.sum().backward()
        results.append((out.detach(), torch.zeros(()) if x.grad is None else x.grad))
    for what, eager, compiled in zip(("value", "gradient"), *results, strict=True):
        assert_same_bits(what, compiled, eager)


def test_forward_mode_is_refused():
    given = inputs()
    logp = given.pop("logp")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: rlfast.loss("ppo")(x, **given).loss, (logp,), (logp,))


@pytest.mark.backends("triton", "cuda")
@pytest.mark.gpu
def test_in_a_cuda_graph(backend, device):
    objective, given = OBJECTIVES["everything"], inputs(device, name="everything")
    logp = given.pop("logp").requires_grad_()

    def step():
        loss = objective(logp, **given).loss
        return loss, *torch.autograd.grad(loss, logp)

    with rlfast.use_backend(backend):
        check_replay(step, logp)
