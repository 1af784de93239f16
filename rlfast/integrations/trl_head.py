"""The fused head: what TRL asks of it, and where it meets a loss, which it may make with its log-probs.

chunked_logprob   ``ChunkedLogProbFunction.apply``, on rlfast's kernels
Fusion            a loss that the head makes when a model calls it, within ``fusing``
swaps             what ``rlfast.patch("trl")`` puts in place
own_heads         the same for the models of one trainer
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
import types
from contextvars import ContextVar

import torch

from rlfast.distributed.gather import Partitioned
from rlfast.integrations.patching import Swap, or_original, reads, rebind, takes, tensor_unsupported
from rlfast.logps import linear_token_logps
from rlfast.rollout import training


def compute_dtype(hidden) -> torch.dtype:
    """What a head's projection runs in: autocast's dtype if that is on, else hidden's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def counted_rows_only(device: torch.device) -> bool:
    """Whether TRL should gather the positions whose label counts before it calls the head: always.

    TRL asks its ``_use_triton``, because a varying row count would be slow on devices that recompile for each shape.
    The CPU does not, and each prompt or padding position costs it a row of three GEMMs over the vocabulary.
    """
    return True


@contextlib.contextmanager
def whole(*heads):
    """Within it (weight, bias) of heads that DeepSpeed ZeRO-3 has partitioned are there, gathered as TRL does it.

    It gives the ``process_group`` by which a backward finds them again; None where nothing is partitioned.
    """
    utils = sys.modules.get("trl.trainer.utils")  # who runs TRL's trainers has it
    if utils is None or not zero3():
        yield None
        return

    @contextlib.contextmanager
    def gather():
        with contextlib.ExitStack() as stack:
            for head in heads:
                stack.enter_context(utils.maybe_gather_lm_head_ctx(*head))
            yield

    with gather():
        yield Partitioned(gather)


def zero3() -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the model."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_current: ContextVar[Fusion | None] = ContextVar("rlfast_trl_fusion", default=None)


class _Tied(torch.autograd.Function):
    """Log-probs that are a function of the loss, with a gradient of 0: what wraps a model looks for such a graph."""

    @staticmethod
    def forward(ctx, logp, loss):
        return logp.view_as(logp)

    @staticmethod
    def backward(ctx, g):
        return None, g.new_zeros(())


class Fusion:
    """A loss that the head makes when the model calls it; what the model returns then has a gradient of 0."""

    loss: torch.Tensor | None = None  # with gradient, as soon as it is made

    def __init__(self, scored: torch.Tensor):
        self.scored = scored  # bool [B, T]: the tokens that the head is asked for, one row after the other
        self.cu_seqlens = torch.nn.functional.pad(scored.sum(1).cumsum(0), (1, 0)).cpu()

    def takes(self, hidden) -> bool:
        """Whether this call of the head is the loss's."""
        return self.loss is None and torch.is_grad_enabled() and int(self.cu_seqlens[-1]) == hidden.shape[0]

    def packed(self, x):
        """The scored tokens of [B, T], [B, 1] or [B], one after the other."""
        if x is None:
            return None
        x = x.unsqueeze(1) if x.dim() == 1 else x
        return x.expand(self.scored.shape)[self.scored]

    def made(self, loss, logp):
        """Keep the loss; the log-probs as the model is to return them."""
        self.loss = loss
        return _Tied.apply(logp, loss)

    def in_place_of(self, theirs):
        """The number that TRL has come to, with what its router has, and the gradient of the loss."""
        return theirs + (self.loss - self.loss.detach())

    def head(self, hidden, weight, bias, targets, outputs, **options) -> tuple:
        """What TRL's head returns: (log-probs, entropies, log Σp², mean logits, is_top1), None where not asked for."""
        raise NotImplementedError


@contextlib.contextmanager
def fusing(fusion: Fusion | None):
    """Within it, the fused head makes the loss."""
    token = _current.set(fusion)
    try:
        yield fusion
    finally:
        _current.reset(token)


def current(hidden) -> Fusion | None:
    """The fusion that a call of the head belongs to."""
    fusion = _current.get()
    return fusion if fusion is not None and fusion.takes(hidden) else None


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
    dtype = compute_dtype(hidden)
    wanted = tuple(name for name in OPTIONAL_OUTPUTS if name in outputs)
    options = {"temperature": temperature, "softcap": final_logit_softcapping, "logit_scale": logit_scale}
    fusion = current(hidden)
    with torch.autocast(hidden.device.type, enabled=False), whole((weight, bias)) as group:
        options["process_group"] = group
        head = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), targets
        if fusion is not None:
            return fusion.head(*head, wanted, **options)
        hidden, weight, bias, targets = head
        out = linear_token_logps(
            hidden, weight, targets, bias, **options, outputs=("logp", *wanted), batch_invariant=training.active()
        )
    floats = (out.logp, out.entropy, out.log_sum_sq_probs, out.mean_logits)
    return (*(x if x is None else x.float() for x in floats), out.is_top1)


class ChunkedLogProbFunction:
    """TRL's name of ``chunked_logprob``."""

    apply = staticmethod(chunked_logprob)


def _unsupported(hidden, weight, bias, *_, **__) -> str | None:
    if training.active() and zero3():
        return "DeepSpeed ZeRO-3 has partitioned the head when a bitwise step's backward makes its logits again"
    return tensor_unsupported(hidden=hidden, weight=weight, bias=bias)


def head_of(utils, strange: list[str]):
    """``_ChunkedLogProbFunction`` of TRL's utils with rlfast's ``apply``; None where it is not as known."""
    head = getattr(utils, "_ChunkedLogProbFunction", None)
    if getattr(head, "of_rlfast", False):
        return head  # TRL is patched
    name = "trl.trainer.utils._ChunkedLogProbFunction.forward"
    wanted = inspect.signature(chunked_logprob).parameters
    if not takes(getattr(head, "forward", None), wanted, name, strange, skip="ctx"):
        return None
    apply = or_original(chunked_logprob, head.apply, _unsupported)
    return type(head.__name__, (head,), {"apply": staticmethod(apply), "of_rlfast": True, "__doc__": head.__doc__})


def swaps(utils, strange: list[str]) -> list[Swap]:
    """The head in every TRL module, and whether it is given the counted rows alone."""
    ours = head_of(utils, strange)
    if ours is None:
        return []
    found = [Swap(utils._ChunkedLogProbFunction, ours, prefix="trl")]
    if _asks_before_compacting(utils):
        found.append(Swap(utils._use_triton, counted_rows_only, owner=utils, name="_use_triton"))
    else:
        strange.append("trl.trainer.utils.add_fused_lm_head does not ask _use_triton whether to drop masked rows")
    return found


def _asks_before_compacting(utils) -> bool:
    """Whether the fused forward is the only code of TRL's utils that reads the global ``_use_triton``."""
    readers = [f.__name__ for f in vars(utils).values() if inspect.isfunction(f) and reads(f.__code__, "_use_triton")]
    return hasattr(utils, "_use_triton") and [r for r in readers if r != "_use_triton"] == ["add_fused_lm_head"]


@contextlib.contextmanager
def own_heads():
    """Within it, a model that TRL adds a fused head to gets rlfast's, and keeps it. Other models are left alone.

    Raises:
        RuntimeError: TRL's head is not as known.
    """
    utils, strange = importlib.import_module("trl.trainer.utils"), []
    names = {"_ChunkedLogProbFunction": head_of(utils, strange), "_use_triton": counted_rows_only}
    if strange:
        raise RuntimeError(f"TRL does not look as it should: {'; '.join(strange)}")
    theirs = utils.add_fused_lm_head
    ours = types.FunctionType(theirs.__code__, vars(utils) | names, theirs.__name__, theirs.__defaults__)
    rebind("trl", theirs, ours)
    try:
        yield
    finally:
        rebind("trl", ours, theirs)
