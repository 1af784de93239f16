"""verl's functions of logits, of hidden states and of masks, under verl's names and signatures.

    verl.utils.torch_functional                   logprobs_from_logits, logprobs_from_logits_v2, entropy_from_logits,
                                                  entropy_from_logits_with_chunking, masked_sum, masked_mean, …
    verl.utils.experimental.torch_functional      FusedLinearForPPO
    verl.utils.kernel.linear_cross_entropy        linear_cross_entropy, which is in ``megatron.py``

Log-probs and entropies are float32, as those of flash-attn, verl's fast path on a GPU, are. The temperature is the
caller's: verl's engine divides the logits, and hands it to the fused heads.
"""

from __future__ import annotations

import torch

from rlfast.integrations.megatron import REDUCTIONS
from rlfast.integrations.megatron import linear_cross_entropy as linear_cross_entropy
from rlfast.integrations.patching import tensor_unsupported
from rlfast.logps import linear_token_logps, token_logps
from rlfast.reductions import masked_mean as mean_over


def logprobs_from_logits(logits, labels, inplace_backward=True):
    """Log-probs of ``labels`` under softmax(logits).

    Args:
        logits: [*, V] float, any strides. labels: [*] int.
        inplace_backward: the gradient is written over the logits, which must not be used after the backward.

    Returns:
        [*] float32.
    """
    return token_logps(logits, labels.long(), inplace_backward=inplace_backward).logp


def logprobs_from_logits_v2(logits, labels):
    """``logprobs_from_logits`` that leaves the logits alone."""
    return token_logps(logits, labels.long()).logp


def entropy_from_logits(logits):
    """Shannon entropy, in nats, of softmax(logits), [*, V] → [*] float32."""
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logps(logits, any_target, outputs=("entropy",)).entropy


def entropy_from_logits_with_chunking(logits, chunk_size=2048):
    """``entropy_from_logits``; ``chunk_size`` is verl's, and not needed."""
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits):
    """Σ softmax(logits)², [*, V] → [*] float32. A constant: no gradient flows through it."""
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logps(logits.detach(), any_target, outputs=("log_sum_sq_probs",)).log_sum_sq_probs.exp()


def fused_linear_for_ppo(hidden_states, vocab_weights, input_ids, temperature=1.0, chunk_size=512):
    """``FusedLinearForPPOFunction.apply``: log-probs and entropies under hidden·weightᵀ / temperature.

    Args:
        hidden_states: [T, D] or [B, T, D] float. vocab_weights: [V, D]. input_ids: [T] or [B, T] int.
        chunk_size: verl's; rlfast chooses its own.

    Returns:
        (log-probs float32, entropies in the dtype of hidden_states), each shaped like input_ids.
    """
    out = linear_token_logps(
        hidden_states, vocab_weights, input_ids.long(), temperature=temperature, outputs=("logp", "entropy")
    )
    return out.logp, out.entropy.to(hidden_states.dtype)


class FusedLinearForPPOFunction:
    """verl's name of ``fused_linear_for_ppo``."""

    apply = staticmethod(fused_linear_for_ppo)


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of the same name; ``chunk_size`` and ``impl_backend`` are verl's, and not needed."""

    def __init__(self, chunk_size=512, impl_backend="torch"):
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
        """``fused_linear_for_ppo``."""
        return fused_linear_for_ppo(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)


def masked_sum(values, mask, axis=None):
    """Σ mask·values over ``axis``, all of them if it is None. What is masked may be NaN."""
    kept = torch.where(mask.bool(), values, 0.0)
    return (kept if mask.dtype == torch.bool else kept * mask).sum(dim=axis)


def masked_mean(values, mask, axis=None):
    """Σ mask·values ÷ (Σ mask + 1e-8) over ``axis``, summed in float64; float32 at least. What is masked may be NaN.

    The mask is 0 or 1: any other number is taken for 1. The patch leaves weights to verl.
    """
    return mean_over(values.to(torch.promote_types(values.dtype, torch.float32)), mask, dim=axis, like="verl")


def masked_var(values, mask, unbiased=True):
    """The variance of the unmasked values, by Bessel's correction unless ``unbiased`` is False; float32 at least.

    Raises:
        ValueError: the mask has no element, or with the correction only one.
    """
    return _moments(values, mask, unbiased)[1].to(torch.promote_types(values.dtype, torch.float32))


def masked_whiten(values, mask, shift_mean=True):
    """(values − mean) ÷ √(variance + 1e-8) of the unmasked values; those that are masked are moved and scaled too.

    Args:
        shift_mean: False gives the mean back after scaling.

    Raises:
        ValueError: the mask has fewer than two elements.
    """
    return whitened(values, *_moments(values, mask, True), shift_mean)


def whitened(values, mean, var, shift_mean: bool = True):
    """Values with a mean and a variance in float64 taken off them."""
    moved = (values - mean.to(values.dtype)) * (var + 1e-8).rsqrt().to(values.dtype)
    return moved if shift_mean else moved + mean.to(values.dtype)


def _moments(values, mask, bessel: bool):
    """(mean, variance) of the unmasked values in float64, with verl's errors."""
    mask = mask if mask.dtype == torch.bool else mask.bool()
    return moments(torch.where(mask, values, 0.0), mask.count_nonzero(), bessel)


def moments(kept, count, bessel: bool = True):
    """The same of values that are 0 where they are masked, ``count`` of which are not."""
    if bessel:
        enough(count)
    kept = kept.double().flatten()
    mean = kept.sum() / (count + 1e-8)
    moved = kept - mean
    squares = moved.dot(moved) - (moved.numel() - count) * mean.square()  # those that are masked are at −mean
    return mean, squares.clamp(min=0.0) / (count - 1 if bessel else count + 1e-8)


def enough(count) -> None:
    """verl's errors, in its words, of a deviation by Bessel's correction of fewer than two."""
    if count == 0:
        raise ValueError("At least one element in the mask has to be 1.")
    if count == 1:
        raise ValueError("The sum of the mask is one, which can cause a division by zero.")


def logits_unsupported(logits, labels=None, *_, **__) -> str | None:
    """Why rlfast cannot take a call of a function of logits."""
    reason = tensor_unsupported(logits=logits, labels=labels if isinstance(labels, torch.Tensor) else None)
    if reason is None and isinstance(labels, torch.Tensor):
        if labels.device != logits.device:
            return f"labels is on {labels.device} and logits on {logits.device}"
        if labels.shape != logits.shape[:-1]:
            return f"labels of shape {tuple(labels.shape)} beside logits of shape {tuple(logits.shape)}"
    return reason


def chunks_unsupported(logits, *_, **__) -> str | None:
    """Why rlfast cannot take a call of ``entropy_from_logits_with_chunking``."""
    return tensor_unsupported(logits=logits)


def squares_unsupported(logits) -> str | None:
    """Why rlfast cannot take a call of ``calculate_sum_pi_squared_from_logits``."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return "its gradient is wanted, and rlfast's is a constant"
    return tensor_unsupported(logits=logits)


def _temperature_unsupported(temperature) -> str | None:
    if isinstance(temperature, torch.Tensor) or temperature > 0:
        return None
    return f"temperature is {temperature}, rlfast takes a number > 0"


def head_unsupported(hidden_states, vocab_weights, input_ids, temperature=1.0, *_, **__) -> str | None:
    """Why rlfast cannot take a call of the fused head."""
    if isinstance(temperature, torch.Tensor) and temperature.dim() > 0:
        return f"temperature is a tensor of shape {tuple(temperature.shape)}, which verl divides columns by"
    if input_ids.shape != hidden_states.shape[:-1]:
        return f"input_ids of shape {tuple(input_ids.shape)} beside hidden_states of {tuple(hidden_states.shape)}"
    reason = tensor_unsupported(hidden_states=hidden_states, vocab_weights=vocab_weights)
    return reason or _temperature_unsupported(temperature)


def cross_entropy_unsupported(
    hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None
) -> str | None:
    """Why rlfast cannot take a call of ``linear_cross_entropy``."""
    if str(reduction).lower() not in REDUCTIONS:
        return f"reduction is {reduction!r}, rlfast has {REDUCTIONS}"
    return tensor_unsupported(hidden=hidden, weight=weight) or _temperature_unsupported(temperature)


def sum_unsupported(values, mask, *_, **__) -> str | None:
    """Why rlfast cannot take a call of ``masked_sum``."""
    return tensor_unsupported(values=values, mask=mask)


def values_unsupported(values, mask, *_, **__) -> str | None:
    """Why rlfast cannot take a call of a masked mean, variance or whitening."""
    reason = tensor_unsupported(values=values, mask=mask)
    if reason is None and (mask.shape != values.shape or mask.device != values.device):
        return f"a mask of shape {tuple(mask.shape)} beside values of shape {tuple(values.shape)}"
    return reason or mask_unsupported(mask)


def mask_unsupported(mask) -> str | None:
    """Why rlfast cannot take a mask: it has weights in it. To look at one that is not bool synchronises on a GPU."""
    if mask.dtype == torch.bool or mask.numel() == 0:
        return None
    if mask.is_floating_point():
        plain = bool(((mask == 0) | (mask == 1)).all())
    else:
        low, high = torch.aminmax(mask)
        plain = low >= 0 and high <= 1
    return None if plain else "the mask has values other than 0 and 1"
