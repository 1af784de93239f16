"""The scan by the compiled kernels: the ``cpu`` and ``cuda`` backends.

The arguments are listed in ``csrc/bindings.h``.
"""

from __future__ import annotations

import torch

from rlfast import backends
from rlfast.native.token_logps import DTYPES, address
from rlfast.ops.scan_records import ADVANTAGES, RETURNS, Inputs, Options, allocate


def _tokens(x: torch.Tensor | None, padded: bool) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPES[x.dtype], x.stride(0) if padded else 0)


def _flags(x: torch.Tensor | None, padded: bool) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0) if padded else 0)


def _rate(x: torch.Tensor | None, rows: int, padded: bool) -> tuple[int, bool]:
    """(address, whether it is one a token)."""
    if x is None:
        return 0, False
    return x.data_ptr(), x.dim() > 1 or not (padded or x.shape[0] == rows)


def _arguments(x: Inputs, o: Options, out: torch.Tensor) -> tuple:
    padded = x.cu_seqlens is None
    rows, steps = x.tokens.shape if padded else (x.cu_seqlens.shape[0] - 1, 0)
    first, last = out.data_ptr(), out[-1].data_ptr() if out.shape[0] == 2 else out.data_ptr()
    return (
        rows, steps, address(x.cu_seqlens), *_tokens(x.rewards, padded), *_tokens(x.values, padded),
        *_tokens(x.log_ratio, padded), *_tokens(x.kl, padded), *_tokens(x.coefficients, padded),
        *_tokens(x.next_values, padded), *_flags(x.mask, padded), *_flags(x.done, padded), *_flags(x.truncated, padded),
        address(x.row_rewards), address(x.bootstrap), o.gamma, *_rate(x.gammas, rows, padded), o.lam,
        *_rate(x.lams, rows, padded), o.critic_lam, *_rate(x.critic_lams, rows, padded), o.kl_coef, o.clip_rho,
        o.clip_c, o.clip_pg, o.options & 15, o.whiten, o.eps,
        first if o.options & ADVANTAGES else 0, last if o.options & RETURNS else 0,
    )  # fmt: skip


def gae(rewards, values, mask, gamma: float, lam: float) -> torch.Tensor:
    """``forward`` of GAE on dense float32 rows on the CPU."""
    rows, steps = values.shape
    out = values.new_empty((2, rows, steps))
    first = out.data_ptr()
    backends.extension("cpu").gae(
        rewards.data_ptr(), values.data_ptr(), 0 if mask is None else mask.data_ptr(), rows, steps, gamma, lam, first,
        first + 4 * rows * steps, backends.isa(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def forward(x: Inputs, o: Options) -> torch.Tensor:
    """See ``rlfast/ops/affine_scan.py``."""
    out = allocate(x, o)
    if out.is_cuda:
        return _on_gpu(x, o, out)
    backends.extension("cpu").affine_scan(*_arguments(x, o, out), backends.isa(), torch.get_num_threads())
    return out


def _on_gpu(x: Inputs, o: Options, out: torch.Tensor) -> torch.Tensor:
    extension, device, packed = backends.extension("cuda"), out.device, x.cu_seqlens is not None
    rows = x.cu_seqlens.shape[0] - 1 if packed else x.tokens.shape[0]
    longest = x.tokens.shape[-1]
    doubles = extension.affine_scan_scratch(rows, longest, packed, o.whiten != 0, device.index)
    scratch = torch.empty(doubles, dtype=torch.float64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    address = scratch.data_ptr() if doubles else 0
    extension.affine_scan(*_arguments(x, o, out), longest, address, device.index, stream)
    return out
