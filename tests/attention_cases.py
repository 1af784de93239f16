"""What the tests feed attention: sequences laid out in pages, and how a result is held to the oracle."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from unittest import mock

import torch

import rlfast
from rlfast.reference import paged_attention as oracle
from tests.cases import DTYPES
from tests.numerics import Orders, assert_gradient, assert_value, by_name


@dataclass(frozen=True)
class Case:
    """Sequences of ``lengths`` positions, the last ``new`` of each being queries."""

    lengths: tuple = (130, 7, 64)
    new: tuple = (1, 7, 3)
    heads: int = 4
    kv_heads: int = 2
    width: int = 32
    value_width: int = 32
    page_size: int = 16
    prefix: int = 0  # positions that all sequences share
    copied: bool = False  # each has a copy of the pages of the prefix
    dtype: str = "f32"
    sinks: bool = False
    options: tuple = ()  # (name, value) of softcap and window
    size: float = 1.0  # of q: scores grow with it
    seed: int = 0

    @property
    def words(self) -> dict:
        return {"scale": self.width**-0.5} | dict(self.options)

    def tokens(self) -> dict:
        """q [T, H, D] of the new tokens; k and v of every position of each sequence; sinks."""
        rng = torch.Generator().manual_seed(self.seed)

        def draw(*shape):
            return torch.randn(shape, generator=rng)

        kv = [(draw(n, self.kv_heads, self.width), draw(n, self.kv_heads, self.value_width)) for n in self.lengths]
        for k, v in kv[1:]:
            n = min(self.prefix, len(k), len(kv[0][0]))
            k[:n], v[:n] = kv[0][0][:n], kv[0][1][:n]
        q = [draw(n, self.heads, self.width) * self.size for n in self.lengths]
        sinks = draw(self.heads) * 2
        dtype = DTYPES.get(self.dtype, torch.float64)
        q = [x[n - new :] for x, n, new in zip(q, self.lengths, self.new, strict=True)]
        return {
            "q": torch.cat([*q, torch.empty(0, self.heads, self.width)]).to(dtype),
            "kv": [(k.to(dtype), v.to(dtype)) for k, v in kv],
            "sinks": sinks if self.sinks else None,
        }


def starts(counts) -> torch.Tensor:
    """int32 [n + 1]: where each begins, and the end."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32)


def laid(case: Case, garbage: float = float("nan")) -> dict:
    """The arguments of ``paged_attention``: pages in random order, garbage in every slot that holds no position."""
    given, size = case.tokens(), case.page_size
    shared = 0 if case.copied else case.prefix // size
    counts = [-(-n // size) for n in case.lengths]
    own = sum(max(0, n - shared) for n in counts) + shared + 3
    order = torch.randperm(own, generator=torch.Generator().manual_seed(case.seed + 1)).tolist()
    common, rest = order[:shared], order[shared:]
    dtype = given["q"].dtype
    caches = [torch.full((own, size, case.kv_heads, w), garbage, dtype=dtype) for w in (case.width, case.value_width)]
    table = torch.full((len(counts), max([*counts, 1])), -7, dtype=torch.int32)
    for s, ((k, v), n) in enumerate(zip(given["kv"], counts, strict=True)):
        pages = [*common[:n], *(rest.pop() for _ in range(max(0, n - shared)))]
        table[s, :n] = torch.tensor(pages, dtype=torch.int32)
        p = torch.arange(len(k))
        at = table[s, p // size].long(), p % size
        caches[0][at], caches[1][at] = k, v
    lens = torch.tensor(case.lengths, dtype=torch.int32)
    return {
        "q": given["q"], "k_cache": caches[0], "v_cache": caches[1], "block_table": table, "cu_q": starts(case.new),
        "kv_lens": lens, "sinks": given["sinks"],
    }  # fmt: skip


def on(x: dict, device: str) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in x.items()}


def run(case: Case, backend: str, device: str, arguments: dict | None = None) -> torch.Tensor:
    """The public function."""
    with rlfast.use_backend(backend), torch.no_grad():
        return rlfast.paged_attention(**on(arguments or laid(case), device), **case.words).cpu()


@contextlib.contextmanager
def shuffled(seed: int):
    """Within it, the oracle's sums over keys go in another order."""
    attend = oracle.attend

    def other(q, k, v, **words):
        order = torch.randperm(len(k), generator=torch.Generator().manual_seed(seed)).to(k.device)
        return attend(q, k[order], v[order], **words)

    with mock.patch.object(oracle, "attend", other):
        yield


def of_oracle(case: Case, arguments: dict, dtype: torch.dtype) -> torch.Tensor:
    return oracle.paged_attention(**arguments, **case.words, dtype=dtype)


def turned(x: dict, names: tuple, seed: int) -> dict:
    """The same scores by another order of their sums: the width shuffled."""
    order = torch.randperm(x["q"].shape[-1], generator=torch.Generator().manual_seed(seed))
    return x | {name: x[name][..., order] for name in names}


def solution(case: Case, arguments: dict) -> tuple:
    """(float64 by the oracle, PyTorch in float32 by several orders of the sums)."""

    @functools.cache
    def make(seed: int):
        if not seed:
            return of_oracle(case, arguments, torch.float32)
        with shuffled(seed):
            return of_oracle(case, turned(arguments, ("q", "k_cache"), seed), torch.float32)

    return of_oracle(case, arguments, torch.float64), Orders(make)


@functools.cache
def solved(case: Case) -> tuple:
    """The same of a case as it is laid out, once for all backends."""
    return solution(case, laid(case))


def check(case: Case, backend: str, device: str, arguments: dict | None = None) -> torch.Tensor:
    """One call against the oracle in float64."""
    truth, own = solved(case) if arguments is None else solution(case, arguments)
    got = run(case, backend, device, arguments)
    assert got.dtype == DTYPES.get(case.dtype, torch.float64) and got.is_contiguous()
    assert_value(str(case), got, truth, own)
    return got


def whole(case: Case) -> Case:
    """The same sequences, all positions of which are queries."""
    return replace(case, new=case.lengths)


def packed(case: Case) -> dict:
    """The arguments of ``packed_attention``."""
    given = whole(case).tokens()
    none = (torch.empty(0, case.kv_heads, w, dtype=given["q"].dtype) for w in (case.width, case.value_width))
    k, v = (torch.cat([nothing, *(pair[i] for pair in given["kv"])]) for i, nothing in enumerate(none))
    return {"q": given["q"], "k": k, "v": v, "cu_seqlens": starts(case.lengths), "sinks": given["sinks"]}


def learned(arguments: dict, dtype=None, device: str = "cpu") -> dict:
    """The arguments with q, k, v and sinks as leaves."""
    names = ("q", "k", "v", "sinks")
    return {
        k: x.detach().to(device, dtype or x.dtype).requires_grad_() if k in names and x is not None else x
        for k, x in on(arguments, device).items()
    }


def gradients(function, arguments: dict, upstream: torch.Tensor) -> dict:
    leaves = {k: x for k, x in arguments.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    out = function(**arguments)
    found = torch.autograd.grad(out, list(leaves.values()), upstream.to(out))
    return dict(zip(leaves, found, strict=True)) | {"out": out.detach()}


@functools.cache
def solved_gradients(case: Case) -> tuple:
    """(upstream, truth, yardsticks) of forward and backward, by the oracle and autograd."""
    arguments = packed(case)
    shape = (*arguments["q"].shape[:2], case.value_width)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(arguments["q"].dtype)

    def reference(x, dtype):
        return gradients(
            lambda **given: oracle.packed_attention(**given, **case.words, dtype=dtype), learned(x, dtype), upstream
        )

    def make(seed: int):
        if not seed:
            return {}, reference(arguments, torch.float32)
        with shuffled(seed):
            found = reference(turned(arguments, ("q", "k"), seed), torch.float32)
        order = torch.randperm(case.width, generator=torch.Generator().manual_seed(seed)).argsort()
        return {}, found | {name: found[name][..., order] for name in ("q", "k")}

    return upstream, reference(arguments, torch.float64), by_name(make)[1]


def check_gradients(case: Case, backend: str, device: str) -> None:
    """Forward and backward of ``packed_attention`` against the oracle's."""
    upstream, truth, own = solved_gradients(case)
    with rlfast.use_backend(backend):
        call = learned(packed(case), device=device)
        got = gradients(lambda **given: rlfast.packed_attention(**given, **case.words), call, upstream.to(device))
    for name, x in got.items():
        hold = assert_value if name == "out" else assert_gradient
        hold(f"{name} of {case}", x.cpu(), truth[name], own[name])
