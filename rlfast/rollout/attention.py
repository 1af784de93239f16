"""rlfast's attention as transformers calls it: over the engine's pages, and, with gradient, within a training batch.

transformers looks an attention function up by ``config._attn_implementation`` on every call. Two names are ours:

    rlfast_rollout   keys and values go to pages, or stay within packed sequences; no mask is built
    rlfast           for a training forward, padded or packed: the same arithmetic with gradient
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from rlfast import backends, validate
from rlfast.attention import packed_attention
from rlfast.ops import paged_attention as paged_op
from rlfast.rollout.kv import Caches

ROLLOUT, TRAINING = "rlfast_rollout", "rlfast"
_active: ContextVar[Packed | Paged | None] = ContextVar("rlfast_rollout_pass", default=None)


class Layer(NamedTuple):
    """What a layer asked for."""

    index: int
    dtype: torch.dtype
    widths: tuple[int, int]  # of keys and values
    window: int
    sinks: bool
    bytes_of_token: int  # keys and values of a position


@dataclass
class Packed:
    """Sequences one after the other, each attending to itself."""

    cu_seqlens: torch.Tensor  # int32 [S + 1]
    layers: list[Layer] = field(default_factory=list)

    def attend(self, layer: int, q, k, v, options: dict):
        size, widths = sum(x[0].numel() * x.element_size() for x in (k, v)), (k.shape[-1], v.shape[-1])
        self.layers.append(Layer(layer, q.dtype, widths, options["window"], options["sinks"] is not None, size))
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
    shared_prefix: bool  # whether neighbours begin with the same pages
    other: Callable | None = None  # another library's attention (rlfast/rollout/flash.py)

    def attend(self, layer: int, q, k, v, options: dict):
        """The op itself: the engine's own tables need no check in every layer."""
        keys, values = self.caches.write(layer, k, v, self.slots)
        given = (q, keys, values, self.block_table, self.cu_q, self.kv_lens, options["sinks"], options["scale"],
                 options["softcap"], options["window"])  # fmt: skip
        if self.other is not None:
            return self.other(*given, self.most_new)
        return paged_op.call(*given, self.shared_prefix, backends.requested())


def shares_prefix(tables: Sequence[Sequence[int]]) -> bool:
    """Whether any two neighbours begin with the same page."""
    return any(a[0] == b[0] for a, b in itertools.pairwise(tables))


class Layout(NamedTuple):
    """Of a training batch [B, T]."""

    keep: torch.Tensor | None  # int64: its real tokens among all B·T, in order; None: all are
    ends: torch.Tensor  # int32 [S + 1]: where sequences begin and end among the real ones


_last: ContextVar[tuple[list, list, Layout] | None] = ContextVar("rlfast_training_layout", default=None)


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


def _tokens(*tensors):
    """[B, H, T, D] as [B·T, H, D] each, cast by autocast as torch casts what its own attention is given."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind) and tensors[0].dtype != torch.float64:
        tensors = [x.to(torch.get_autocast_dtype(kind)) for x in tensors]
    return (x.transpose(1, 2).flatten(0, 1) for x in tensors)


def window_of(config, layer: int) -> int:
    """The window that a config gives a layer; 0: none, or one as wide as the context."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if not isinstance(window, int) or not getattr(config, "use_sliding_window", True):
        return 0
    if window >= (getattr(config, "max_position_embeddings", None) or window + 1):
        return 0
    return window if not kinds or kinds[layer] == "sliding_attention" else 0


def rollout_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, **_,
):  # fmt: skip
    """What transformers calls under ``ROLLOUT``: packed tokens, batch 1."""
    how = _active.get()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = _options(scaling, sliding_window, softcap, s_aux, dropout)
    return how.attend(module.layer_idx, *_tokens(query, key, value), options).unsqueeze(0), None


def training_attention(
    module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
    s_aux=None, cu_seq_lens_q=None, position_ids=None, **_,
):  # fmt: skip
    """What transformers calls under ``TRAINING``: rows padded left or right under a mask [B, T], or packed ones."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    options = _options(scaling, sliding_window, softcap, s_aux, dropout)
    batch, _, length, _ = query.shape
    if attention_mask is not None and attention_mask.dim() != 2:
        validate.fail("attention_mask", "shape (B, T), of what is no padding", validate.shape(attention_mask))
    unseen = 0 if sliding_window else window_of(module.config, module.layer_idx)
    if unseen:
        name = type(module).__name__
        validate.fail("sliding_window", f"the {unseen} positions that {name} leaves to its mask, which is none", "None")
    q, k, v = _tokens(query, key, value)
    given, first = (attention_mask, cu_seq_lens_q, position_ids), module.layer_idx == 0
    keep, ends = _layout(given, batch, length, query.device, first)
    if keep is None:
        out = packed_attention(q, k, v, ends, **options)
    else:
        some = packed_attention(*(x.index_select(0, keep) for x in (q, k, v)), ends, **options)
        out = some.new_zeros(batch * length, *some.shape[1:]).index_copy(0, keep, some)
    return out.unflatten(0, (batch, length)), None


def _layout(given: tuple, batch: int, length: int, device, first: bool) -> Layout:
    """``_found_layout`` of (mask, cu_seqlens, position_ids), which waits for a GPU: by the first layer, for all that
    are given the same tensors. It looks at every forward: numpy may have written where no version counts."""
    tensors = [x for x in given if x is not None]
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or any(x.is_inference() for x in tensors):
        return _found_layout(*given, batch, length, device)
    marks = [*((id(x), x._version) for x in tensors), batch, length, device]
    last = _last.get()
    if first or last is None or last[0] != marks:
        last = marks, tensors, _found_layout(*given, batch, length, device)  # tensors that live: no other has their ids
        _last.set(last)
    return last[2]


def _found_layout(mask, cu_seqlens, position_ids, batch: int, length: int, device) -> Layout:
    keep = None if mask is None or mask.all() else mask.reshape(-1).nonzero().squeeze(1)
    return Layout(keep, _ends(mask, cu_seqlens, position_ids, batch, length, device))


def _ends(mask, cu_seqlens, position_ids, batch: int, length: int, device) -> torch.Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.to(torch.int32)
    if mask is not None:
        ends = mask.sum(1).cumsum(0)
    elif position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == length:
        first = torch.ones(batch, 1, dtype=torch.bool, device=device)  # positions that do not count on begin another
        starts = torch.cat((first, (position_ids.diff() != 1).expand(batch, -1)), 1).reshape(-1).nonzero().squeeze(1)
        return torch.cat((starts, starts.new_tensor([batch * length]))).to(torch.int32)
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
