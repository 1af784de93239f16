"""verl's functions of logits that Megatron's ranks share, patched and not, in a group of one rank.

Megatron is stood in for by what verl's module takes of it; several ranks are in ``test_vocab_parallel.py``.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl", reason='the verl package is missing: pip install --no-deps "verl==0.9.*"')
import rlfast
from rlfast.integrations import patching, verl_megatron
from rlfast.integrations import verl as ours

NAMES = (
    "vocab_parallel_log_probs_from_logits",
    "vocab_parallel_entropy",
    "vocab_parallel_entropy_with_chunking",
    "vocab_parallel_sum_pi_squared",
)
V = 97


def cross_entropy(vocab_parallel_logits, target):
    return -vocab_parallel_logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


@pytest.fixture
def group():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.fixture
def load(group, monkeypatch):
    """Imports verl's module anew, and one that took its functions by value."""
    core = types.ModuleType("megatron.core")
    core.parallel_state = types.ModuleType("megatron.core.parallel_state")
    core.parallel_state.get_tensor_model_parallel_group = lambda: group
    core.tensor_parallel = types.ModuleType("megatron.core.tensor_parallel")
    core.tensor_parallel.vocab_parallel_cross_entropy = cross_entropy
    for module in (types.ModuleType("megatron"), core, core.parallel_state, core.tensor_parallel):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    worker = types.ModuleType("verl.worker_of_megatron")

    def imported():
        module = importlib.import_module(verl_megatron.MODULE)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(worker).update({name: getattr(module, name) for name in NAMES})
        monkeypatch.setitem(sys.modules, worker.__name__, worker)
        return module, worker

    monkeypatch.delitem(sys.modules, verl_megatron.MODULE, raising=False)
    yield imported
    sys.modules.pop(verl_megatron.MODULE, None)


def run(module, name: str, dtype, wide: bool = False) -> tuple:
    """A function's value, and the gradient of its logits where it has one; ``wide``: computed in float32."""
    torch.manual_seed(0)
    leaf, labels = torch.randn(2, 7, V).mul(3).to(dtype), torch.randint(V, (2, 7))
    constant = name == "vocab_parallel_sum_pi_squared"
    if not constant:
        leaf.requires_grad_()
    logits = leaf.float() if wide else leaf
    logits = logits if constant else logits * 1.0  # verl's writes over what it is given
    value = getattr(module, name)(*((logits, labels) if name == NAMES[0] else (logits,)))
    if constant:
        return value, None
    (value * torch.linspace(0.5, 1.5, value.numel()).view_as(value)).sum().backward()
    return value.detach(), leaf.grad


def agree(got: tuple, theirs: tuple) -> None:
    """Values in float32; a gradient to the rounding of its type."""
    torch.testing.assert_close(got[0], theirs[0], rtol=3e-5, atol=3e-6)
    assert (got[1] is None) == (theirs[1] is None)
    if got[1] is not None:
        torch.testing.assert_close(
            got[1], theirs[1], rtol=2.0**-7 if got[1].dtype != torch.float32 else 3e-5, atol=1e-4
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", NAMES)
def test_equals_verls(load, monkeypatch, name, dtype):
    """verl's in float32 of the same rounded logits."""
    said = []
    monkeypatch.setattr(patching, "runs_as_it_is", lambda original, reason: said.append(reason))
    module, worker = load()
    theirs = run(module, name, dtype, wide=True)
    with rlfast.patch("verl"):
        got = run(worker, name, dtype)
    agree(got, theirs)
    agree(run(ours, name, dtype), theirs)
    assert not said
    with pytest.raises(AssertionError):
        agree((1.01 * got[0], got[1]), theirs)
    if got[1] is not None:
        with pytest.raises(AssertionError):
            agree((got[0], 1.01 * got[1]), theirs)


def test_patched_before_and_after_the_import_and_undone(load):
    undo = rlfast.patch("verl")
    try:
        assert not any(verl_megatron.MODULE in name for name in undo.replaced)
        module, worker = load()
        assert {f"{verl_megatron.MODULE}.{name}" for name in NAMES} <= set(undo.replaced)
        held = [getattr(module, name) for name in NAMES]
        with rlfast.patch("verl"):  # which reaches nothing twice
            assert [getattr(module, name) for name in NAMES] == held
    finally:
        undo()
    for name in NAMES:
        assert getattr(module, name) is getattr(worker, name) is held[NAMES.index(name)].__wrapped__
    with rlfast.patch("verl"):
        assert all(hasattr(getattr(worker, name), "__wrapped__") for name in NAMES)
    assert not any(hasattr(getattr(worker, name), "__wrapped__") for name in NAMES)


def test_what_goes_to_verl(load, monkeypatch):
    said = []
    monkeypatch.setattr(patching, "runs_as_it_is", lambda original, reason: said.append(reason))
    module, _ = load()
    logits = torch.randn(3, V, requires_grad=True)
    own = module.vocab_parallel_sum_pi_squared(logits.detach())
    with rlfast.patch("verl"):
        got = module.vocab_parallel_sum_pi_squared(logits)
        with pytest.raises(RuntimeError):
            module.vocab_parallel_log_probs_from_logits(logits.detach(), torch.zeros(2, 2, dtype=torch.int64))
    assert torch.equal(got.detach(), own)
    assert "gradient is wanted" in said[0] and "labels of shape (2, 2)" in said[1]
