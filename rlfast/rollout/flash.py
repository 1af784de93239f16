"""Attention by other libraries, with the arguments of ``paged_attention``: flash-attn 2.8, flash-attn-4, flashinfer.

None of them is taken unless its name is given: their bits may depend on the batch and on the chunks of a prompt, which
those of rlfast's kernels do not. Each refuses, with the reason, what it would compute differently.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch

from rlfast import validate

NAMES = ("flash-attn", "flash-attn-4", "flashinfer")
MODULES = {"flash-attn": "flash_attn", "flash-attn-4": "flash_attn.cute", "flashinfer": "flashinfer"}
INSTALL = {
    "flash-attn": "pip install flash-attn --no-build-isolation: it compiles for an hour",
    "flash-attn-4": "pip install --pre flash-attn-4: Hopper and Blackwell",
    "flashinfer": "pip install flashinfer-python: it compiles at run time",
}
CAPABILITY = {"flash-attn": 80, "flash-attn-4": 90, "flashinfer": 75}
HALF = (torch.float16, torch.bfloat16)
PAGES = {"flash-attn": 256}  # pages of a multiple of it
WIDEST = {"flash-attn": 256}  # heads
SINKS = ("flash-attn-4",)
PLANNED = ("flashinfer",)  # on the host at every step, which a CUDA graph would not do again
TWO_WIDTHS = ("flash-attn-4",)  # of keys and values; flashinfer too, but not in decoding
WORKSPACE_BYTES = 128 << 20  # what flashinfer recommends


def _there(module: str) -> bool:
    """Whether a module can be found; its package is imported for that, the module is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


@functools.cache
def why_not(name: str) -> str | None:
    """Why a library cannot be used here; None if it can.

    Raises:
        ValueError: the name is unknown.
    """
    validate.one_of("name", name, NAMES)
    if not _there(MODULES[name]):
        return f"not installed ({INSTALL[name]})"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor < CAPABILITY[name]:
        return f"needs sm_{CAPABILITY[name]} or later, the device is sm_{major}{minor}"
    return None


def attention(name: str, layers=(), page_size: int = 0):
    """A library's attention as a function of (q, k_cache, v_cache, block_table, cu_q, kv_lens, sinks, scale, softcap,
    window, most_new): the arguments of ``rlfast.ops.paged_attention.op``, and the most new tokens that a sequence has,
    if the caller knows that; 1 takes the library's way for decoding.

    Args:
        name: "flash-attn", "flash-attn-4" or "flashinfer".
        layers, page_size: what it will be asked for (``rlfast.rollout.attention.Layer``), with pages of which size.

    Raises:
        ValueError, TypeError: the name is unknown; or the library has not what a layer asks for.
        RuntimeError: the library cannot be used here; the message says why.
    """
    reason = why_not(validate.one_of("use_attention", name, NAMES))
    if reason is not None:
        raise RuntimeError(f"attention {name!r} is not available: {reason}")
    for layer in layers:
        _refuse(name, layer.dtype, layer.sinks, page_size, layer.widths)
    return ADAPTERS[name](importlib.import_module(MODULES[name]))


def _refuse(name: str, dtype, sinks: bool, page_size: int, widths, one_width: bool = True) -> None:
    """What the library has no word for."""
    page, (width, of_values) = PAGES.get(name, 1), widths
    if dtype not in HALF:
        validate.fail("q", f"float16 or bfloat16 with {name}", str(dtype), TypeError)
    if sinks and name not in SINKS:
        validate.fail("sinks", f"None with {name}, which has none", "a tensor")
    if page_size % page:
        validate.fail("page_size", f"a multiple of {page} with {name}", str(page_size))
    if width > WIDEST.get(name, width):
        validate.fail("q", f"heads of at most {WIDEST[name]} with {name}", str(width))
    if one_width and name not in TWO_WIDTHS and of_values != width:
        validate.fail("v_cache", f"a width of {width} like q with {name}", str(of_values))


def _refuse_call(name: str, q, k_cache, v_cache, sinks, one_width: bool = True) -> None:
    widths = q.shape[-1], v_cache.shape[-1]
    _refuse(name, q.dtype, sinks is not None, k_cache.shape[1], widths, one_width)


def ends_of(counts: torch.Tensor) -> torch.Tensor:
    """int32 [n + 1]: 0 and the running sums, without a look at them."""
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def decoding(q, kv_lens, most_new) -> bool:
    """Whether every sequence has one new token: known where the caller says that none has more, and none has fewer."""
    return most_new == 1 and q.shape[0] == kv_lens.shape[0]


def flash_attn(library):
    """flash-attn 2.8: pages of a multiple of 256, one width, no sinks."""

    def attend(q, k_cache, v_cache, block_table, cu_q, kv_lens, sinks, scale, softcap, window, most_new=None):
        _refuse_call("flash-attn", q, k_cache, v_cache, sinks)
        words = {
            "softmax_scale": scale, "causal": True, "window_size": (window - 1 if window else -1, 0 if window else -1),
            "softcap": softcap, "block_table": block_table,
        }  # fmt: skip
        if decoding(q, kv_lens, most_new):
            out = library.flash_attn_with_kvcache(q.unsqueeze(1), k_cache, v_cache, cache_seqlens=kv_lens, **words)
            return out.squeeze(1)
        most = most_new or q.shape[0]  # bounds: they size a launch
        room = block_table.shape[1] * k_cache.shape[1]
        return library.flash_attn_varlen_func(q, k_cache, v_cache, cu_q, ends_of(kv_lens), most, room, **words)

    return attend


def flash_attn_4(library):
    """flash-attn-4: sinks, which it takes in bfloat16."""

    def attend(q, k_cache, v_cache, block_table, cu_q, kv_lens, sinks, scale, softcap, window, most_new=None):
        _refuse_call("flash-attn-4", q, k_cache, v_cache, sinks)
        out = library.flash_attn_varlen_func(
            q, k_cache, v_cache, cu_seqlens_q=cu_q, seqused_k=kv_lens, page_table=block_table, softmax_scale=scale,
            causal=True, window_size=(window - 1 if window else None, 0 if window else None), softcap=softcap,
            learnable_sink=None if sinks is None else sinks.to(torch.bfloat16),
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out  # (out, lse)

    return attend


class Flashinfer:
    """flashinfer's wrappers: planned once for the layers of a step, which share their tables; no sinks."""

    def __init__(self, library):
        self._library, self._wrappers, self._planned = library, {}, None

    def _wrapper(self, kind: str, device):
        if (kind, device) not in self._wrappers:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._wrappers[kind, device] = getattr(self._library, kind)(workspace, "NHD")
        return self._wrappers[kind, device]

    def __call__(self, q, k_cache, v_cache, block_table, cu_q, kv_lens, sinks, scale, softcap, window, most_new=None):
        decode = decoding(q, kv_lens, most_new)
        _refuse_call("flashinfer", q, k_cache, v_cache, sinks, one_width=decode)
        wrapper = self._wrapper(f"Batch{'Decode' if decode else 'Prefill'}WithPagedKVCacheWrapper", q.device)
        tables, widths = (block_table, cu_q, kv_lens), (*k_cache.shape[1:], v_cache.shape[-1])
        seen = (*((x.data_ptr(), x._version, x.shape) for x in tables), q.shape, q.dtype, widths, decode)
        seen += (scale, softcap, window)
        if self._planned is None or self._planned[0] != seen:
            self._plan(wrapper, q, k_cache, v_cache, tables, scale, softcap, window, decode)
            self._planned = seen, tables  # held, so that no other tensor has their addresses
        return wrapper.run(q, (k_cache, v_cache))

    def _plan(self, wrapper, q, k_cache, v_cache, tables, scale, softcap, window, decode: bool) -> None:
        block_table, cu_q, kv_lens = tables
        _, page_size, kv_heads, _ = k_cache.shape
        pages = (kv_lens + page_size - 1) // page_size
        column = torch.arange(block_table.shape[1], device=q.device)
        sizes = (ends_of(pages), block_table[column < pages.unsqueeze(1)], (kv_lens - 1) % page_size + 1)
        shape = (q.shape[1], kv_heads, q.shape[2], page_size)
        words = {
            "sm_scale": scale, "window_left": window - 1 if window else -1, "logits_soft_cap": softcap or None,
            "q_data_type": q.dtype, "kv_data_type": k_cache.dtype,
        }  # fmt: skip
        if decode:
            wrapper.plan(*sizes, *shape, **words)
        else:
            wrapper.plan(cu_q, *sizes, *shape, head_dim_vo=v_cache.shape[-1], causal=True, **words)


ADAPTERS = {"flash-attn": flash_attn, "flash-attn-4": flash_attn_4, "flashinfer": Flashinfer}
