"""Policy losses by the compiled kernels: the ``cpu`` and ``cuda`` backends.

The extensions take addresses, strides and numbers; ``csrc/bindings.h`` lists them, and ``csrc/rlfast/token_loss.h`` has
the records that they fill.
"""

from __future__ import annotations

import functools

import torch

from rlfast import backends
from rlfast.ops.loss_records import Fields, Output, allocate

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_FIELD = (0, 0, 0, 0)


@functools.cache
def formulas(device: str) -> tuple[dict[str, int], dict[str, int]]:
    """Surrogates and estimators of the extension for a device, by name: their numbers."""
    extension = backends.extension(device)
    lists = extension.token_loss_surrogates(), extension.token_loss_estimators()
    return tuple({name: number for number, name in enumerate(names)} for names in lists)


def why_not(surrogate: str, device: str = "cpu") -> str | None:
    """Why the extension cannot compute a surrogate; None if it can."""
    if surrogate in formulas(device)[0]:
        return None
    return f"{surrogate} is not compiled into the extension, expected one of {', '.join(formulas(device)[0])}"


def _field(x: torch.Tensor | None) -> tuple:
    if x is None:
        return NO_FIELD
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0) if x.dim() == 2 else 0, x.stride(-1)


def _flags(x: torch.Tensor | None) -> tuple:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0) if x.dim() == 2 else 0)


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _inputs(f: Fields) -> list[int]:
    logp = f.logp
    rows = logp.shape[0] if logp.dim() == 2 else 1
    sequences = rows if f.cu_seqlens is None else f.cu_seqlens.shape[0] - 1
    floats = (f.logp, f.old_logp, f.ref_logp, f.rollout_logp, f.adv, f.entropy, f.weights, f.extra)
    return [
        sequences, logp.shape[-1], *(number for x in floats for number in _field(x)), *_flags(f.mask), *_flags(f.keep),
        _address(f.cu_seqlens), _address(f.num_items), _address(f.coefs),
    ]  # fmt: skip


@functools.cache
def _counter(device: int, stream: int) -> torch.Tensor:
    """Blocks of a launch that are done: every launch on this stream leaves it at 0."""
    return torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")


def _cuda_last(logp, inputs: list[int], plan, settings) -> tuple:
    """What the CUDA kernel takes last, and the tensors behind the addresses in it."""
    device = logp.device
    stream = torch.cuda.current_stream(device).cuda_stream
    doubles = backends.extension("cuda").token_loss_scratch(inputs, plan, settings)
    scratch = torch.empty(doubles, dtype=torch.float64, device=device)
    # a graph may be replayed on any stream: its counter is its own
    capturing = torch.cuda.is_current_stream_capturing()
    counter = torch.zeros(1, dtype=torch.int32, device=device) if capturing else _counter(device.index, stream)
    return (scratch.data_ptr(), counter.data_ptr(), device.index, stream), (scratch, counter)


def forward(fields: Fields, surrogate: str, estimator: str, plan, settings, hyper, kl_hyper, needs) -> Output:
    """See ``rlfast/ops/token_loss.py``."""
    device, out, inputs = fields.logp.device.type, allocate(fields, needs), _inputs(fields)
    if device == "cuda":
        last, _alive = _cuda_last(fields.logp, inputs, plan, settings)
    else:
        last = backends.isa(), torch.get_num_threads()
    surrogates, estimators = formulas(device)
    backends.extension(device).token_loss(
        inputs, plan, settings, surrogates[surrogate], hyper, estimators[estimator] if estimator else -1, kl_hyper,
        out.loss.data_ptr(), out.metrics.data_ptr(), out.dlogp.data_ptr() if needs[0] else 0,
        out.dentropy.data_ptr() if needs[1] else 0, *last,
    )  # fmt: skip
    return out
