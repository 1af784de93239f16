"""Attention by its definition: a query at a time, over the keys that it sees and no others."""

import torch


def attend(q, k, v, *, scale, softcap=0.0, sinks=None):
    """Σ_j p_j·v_j of one query [H, D] over keys [m, Hkv, D] and values [m, Hkv, Dv], p = softmax of the scores.

    Head h reads key head h // (H / Hkv). A sink is one more score of its head, whose probability goes to no value.
    """
    group = q.shape[0] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # [H, m, ·]
    scores = scale * (k @ q.unsqueeze(-1)).squeeze(-1)  # [H, m]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).unsqueeze(-1)), -1)
    p = torch.softmax(scores, -1)[:, : k.shape[1]]
    return (p.unsqueeze(1) @ v).squeeze(1)


def seen_from(position, window):
    """The first position that a query sees; the last is its own."""
    return max(0, position - window + 1) if window else 0


def paged_attention(
    q, k_cache, v_cache, block_table, cu_q, kv_lens, sinks=None, *, scale, softcap=0.0, window=0, dtype=None
):
    """[T, H, Dv]: the new tokens of sequence s are its last cu_q[s+1] − cu_q[s] positions of kv_lens[s]."""
    dtype = dtype or q.dtype
    size, out = k_cache.shape[1], []
    for s, (begin, end) in enumerate(zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True)):
        for token in range(begin, end):
            last = int(kv_lens[s]) - (end - token)
            p = torch.arange(seen_from(last, window), last + 1, device=q.device)
            at = block_table[s, p // size].long(), p % size
            keys, values = k_cache[at].to(dtype), v_cache[at].to(dtype)
            out.append(attend(q[token].to(dtype), keys, values, scale=scale, softcap=softcap, sinks=sinks))
    return torch.stack(out) if out else q.new_zeros((0, q.shape[1], v_cache.shape[-1]), dtype=dtype)


def packed_attention(q, k, v, cu_seqlens, sinks=None, *, scale, softcap=0.0, window=0, dtype=None):
    """The same where q, k and v [T, ·, ·] hold whole sequences, one after the other."""
    dtype, out = dtype or q.dtype, []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for token in range(begin, end):
            seen = slice(begin + seen_from(token - begin, window), token + 1)
            keys, values = k[seen].to(dtype), v[seen].to(dtype)
            out.append(attend(q[token].to(dtype), keys, values, scale=scale, softcap=softcap, sinks=sinks))
    return torch.stack(out) if out else (q.sum() + k.sum() + v.sum()).to(dtype).expand(0, q.shape[1], v.shape[-1])
