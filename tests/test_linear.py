"""``linear`` on every backend: the contract, and that a row's bits depend on nothing but the row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import rlfast
from rlfast import backends
from rlfast.ops import linear as linear_op
from rlfast.parity import ORDERS
from rlfast.reference.linear import linear as reference
from rlfast.verify.linear import reordered
from rlfast.verify.subject import Problem
from tests import shared
from tests.cases import DTYPES, few
from tests.numerics import assert_gradient, assert_same_bits, assert_value, assert_zero

OP = "linear"
# Rows, depth, columns: of a model, around a vector, a tile and a panel, several blocks of the depth, one column.
SHAPES = (
    (5, 576, 192), (1, 576, 576), (16, 1536, 50), (7, 1, 1), (1, 1, 9), (3, 15, 8), (4, 17, 7), (33, 31, 5),
    (6, 33, 17), (2, 64, 1), (9, 129, 16), (64, 257, 23), (300, 40, 11), (50, 6001, 75), (20, 9000, 67),
)  # fmt: skip
INVARIANT = ((576, 192), (67, 37), (1, 5), (33, 1), (6000, 20), (2100, 8), (30_000, 3))  # depth, columns
ROWS = 200


def inputs_of(rows, depth: int, columns: int, dtype=torch.float32, bias: bool = True, seed: int = 0) -> dict:
    """x [rows, depth] (or of several leading dimensions), weight and bias of a layer whose outputs are a few units."""
    draw = torch.Generator().manual_seed(seed)
    lead = rows if isinstance(rows, tuple) else (rows,)
    x = torch.randn(*lead, depth, generator=draw)
    found = {"x": x, "weight": torch.randn(columns, depth, generator=draw) * depth**-0.5}
    if bias:
        found["bias"] = torch.randn(columns, generator=draw)
    return {name: y.to(dtype) for name, y in found.items()}


def upstream_of(shape, dtype) -> torch.Tensor:
    """An upstream gradient that ``dtype`` holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype).float()


def run(inputs: dict, backend: str, device: str, wide: bool = False, needs=("x", "weight", "bias")):
    """(y, gradients)."""
    leaves = {name: x.detach().to(device).requires_grad_(name in needs) for name, x in inputs.items()}
    with rlfast.use_backend(backend):
        y = rlfast.linear(**leaves, wide=wide)
    differentiated = [x for x in leaves.values() if x.requires_grad]
    if not differentiated:
        return y, {}
    g = upstream_of(y.shape, y.dtype).to(device, y.dtype)
    found = torch.autograd.grad(y, differentiated, g)
    return y.detach(), dict(zip([name for name, x in leaves.items() if x.requires_grad], found, strict=True))


def oracle(problem: Problem, dtype: torch.dtype) -> dict:
    """{"y" and the leaves' gradients} of a problem with x [M, K].

    64 rows and columns of zeros are added, and left out again: for a handful torch takes dot products, not its GEMM.
    """
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in problem.leaves.items()}
    pads = {"x": (0, 0, 0, 64), "weight": (0, 0, 0, 64), "bias": (0, 64)}
    padded = {name: F.pad(x, pads[name]) for name, x in leaves.items()}
    g = problem.upstream["y"].to(dtype)
    y = reference(**padded, dtype=dtype)[: g.shape[0], : g.shape[1]]
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), g), strict=True))


def hold(inputs: dict, y, gradients: dict) -> None:
    """A result to the contract."""
    x, rows = inputs["x"], inputs["x"].shape[:-1].numel()
    leaves = inputs | {"x": x.reshape(rows, x.shape[-1])}
    problem = Problem(leaves, {}, {"y": upstream_of(y.shape, y.dtype).reshape(rows, -1)})
    truth, own = oracle(problem, torch.float64), [oracle(problem, torch.float32)]
    for seed in range(1, ORDERS):
        moved, back = reordered(problem, seed)
        own.append({name: back[name](found) for name, found in oracle(moved, torch.float32).items()})
    assert_value("y", y.cpu().reshape(rows, -1), truth["y"], [o["y"] for o in own])
    for name, g in gradients.items():
        flat = g.cpu().reshape(truth[name].shape)
        assert g.dtype == inputs[name].dtype and g.shape == inputs[name].shape
        assert_gradient(f"gradient of {name}", flat, truth[name], [o[name] for o in own])


def check(inputs: dict, backend: str, device: str, wide: bool = False) -> None:
    hold(inputs, *run(inputs, backend, device, wide))


@pytest.mark.parametrize("wide", (False, True), ids=("narrow", "wide"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contract(backend, device, shape, dtype, wide):
    inputs = inputs_of(*shape, DTYPES[dtype], bias=shape[0] % 2 == 1)
    y, gradients = run(inputs, backend, device, wide)
    assert y.dtype == (torch.float32 if wide else DTYPES[dtype]) and y.is_contiguous()
    hold(inputs, y, gradients)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.backends("cpu")
def test_contract_on_every_isa(backend, device, shape, dtype, isa):
    with backends.use_isa(isa):
        check(inputs_of(*shape, DTYPES[dtype], bias=shape[0] % 2 == 0), backend, device, wide=shape[2] % 2 == 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend, device, dtype):
    """Rows of x and of the weight of any stride, and matrices that lie turned."""
    whole = inputs_of((6, 5), 48, 40, DTYPES[dtype])
    x, weight = whole["x"], whole["weight"]
    for rows in (x[:, 1:], x[:, ::2], x.transpose(0, 1), x[:1].expand(6, 5, 48), x[..., ::2].repeat(1, 1, 2)):
        check(whole | {"x": rows}, backend, device)
    for part in (slice(3, 35), slice(0, 48, 2)):
        check(whole | {"x": x[..., part], "weight": weight[:, part]}, backend, device)
    rows = slice(7, 29)
    check(whole | {"weight": weight[rows], "bias": whole["bias"][rows]}, backend, device)
    check(whole | {"weight": weight[::3], "bias": whole["bias"][::3]}, backend, device)
    check(whole | {"weight": weight.T.contiguous().T}, backend, device)


@pytest.mark.parametrize("lead", ((), (0,), (0, 3), (2, 0), (1, 1), (2, 1, 3)), ids=str)
def test_shapes(backend, device, lead):
    inputs = inputs_of(lead, 12, 5)
    y, gradients = run(inputs, backend, device)
    assert y.shape == (*lead, 5) and gradients["x"].shape == (*lead, 12)
    if 0 in lead:
        assert_zero("gradient of weight", gradients["weight"])
        assert_zero("gradient of bias", gradients["bias"])
    else:
        hold(inputs, y, gradients)


@pytest.mark.parametrize("wide", (False, True), ids=("narrow", "wide"))
@pytest.mark.parametrize("needs", ((), ("x",), ("weight",), ("bias",), ("x", "bias")), ids=str)
def test_only_what_is_needed_comes_back(backend, device, needs, wide):
    inputs = inputs_of(19, 33, 21, torch.bfloat16)
    y, gradients = run(inputs, backend, device, wide, needs)
    assert tuple(gradients) == needs
    hold(inputs, y, gradients)


def test_a_wide_gradient_in_pieces(backend, device, monkeypatch):
    """More columns than are widened at a time."""
    monkeypatch.setattr("rlfast.fallback.linear.COLUMNS", 8)
    check(inputs_of(9, 20, 27, torch.bfloat16), backend, device, wide=True)


@pytest.mark.backends("torch", "reference")
def test_float64(backend, device):
    inputs = {name: x.double().requires_grad_() for name, x in inputs_of(3, 4, 5).items()}
    for wide in (False, True):
        with rlfast.use_backend(backend):
            assert rlfast.linear(**inputs, wide=wide).dtype == torch.float64
            assert torch.autograd.gradcheck(partial(rlfast.linear, wide=wide), [*inputs.values()])


def invariant(inputs: dict, wide: bool, threads) -> None:
    """Some of the rows alone, at each size and in three places, on one thread and on more: the bits of all of them."""
    with torch.no_grad():
        threads(1)
        whole = rlfast.linear(**inputs, wide=wide)
        rest = {name: x for name, x in inputs.items() if name != "x"}
        for rows in (1, 2, 3, 7, 16, 33, 64, ROWS):
            for count in (1, 2, 5):
                threads(count)
                for start in {0, (ROWS - rows) // 2, ROWS - rows}:
                    part = rlfast.linear(inputs["x"][start : start + rows], **rest, wide=wide)
                    assert_same_bits(f"{rows} rows from {start}", part, whole[start : start + rows])
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
        assert_same_bits("rows in another order", rlfast.linear(inputs["x"][order], **rest, wide=wide), whole[order])
        one = rlfast.linear(inputs["x"][3:4].expand(ROWS, -1), **rest, wide=wide)
        assert_same_bits("one row everywhere", one, whole[3:4].expand(ROWS, -1).contiguous())


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("wide", (False, True), ids=("narrow", "wide"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", INVARIANT, ids=str)
@pytest.mark.backends("cpu")
def test_a_row_does_not_depend_on_the_others(backend, device, shape, dtype, wide, isa, threads):
    assert linear_op.batch_invariant(backend)
    with rlfast.use_backend(backend), backends.use_isa(isa):
        invariant(inputs_of(ROWS, *shape, DTYPES[dtype], bias=wide), wide, threads)


@pytest.mark.backends("cpu")
def test_a_column_does_not_depend_on_the_others(backend, device):
    """A layer may be cut by columns: a fused q, k, v gives the bits of the three."""
    inputs = inputs_of(11, 100, 45)
    with rlfast.use_backend(backend), torch.no_grad():
        whole = rlfast.linear(**inputs)
        for part in (slice(0, 8), slice(3, 20), slice(44, 45), slice(17, 45)):
            some = rlfast.linear(inputs["x"], inputs["weight"][part], inputs["bias"][part])
            assert_same_bits(f"columns {part}", some, whole[:, part].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.backends("cpu")
def test_wide_is_what_narrow_rounds(backend, device, dtype):
    inputs = inputs_of(9, 70, 21, DTYPES[dtype])
    with rlfast.use_backend(backend), torch.no_grad():
        assert_same_bits("y", rlfast.linear(**inputs), rlfast.linear(**inputs, wide=True).to(DTYPES[dtype]))


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.backends("cpu")
def test_a_row_that_is_not_finite_is_alone(backend, device, dtype, isa):
    inputs = inputs_of(9, 37, 21, DTYPES[dtype])
    with rlfast.use_backend(backend), backends.use_isa(isa), torch.no_grad():
        clean = rlfast.linear(**inputs)
        inputs["x"][4, 36], inputs["x"][6, 2] = torch.nan, torch.inf
        y = rlfast.linear(**inputs)
    assert bool(y[4].isnan().all()) and not bool(y[6].isfinite().any())
    keep = torch.tensor([0, 1, 2, 3, 5, 7, 8])
    assert_same_bits("the other rows", y[keep], clean[keep])


def test_an_update_of_the_weight_in_place_is_seen(backend, device):
    inputs = {name: x.to(device) for name, x in inputs_of(3, 20, 9).items()}
    with rlfast.use_backend(backend), torch.no_grad():
        rlfast.linear(**inputs)
        inputs["weight"].mul_(2.0)
        inputs["bias"].zero_()
        y = rlfast.linear(**inputs)
        assert_same_bits("y", y, rlfast.linear(**{name: x.clone() for name, x in inputs.items()}))
    hold(inputs, y, {})


@pytest.mark.backends("cpu")
def test_the_ways_to_the_kernel_agree(backend, device):
    """Past the dispatcher, through it, and with autograd's record: one kernel, the same bits."""
    inputs = inputs_of((2, 3), 40, 11)
    x, weight, bias = inputs.values()
    with rlfast.use_backend(backend):
        short = linear_op.usual(x, weight, bias, False)
        assert short is not None and short.shape == (2, 3, 11)
        assert_same_bits("the op", linear_op.op(x.view(6, 40), weight, bias, False, backend).view(2, 3, 11), short)
        assert linear_op.usual(x, weight.clone().requires_grad_(), bias, False) is None
        assert_same_bits("recorded", rlfast.linear(x, weight.clone().requires_grad_(), bias).detach(), short)
    with torch.profiler.profile() as profile:
        assert_same_bits("watched", rlfast.linear(x, weight, bias), short)
    assert any(event.key == "rlfast::linear" for event in profile.key_averages())
    with FakeTensorMode() as mode:
        fake = rlfast.linear(*(mode.from_tensor(t) for t in (x, weight, bias)))
    assert type(fake) is not torch.Tensor and fake.shape == (2, 3, 11)


@pytest.mark.parametrize("wide", (False, True), ids=("narrow", "wide"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_kernels_agree(backend, device, dtype, wide):
    """The shapes, dtypes and strides that the real ones give."""
    x, weight, bias = (x.to(device) for x in inputs_of(6, 8, 5, DTYPES[dtype]).values())
    g = torch.ones(6, 5, dtype=torch.float32 if wide else DTYPES[dtype], device=device)
    for function, args, rest in (
        (linear_op.op, (x, weight, bias), (wide, backend)),
        (linear_op.op_backward, (x, weight, g), ([True, False, True], backend)),
    ):
        real = function(*args, *rest)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(t) for t in args), *rest)
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else ((real, fake),)
        for a, b in pairs:
            assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


@pytest.mark.parametrize("wide", (False, True), ids=("narrow", "wide"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "f16"))
def test_autocast(backend, device, dtype, wide):
    """x, weight and bias are cast as F.linear casts them, and the gradients come back in their own dtype."""
    inputs = inputs_of(9, 20, 30)
    leaves = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    with rlfast.use_backend(backend), torch.autocast(device, dtype):
        y = rlfast.linear(**leaves, wide=wide)
        with torch.no_grad():
            again = rlfast.linear(**leaves, wide=wide)
    assert y.dtype == again.dtype == (torch.float32 if wide else dtype)
    y.backward(upstream_of(y.shape, y.dtype).to(device, y.dtype))
    expected, gradients = run({name: x.to(dtype) for name, x in inputs.items()}, backend, device, wide)
    assert_same_bits("y", y.detach(), expected)
    assert_same_bits("y without a gradient", again, expected)
    for name, x in leaves.items():
        assert_same_bits(f"gradient of {name}", x.grad, gradients[name].float())


@pytest.mark.unpoisoned
def test_compiled_without_a_graph_break(backend, device):
    """fullgraph=True, forward and backward, against the same function run eagerly, to the bit."""

    def function(x, weight, bias):
        return rlfast.linear(x, weight, bias).square().sum() + rlfast.linear(x, weight, wide=True).sum()

    results = []
    torch._dynamo.reset()
    for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [x.to(device).requires_grad_() for x in inputs_of((2, 5), 12, 7).values()]
        with rlfast.use_backend(backend):
            loss = f(*leaves)
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits("compiled", compiled, eager)


@pytest.mark.unpoisoned
@pytest.mark.backends("cpu", "torch")
def test_opcheck(backend, device):
    for dtype, wide in ((torch.float32, False), (torch.bfloat16, True)):
        x, weight, bias = (x.to(device) for x in inputs_of(6, 8, 5, dtype).values())
        torch.library.opcheck(linear_op.op, (x, weight, None, wide, backend))
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(linear_op.op, (*leaves, wide, backend))
        g = torch.ones(6, 5, dtype=torch.float32 if wide else dtype, device=device)
        torch.library.opcheck(linear_op.op_backward, (x, weight, g, [True, False, True], backend))


def test_other_derivatives_are_refused(backend, device):
    x, weight, bias = (x.to(device) for x in inputs_of(3, 8, 5).values())
    with rlfast.use_backend(backend):
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(rlfast.linear(x, leaf, bias).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (gradient.sum() + leaf.square().sum()).backward()
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda t: rlfast.linear(t, weight), (x,), (x,))


BAD = {
    "x-list": ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
    "x-int": ({"x": torch.ones(3, 6).int()}, TypeError, "x: expected dtype float32"),
    "x-scalar": ({"x": torch.tensor(1.0)}, ValueError, "x: expected shape [*, K] with K > 0, got ()"),
    "x-narrow": ({"x": torch.ones(3, 5)}, ValueError, "weight: expected shape (N, 5) to match x, got (4, 6)"),
    "weight-none": ({"weight": None}, TypeError, "weight: expected a torch.Tensor, got NoneType"),
    "weight-rank": ({"weight": torch.ones(6)}, ValueError, "weight: expected shape (N, 6) to match x, got (6,)"),
    "weight-empty": ({"weight": torch.ones(0, 6)}, ValueError, "weight: expected shape (N, 6) to match x, got (0, 6)"),
    "weight-bf16": ({"weight": torch.ones(4, 6).bfloat16()}, TypeError, "weight: expected dtype torch.float32 like x"),
    "weight-meta": ({"weight": torch.ones(4, 6, device="meta")}, ValueError, "weight: expected device cpu like x"),
    "bias-shape": ({"bias": torch.ones(5)}, ValueError, "bias: expected shape (4,) like the rows of weight, got (5,)"),
    "bias-f16": ({"bias": torch.ones(4).half()}, TypeError, "bias: expected dtype torch.float32 like x"),
    "bias-float": ({"bias": 1.0}, TypeError, "bias: expected a torch.Tensor, got float"),
    "wide-int": ({"wide": 1}, TypeError, "wide: expected True or False, got 1"),
}


@pytest.mark.parametrize(("change", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_input(change, kind, words):
    good = {"x": torch.ones(3, 6), "weight": torch.ones(4, 6), "bias": torch.ones(4), "wide": False}
    assert rlfast.linear(**good).shape == (3, 4)
    with pytest.raises(kind) as caught:
        rlfast.linear(**(good | change))
    assert words in str(caught.value)


def test_who_promises_the_bits():
    assert [name for name in backends.NAMES if linear_op.batch_invariant(name)] == ["cpu"]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("x", "weight"))
def test_more_than_2_31_elements(backend, device, name):
    """Row offsets beyond 2³¹ elements, in a storage whose untouched pages are never mapped."""
    shared.skip_unless_memory(device, 7)
    inputs = inputs_of(3, 40, 3, torch.bfloat16)
    expected, _ = run(inputs, backend, device)
    stride = (1 << 30) + 4096
    storage = torch.empty(2 * stride + 40, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((3, 40), (stride, 1)).copy_(inputs[name])
    with rlfast.use_backend(backend), torch.no_grad():
        y = rlfast.linear(**{k: t.to(device) for k, t in (inputs | {name: far}).items()})
    assert_same_bits("y", y, expected)


@pytest.mark.large
@pytest.mark.parametrize("dtype", ("f32", "bf16"))
@pytest.mark.backends("cpu")
def test_full_size(backend, device, dtype):
    """The head of a model of 135M parameters, and its widest layer over a training batch."""
    for rows, depth, columns in ((few(16, 2), 576, 49152), (2048, 576, 1536), (2048, 1536, 576)):
        check(inputs_of(rows, depth, columns, DTYPES[dtype], bias=False), backend, device, wide=columns == 49152)
