"""linear: the layers of a decode step, which read every weight for a few rows, and of a training forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

import rlfast
from bench import arms, gemms
from bench.baselines import linear as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import generator, normal

# (columns, depth) of SmolLM2-135M: q, k, v, o, gate, up, down of a layer, 30 layers; and its head.
LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
LAYERS, HEAD, WIDTH, INNER = 30, 49152, 576, 1536
OUTPUTS = ("q", "k", "v", "o", "gate", "up", "down")
MANY = 64  # rows, from which on arithmetic counts, not the weights' bytes


@dataclass(frozen=True, kw_only=True)
class Layers(Case):
    """The linear layers of a model one after the other, each on the same rows; or its head of so many columns."""

    op: str = "linear"
    rows: int
    layers: int = 0
    head: int = 0

    NAMES: ClassVar = {"rlfast wide": "logits in float32"}

    def small(self) -> Layers:
        return replace(self, layers=min(self.layers, 1), head=min(self.head, 4099), budget_s=0.2)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(columns, depth) of each weight, in their order."""
        return [(self.head, WIDTH)] if self.head else list(LAYER) * self.layers

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Every weight in one storage, so that the ceiling reads what the layers read."""
        draw, dtype = generator(device), DTYPES[self.dtype]
        weights = normal(draw, self.elements // WIDTH, WIDTH, dtype=dtype, scale=WIDTH**-0.5).view(-1)
        return {
            "weights": weights,
            "x": normal(draw, self.rows, WIDTH, dtype=dtype),
            "inner": normal(draw, self.rows, INNER, dtype=dtype),
        }

    @property
    def elements(self) -> int:
        return sum(columns * depth for columns, depth in self.shapes)

    def _calls(self, data: dict) -> list[tuple]:
        """(rows, weight) of each layer."""
        parts = data["weights"].split([columns * depth for columns, depth in self.shapes])
        of_depth = {WIDTH: data["x"], INNER: data["inner"]}
        shaped = zip(self.shapes, parts, strict=True)
        return [(of_depth[depth], part.view(columns, depth)) for (columns, depth), part in shaped]

    def _arm(self, function, data: dict):
        """All of them; the last layer's outputs are what is checked."""
        calls, names = self._calls(data), self._names

        def run():
            with torch.no_grad():
                found = [function(x, weight) for x, weight in calls]
            return dict(zip(names, found[-len(names) :], strict=True))

        return run

    @property
    def _names(self) -> tuple[str, ...]:
        return ("logits",) if self.head else OUTPUTS

    def ours(self, data: dict) -> dict:
        found = {"rlfast": rlfast.linear}
        if self.head and self.dtype != "float32":
            found["rlfast wide"] = partial(rlfast.linear, wide=True)
        return {name: self._arm(f, data) for name, f in found.items()}

    def plain(self, data: dict) -> dict:
        found = {"eager": baselines.eager, "compile": torch.compile(baselines.eager, dynamic=False)}
        if self.rows < MANY:
            found["plain weight first"] = baselines.weight_first
            found["plain padded"] = baselines.padded
            found["plain row by row"] = baselines.one_by_one
        if self.dtype == "float32" and gemms.onednn_works():
            found["plain oneDNN"] = gemms.onednn
        return {name: self._arm(f, data) for name, f in found.items()}

    def truth(self, data: dict) -> dict:
        names = self._names
        last = self._calls(data)[-len(names) :]
        return {name: (None, x.double() @ w.double().T) for name, (x, w) in zip(names, last, strict=True)}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(data["weights"]) if self.rows < MANY else {}

    def traffic(self, arm: str) -> int:
        """The weights, once; a copy moves each byte twice."""
        once = self.elements * DTYPES[self.dtype].itemsize if self.rows < MANY else 0
        return 2 * once if arm == "copy" else once

    def flops(self, arm: str) -> int:
        return 2 * self.rows * self.elements if self.rows >= MANY else 0


def _decode(rows: int, dtype: str) -> Layers:
    targets = (Target("rlfast", "read", 0.7 if dtype == "float32" else 0.5), Target("rlfast", "plain", 1.2))
    name = f"linear decode step of {LAYERS} layers, {rows} rows {dtype}"
    return Layers(name=name, rows=rows, layers=LAYERS, dtype=dtype, targets=targets, budget_s=15.0, isas=rows == 4)


def _head(rows: int, dtype: str) -> Layers:
    targets = (Target("rlfast", "read", 0.7 if dtype == "float32" else 0.5), Target("rlfast", "plain", 1.2))
    name = f"linear head of {HEAD} columns, {rows} rows {dtype}"
    return Layers(name=name, rows=rows, head=HEAD, dtype=dtype, targets=targets, budget_s=8.0, isas=False)


def _training(rows: int, dtype: str) -> Layers:
    """Here torch's GEMM is at its best, and the same bits as in decoding cost this much."""
    targets = (Target("rlfast", "eager", 1.3, "cost"),)
    name = f"linear training forward of one layer, {rows} rows {dtype}"
    return Layers(name=name, rows=rows, layers=1, dtype=dtype, targets=targets, budget_s=10.0, isas=False)


CASES = (
    *(_decode(rows, dtype) for dtype in DTYPES for rows in (1, 4, 16)),
    *(_head(rows, dtype) for dtype in DTYPES for rows in (1, 4, 16)),
    *(_training(2048, dtype) for dtype in DTYPES),
)
