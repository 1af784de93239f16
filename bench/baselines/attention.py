"""Attention over a paged cache as plain PyTorch writes it, and the strongest that we could write."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def gathered(q, k_cache, v_cache, block_table):
    """One query a sequence, every sequence as long as its pages: gather the cache, then SDPA."""
    k, v = (cache[block_table.long()].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    return sdpa(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)


def products(q, k_cache, v_cache, block_table):
    """The same by two batched products in the cache's own layout: the heads of a group are rows of one."""
    sequences, heads, width = q.shape
    kv_heads = k_cache.shape[2]
    k, v = (cache[block_table.long()].flatten(1, 2).transpose(1, 2).flatten(0, 1) for cache in (k_cache, v_cache))
    q = q.reshape(sequences * kv_heads, heads // kv_heads, width)
    p = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * width**-0.5, -1, dtype=torch.float32)
    return torch.bmm(p.to(v.dtype), v).view(sequences, heads, -1)


def prefix_once(q, k_cache, v_cache, block_table, shared_pages, group):
    """Groups of sequences that share leading pages: those keys are read once a group, and the two parts merged."""
    sequences, heads, width = q.shape
    kv_heads, groups = k_cache.shape[2], sequences // group
    rows = heads // kv_heads

    def part(table, queries):  # [B, pages], [B, Hkv, n, D] → (log Σe^s, Σp·v)
        k, v = (cache[table.long()].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
        scores = queries @ k.transpose(2, 3) * width**-0.5
        lse = scores.logsumexp(-1, keepdim=True)
        return lse, (scores - lse).exp() @ v

    q = q.view(groups, group, kv_heads, rows, width)
    lse, found = part(block_table[::group, :shared_pages], q.transpose(1, 2).flatten(2, 3))
    lse, found = (x.unflatten(2, (group, rows)).transpose(1, 2).flatten(0, 1) for x in (lse, found))
    own_lse, own = part(block_table[:, shared_pages:], q.flatten(0, 1))
    weight = torch.sigmoid(lse - own_lse)
    return (weight * found + (1 - weight) * own).view(sequences, heads, -1)


def causal(q, k_cache, v_cache, block_table):
    """One prompt whose pages lie in their order, as the strongest of torch's own kernels takes it."""
    k, v = (cache.flatten(0, 1).transpose(0, 1).unsqueeze(0) for cache in (k_cache, v_cache))
    return sdpa(q.transpose(0, 1).unsqueeze(0), k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def causal_math(q, k_cache, v_cache, block_table):
    """The same by SDPA's math path, as a model without a fused kernel has it."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return causal(q, k_cache, v_cache, block_table)
