"""TRL's log-prob and entropy functions, under TRL's names and signatures, on rlfast's kernels.

Every TRL trainer that scores tokens from hidden states (SFT, DPO, KTO, GRPO, RLOO, AsyncGRPO, GMPO) ends in
``ChunkedLogProbFunction.apply``; those that hold logits call ``selective_log_softmax`` and its relatives. Outputs are
float32, as those of TRL's own CUDA kernels are (its CPU path returns the dtype of the logits). The loss of GRPO is in
``trl_grpo.py``, those of DPO, KTO and reward models in ``trl_dpo.py`` and ``trl_preference.py``, those of distillation
in ``trl_divergence.py``; ``trl_mixins.py`` has all of it for one trainer class.

``replacements`` is what ``rlfast.patch("trl")`` puts in place. The functions need no TRL and can be called directly.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys

import torch

from rlfast.integrations import trl_divergence, trl_grpo, trl_head, trl_mixins, trl_preference, trl_rollout
from rlfast.integrations.patching import Swap, or_original, static_swap, takes, tensor_unsupported
from rlfast.logps import token_logps

ChunkedLogProbFunction = trl_head.ChunkedLogProbFunction
ChunkedDivergenceFunction = trl_divergence.ChunkedDivergenceFunction
chunked_logprob = trl_head.chunked_logprob
chunked_divergence = trl_divergence.chunked_divergence
generalized_jsd_loss = trl_divergence.generalized_jsd_loss
gold_jsd_loss = trl_divergence.gold_jsd_loss
iw_opd_jsd_loss = trl_divergence.iw_opd_jsd_loss
rollout = trl_rollout.rollout
RlfastHeadMixin = trl_mixins.RlfastHeadMixin
RlfastGRPOMixin = trl_mixins.RlfastGRPOMixin
RlfastDPOMixin = trl_mixins.RlfastDPOMixin
RlfastKTOMixin = trl_mixins.RlfastKTOMixin
RlfastRewardMixin = trl_mixins.RlfastRewardMixin

logger = logging.getLogger("rlfast.integrations")

TESTED = ("1.16",)
BATCH_LOGPS = {
    "trl.experimental.cpo.cpo_trainer": "CPOTrainer",
    "trl.experimental.orpo.orpo_trainer": "ORPOTrainer",
}


def selective_log_softmax(logits, index, temperature=1.0, row_mask=None):
    """Log-probs of ``index`` under softmax(logits / temperature).

    Args:
        logits: [*, V] float, any strides. index: [*] or [*, K] int.
        row_mask: shaped like index; where it is zero the log-prob is 0 and nothing is read.

    Returns:
        Tensor shaped like index, float32.
    """
    return token_logps(logits, _masked(index, row_mask), temperature=_positive(temperature)).logp


def entropy_from_logits(logits, chunk_size=128):
    """Shannon entropy, in nats, of each row of logits [*, V]; float32 [*]. ``chunk_size`` is TRL's, and not needed."""
    any_target = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logps(logits, any_target, outputs=("entropy",)).entropy


def selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None):
    """``selective_log_softmax`` and the entropy of softmax(logits / temperature), in one pass over the logits.

    Returns:
        (logp, entropy), each shaped like index [*], float32; zero where ``row_mask`` is.
    """
    out = token_logps(logits, _masked(index, row_mask), temperature=_positive(temperature), outputs=("logp", "entropy"))
    return out.logp, out.entropy if entropy_requires_grad else out.entropy.detach()


def kernel_logprobs_and_entropy(logits, index, temperature=1.0, row_mask=None):
    """``trl.kernels.selective_log_softmax_and_entropy``: the same under the signature of TRL's Triton kernel."""
    return selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)


def get_batch_logps(logits, labels, average_log_prob=False, is_encoder_decoder=False):
    """``get_batch_logps`` of TRL's CPO and ORPO: the sum or the mean of each sequence's label log-probs.

    Args:
        logits: [B, S, V] float. labels: [B, S] int; −100 marks a token that does not count, and is not read.

    Returns:
        [B] float32.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"labels: expected shape {tuple(logits.shape[:-1])} like the rows of logits, got {tuple(labels.shape)}"
        )
    if not is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    total = token_logps(logits, labels).logp.sum(-1)
    return total / (labels != -100).sum(-1) if average_log_prob else total


def _masked(index, row_mask):
    return index if row_mask is None else index.masked_fill(row_mask == 0, -100)


def _positive(temperature):
    if temperature <= 0:
        raise ValueError("temperature must be positive")  # TRL's own words: its callers' tests look for them
    return temperature


def _logits_unsupported(logits, index=None, *args, row_mask=None, **_) -> str | None:
    reason = tensor_unsupported(logits=logits)
    if reason is None and isinstance(index, torch.Tensor) and index.device != logits.device:
        return f"index is on {index.device} and logits on {logits.device}"
    if reason is None and isinstance(index, torch.Tensor) and index.shape[: logits.dim() - 1] != logits.shape[:-1]:
        return f"index of shape {tuple(index.shape)} is broadcast against logits of shape {tuple(logits.shape)}"
    if reason is None and isinstance(index, torch.Tensor) and index.dim() == logits.dim() and not index.shape[-1]:
        return f"index of shape {tuple(index.shape)} asks for no token"
    return reason


def _batch_unsupported(logits, labels=None, *_, **__) -> str | None:
    return tensor_unsupported(logits=logits)


def replacements(untested: bool, rollouts: bool = False, bitwise: bool = False):
    """What to swap in the installed TRL: a function that lists the swaps, TRL's version, and what brings more of them.

    Raises:
        RuntimeError: the version is not one of ``TESTED`` and ``untested`` is False, or a signature is not as known.
    """
    version = importlib.import_module("trl").__version__
    if not untested and ".".join(version.split(".")[:2]) not in TESTED:
        raise RuntimeError(
            f'rlfast.patch("trl"): tested with TRL {", ".join(TESTED)}, found {version}: '
            f"run `pip install 'trl=={TESTED[-1]}.*'`, or pass untested=True "
            "to replace what still has the signature that rlfast knows"
        )
    utils = importlib.import_module("trl.trainer.utils")
    fixed, strange = _functions(utils)
    fixed += trl_divergence.swaps(strange) + trl_grpo.swaps(strange) + trl_preference.swaps(strange)
    if rollouts:
        fixed += trl_rollout.swaps(strange, bitwise)
    if strange and not untested:
        raise RuntimeError(f'rlfast.patch("trl"): TRL {version} does not look as it should: {"; ".join(strange)}')
    for reason in strange:
        logger.warning("TRL %s: %s; it is left alone", version, reason)
    if not fixed:
        raise RuntimeError(f'rlfast.patch("trl"): nothing in TRL {version} has a signature that rlfast knows')
    later = (trl_divergence.DISTILLATION, *trl_divergence.LOSSES, *BATCH_LOGPS)
    return lambda: [*fixed, *_loaded_batch_logps(), *trl_divergence.loaded()], version, later


def _functions(utils) -> tuple[list[Swap], list[str]]:
    """The swaps by identity in every TRL module, and why some are not made."""
    swaps, strange = [], []
    for name, ours, why_not in (
        ("selective_log_softmax", selective_log_softmax, _logits_unsupported),
        ("entropy_from_logits", entropy_from_logits, _logits_unsupported),
        ("selective_log_softmax_and_entropy", selective_log_softmax_and_entropy, _logits_unsupported),
        ("_fused_logprob_entropy", kernel_logprobs_and_entropy, _logits_unsupported),
    ):
        original = getattr(utils, name, None)
        if original is None and name == "_fused_logprob_entropy":
            continue  # TRL binds it only where Triton is installed
        if takes(original, inspect.signature(ours).parameters, f"trl.trainer.utils.{name}", strange):
            swaps.append(Swap(original, or_original(ours, original, why_not), prefix="trl"))
    return swaps + trl_head.swaps(utils, strange), strange


def _loaded_batch_logps() -> list[Swap]:
    """``get_batch_logps`` of the experimental trainers that are loaded."""
    owners = (getattr(sys.modules.get(module), trainer, None) for module, trainer in BATCH_LOGPS.items())
    found = (static_swap(owner, "get_batch_logps", get_batch_logps, _batch_unsupported) for owner in owners)
    return [swap for swap in found if swap is not None]
