"""Functions of Megatron-Core and of verl over it, under their names, for a vocabulary that tensor parallel ranks share.

    megatron.core.tensor_parallel        vocab_parallel_cross_entropy, and the fused one
    verl.utils.megatron.tensor_parallel  vocab_parallel_log_probs_from_logits, vocab_parallel_entropy, its chunked twin,
                                         vocab_parallel_sum_pi_squared
    verl.utils.kernel                    linear_cross_entropy(…, dist_process_group=)

Outputs are float32. The logits are left as they are, where Megatron's functions write over them. Without a group it is
Megatron's tensor parallel one.
"""

from __future__ import annotations

import sys

import torch

from rlfast import validate
from rlfast.distributed.groups import VocabParallel
from rlfast.distributed.ranks import ranks_of
from rlfast.logps import linear_token_logps, token_logps

REDUCTIONS = ("none", "sum", "mean")


def group_of(group):
    """The group, or that of Megatron's parallel state."""
    if group is not None:
        return group
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None:
        validate.fail("group", "a group, since megatron.core has not been imported", "None")
    return state.get_tensor_model_parallel_group()


def _shared(logits, group):
    """The group; with the vocabulary's size where ranks do not look at each other's shards: Megatron's are equal."""
    group = group_of(group)
    if logits.device.type == "cpu":
        return group
    return VocabParallel(group, vocab_size=logits.shape[-1] * ranks_of(group).size)


def _any_target(logits):
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def vocab_parallel_log_probs_from_logits(logits, labels, group=None):
    """Log-probs of ``labels`` under logits [*, V / ranks]; ids of the whole vocabulary, shaped [*]."""
    return token_logps(logits, labels, process_group=_shared(logits, group)).logp


def vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing=0.0, tp_group=None):
    """−log p of the targets under logits [S, B, V / ranks]: [S, B].

    Raises:
        ValueError: ``label_smoothing`` is not 0.
    """
    if label_smoothing:
        validate.fail("label_smoothing", "0.0", repr(label_smoothing))
    return -vocab_parallel_log_probs_from_logits(vocab_parallel_logits, target, tp_group)


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=None):
    """``vocab_parallel_cross_entropy``."""
    return vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group=tp_group)


def vocab_parallel_entropy(vocab_parallel_logits, group=None):
    """Entropies in nats under logits [*, V / ranks], with gradient: [*]."""
    logits, wanted = vocab_parallel_logits, ("entropy",)
    return token_logps(logits, _any_target(logits), outputs=wanted, process_group=_shared(logits, group)).entropy


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits, chunk_size=2048, group=None):
    """``vocab_parallel_entropy``; ``chunk_size`` is verl's, and not needed."""
    return vocab_parallel_entropy(vocab_parallel_logits, group)


def vocab_parallel_sum_pi_squared(vocab_parallel_logits, group=None):
    """Σ p² under logits [*, V / ranks]: [*]. A constant: no gradient flows through it."""
    logits, wanted = vocab_parallel_logits.detach(), ("log_sum_sq_probs",)
    out = token_logps(logits, _any_target(logits), outputs=wanted, process_group=_shared(logits, group))
    return out.log_sum_sq_probs.exp()


def linear_cross_entropy(hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
    """Log-probs and entropies of a head [V / ranks, D] over hidden [*, D], one a token; verl's kernel of that name.

    Args:
        hidden: [*, D] float, the same on every rank. weight: this rank's rows. labels: [*] int.
        reduction: "none", "sum" or "mean" of the log-probs over the tokens.
        dist_process_group: the ranks that share the vocabulary; None: there is one.

    Returns:
        (log-probs [tokens] or [], entropies [tokens]), float32. ∂hidden is what this rank's rows add to it, as verl's
        kernel has it: Megatron's gather of the hidden states, or its copy to the ranks, sums in its backward.
    """
    validate.one_of("reduction", str(reduction).lower(), REDUCTIONS)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    share = None if dist_process_group is None else VocabParallel(dist_process_group, sum_hidden=False)
    wanted = {"outputs": ("logp", "entropy"), "process_group": share}
    out = linear_token_logps(rows, weight, labels, temperature=temperature, **wanted)
    reduced = {"none": out.logp, "sum": out.logp.sum(), "mean": out.logp.mean()}
    return reduced[str(reduction).lower()], out.entropy
