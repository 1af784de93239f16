"""transformers' causal language-model loss on rlfast's kernels.

``model.loss_function = loss_function`` is all it takes; ``install(model)`` does it and can be undone. transformers' own
``ForCausalLMLoss`` copies all logits to float32 first; here they are read once, in their own dtype.
"""

from __future__ import annotations

import importlib
import inspect

import torch

from rlfast import validate
from rlfast.integrations.patching import Undo, or_original, takes, tensor_unsupported
from rlfast.logps import token_logps


def targets_of(labels, ignore_index: int = validate.IGNORE_INDEX) -> torch.Tensor:
    """Labels as targets of rlfast, where −100 is what does not count; of another ``ignore_index``, −100 is an error."""
    if ignore_index == validate.IGNORE_INDEX:
        return labels
    stray = labels.masked_fill(labels == validate.IGNORE_INDEX, -1)  # no token either
    return stray.masked_fill(labels == ignore_index, validate.IGNORE_INDEX)


def loss_function(
    logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
) -> torch.Tensor:
    """``ForCausalLMLoss``: −log p of the next tokens, summed and divided by their number.

        −Σ_t log p(label_{t+1}) / n

    Args:
        logits: [*, V] float32, bfloat16 or float16, with gradient. labels: [*] int, ``ignore_index`` where none counts.
        vocab_size: V.
        num_items_in_batch: n, a number or a 0-dim tensor; the labels that count if None.
        shift_labels: [*], labels that are shifted already; ``labels`` is not read then.
        kwargs: what models pass along; not read, as in transformers.

    Returns:
        [] float32. NaN without ``num_items_in_batch`` and without a label that counts, as in transformers.

    Raises:
        ValueError, TypeError: the vocabulary is not the last dimension, or a label is out of range.

    Example:
        >>> model.loss_function = rlfast.integrations.transformers.loss_function
    """
    if logits.shape[-1] != vocab_size:
        validate.fail("logits", f"shape [*, {vocab_size}], as vocab_size says", validate.shape(logits))
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = targets_of(shift_labels.to(logits.device), ignore_index).reshape(-1)
    total = -token_logps(logits.reshape(-1, vocab_size), targets).logp.sum()
    if num_items_in_batch is None:
        return total / (targets != validate.IGNORE_INDEX).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


ForCausalLMLoss = loss_function  # transformers' name of it


def _unsupported(logits, labels=None, vocab_size=None, *_, shift_labels=None, **__) -> str | None:
    return tensor_unsupported(logits=logits, labels=labels, shift_labels=shift_labels)


def install(model) -> Undo:
    """Set a model's ``loss_function`` to this one, until undone.

    Tensors that rlfast cannot take go to transformers' own function, with the reason logged once.

    Args:
        model: a transformers model whose loss is ``ForCausalLMLoss``.

    Returns:
        Undo: takes it back when called, or at the end of its ``with`` block.

    Raises:
        ValueError: the model's loss is another one.

    Example:
        >>> with rlfast.integrations.transformers.install(model):
        ...     trainer.train()
    """
    stock = importlib.import_module("transformers.loss.loss_utils").ForCausalLMLoss
    before = getattr(model, "loss_function", None)
    undo, strange = Undo(), []
    if getattr(before, "__wrapped__", None) is stock:
        return undo  # in place: whoever came first takes it back
    if before is not stock:
        validate.fail("model", "one whose loss_function is ForCausalLMLoss", getattr(before, "__name__", repr(before)))
    if not takes(stock, inspect.signature(loss_function).parameters, "ForCausalLMLoss", strange):
        raise RuntimeError(f"rlfast.integrations.transformers.install: {strange[0]}")
    own = "_loss_function" in vars(model)  # where the property of PreTrainedModel keeps what was set
    ours = model.loss_function = or_original(loss_function, stock, _unsupported)

    def back():
        if model.loss_function is not ours:
            return  # somebody has set another one since
        if own:
            model.loss_function = stock
        else:
            del model._loss_function

    undo.callback(back)
    return undo
