"""flash-attn 2.8, flash-attn-4 and flashinfer in plain torch: their signatures, their checks, and what they compute.

Signatures as in flash_attn/flash_attn_interface.py, flash_attn/cute/interface.py, flashinfer/decode.py and prefill.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

CALLS = []  # names of the functions that were called


def _attend(q, keys, values, scale, left, softcap, sink=None):
    """q [n, H, D], the last of keys [m, Hkv, ·]: bottom-right causal; left < 0: no window."""
    n, m = q.shape[0], keys.shape[0]
    group = q.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
    hidden = (distance < 0) | ((distance > left) if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink is not None:
        scores = torch.cat((scores, sink.float()[:, None, None].expand(-1, n, 1)), -1)
    p = torch.softmax(scores, -1)[..., :m]
    return torch.einsum("hnm,mhd->nhd", p, values).to(q.dtype)


def _gathered(cache, table_row, length):
    at = torch.arange(length)
    return cache[table_row[at // cache.shape[1]].long(), at % cache.shape[1]]


def _packed(q, k, v, cu_q, lens, table, scale, left, softcap, sink=None):
    out = []
    for s, n in enumerate(lens.tolist()):
        part = q[cu_q[s] : cu_q[s + 1]]
        out.append(_attend(part, _gathered(k, table[s], n), _gathered(v, table[s], n), scale, left, softcap, sink))
    return torch.cat(out)


def _half(*tensors):
    assert len({x.dtype for x in tensors}) == 1, "inputs must have the same dtype"
    assert tensors[0].dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
    assert all(x.stride(-1) == 1 for x in tensors)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """flash-attn 2.8."""
    CALLS.append("flash_attn_varlen_func")
    _half(q, k, v)
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert q.shape[-1] == v.shape[-1] and causal and softmax_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q and int(cu_seqlens_k.diff().max()) <= max_seqlen_k
    assert window_size[1] == (0 if window_size[0] >= 0 else -1)
    return _packed(q, k, v, cu_seqlens_q, cu_seqlens_k.diff(), block_table, softmax_scale, window_size[0], softcap)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """flash-attn 2.8."""
    CALLS.append("flash_attn_with_kvcache")
    _half(q, k_cache, v_cache)
    assert k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    assert q.dim() == 4 and q.shape[1] == 1 and cache_seqlens.dtype == block_table.dtype == torch.int32
    cu = torch.arange(q.shape[0] + 1)
    found = _packed(
        q[:, 0], k_cache, v_cache, cu, cache_seqlens, block_table, softmax_scale, window_size[0], softcap
    )  # fmt: skip
    return found.unsqueeze(1)


def cute_flash_attn_varlen_func(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
    seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, cu_total_m_blocks=None, cu_total_n_blocks=None, aux_tensors=None, return_lse=False,
):  # fmt: skip
    """flash-attn-4."""
    CALLS.append("flash-attn-4")
    _half(q, k, v)
    assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
    assert seqused_k.dtype == page_table.dtype == cu_seqlens_q.dtype == torch.int32 and causal
    assert learnable_sink is None or learnable_sink.dtype == torch.bfloat16, "learnable_sink must be bfloat16"
    left = -1 if window_size[0] is None else window_size[0]
    return (
        _packed(q, k, v, cu_seqlens_q, seqused_k, page_table, softmax_scale, left, softcap, learnable_sink),
        None,
    )


class _Wrapper:
    def __init__(self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, **_):
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        self.planned = None

    def _hold(self, indptr, indices, last_page_len, page_size, words):
        CALLS.append("plan")
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        counts = indptr.diff().tolist()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for s, (a, n) in enumerate(zip(indptr.tolist(), counts, strict=False)):
            table[s, :n] = indices[a : a + n]
        assert int(last_page_len.min()) >= 1
        self.planned = table, (indptr.diff() - 1) * page_size + last_page_len, words

    def run(self, q, paged_kv_cache):
        CALLS.append(type(self).__name__)
        table, lens, words = self.planned
        k, v = paged_kv_cache
        _half(q, k, v)
        assert q.dtype == words["q_data_type"] and q.shape[1:] == words["shape"]
        soft, cu = words["logits_soft_cap"] or 0.0, words["cu_q"]
        return _packed(q, k, v, cu, lens, table, words["sm_scale"], words["window_left"], soft)


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """flashinfer."""

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
        head_dim_qk, page_size, head_dim_vo=None, custom_mask=None, packed_custom_mask=None, causal=False,
        pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None, window_left=-1, logits_soft_cap=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert causal and qo_indptr.dtype == torch.int32
        words = {"q_data_type": q_data_type, "shape": (num_qo_heads, head_dim_qk), "logits_soft_cap": logits_soft_cap}
        words |= {"sm_scale": sm_scale, "window_left": window_left, "cu_q": qo_indptr}
        self._hold(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, words)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """flashinfer: what follows page_size is given by name."""

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
        sm_scale=None,
    ):  # fmt: skip
        words = {"q_data_type": q_data_type, "shape": (num_qo_heads, head_dim), "logits_soft_cap": logits_soft_cap}
        words |= {"sm_scale": sm_scale, "window_left": window_left, "cu_q": torch.arange(len(last_page_len) + 1)}
        self._hold(indptr, indices, last_page_len, page_size, words)


LIBRARIES = {
    "flash-attn": SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    ),
    "flash-attn-4": SimpleNamespace(flash_attn_varlen_func=cute_flash_attn_varlen_func),
    "flashinfer": SimpleNamespace(
        BatchPrefillWithPagedKVCacheWrapper=BatchPrefillWithPagedKVCacheWrapper,
        BatchDecodeWithPagedKVCacheWrapper=BatchDecodeWithPagedKVCacheWrapper,
    ),
}
