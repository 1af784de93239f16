"""OpenRLHF as it is installed, without what its trainers need: stand-ins for DeepSpeed, flash-attn and Ray's launcher.

They are there while its modules are imported and not afterwards, so that no other library finds them. With them its
functions can be called, which are arithmetic on tensors; its trainers cannot.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types

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
UTILS, LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
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
        return tuple(importlib.import_module(name) for name in (UTILS, LOSS, MAKER))
