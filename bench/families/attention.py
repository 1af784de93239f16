"""paged_attention: decode steps, groups that share a prefix, prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from bench import arms
from bench.baselines import attention as baselines
from bench.case import DTYPES, Case, Target
from bench.draws import even, generator, normal
from rlfast import backends
from rlfast.ops import paged_attention as paged_op
from rlfast.reference.paged_attention import attend

PAGE = 16


@dataclass(frozen=True, kw_only=True)
class Attention(Case):
    """Reads the cache once, a shared prefix once a group; a prompt is arithmetic."""

    op: str = "paged_attention"
    sequences: int
    keys: int
    new: int = 1  # of each sequence
    group: int = 1  # sequences that share the first ``prefix`` keys
    prefix: int = 0
    heads: int = 9
    kv_heads: int = 3
    width: int = 64

    NAMES: ClassVar = {
        "eager": "gather, then SDPA", "plain products": "two batched products", "plain causal": "SDPA's flash path",
        "plain prefix": "torch, the prefix once a group",
    }  # fmt: skip

    def small(self) -> Attention:
        keys = min(self.keys, 4 * PAGE)
        return replace(self, keys=keys, new=min(self.new, keys), prefix=min(self.prefix, keys // 2), budget_s=0.2)

    @property
    def pages(self) -> int:
        return self.keys // PAGE

    def inputs(self, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Pages in random order for decode steps; a prompt's in theirs."""
        draw, dtype = generator(device), DTYPES[self.dtype]
        shape = (self.sequences * self.pages, PAGE, self.kv_heads, self.width)
        order = torch.arange(shape[0], device=device)
        if self.new == 1:
            order = torch.randperm(shape[0], generator=draw, device=device)
        table = order.view(self.sequences // self.group, self.group, self.pages).to(torch.int32)
        shared = self.prefix // PAGE
        table[:, :, :shared] = table[:, :1, :shared].clone()
        ends = torch.arange(self.sequences + 1, device=device, dtype=torch.int32) * self.new
        return {
            "q": normal(draw, self.sequences * self.new, self.heads, self.width, dtype=dtype),
            "k_cache": normal(draw, *shape, dtype=dtype),
            "v_cache": normal(draw, *shape, dtype=dtype),
            "block_table": table.view(self.sequences, self.pages),
            "cu_q": ends,
            "kv_lens": torch.full((self.sequences,), self.keys, dtype=torch.int32, device=device),
        }

    def ours(self, data: dict) -> dict:
        def run(*tensors):
            return paged_op.call(*tensors, None, self.width**-0.5, 0.0, 0, self.prefix > 0, backends.requested())

        return {"rlfast": arms.arm(run, data, (), ("out",))}

    def plain(self, data: dict) -> dict:
        tensors = {name: data[name] for name in ("q", "k_cache", "v_cache")}
        make = partial(arms.arm, leaves=tensors, rest=(data["block_table"],), outputs=("out",))
        if self.new > 1:
            found = {"eager": baselines.causal_math, "compile": torch.compile(baselines.causal, dynamic=False)}
            return {name: make(f) for name, f in (found | {"plain causal": baselines.causal}).items()}
        found = {"eager": baselines.gathered, "compile": torch.compile(baselines.gathered, dynamic=False)}
        found["plain products"] = baselines.products
        if self.group > 1:
            once = partial(baselines.prefix_once, shared_pages=self.prefix // PAGE, group=self.group)
            found |= {"plain prefix": once}
        return {name: make(f) for name, f in found.items()}

    def truth(self, data: dict) -> dict:
        rows = even(data["q"].shape[0], 16).to(data["q"].device)
        found = []
        for row in rows.tolist():
            s, last = row // self.new, self.keys - self.new + row % self.new
            p = torch.arange(last + 1, device=rows.device)
            at = data["block_table"][s, p // PAGE].long(), p % PAGE
            keys = (data[name][at].double() for name in ("k_cache", "v_cache"))
            found.append(attend(data["q"][row].double(), *keys, scale=self.width**-0.5))
        return {"out": (rows, torch.stack(found))}

    def ceilings(self, data: dict, device: str) -> dict:
        return arms.bandwidth(torch.ones(max(self.traffic("read") // 4, 1), device=device)) if self.new == 1 else {}

    def traffic(self, arm: str) -> int:
        """Keys and values of every page that is not another's; a copy moves each of those bytes twice."""
        if self.new > 1:
            return 0
        held = self.sequences * self.keys - (self.sequences - self.sequences // self.group) * self.prefix
        return (2 if arm == "copy" else 1) * 2 * held * self.kv_heads * self.width * DTYPES[self.dtype].itemsize

    def flops(self, arm: str) -> int:
        """Two products over what is seen."""
        if self.new == 1:
            return 0
        seen = self.sequences * (self.new * self.keys - self.new * (self.new - 1) // 2)
        return 4 * seen * self.heads * self.width


EAGER, PLAIN = Target("rlfast", "eager", 1.5), Target("rlfast", "plain", 1.2)
ON_GPU = (Target("rlfast", "compile", 1.0),)


def _case(name: str, dtype: str, *targets: Target, **shape) -> Attention:
    name = f"paged_attention {name} {dtype}"
    return Attention(name=name, dtype=dtype, targets=targets, gpu_targets=ON_GPU, budget_s=8.0, **shape)


CASES = (
    *(_case("decode, 16 sequences × 256 keys", d, EAGER, PLAIN, sequences=16, keys=256) for d in DTYPES),
    _case(
        "decode, 4 groups of 16 that share 256 of 320 keys", "float32", EAGER, PLAIN, sequences=64, keys=320, group=16,
        prefix=256,
    ),
    *(
        _case(f"prompt of {n}", d, Target("rlfast", "eager", 2.0), Target("rlfast", "plain", 0.8), sequences=1, keys=n,
              new=n, isas=n < 1000)
        for n in (256, 2048)
        for d in DTYPES
    ),
)  # fmt: skip
