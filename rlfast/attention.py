"""Attention over a paged cache of keys and values, for rollouts; over packed sequences with a gradient, for training.

Both give a query the same bits.
"""

from __future__ import annotations

import torch

from rlfast import backends, validate
from rlfast.ops import packed_attention as packed_op
from rlfast.ops import paged_attention as paged_op

INDEX = (torch.int32,)
INDICES = (torch.int32, torch.int64)
MOST_TOKENS = 2**31 - 1


def paged_attention(
    q, k_cache, v_cache, block_table, cu_q, kv_lens, *, scale, softcap=0.0, window=0, sinks=None, shared_prefix=False
) -> torch.Tensor:
    """Causal attention of new tokens over a paged cache that holds their keys and values already.

    The query at position p of a sequence sees its keys j ≤ p, and j > p − window where there is a window:

        s_j = scale·q·k_j, or softcap·tanh(scale·q·k_j / softcap)       out = Σ_j e^{s_j}·v_j / (Σ_j e^{s_j} + e^{sink})

    Args:
        q: [T, H, D] float32, bfloat16, float16 or float64: the new tokens of S sequences, one sequence after the other.
        k_cache: [pages, page_size, Hkv, D] of q's dtype; head h reads key head h // (H / Hkv).
        v_cache: [pages, page_size, Hkv, Dv] of q's dtype.
        block_table: int32 [S, most]: position p of sequence s is in page block_table[s, p // page_size], slot
            p % page_size. What lies behind a sequence's last page is not read, nor is what no query sees.
        cu_q: int32 [S + 1]: sequence s has the new tokens cu_q[s] to cu_q[s + 1], its last positions.
        kv_lens: int32 [S]: positions of each sequence, the new tokens among them.
        scale: of the scores, such as D ** -0.5.
        softcap: bound on the scores; 0: none.
        window: positions that a query sees, its own among them; 0: all.
        sinks: [H] float logits that take probability and have no value, or None.
        shared_prefix: whether sequences that follow one another begin with the same pages, as samples of one prompt do.
            Triton then reads those once for all of them; the C++ kernels always do. The bits are the same.

    Returns:
        [T, H, Dv] of q's dtype. It has no gradient. On the C++ and Triton kernels a query's bits depend on its q, its
        keys and values and the options alone: not on pages, chunks of the prompt, the batch, threads or what prefixes
        are shared.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range. On a GPU, where looking
            would synchronise, the numbers in block_table, cu_q and kv_lens are not looked at.

    Example:
        >>> q, cache = torch.randn(1, 4, 16), torch.randn(3, 8, 2, 16)
        >>> table, ends, lens = (torch.tensor(x, dtype=torch.int32) for x in ([[2, 0]], [0, 1], [10]))
        >>> rlfast.paged_attention(q, cache, cache, table, ends, lens, scale=0.25).shape
        torch.Size([1, 4, 16])
    """
    _queries(q)
    _cache("k_cache", k_cache, q, 4)
    _cache("v_cache", v_cache, q, 4)
    _same("v_cache", v_cache, "k_cache", k_cache, 3)
    _heads(q, k_cache, "k_cache")
    for name, x, dims in (("block_table", block_table, 2), ("cu_q", cu_q, 1), ("kv_lens", kv_lens, 1)):
        _index(name, x, dims, q, INDEX)
    sequences = kv_lens.shape[0]
    if block_table.shape[0] != sequences:
        validate.fail("block_table", f"shape ({sequences}, most) like kv_lens", validate.shape(block_table))
    if cu_q.shape[0] != sequences + 1:
        validate.fail("cu_q", f"shape ({sequences + 1},) for the sequences of kv_lens", validate.shape(cu_q))
    options = _options(scale, softcap, window)
    if validate.looked_at(q):
        _ends("cu_q", cu_q, q.shape[0])
        _places(block_table, cu_q, kv_lens, k_cache, window)
    sinks = _sinks(sinks, q)
    if not isinstance(shared_prefix, bool):
        validate.fail("shared_prefix", "a bool", repr(shared_prefix), TypeError)
    tensors = (_dense(q), k_cache, v_cache, _dense(block_table), cu_q.contiguous(), kv_lens.contiguous(), sinks)
    return paged_op.call(*tensors, *options, shared_prefix, backends.requested())


def packed_attention(q, k, v, cu_seqlens, *, scale, softcap=0.0, window=0, sinks=None) -> torch.Tensor:
    """Causal attention within packed sequences: what ``paged_attention`` gives the same tokens, bit for bit.

    Args:
        q: [T, H, D] float32, bfloat16, float16 or float64: sequences one after the other.
        k: [T, Hkv, D] of q's dtype; head h reads key head h // (H / Hkv).
        v: [T, Hkv, Dv] of q's dtype.
        cu_seqlens: int32 or int64 [S + 1]: sequence s is the tokens cu_seqlens[s] to cu_seqlens[s + 1].
        scale, softcap, window, sinks: as in ``paged_attention``.

    Returns:
        [T, H, Dv] of q's dtype, differentiable in q, k, v and sinks. The backward takes a sequence at a time, in
        float32, and on a GPU waits for cu_seqlens.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape, dtype, device or range.

    Example:
        >>> q, k = torch.randn(5, 4, 16, requires_grad=True), torch.randn(5, 2, 16)
        >>> rlfast.packed_attention(q, k, k, torch.tensor([0, 2, 5]), scale=0.25).sum().backward()
    """
    _queries(q)
    _cache("k", k, q, 3)
    _cache("v", v, q, 3)
    _same("v", v, "k", k, 2)
    _heads(q, k, "k")
    if k.shape[0] != q.shape[0]:
        validate.fail("k", f"{q.shape[0]} tokens like q", validate.shape(k))
    _index("cu_seqlens", cu_seqlens, 1, q, INDICES)
    if cu_seqlens.shape[0] < 1:
        validate.fail("cu_seqlens", "shape (S + 1,)", validate.shape(cu_seqlens))
    if validate.looked_at(q):
        _ends("cu_seqlens", cu_seqlens, q.shape[0])
    options = _options(scale, softcap, window)
    ends = cu_seqlens.to(torch.int32).contiguous()
    return packed_op.op(_dense(q), _dense(k), _dense(v), ends, _sinks(sinks, q), *options, backends.requested())


def _dense(x: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension; the other strides stay."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _queries(q) -> None:
    validate.tensor("q", q)
    if q.dim() != 3 or 0 in q.shape[1:]:
        validate.fail("q", "shape (T, H, D) with H, D > 0", validate.shape(q))
    if q.shape[0] > MOST_TOKENS:
        validate.fail("q", f"at most {MOST_TOKENS} tokens", q.shape[0])


def _cache(name: str, x, q, dims: int) -> None:
    validate.tensor(name, x)
    wanted = "(pages, page_size, Hkv, width)" if dims == 4 else "(T, Hkv, width)"
    if x.dim() != dims or 0 in x.shape[1:]:
        validate.fail(name, f"shape {wanted}, none of them 0 but the first", validate.shape(x))
    if x.dtype != q.dtype:
        validate.fail(name, f"dtype {q.dtype} like q", str(x.dtype), TypeError)
    validate.same_device(name, x, "q", q)
    if dims == 4 and x.stride(-1) != 1:
        validate.fail(name, "a contiguous last dimension, since a cache is not copied", f"strides {x.stride()}")


def _same(name: str, x, other_name: str, other, dims: int) -> None:
    if x.shape[:dims] != other.shape[:dims]:
        shape = (*other.shape[:dims], "width")
        validate.fail(name, f"shape {shape} like {other_name}".replace("'", ""), validate.shape(x))


def _heads(q, k, name: str) -> None:
    if k.shape[-1] != q.shape[2]:
        validate.fail(name, f"a width of {q.shape[2]} like q", k.shape[-1])
    if q.shape[1] % k.shape[-2]:
        validate.fail("q", f"a multiple of the {k.shape[-2]} heads of {name}", f"{q.shape[1]} heads")


def _index(name: str, x, dims: int, q, dtypes) -> None:
    validate.tensor(name, x, dtypes)
    if x.dim() != dims:
        validate.fail(name, f"{dims} dimension{'s' * (dims > 1)}", validate.shape(x))
    validate.same_device(name, x, "q", q)


def _ends(name: str, ends, tokens: int) -> None:
    """Looks: 0, ascending, up to the number of tokens."""
    found = ends.tolist()
    if found[0] != 0 or found[-1] != tokens or found != sorted(found):
        validate.fail(name, f"ascending numbers from 0 to the {tokens} tokens of q", found)


def _places(block_table, cu_q, kv_lens, k_cache, window: int) -> None:
    """Looks: lengths that hold the new tokens and fit the table, and pages that are there where a query looks."""
    pages, size = k_cache.shape[:2]
    room = block_table.shape[1] * size
    new = cu_q.diff()
    misfit = (kv_lens < new) | (kv_lens > room)
    if bool(misfit.any()):
        s = int(misfit.int().argmax())
        wanted = f"{int(new[s])} new tokens to {room}, the room of block_table, for sequence {s}"
        validate.fail("kv_lens", wanted, int(kv_lens[s]))
    begin = torch.arange(block_table.shape[1], device=kv_lens.device) * size
    used = (begin < kv_lens.unsqueeze(1)) & (new > 0).unsqueeze(1)
    if window:
        used &= begin + size > (kv_lens - new + 1 - window).unsqueeze(1)
    wrong = used & ((block_table < 0) | (block_table >= pages))
    if bool(wrong.any()):
        s, p = (int(i) for i in wrong.nonzero()[0])
        validate.fail("block_table", f"pages from 0 to {pages - 1}", f"{int(block_table[s, p])} at ({s}, {p})")


def _options(scale, softcap, window) -> tuple[float, float, int]:
    scale, softcap = validate.positive("scale", scale), validate.at_least("softcap", softcap, 0)
    if softcap:
        validate.positive("softcap", softcap)
    if isinstance(window, bool) or not isinstance(window, int):
        validate.fail("window", "an int", repr(window), TypeError)
    if not 0 <= window <= MOST_TOKENS:
        validate.fail("window", "0 for none, or a number of positions", window)
    return scale, softcap, window


def _sinks(sinks, q) -> torch.Tensor | None:
    if sinks is None:
        return None
    validate.tensor("sinks", sinks)
    if sinks.shape != q.shape[1:2]:
        validate.fail("sinks", f"shape ({q.shape[1]},) for the heads of q", validate.shape(sinks))
    validate.same_device("sinks", sinks, "q", q)
    return sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()
