"""verl's own functions beside the patched ones: a second copy of them, batches, its configuration, one comparison."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types

import torch
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.utils.experimental import torch_functional as fused
from verl.workers.config import ActorConfig, PolicyLossConfig

ROWS, LENGTH = 9, 40
MASKS = (torch.bool, torch.int64, torch.float32)
EPS = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7}  # of the largest element: float32 sums; a bfloat16's own rounding
LEAVES = ("log_prob", "vpreds", "logits", "hidden", "weight", "values", "loss_mat")  # those with a gradient

VERL = types.SimpleNamespace(core=core_algos, functional=torch_functional, fused=fused)


@functools.cache
def stock() -> types.SimpleNamespace:
    """Copies of verl's modules which no patch reaches, as ``VERL`` are those that one does."""
    copies = {}
    for key, module in vars(VERL).items():
        spec = importlib.util.spec_from_file_location(f"stock_{key}", module.__file__)
        copies[key] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = copies[key]
        spec.loader.exec_module(copies[key])
    copies["core"].verl_F = copies["functional"]
    return types.SimpleNamespace(**copies)


def mask_of(dtype=torch.bool, holes: bool = True) -> torch.Tensor:
    """[ROWS, LENGTH] of uneven rows: one empty, one full, one of a single token, and holes."""
    lengths = torch.tensor([0, LENGTH, 1, 7, 33, 20, 39, 12, 25])
    mask = torch.arange(LENGTH) < lengths[:, None]
    if holes:
        mask[4, 5:9] = False
        mask[5, 0] = False
    return mask.to(dtype)


def batch(spread: float = 0.15, seed: int = 0, token_adv: bool = False) -> dict:
    """Log-probs of a step whose log-ratios are as far apart as ``spread`` says, advantages and weights."""
    torch.manual_seed(seed)
    logp = -torch.rand(ROWS, LENGTH) * 3 - 0.02
    adv = torch.randn(ROWS, LENGTH) if token_adv else torch.randn(ROWS, 1).expand(ROWS, LENGTH).contiguous()
    return {
        "old_log_prob": (logp + torch.randn(ROWS, LENGTH) * spread).clamp(max=-1e-3),
        "log_prob": logp,
        "advantages": adv,
        "rollout_is_weights": torch.rand(ROWS, LENGTH) + 0.5,
    }


def actor(**changed):
    """verl's configuration of an actor."""
    chosen = {name: changed.pop(name) for name in list(changed) if name in PolicyLossConfig.__dataclass_fields__}
    info = changed.pop("info", {})
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **changed)
    object.__setattr__(config, "policy_loss", PolicyLossConfig(**chosen))
    config.global_batch_info.update(info)
    return config


def close(name: str, got, theirs, dtype=torch.float32) -> None:
    """Equal, to the rounding that ``EPS`` states; NaN where theirs is."""
    assert got.shape == theirs.shape, f"{name}: {tuple(got.shape)} beside {tuple(theirs.shape)}"
    assert bool((got.isnan() == theirs.isnan()).all()), f"{name}: NaN at other places"
    got, theirs = got.detach().double().nan_to_num(), theirs.detach().double().nan_to_num()
    if not theirs.numel():
        return
    off, size = (got - theirs).abs().max().item(), theirs.abs().max().item()
    assert off <= EPS.get(dtype, EPS[torch.float32]) * size + 1e-12, (
        f"{name}: off by {off:.3g} where the largest is {size:.3g}"
    )


def same(call, leaves: dict, dtype=torch.float32) -> None:
    """``call(verl, **leaves)`` gives the same values and gradients with patched modules as with the stock ones.

    ``call`` returns tensors, of which those with a gradient are pulled, and numbers by name. In bfloat16 verl computes
    in float32 from the same rounded inputs: its own bfloat16 arithmetic would hide what is compared.
    """
    rounded = {k: x.to(dtype) if x is not None and x.is_floating_point() else x for k, x in leaves.items()}
    wide = {k: x.float() if x is not None and x.is_floating_point() else x for k, x in rounded.items()}
    got, theirs = _run(call, VERL, rounded), _run(call, stock(), wide)
    assert list(got) == list(theirs)
    for name, other in theirs.items():
        if isinstance(other, torch.Tensor):
            close(name, got[name], other, got[name].dtype)
        else:
            assert abs(got[name] - other) <= 1e-5 * max(1.0, abs(other)), f"{name}: {got[name]} beside {other}"


def _run(call, verl, leaves: dict) -> dict:
    """What a call returns, and the gradients of its leaves, by name."""
    given = {k: x if x is None else x.clone() for k, x in leaves.items()}
    wanted = [k for k in given if k in LEAVES]
    for name in wanted:
        given[name].requires_grad_()
    out = call(verl, **given)
    found, total = {}, 0.0
    for i, x in enumerate(out if isinstance(out, tuple) else (out,)):
        if isinstance(x, dict):
            found |= {name: x[name] for name in sorted(x)}
            continue
        found[f"output {i}"] = x
        if x.requires_grad:
            pull = torch.linspace(0.5, 1.5, x.numel()).reshape(x.shape)
            total = total + (x.float() * pull).nan_to_num().sum()
    if isinstance(total, torch.Tensor):
        gradients = torch.autograd.grad(total, [given[k] for k in wanted], allow_unused=True)
        found |= {f"gradient by {k}": g for k, g in zip(wanted, gradients, strict=True) if g is not None}
    return found
