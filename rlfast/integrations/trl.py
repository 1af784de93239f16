"""TRL's log-prob and entropy functions, under TRL's names and signatures, on rlfast's kernels.

Every TRL trainer that scores tokens from hidden states (SFT, DPO, KTO, GRPO, RLOO, AsyncGRPO, GMPO) ends in
``ChunkedLogProbFunction.apply``; those that hold logits call ``selective_log_softmax`` and its relatives. Outputs are
float32, as those of TRL's own CUDA kernels are (its CPU path returns the dtype of the logits). The loss of GRPO is in
``trl_grpo.py``, those of DPO, KTO and reward models in ``trl_dpo.py`` and ``trl_preference.py``.

``replacements`` is what ``rlfast.patch("trl")`` puts in place. The functions need no TRL and can be called directly.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys

import torch

from rlfast.integrations import trl_grpo, trl_head, trl_preference, trl_rollout
from rlfast.integrations.patching import Swap, or_original, reads, takes, tensor_unsupported
from rlfast.logps import linear_token_logps, token_logps
from rlfast.rollout import training

rollout = trl_rollout.rollout

logger = logging.getLogger("rlfast.integrations")

TESTED = ("1.16",)
OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def chunked_logprob(
    hidden,
    weight,
    bias,
    targets,
    temperature,
    chunk_size,
    final_logit_softcapping=None,
    logit_scale=1.0,
    outputs=OPTIONAL_OUTPUTS,
):
    """``ChunkedLogProbFunction.apply``: log-probs of ``targets`` under hidden·weightᵀ + bias, logits never in full.

    Args:
        hidden: [N, D] float. weight: [V, D]. bias: [V] or None. targets: [N] int in [0, V).
        chunk_size: TRL's vocabulary tile; rlfast chooses its own.
        outputs: which of ``OPTIONAL_OUTPUTS`` to compute; the others come back as None.

    Returns:
        (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N]; float32, the last bool. The first two
        are differentiable. The projection runs in autocast's dtype if that is on, else in hidden's.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wanted = tuple(name for name in OPTIONAL_OUTPUTS if name in outputs)
    head = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets
    options = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
    fusion = trl_head.current(hidden)
    with torch.autocast(device, enabled=False):
        if fusion is not None:
            return fusion.head(*head, wanted, **options)
        hidden, weight, bias, targets = head
        out = linear_token_logps(
            hidden, weight, targets, bias, **options, outputs=("logp", *wanted), batch_invariant=training.active()
        )
    floats = (out.logp, out.entropy, out.log_sum_sq_probs, out.mean_logits)
    return (*(x if x is None else x.float() for x in floats), out.is_top1)


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


def counted_rows_only(device: torch.device) -> bool:
    """Whether TRL should gather the positions whose label counts before it calls the head: always.

    TRL asks its ``_use_triton``, because a varying row count would be slow on devices that recompile for each shape.
    The CPU does not, and each prompt or padding position costs it a row of three GEMMs over the vocabulary.
    """
    return True


def _masked(index, row_mask):
    return index if row_mask is None else index.masked_fill(row_mask == 0, -100)


def _positive(temperature):
    if temperature <= 0:
        raise ValueError("temperature must be positive")  # TRL's own words: its callers' tests look for them
    return temperature


def _head_unsupported(hidden, weight, bias, *_, **__) -> str | None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        return (
            "under DeepSpeed ZeRO-3 the head is partitioned again before the backward, and only TRL's kernel gathers it"
        )
    return tensor_unsupported(hidden=hidden, weight=weight, bias=bias)


def _logits_unsupported(logits, index=None, *args, row_mask=None, **_) -> str | None:
    reason = tensor_unsupported(logits=logits)
    if reason is None and isinstance(index, torch.Tensor) and index.device != logits.device:
        return f"index is on {index.device} and logits on {logits.device}"
    if reason is None and isinstance(index, torch.Tensor) and index.shape[: logits.dim() - 1] != logits.shape[:-1]:
        return f"index of shape {tuple(index.shape)} is broadcast against logits of shape {tuple(logits.shape)}"
    return reason


def _batch_unsupported(logits, labels=None, *_, **__) -> str | None:
    return tensor_unsupported(logits=logits)


def replacements(untested: bool, rollouts: bool = False, bitwise: bool = False):
    """What to swap in the installed TRL: a function that lists the swaps, and TRL's version.

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
    fixed += trl_grpo.swaps(strange) + trl_preference.swaps(strange)
    if rollouts:
        fixed += trl_rollout.swaps(strange, bitwise)
    if strange and not untested:
        raise RuntimeError(f'rlfast.patch("trl"): TRL {version} does not look as it should: {"; ".join(strange)}')
    for reason in strange:
        logger.warning("TRL %s: %s; it is left alone", version, reason)
    if not fixed:
        raise RuntimeError(f'rlfast.patch("trl"): nothing in TRL {version} has a signature that rlfast knows')
    return lambda: [*fixed, *_loaded_batch_logps()], version


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
    head = getattr(utils, "_ChunkedLogProbFunction", None)
    forward = getattr(head, "forward", None)
    wanted = inspect.signature(chunked_logprob).parameters
    if takes(forward, wanted, "trl.trainer.utils._ChunkedLogProbFunction.forward", strange, skip="ctx"):
        apply = or_original(chunked_logprob, head.apply, _head_unsupported)
        ours = type(head.__name__, (head,), {"apply": staticmethod(apply), "__doc__": head.__doc__})
        swaps.append(Swap(head, ours, prefix="trl"))
        if _asks_before_compacting(utils):
            swaps.append(Swap(utils._use_triton, counted_rows_only, owner=utils, name="_use_triton"))
        else:
            strange.append("trl.trainer.utils.add_fused_lm_head does not ask _use_triton whether to drop masked rows")
    return swaps, strange


def _asks_before_compacting(utils) -> bool:
    """Whether the fused forward is the only code of TRL's utils that reads the global ``_use_triton``."""
    readers = [f.__name__ for f in vars(utils).values() if inspect.isfunction(f) and reads(f.__code__, "_use_triton")]
    return hasattr(utils, "_use_triton") and [r for r in readers if r != "_use_triton"] == ["add_fused_lm_head"]


def _loaded_batch_logps() -> list[Swap]:
    """``get_batch_logps`` of the experimental trainers that are loaded; others bind our selective_log_softmax later."""
    swaps = []
    for module, trainer in (("cpo", "CPOTrainer"), ("orpo", "ORPOTrainer")):
        owner = getattr(sys.modules.get(f"trl.experimental.{module}.{module}_trainer"), trainer, None)
        original = vars(owner).get("get_batch_logps") if owner is not None else None
        if not isinstance(original, staticmethod) or getattr(original.__func__, "__wrapped__", None) is not None:
            continue  # not loaded, or already ours
        if list(inspect.signature(original.__func__).parameters) == list(inspect.signature(get_batch_logps).parameters):
            ours = staticmethod(or_original(get_batch_logps, original.__func__, _batch_unsupported))
            swaps.append(Swap(original, ours, owner=owner, name="get_batch_logps"))
    return swaps
