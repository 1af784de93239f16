"""flash-attn's cross-entropy, ``flash_attn.ops.triton.cross_entropy.cross_entropy_loss``, on rlfast's kernels.

verl and OpenRLHF take their log-probs from it where it is installed, and their own slower path where it is not.
``install()`` makes this one function importable under its name, and nothing else of flash-attn: whoever looks for the
package still finds none.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import torch

from rlfast import validate
from rlfast.integrations.patching import Undo
from rlfast.integrations.transformers import targets_of
from rlfast.logps import token_logps

LEAF = "flash_attn.ops.triton.cross_entropy"


def cross_entropy_loss(
    logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0, lse_square_scale=0.0, ignore_index=-100,
    inplace_backward=False, process_group=None,
) -> tuple:  # fmt: skip
    """The cross-entropy of each row, and the part of it that is z-loss.

        z = logit_scale·logits;  loss = lse z − (1 − s)·z_label − s·mean z + lse_square_scale·(lse z)²

    Args:
        logits: [N, V] float32, bfloat16 or float16, with gradient. labels: [N] int; ``ignore_index`` marks a row of 0.
        precomputed_lse: None: it is computed.
        label_smoothing: s; other than 0 it costs a float32 copy of the logits.
        lse_square_scale: weight of the z-loss.
        inplace_backward: the gradient is written over the logits.
        process_group: None, or a group of one: the vocabulary is not divided.

    Returns:
        (losses, z_losses), [N] float32; the second without gradient.

    Raises:
        ValueError, TypeError: an argument is none of the above; the message names it.
    """
    if precomputed_lse is not None:
        validate.fail("precomputed_lse", "None: rlfast computes it", type(precomputed_lse).__name__)
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        validate.fail("process_group", "None, or a group of one process", repr(process_group))
    if label_smoothing:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # two gradients, rounded once
    targets = targets_of(labels, ignore_index)
    counted = targets != validate.IGNORE_INDEX
    wanted = ("logp", "lse") if label_smoothing or lse_square_scale else ("logp",)
    out = token_logps(logits, targets, logit_scale=logit_scale, outputs=wanted, inplace_backward=inplace_backward)
    losses = -out.logp
    if label_smoothing:
        uniform = out.lse - logit_scale * logits.mean(-1)
        losses = torch.where(counted, torch.lerp(losses, uniform, label_smoothing), 0.0)
    if not lse_square_scale:
        return losses, torch.zeros_like(losses)
    z_losses = lse_square_scale * torch.where(counted, out.lse, 0.0).square()
    return losses + z_losses, z_losses.detach()


def install() -> Undo:
    """Make ``from flash_attn.ops.triton.cross_entropy import cross_entropy_loss`` give the one above, until undone.

    Call it before verl or OpenRLHF is imported. ``find_spec("flash_attn")``, ``import flash_attn`` and transformers'
    checks still say that flash-attn is absent.

    Returns:
        Undo: takes it back when called, or at the end of its ``with`` block, for imports to come: a module that has
        imported it by name, as verl's and OpenRLHF's do, keeps it. Twice is once: the second has nothing to take back.

    Raises:
        RuntimeError: flash-attn is installed, and would be hidden.
    """
    undo = Undo()
    if getattr(sys.modules.get(LEAF), "cross_entropy_loss", None) is cross_entropy_loss:
        return undo
    if "flash_attn" in sys.modules or LEAF in sys.modules or importlib.util.find_spec("flash_attn") is not None:
        raise RuntimeError("rlfast.integrations.flash_attn.install: flash-attn is installed, and would be hidden")
    leaf = types.ModuleType(LEAF, __doc__)
    # the import system looks for a module's full name before it looks for the packages that hold it
    leaf.__spec__ = importlib.machinery.ModuleSpec(LEAF, loader=None)
    leaf.cross_entropy_loss = cross_entropy_loss
    sys.modules[LEAF] = leaf
    undo.callback(sys.modules.pop, LEAF, None)
    return undo
