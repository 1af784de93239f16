"""Every bad input to the log-prob ops: the error names the argument, what was wanted and what came."""

from __future__ import annotations

import re

import pytest
import torch

import rlfast
from rlfast import backends

N, D, V = 4, 6, 11
META = torch.empty(N, V, device="meta")


def good(op: str) -> dict:
    """Keyword arguments that the op takes."""
    x = {"targets": torch.tensor([1, 5, 10, 0])}
    if op == "token_logps":
        return x | {"logits": torch.randn(N, V)}
    return x | {"hidden": torch.randn(N, D), "weight": torch.randn(V, D)}


COMMON = {
    "targets-rank": ({"targets": torch.zeros(N, 2, 2).long()}, ValueError, "targets: expected shape (4,) or (4, 'K')"),
    "targets-shape": ({"targets": torch.zeros(N + 1).long()}, ValueError, "targets: expected shape (4,)", "got (5,)"),
    "targets-empty-k": (
        {"targets": torch.zeros(N, 0).long()},
        ValueError,
        "targets: expected at least one",
        "got (4, 0)",
    ),
    "targets-dtype": (
        {"targets": torch.zeros(N)},
        TypeError,
        "targets: expected dtype int64 or int32",
        "torch.float32",
    ),
    "targets-bool": ({"targets": torch.zeros(N).bool()}, TypeError, "targets: expected dtype", "torch.bool"),
    "targets-list": ({"targets": [1, 2, 3, 4]}, TypeError, "targets: expected a torch.Tensor", "got list"),
    "targets-device": (
        {"targets": torch.zeros(N, device="meta").long()},
        ValueError,
        "targets: expected device cpu",
        "meta",
    ),
    "targets-vocab": (
        {"targets": torch.tensor([1, V, 0, 0])},
        ValueError,
        "targets: expected values in [0, 11)",
        "11 at",
    ),
    "targets-minus-one": (
        {"targets": torch.tensor([1, -1, 0, 0])},
        ValueError,
        "targets: expected values",
        "-1 at (1,)",
    ),
    "targets-minus-101": (
        {"targets": torch.tensor([-101, -100, 0, 0])},
        ValueError,
        "targets: expected",
        "-101 at (0,)",
    ),
    "targets-int32": (
        {"targets": torch.tensor([1, V, 0, 0]).int()},
        ValueError,
        "targets: expected values",
        "11 at (1,)",
    ),
    "targets-masked": (
        {"targets": torch.tensor([1, V, 0, 0]), "mask": torch.tensor([1, 0, 1, 1])},
        ValueError,
        "targets: expected values",
        "11 at (1,)",
    ),
    "targets-candidate": (
        {"targets": torch.tensor([[1, 0], [1, 0], [0, V + 2], [0, 0]])},
        ValueError,
        "targets: expected",
        "13 at (2, 1)",
    ),
    "temperature-zero": ({"temperature": 0.0}, ValueError, "temperature: expected a finite float > 0", "got 0.0"),
    "temperature-negative": ({"temperature": -1}, ValueError, "temperature: expected a finite float > 0", "got -1"),
    "temperature-nan": ({"temperature": float("nan")}, ValueError, "temperature: expected a finite float > 0", "nan"),
    "temperature-inf": ({"temperature": float("inf")}, ValueError, "temperature: expected a finite float > 0", "inf"),
    "temperature-huge": (
        {"temperature": 1e39},
        ValueError,
        "temperature: expected a float from 1e-30 to 1e+30",
        "1e+39",
    ),
    "temperature-tiny": ({"temperature": 1e-39}, ValueError, "temperature: expected a float from", "got 1e-39"),
    "temperature-str": ({"temperature": "hot"}, TypeError, "temperature: expected a float", "'hot'"),
    "temperature-none": ({"temperature": None}, TypeError, "temperature: expected a float", "None"),
    "temperature-bool": ({"temperature": True}, TypeError, "temperature: expected a float", "True"),
    "temperatures-shape": (
        {"temperature": torch.ones(N + 1)},
        ValueError,
        "temperature: expected shape (4,)",
        "got (5,)",
    ),
    "temperatures-zero": (
        {"temperature": torch.tensor([1, 0, 1, 1.0])},
        ValueError,
        "temperature: expected",
        "got 0.0",
    ),
    "temperatures-tiny": (
        {"temperature": torch.tensor([1, 1e-46, 1, 1], dtype=torch.float64)},
        ValueError,
        "temperature: expected values from 1e-30 to 1e+30",
        "got 1e-46",
    ),
    "temperatures-nan": ({"temperature": torch.full((N,), torch.nan)}, ValueError, "temperature: expected", "nan"),
    "temperatures-dtype": ({"temperature": torch.ones(N).long()}, TypeError, "temperature: expected dtype", "int64"),
    "temperatures-grad": ({"temperature": torch.ones(N).requires_grad_()}, ValueError, "temperature: expected", "grad"),
    "temperatures-device": (
        {"temperature": torch.ones(N, device="meta")},
        ValueError,
        "temperature: expected device",
        "meta",
    ),
    "softcap-zero": ({"softcap": 0.0}, ValueError, "softcap: expected a finite float > 0", "got 0.0"),
    "softcap-negative": ({"softcap": -30.0}, ValueError, "softcap: expected a finite float > 0", "got -30.0"),
    "softcap-tiny": ({"softcap": 1e-46}, ValueError, "softcap: expected a float from", "got 1e-46"),
    "softcap-str": ({"softcap": "30"}, TypeError, "softcap: expected a float", "'30'"),
    "scale-nan": ({"logit_scale": float("nan")}, ValueError, "logit_scale: expected a finite float", "nan"),
    "scale-huge": ({"logit_scale": 1e39}, ValueError, "logit_scale: expected a float within the range", "1e+39"),
    "scale-tensor": ({"logit_scale": torch.ones(2)}, TypeError, "logit_scale: expected a float", "tensor"),
    "mask-shape": ({"mask": torch.ones(N, 1)}, ValueError, "mask: expected shape (4,)", "got (4, 1)"),
    "mask-dtype": ({"mask": torch.ones(N).to(torch.complex64)}, TypeError, "mask: expected dtype", "complex64"),
    "mask-list": ({"mask": [1, 1, 0, 0]}, TypeError, "mask: expected a torch.Tensor", "got list"),
    "mask-device": ({"mask": torch.ones(N, device="meta")}, ValueError, "mask: expected device cpu", "meta"),
    "outputs-name": ({"outputs": ("logp", "entropi")}, ValueError, "outputs: expected names among", "'entropi'"),
    "outputs-str": ({"outputs": "logp"}, TypeError, "outputs: expected a tuple of names", "'logp'"),
    "outputs-none": ({"outputs": None}, TypeError, "outputs: expected a tuple of names", "None"),
    "outputs-topk": ({"outputs": ("topk_ids",)}, ValueError, "top_k: expected an int, since", "'topk_ids'"),
    "top-k-zero": ({"top_k": 0}, ValueError, "top_k: expected 1 to the vocabulary of 11", "got 0"),
    "top-k-large": ({"top_k": V + 1}, ValueError, "top_k: expected 1 to the vocabulary of 11", "got 12"),
    "top-k-float": ({"top_k": 2.0}, TypeError, "top_k: expected an int", "2.0"),
    "top-k-bool": ({"top_k": True}, TypeError, "top_k: expected an int", "True"),
}

ONE_OP = {
    "token_logps": {
        "logits-list": ({"logits": [[1.0]]}, TypeError, "logits: expected a torch.Tensor", "got list"),
        "logits-int": ({"logits": torch.ones(N, V).long()}, TypeError, "logits: expected dtype float32", "torch.int64"),
        "logits-scalar": ({"logits": torch.tensor(1.0)}, ValueError, "logits: expected shape [*, V]", "got ()"),
        "logits-no-vocab": (
            {"logits": torch.ones(N, 0)},
            ValueError,
            "logits: expected shape [*, V] with V > 0",
            "(4, 0)",
        ),
        "logits-sparse": ({"logits": torch.eye(N).to_sparse()}, TypeError, "logits: expected a dense tensor", "sparse"),
    },
    "linear_token_logps": {
        "hidden-list": ({"hidden": [1.0]}, TypeError, "hidden: expected a torch.Tensor", "got list"),
        "hidden-int": ({"hidden": torch.ones(N, D).int()}, TypeError, "hidden: expected dtype float32", "torch.int32"),
        "hidden-scalar": ({"hidden": torch.tensor(1.0)}, ValueError, "hidden: expected shape [*, D]", "got ()"),
        "weight-none": ({"weight": None}, TypeError, "weight: expected a torch.Tensor", "NoneType"),
        "weight-rank": ({"weight": torch.ones(V)}, ValueError, "weight: expected shape (V, 6)", "got (11,)"),
        "weight-width": ({"weight": torch.ones(V, D + 1)}, ValueError, "weight: expected shape (V, 6)", "got (11, 7)"),
        "weight-turned": ({"weight": torch.ones(D, V)}, ValueError, "weight: expected shape (V, 6)", "got (6, 11)"),
        "weight-no-vocab": ({"weight": torch.ones(0, D)}, ValueError, "weight: expected shape (V, 6)", "got (0, 6)"),
        "weight-dtype": (
            {"weight": torch.ones(V, D).bfloat16()},
            TypeError,
            "weight: expected dtype torch.float32",
            "bfloat16",
        ),
        "weight-device": (
            {"weight": torch.ones(V, D, device="meta")},
            ValueError,
            "weight: expected device cpu",
            "meta",
        ),
        "bias-shape": ({"bias": torch.ones(V + 1)}, ValueError, "bias: expected shape (11,)", "got (12,)"),
        "bias-dtype": ({"bias": torch.ones(V).half()}, TypeError, "bias: expected dtype torch.float32", "float16"),
        "bias-device": ({"bias": torch.ones(V, device="meta")}, ValueError, "bias: expected device cpu", "meta"),
        "budget-nan": ({"memory_budget": float("nan")}, ValueError, "memory_budget: expected", "nan"),
        "budget-str": ({"memory_budget": "2G"}, TypeError, "memory_budget: expected", "'2G'"),
    },
}
BAD = [(op, name, *case) for op in ONE_OP for name, case in (COMMON | ONE_OP[op]).items()]


@pytest.mark.parametrize(
    ("op", "change", "kind", "words"), [(b[0], b[2], b[3], b[4:]) for b in BAD], ids=[f"{b[0]}-{b[1]}" for b in BAD]
)
def test_bad_input(op, change, kind, words):
    with pytest.raises(kind) as caught:
        getattr(rlfast, op)(**(good(op) | change))
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"
    assert re.match(r"\w+: expected .+, got .+", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("op", ONE_OP)
def test_good_input(op):
    """What the bad ones were made from."""
    out = getattr(rlfast, op)(**good(op), mask=torch.tensor([1, 0, 1, 1]), temperature=torch.tensor(0.7), top_k=3)
    assert out.logp.shape == (N,) and out.logp[1] == 0 and out.topk_ids.shape == (N, 3)


def test_a_backend_that_is_unknown():
    with pytest.raises(ValueError, match=r"expected one of .*'triton'.* got 'tritn'"), rlfast.use_backend("tritn"):
        pass
    with pytest.raises(ValueError, match=r"got 'tritn'"):
        backends.why_not("tritn")
    with pytest.raises(ValueError, match=r"op: expected one of .*got 'token_logp'"):
        backends.active("token_logp")


def test_a_backend_that_is_not_there(monkeypatch):
    monkeypatch.setattr(backends, "_why_not_cuda", lambda: "torch sees no CUDA device")
    with (
        pytest.raises(RuntimeError, match=r"backend 'cuda' is not available: torch sees no CUDA"),
        rlfast.use_backend("cuda"),
    ):
        pass


@pytest.mark.parametrize("op", ONE_OP)
def test_a_backend_that_cannot_serve_the_dtype(op):
    wide = {k: x.double() if x.is_floating_point() else x for k, x in good(op).items()}
    with rlfast.use_backend("cpu"), pytest.raises(RuntimeError, match=f"'cpu' cannot run {op}: dtype torch.float64"):
        getattr(rlfast, op)(**wide)
    assert getattr(rlfast, op)(**wide).logp.dtype == torch.float64


def test_use_backend_is_scoped():
    first = backends.active("token_logps")
    with rlfast.use_backend("torch"):
        assert backends.active("token_logps") == "torch"
        with rlfast.use_backend("reference"):
            assert backends.active("token_logps") == "reference"
        assert backends.active("token_logps") == "torch"
    with pytest.raises(KeyError), rlfast.use_backend("reference"):
        raise KeyError
    assert backends.active("token_logps") == first


def test_the_backward_runs_on_the_backend_of_its_forward(monkeypatch):
    """The choice is recorded: a backward outside the ``with`` block, on autograd's thread, uses it too."""
    seen = []
    module = backends.implementation("token_logps", "torch")
    original = module.backward
    monkeypatch.setattr(module, "backward", lambda *args: (seen.append("torch"), original(*args)))
    x = torch.randn(3, V, requires_grad=True)
    with rlfast.use_backend("torch"):
        logp = rlfast.token_logps(x, torch.tensor([1, 2, 3])).logp
    with rlfast.use_backend("reference"):
        logp.sum().backward()
    assert seen == ["torch"]


def test_an_unavailable_isa():
    with (
        pytest.raises(RuntimeError, match=r"isa 'sse9' is not available here: expected one of"),
        backends.use_isa("sse9"),
    ):
        pass
