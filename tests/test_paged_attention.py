"""Attention on every backend: values by the definition, and bits that depend on nothing but what a query sees."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.ops import packed_attention as packed_op
from rlfast.ops import paged_attention as paged_op
from tests import shared
from tests.attention_cases import (
    Case,
    check,
    check_gradients,
    laid,
    learned,
    on,
    packed,
    run,
    solved,
    starts,
    whole,
)
from tests.cases import few
from tests.numerics import assert_same_bits

OP = "paged_attention"
INVARIANT = pytest.mark.backends("cpu", "triton")
DECODE = Case((300, 1, 64, 65, 129), (1, 1, 1, 1, 1), heads=9, kv_heads=3)
PREFILL = Case((few(200, 70), 33), (few(200, 70), 33))
CHUNK = Case((few(260, 150), 70, 5), (few(100, 20), 1, 0), heads=6, kv_heads=2)
OPTIONS = {
    "plain": {},
    "softcap": {"options": (("softcap", 5.0),), "size": 4.0},
    "window": {"options": (("window", 37),)},
    "sinks": {"sinks": True},
    "all": {"options": (("softcap", 20.0), ("window", 70)), "sinks": True, "size": 3.0},
}
SOME = list(OPTIONS)[:: few(1, 4)]  # plain and all under the interpreter
SHAPES = {"decode": DECODE, "prefill": PREFILL, "chunk": CHUNK}


@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
def test_values(backend, device, shape, dtype, options):
    check(replace(SHAPES[shape], dtype=dtype, **OPTIONS[options]), backend, device)


@pytest.mark.backends("torch", "reference")
@pytest.mark.parametrize("options", OPTIONS)
def test_float64(backend, device, options):
    check(replace(CHUNK, dtype="f64", **OPTIONS[options]), backend, device)


WIDTHS = ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (33, 33), (1, 1), (48, 80), (192, 128), (16, 7))


@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("widths", WIDTHS[:: few(1, 2)], ids=str)
def test_widths(backend, device, widths, dtype):
    case = Case((70, 130), (few(70, 9), 1), width=widths[0], value_width=widths[1], dtype=dtype)
    check(case, backend, device)


@pytest.mark.parametrize("heads", ((1, 1), (9, 3), (8, 1), (4, 4), (few(200, 20), 1)), ids=str)
def test_heads(backend, device, heads):
    """A group may have more heads than a tile has rows."""
    check(
        Case((80, 66), (few(40, 20), 1), heads=heads[0], kv_heads=heads[1], width=16, value_width=16), backend, device
    )


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("dtype", ("f32", "bf16", "f16"))
@pytest.mark.backends("cpu")
def test_on_every_isa(backend, device, isa, dtype):
    with backends.use_isa(isa):
        for options in ("plain", "all"):
            for shape in SHAPES.values():
                check(replace(shape, dtype=dtype, width=33, value_width=21, **OPTIONS[options]), backend, device)
        check_same_bits(replace(SHARED, dtype=dtype), backend, device)


SHARED = Case((150, 141, 170), (2, 1, 9), heads=6, kv_heads=2, prefix=140)


def rows_of(case: Case, s: int) -> slice:
    begin = sum(case.new[:s])
    return slice(begin, begin + case.new[s])


def alone(case: Case, s: int) -> Case:
    """One sequence of a batch, at other pages."""
    return replace(case, lengths=case.lengths[s : s + 1], new=case.new[s : s + 1], prefix=0)


def arguments_of(case: Case, s: int) -> dict:
    """The call of sequence s alone, over the cache of all."""
    x = laid(case)
    one = {"block_table": x["block_table"][s : s + 1], "kv_lens": x["kv_lens"][s : s + 1]}
    return x | one | {"q": x["q"][rows_of(case, s)], "cu_q": starts(case.new[s : s + 1])}


def check_same_bits(case: Case, backend: str, device: str) -> None:
    """Pages of any size, copied or shared, a sequence alone or in a batch."""
    expected = run(case, backend, device)
    for size in (1, 16, 64):
        other = replace(case, page_size=size)
        assert_same_bits(f"pages of {size}", run(other, backend, device), expected)
        assert_same_bits("copied", run(replace(other, copied=True), backend, device), expected)
    for s in range(len(case.lengths)):
        found = run(case, backend, device, arguments_of(case, s))
        assert_same_bits(f"sequence {s} alone", found, expected[rows_of(case, s)])


@INVARIANT
@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_bits_do_not_depend_on_pages_sharing_or_batch(backend, device, dtype, options):
    check_same_bits(replace(SHARED, dtype=dtype, **OPTIONS[options]), backend, device)


@INVARIANT
@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_bits_do_not_depend_on_chunks(backend, device, dtype, options):
    """A prompt at once, in chunks of any size, token by token, and as packed sequences."""
    n = few(150, 80)
    case = Case((n,), (n,), heads=6, kv_heads=2, dtype=dtype, **OPTIONS[options])
    x, expected = laid(case), run(case, backend, device)
    for size in (1, 7, 50, 64):
        parts = []
        for begin in range(0, n, size):
            end = min(begin + size, n)
            if size == 1 and begin % 9:
                continue
            call = x | {"q": x["q"][begin:end], "cu_q": starts([end - begin])}
            parts.append(run(case, backend, device, call | {"kv_lens": torch.tensor([end], dtype=torch.int32)}))
        every = 9 if size == 1 else 1
        assert_same_bits(f"chunks of {size}", torch.cat(parts), expected[::every])
    with rlfast.use_backend(backend):
        found = rlfast.packed_attention(**on(packed(case), device), **case.words)
    assert_same_bits("packed", found.cpu(), expected)


def test_sequences_that_branch(backend, device):
    """Two share more than the third does, and are followed by one that shares nothing."""
    case = Case((300, 290, 280, 100), (2, 1, 3, 1), prefix=64)
    x = laid(case)
    x["block_table"][1, :16] = x["block_table"][0, :16]
    expected = check(case, backend, device, x)
    if backend in ("cpu", "triton"):
        x["block_table"] = x["block_table"][[2, 1, 3, 0]]
        order = [2, 1, 3, 0]
        moved = torch.cat([x["q"][rows_of(case, s)] for s in order])
        new = [case.new[s] for s in order]
        y = x | {"q": moved, "cu_q": starts(new), "kv_lens": x["kv_lens"][order]}
        rows = torch.cat([torch.arange(7)[rows_of(case, s)] for s in order])
        assert_same_bits("in another order", run(case, backend, device, y), expected[rows])


@INVARIANT
def test_bits_of_packed_sequences(backend, device):
    case = whole(replace(CHUNK, sinks=True))
    with rlfast.use_backend(backend):
        found = rlfast.packed_attention(**on(packed(case), device), **case.words)
    assert_same_bits("packed", found.cpu(), run(case, backend, device))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("shape", (*SHAPES, "shared"))
def test_bits_do_not_depend_on_threads(backend, device, threads, shape):
    shared.skip_unless_cores(2)
    case = replace(SHAPES.get(shape, SHARED), width=64, value_width=64)
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append(run(case, backend, device))
    assert_same_bits("2", found[1], found[0])
    assert_same_bits("3", found[2], found[0])


@pytest.mark.backends("triton")
@pytest.mark.parametrize("options", ("plain", "all"))
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
def test_bits_do_not_depend_on_parts(backend, device, monkeypatch, dtype, options):
    """The keys of a tile walked by one program, or shared out."""
    from rlfast.kernels import paged_attention as kernel

    case = Case((few(2000, 700), 90), (3, 1), dtype=dtype, **OPTIONS[options])
    found = []
    for busy in (1, 64):
        monkeypatch.setattr(kernel, "BUSY", busy)
        monkeypatch.setattr(kernel, "SPLITS_EACH", 2)
        found.append(run(case, backend, device))
    assert_same_bits("parts", found[1], found[0])


def test_parts_are_taken_where_programs_are_few():
    from rlfast.kernels import paged_attention as kernel

    assert kernel.parts_of(kernel.BUSY, 1000, 0) == 1 and kernel.parts_of(1, 15, 0) == 1
    assert kernel.parts_of(1, 64, 0) == 8 and kernel.parts_of(66, 1000, 0) == 4
    assert kernel.parts_of(1, 1000, kernel.SCRATCH_BYTES + 1) == 1


def test_garbage_has_no_effect(backend, device):
    """In slots behind the end, in pages of nobody, and with a window in the pages before it."""
    case = replace(CHUNK, options=(("window", 20),))
    x, y = laid(case), laid(case, garbage=1.0)
    for s, (n, new) in enumerate(zip(case.lengths, case.new, strict=True)):
        before = max(0, n - new - 19) // case.page_size
        x["block_table"][s, :before] = -123456
    assert bool((x["block_table"] < 0).sum() > (y["block_table"] < 0).sum())
    assert_same_bits("garbage", run(case, backend, device, x), run(case, backend, device, y))


@pytest.mark.parametrize("where", ("q", "k_cache", "v_cache"))
def test_a_nan_stays_in_its_sequence(backend, device, where):
    case = Case((70, 130, 80), (3, 2, 4))
    x, expected = laid(case), run(case, backend, device)
    if where == "q":
        x["q"][3, 0, 5] = torch.nan
    else:
        x[where][x["block_table"][1, 1].long(), 3] = torch.nan
    found = run(case, backend, device, x)
    assert bool(found[rows_of(case, 1)].isnan().any())
    for s in (0, 2):
        assert_same_bits(f"sequence {s}", found[rows_of(case, s)], expected[rows_of(case, s)])


@pytest.mark.parametrize("size", (1e3, 1e4))
def test_large_scores(backend, device, size):
    """One key takes all, others underflow."""
    check(replace(CHUNK, size=size), backend, device)
    check(replace(CHUNK, size=size, options=(("softcap", 50.0),), sinks=True), backend, device)


def test_a_sink_that_takes_all_or_nothing(backend, device):
    case = replace(CHUNK, sinks=True)
    for sink in (-1e4, -100.0, 60.0, 1e4):
        x = laid(case)
        x["sinks"] = torch.full_like(x["sinks"], sink)
        found = check(case, backend, device, x)
        assert bool(found.isfinite().all())


def test_equal_scores_give_the_mean(backend, device):
    case = replace(CHUNK, size=0.0)
    check(case, backend, device)
    values = case.tokens()["kv"][0][1][: case.lengths[0] - case.new[0] + 1]  # what the first query sees
    mean = values.double().mean(0).repeat_interleave(case.heads // case.kv_heads, 0)
    torch.testing.assert_close(solved(case)[0][0], mean)


def test_scores_of_minus_infinity(backend, device):
    """A split of such keys has no weight; a query that sees no other has no probability to give, unless to a sink."""
    case = Case((130,), (1,), heads=1, kv_heads=1, width=8, value_width=8)
    x = laid(case)
    x["q"] = x["q"].abs() + 0.1
    for count, sinks, finite in ((64, False, True), (130, False, False), (130, True, True)):
        y = x | {"k_cache": x["k_cache"].clone(), "sinks": torch.zeros(1) if sinks else None}
        p = torch.arange(count)
        y["k_cache"][y["block_table"][0, p // 16].long(), p % 16] = -torch.inf
        found = run(case, backend, device, y)
        assert bool(found.isfinite().all()) == finite, (count, sinks)
        if finite and not sinks:
            check(case, backend, device, y)


@pytest.mark.parametrize("new", ((0, 0), (0, 5), (5, 0)))
def test_sequences_without_new_tokens(backend, device, new):
    check(Case((40, 70), new), backend, device)


def test_no_sequences(backend, device):
    case = Case((), ())
    assert run(case, backend, device).shape == (0, 4, 32)
    with rlfast.use_backend(backend):
        leaves = learned(packed(case), device=device)
        out = rlfast.packed_attention(**leaves, **case.words)
        out.sum().backward()
    assert out.shape == (0, 4, 32) and leaves["q"].grad.shape == (0, 4, 32)


def test_strides(backend, device):
    """Heads before tokens, as models have them; caches side by side; a table that is a part of another."""
    case = Case((70, 40), (20, 1))
    x, expected = laid(case), run(case, backend, device)
    pair = torch.stack((x["k_cache"], x["v_cache"]), 2)
    strided = {
        "q": x["q"].transpose(0, 1).contiguous().transpose(0, 1),
        "k_cache": pair[:, :, 0],
        "v_cache": pair[:, :, 1],
        "block_table": torch.cat((x["block_table"], x["block_table"]), 1)[:, : x["block_table"].shape[1]],
    }
    assert not any(y.is_contiguous() for y in strided.values())
    assert_same_bits("strided", run(case, backend, device, x | strided), expected)


@pytest.mark.unpoisoned
@pytest.mark.backends("cpu", "torch")
def test_offsets_beyond_2_31(backend, device):
    """Two pages that lie 2³¹ elements apart; of the storage between them nothing is touched."""
    case = Case((20,), (3,), heads=2, kv_heads=1, width=16, value_width=16, dtype="bf16", page_size=16)
    x, expected = laid(case), run(case, backend, device)
    far = {}
    for name in ("k_cache", "v_cache"):
        storage = torch.empty(2**31 + 1024, dtype=torch.bfloat16)
        cache = storage.as_strided((2, 16, 1, 16), (2**31, 16, 16, 1))
        far[name] = cache.copy_(x[name][x["block_table"][0].long()])
    far["block_table"] = torch.tensor([[0, 1]], dtype=torch.int32)
    assert_same_bits("far", run(case, backend, device, x | far), expected)


@pytest.mark.unpoisoned
@pytest.mark.backends("cpu", "torch", "triton")
def test_heads_beyond_2_31(backend, device):
    """The third head of queries, keys and values lies 2³¹ elements behind the first."""
    case = Case((20,), (3,), heads=3, kv_heads=3, width=16, value_width=16, dtype="bf16")
    x, expected = laid(case), run(case, backend, device)
    far = {}
    for name, heads in (("q", 1), ("k_cache", 2), ("v_cache", 2)):
        strides = list(x[name].movedim(heads, 0).contiguous().movedim(0, heads).stride())
        strides[heads] = 2**30
        far[name] = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided(x[name].shape, strides).copy_(x[name])
    assert_same_bits("far", run(case, backend, device, x | far), expected)


GRADIENTS = {
    "plain": Case((few(90, 40), 1, 20), (0, 0, 0), heads=6, kv_heads=2, width=24, value_width=16),
    "one head": Case((few(130, 33),), (0,), heads=1, kv_heads=1, width=16, value_width=16),
}


@pytest.mark.parametrize("options", SOME)
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.parametrize("shape", GRADIENTS)
def test_gradients(backend, device, shape, dtype, options):
    check_gradients(replace(GRADIENTS[shape], dtype=dtype, **OPTIONS[options]), backend, device)


@pytest.mark.backends("torch")
def test_gradients_in_chunks(backend, device, monkeypatch):
    """Few scores at a time give the same sums in another order."""
    from rlfast.fallback import paged_attention as fallback

    monkeypatch.setattr(fallback, "ELEMENTS", 1000)
    for options in OPTIONS.values():
        check_gradients(replace(GRADIENTS["plain"], **options), backend, device)
        check(replace(CHUNK, **options), backend, device)


def test_gradients_of_expanded_upstream(backend, device):
    case = GRADIENTS["plain"]
    with rlfast.use_backend(backend):
        found = []
        for pull in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
            leaves = learned(packed(case), device=device)
            pull(rlfast.packed_attention(**leaves, **case.words)).backward()
            found.append(leaves["k"].grad)
    assert_same_bits("expanded", *found)


def test_second_derivatives_are_refused(backend, device):
    case = GRADIENTS["one head"]
    with rlfast.use_backend(backend):
        leaves = learned(packed(case), device=device)
        out = rlfast.packed_attention(**leaves, **case.words)
        (first,) = torch.autograd.grad(out.sum(), leaves["q"], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def test_forward_mode_is_refused():
    case = GRADIENTS["one head"]
    x = packed(case)
    with torch.autograd.forward_ad.dual_level():
        x["q"] = torch.autograd.forward_ad.make_dual(x["q"], torch.ones_like(x["q"]))
        with pytest.raises(NotImplementedError, match="packed_attention: forward-mode"):
            rlfast.packed_attention(**x, **case.words)


def test_a_cache_has_no_gradient():
    case = Case()
    x = laid(case)
    x["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="packed_attention"):
        rlfast.paged_attention(**x, **case.words)
    with torch.no_grad():
        assert not rlfast.paged_attention(**x, **case.words).requires_grad


@pytest.mark.unpoisoned
@pytest.mark.parametrize("sinks", (False, True))
def test_opcheck(sinks):
    case = Case(sinks=sinks)
    x = laid(case)
    call = (*x.values(), 0.2, 0.0, 9, False, "")
    torch.library.opcheck(paged_op.op, call)
    y = packed(Case((5, 9), (0, 0), sinks=sinks))
    torch.library.opcheck(packed_op.op, (*learned(y).values(), 0.2, 3.0, 0, ""))
    g = torch.ones(14, 4, 32)
    torch.library.opcheck(packed_op.op_backward, (g, *y.values(), 0.2, 3.0, 0, ""))


@pytest.mark.unpoisoned
def test_compiled_without_a_graph_break():
    case = Case(sinks=True)
    paged = torch.compile(rlfast.paged_attention, fullgraph=True, backend="aot_eager")
    assert_same_bits("paged", paged(**laid(case), **case.words), rlfast.paged_attention(**laid(case), **case.words))
    compiled = torch.compile(rlfast.packed_attention, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, rlfast.packed_attention):
        leaves = learned(packed(case))
        out = function(**leaves, **case.words)
        out.square().sum().backward()
        found.append((out.detach(), leaves["q"].grad, leaves["sinks"].grad))
    for a, b in zip(*found, strict=True):
        assert_same_bits("packed", a, b)
