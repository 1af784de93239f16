"""Decode steps as CUDA graphs, one for each bucket of rows and pages, with a shared prefix or without.

A forward of one token a sequence launches some hundred kernels and runs the model's Python for each of them; replayed
from a graph it does neither. A graph has fixed sizes, so a step is padded to the next bucket: rows that are nobody's
write into a page of their own and attend to that one position.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from rlfast.rollout.attention import Paged

LARGEST = 256  # rows; a larger step is as well launched, for it is bound by arithmetic


def bucket(n: int) -> int:
    """The next power of two, or the middle between two: at most a third of the rows are padding."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power


class Inputs(NamedTuple):
    """What a decode step reads, in tensors that stay where they are."""

    ids: torch.Tensor  # int64 [B]
    positions: torch.Tensor  # int64 [B]
    slots: torch.Tensor  # int64 [B]
    block_table: torch.Tensor  # int32 [B, most]
    kv_lens: torch.Tensor  # int32 [B]


def capture(run):
    """(replay, output) of a function that launches kernels on static tensors, warmed up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # the first compiles and tunes
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


class Graphs:
    """The graphs of a decoder.

    Args:
        decoder: whose body is captured.
        caches: its keys and values; the last of its pages is the padding's.
        other: another library's attention.
    """

    def __init__(self, decoder, caches, other=None):
        self.decoder, self.caches, self.other, self.places = decoder, caches, other, None
        self.captured: dict[tuple[int, int, bool], tuple] = {}

    def run(self, given: Inputs, shared_prefix: bool) -> torch.Tensor | None:
        """Hidden states [n, D] of one token a sequence; None if there are too many rows for a graph."""
        n, most = given.block_table.shape
        if n > LARGEST:
            return None
        places = self.decoder.places()
        if places != self.places:  # a graph reads the memory, and runs the adapters, of when it was captured
            self.captured.clear()
            self.places = places
        key = bucket(n), bucket(most), shared_prefix
        if key not in self.captured:
            static = self._blank(*key[:2])
            self._fill(static, given)
            replay, out = capture(lambda: self._forward(static, shared_prefix))
            self.captured[key] = static, replay, out
        static, replay, out = self.captured[key]
        self._fill(static, given)
        replay()
        return out[:n]

    def _blank(self, rows: int, most: int) -> Inputs:
        device, size = self.decoder.device, self.caches.size
        spare = self.caches.pages - 1
        return Inputs(
            torch.zeros(rows, dtype=torch.int64, device=device), torch.zeros(rows, dtype=torch.int64, device=device),
            torch.full((rows,), spare * size, device=device),
            torch.full((rows, most), spare, dtype=torch.int32, device=device),
            torch.ones(rows, dtype=torch.int32, device=device),
        )  # fmt: skip

    def _fill(self, static: Inputs, given: Inputs) -> None:
        """A step into the static tensors; rows beyond it are padding again."""
        blank = self._blank(static.ids.shape[0], static.block_table.shape[1])
        for to, empty, x in zip(static, blank, given, strict=True):
            to.copy_(empty)
            to[tuple(slice(0, n) for n in x.shape)] = x

    def _forward(self, static: Inputs, shared_prefix: bool) -> torch.Tensor:
        rows = static.ids.shape[0]
        cu_q = torch.arange(rows + 1, dtype=torch.int32, device=self.decoder.device)
        how = Paged(self.caches, static.slots, static.block_table, cu_q, static.kv_lens, 1, shared_prefix, self.other)
        with self.decoder.installed():
            return self.decoder.forward(static.ids, static.positions, how)
