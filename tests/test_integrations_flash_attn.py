"""flash-attn's cross-entropy on rlfast: its formula, and a stand-in that nobody takes for flash-attn itself."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
import torch

from rlfast.integrations import flash_attn
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero

N, V = 40, 301


def plain(logits, labels, smoothing=0.0, scale=1.0, square=0.0, ignore=-100):
    """(losses, z-losses) as flash-attn 2.8's kernel has them."""
    z, counted = logits * scale, labels != ignore
    lse = z.logsumexp(-1)
    chosen = z.gather(1, labels.masked_fill(~counted, 0)[:, None])[:, 0]
    z_loss = torch.where(counted, square * lse.square(), 0.0)
    loss = lse - (1 - smoothing) * chosen - smoothing * z.mean(-1)
    return torch.where(counted, loss, 0.0) + z_loss, z_loss.detach()


@pytest.mark.parametrize("smoothing, square", ((0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.1, 1e-2)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("scale, ignore", ((1.0, -100), (0.7, 5)))
def test_losses_and_gradients(dtype, scale, ignore, smoothing, square):
    torch.manual_seed(0)
    logits, labels, pull = torch.randn(N, V).mul(3).to(dtype), torch.randint(V, (N,)), torch.rand(N) + 0.5
    labels[::7] = ignore

    def run(function, compute, *options):
        leaf = logits.to(compute, copy=True).requires_grad_()
        losses, z_losses = function(leaf, labels, *options)
        assert not z_losses.requires_grad
        (losses * pull.to(losses)).sum().backward()
        return losses.detach(), z_losses, leaf.grad

    got = run(flash_attn.cross_entropy_loss, dtype, None, smoothing, scale, square, ignore)
    truth, yardstick = (run(plain, d, smoothing, scale, square, ignore) for d in (torch.float64, torch.float32))
    assert got[0].dtype == got[1].dtype == torch.float32 and got[2].dtype == dtype
    assert_zero("ignored rows", got[0][::7])
    assert_value("losses", got[0], truth[0], yardstick[0])
    assert_value("z-losses", got[1], truth[1], yardstick[1])
    assert_gradient("gradient", got[2], truth[2], yardstick[2])


def test_the_gradient_may_be_written_over_the_logits():
    logits, labels = torch.randn(N, V), torch.randint(V, (N,))
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    memory = leaf.data_ptr()
    flash_attn.cross_entropy_loss(leaf * 1.0, labels, inplace_backward=True)[0].sum().backward()
    flash_attn.cross_entropy_loss(other, labels)[0].sum().backward()
    assert_same_bits("gradient", leaf.grad, other.grad)
    scored = leaf.detach().clone().requires_grad_()
    held = scored.view_as(scored)
    flash_attn.cross_entropy_loss(held, labels, inplace_backward=True)[0].sum().backward()
    assert memory != scored.data_ptr() and torch.equal(scored.detach(), scored.grad)


def test_what_rlfast_cannot_do_is_an_error(monkeypatch):
    logits, labels = torch.randn(3, V), torch.tensor([1, 2, -100])
    with pytest.raises(ValueError, match="precomputed_lse: expected None"):
        flash_attn.cross_entropy_loss(logits, labels, precomputed_lse=torch.zeros(3))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group)
    with pytest.raises(ValueError, match="process_group: expected None"):
        flash_attn.cross_entropy_loss(logits, labels, process_group=2)
    assert flash_attn.cross_entropy_loss(logits, labels, process_group=1)[0].shape == (3,)
    with pytest.raises(ValueError, match="targets: expected values"):  # −100 is a label as any other where 5 is ignored
        flash_attn.cross_entropy_loss(logits, labels, ignore_index=5)


def absent() -> bool:
    """Whether everybody who looks for flash-attn finds none."""
    from transformers.utils import is_flash_attn_2_available
    from transformers.utils.import_utils import _is_package_available

    found = (
        _is_package_available.__wrapped__ if hasattr(_is_package_available, "__wrapped__") else _is_package_available
    )
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn")
    with pytest.raises(ImportError):
        importlib.import_module("flash_attn.ops.triton")
    known = found("flash_attn")
    return (
        importlib.util.find_spec("flash_attn") is None
        and not is_flash_attn_2_available()
        and not (known[0] if isinstance(known, tuple) else known)
    )


def test_install_offers_the_leaf_and_nothing_else():
    modules = dict(sys.modules)
    with pytest.raises(ImportError):
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    with flash_attn.install():
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

        assert cross_entropy_loss is flash_attn.cross_entropy_loss
        assert importlib.util.find_spec(flash_attn.LEAF) is not None
        assert absent()
        with flash_attn.install():
            pass
        assert flash_attn.LEAF in sys.modules  # the first to come takes it back
    assert flash_attn.LEAF not in sys.modules and absent()
    undo = flash_attn.install()
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss as kept

    undo()
    undo()
    assert kept is flash_attn.cross_entropy_loss  # who has imported it keeps it
    with pytest.raises(ImportError):
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    assert {name for name in sys.modules.keys() - modules.keys() if name.startswith("flash_attn")} == set()


def test_a_flash_attn_that_is_there_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    with pytest.raises(RuntimeError, match="flash-attn is installed"):
        flash_attn.install()
