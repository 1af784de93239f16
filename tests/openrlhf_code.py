"""OpenRLHF as it is installed, without what its trainers need: stand-ins for DeepSpeed, flash-attn and Ray's launcher.

They are there while its modules are imported and not afterwards, so that no other library finds them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import sys
import types
from types import SimpleNamespace

import torch

STAND_INS = {
    "deepspeed": (),
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "openrlhf.utils.math_utils": ("extract_boxed_answer", "grade_answer"),
    "openrlhf.trainer.ray": (),
    "openrlhf.trainer.ray.launcher": ("RayActorGroup",),
}
B, T, V = 6, 24, 37  # of the draws
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"


@contextlib.contextmanager
def stand_ins():
    """Within it, what OpenRLHF imports is there."""
    for name, contents in STAND_INS.items():
        made = types.ModuleType(name)
        made.__path__, made.__spec__ = [], importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        vars(made).update(dict.fromkeys(contents))
        sys.modules[name] = made
    try:
        yield
    finally:
        for name in STAND_INS:
            sys.modules.pop(name, None)


def load():
    """Its models and its experience maker: (models.utils, models.loss, the experience maker's module)."""
    with stand_ins():
        return tuple(importlib.import_module(name) for name in ("openrlhf.models.utils", "openrlhf.models.loss", MAKER))


@functools.cache
def drawn():
    torch.manual_seed(0)
    logp = torch.randn(B, T).mul(0.5) - 1.5
    mask = torch.rand(B, T) > 0.3
    mask[:, :2], mask[2] = False, False  # an empty row, and holes
    old = logp + 0.4 * torch.randn(B, T)
    pair = -20.0 + 4.0 * torch.randn(4, B)
    return {
        "logits": 2 * torch.randn(B, T, V), "labels": torch.randint(V, (B, T)), "logp": logp, "old": old,
        "ref": logp + torch.randn(B, T) * torch.tensor([0.3, 3.0, 15.0])[torch.randint(3, (B, T))],
        "rollout": old + 0.3 * torch.randn(B, T), "adv": torch.randn(B, T), "mask": mask, "score": torch.randn(B),
        "kl": torch.randn(B, T), "values": torch.randn(B, T), "rewards": torch.randn(B, T), "pair": pair,
        "margin": torch.rand(B),
    }  # fmt: skip


def fields(dtype, mask=torch.bool) -> SimpleNamespace:
    """The draws, each a leaf of its own."""
    made = {name: x.clone().to(dtype) if x.is_floating_point() else x.clone() for name, x in drawn().items()}
    return SimpleNamespace(**made | {"mask": made["mask"].to(mask)})
