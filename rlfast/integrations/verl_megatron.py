"""verl's functions of logits whose vocabulary Megatron's ranks share, under verl's names and signatures.

Those of ``verl.utils.megatron.tensor_parallel``. They are ``megatron.py``'s, whose group may be given; here it is that
of Megatron's parallel state, as verl has it. The patch awaits verl's module, which only Megatron's workers import.
"""

from __future__ import annotations

from rlfast.integrations import megatron, verl_functional
from rlfast.integrations.patching import tensor_unsupported

MODULE = "verl.utils.megatron.tensor_parallel"


def vocab_parallel_log_probs_from_logits(logits, labels):
    """Log-probs of ``labels`` [*], ids of the whole vocabulary, under logits [*, V / ranks]; these stay as they are."""
    return megatron.vocab_parallel_log_probs_from_logits(logits, labels)


def vocab_parallel_entropy(vocab_parallel_logits):
    """Entropies in nats under logits [*, V / ranks], with gradient: [*] float32."""
    return megatron.vocab_parallel_entropy(vocab_parallel_logits)


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits, chunk_size=2048):
    """``vocab_parallel_entropy``; ``chunk_size`` is verl's, and not needed."""
    return megatron.vocab_parallel_entropy(vocab_parallel_logits)


def vocab_parallel_sum_pi_squared(vocab_parallel_logits):
    """Σ p² under logits [*, V / ranks]: [*] float32. A constant: no gradient flows through it."""
    return megatron.vocab_parallel_sum_pi_squared(vocab_parallel_logits)


def entropy_unsupported(vocab_parallel_logits, *_, **__) -> str | None:
    """Why rlfast cannot take a call of an entropy."""
    return tensor_unsupported(vocab_parallel_logits=vocab_parallel_logits)


def squares_unsupported(vocab_parallel_logits) -> str | None:
    """Why rlfast cannot take a call of ``vocab_parallel_sum_pi_squared``."""
    return verl_functional.squares_unsupported(vocab_parallel_logits)
