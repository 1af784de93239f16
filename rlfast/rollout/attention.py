"""rlfast's attention as transformers calls it: over the engine's pages, and, with gradient, within a training batch.

transformers looks an attention function up by ``config._attn_implementation`` on every call. Two names are ours:

    rlfast_rollout   keys and values go to pages, or stay within packed sequences; no mask is built
    rlfast           for a training forward, padded or packed: the same arithmetic with gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from rlfast import backends, validate
from rlfast.attention import packed_attention
from rlfast.ops import paged_attention as paged_op
from rlfast.rollout.kv import Caches

ROLLOUT, TRAINING = "rlfast_rollout", "rlfast"
_active: ContextVar[Packed | Paged | None] = ContextVar("rlfast_rollout_pass", default=None)


@dataclass
class Packed:
    """Sequences one after the other, each attending to itself."""

    cu_seqlens: torch.Tensor  # int32 [S + 1]
    calls: int = 0
    bytes_of_token: int = 0  # keys and values of a position, of all layers

    def attend(self, layer: int, q, k, v, options: dict):
        self.calls += 1
        self.bytes_of_token += sum(x[0].numel() * x.element_size() for x in (k, v))
        return packed_attention(q, k, v, self.cu_seqlens, **options)


@dataclass
class Paged:
    """New tokens of sequences whose earlier keys and values are in pages."""

    caches: Caches
    slots: torch.Tensor  # int64 [T]: where the new ones go
    block_table: torch.Tensor  # int32 [S, most]
    cu_q: torch.Tensor  # int32 [S + 1]
    kv_lens: torch.Tensor  # int32 [S]
    most_new: int  # the most new tokens that a sequence has
    other: Callable | None = None  # another library's attention (rlfast/rollout/flash.py)

    def attend(self, layer: int, q, k, v, options: dict):
        """The op itself: the engine's own tables need no check in every layer."""
        keys, values = self.caches.write(layer, k, v, self.slots)
        given = (q, keys, values, self.block_table, self.cu_q, self.kv_lens, options["sinks"], options["scale"],
                 options["softcap"], options["window"])  # fmt: skip
        if self.other is not None:
            return self.other(*given, self.most_new)
        return paged_op.call(*given, backends.requested())


@contextlib.contextmanager
def running(how: Packed | Paged):
    """Within it, a forward under ``ROLLOUT`` attends so."""
    token = _active.set(how)
    try:
        yield how
    finally:
        _active.reset(token)


def _options(scaling, sliding_window, softcap, s_aux, dropout: float) -> dict:
    if dropout:
        validate.fail("attention_dropout", "0: rlfast's attention has none", repr(dropout))
    sinks = s_aux if s_aux is None else s_aux.float()
    return {"scale": scaling, "softcap": softcap or 0.0, "window": sliding_window or 0, "sinks": sinks}


def _tokens(x):
    """[1, H, T, D] as [T, H, D]."""
    return x[0].transpose(0, 1)


def rollout_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, **_,
):  # fmt: skip
    """What transformers calls under ``ROLLOUT``: packed tokens, batch 1."""
    how = _active.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = _options(scaling, sliding_window, softcap, s_aux, dropout)
    return how.attend(module.layer_idx, _tokens(query), _tokens(key), _tokens(value), options).unsqueeze(0), None


def training_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, cu_seq_lens_q=None, position_ids=None, **_,
):  # fmt: skip
    """What transformers calls under ``TRAINING``: rows padded left or right under a mask [B, T], or packed ones."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = _options(scaling, sliding_window, softcap, s_aux, dropout)
    batch, _, length, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B·T, H, D]
    keep = None if attention_mask is None or attention_mask.all() else attention_mask.reshape(-1).nonzero().squeeze(1)
    ends = _boundaries(attention_mask, cu_seq_lens_q, position_ids, batch, length, query.device)
    if keep is None:
        out = packed_attention(q, k, v, ends, **options)
    else:
        some = packed_attention(*(x.index_select(0, keep) for x in (q, k, v)), ends, **options)
        out = some.new_zeros(batch * length, *some.shape[1:]).index_copy(0, keep, some)
    return out.unflatten(0, (batch, length)), None


def _boundaries(mask, cu_seqlens, position_ids, batch: int, length: int, device):
    """Where the sequences of a training batch begin and end, int32."""
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int32)
    if mask is not None:
        ends = mask.sum(1).cumsum(0)
    elif batch == 1 and position_ids is not None and position_ids.shape[-1] == length:
        starts = (position_ids.reshape(-1) == 0).nonzero().squeeze(1)
        if starts.numel() > 1:
            return torch.cat((starts, starts.new_tensor([length]))).to(torch.int32)
        ends = torch.tensor([length], device=device)
    else:
        ends = torch.arange(1, batch + 1, device=device) * length
    return torch.cat((ends.new_zeros(1), ends)).to(torch.int32)


def padding_mask(*_, attention_mask=None, **__):
    """The mask that ``training_attention`` wants: the batch's own, [B, T] bool, or None."""
    return attention_mask


def register() -> None:
    """Both names, with transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ROLLOUT, rollout_attention)
    AttentionInterface.register(TRAINING, training_attention)
    AttentionMaskInterface.register(TRAINING, padding_mask)


@contextlib.contextmanager
def implementation(configs, name: str):
    """Within it, models of these configs attend by ``name``."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation = old
