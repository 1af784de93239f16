"""What the tests feed the estimators, and how a result is held to the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

import rlfast
from rlfast.ops import affine_scan as scan_op
from rlfast.ops.oracle_scan import outputs
from rlfast.ops.scan_records import Inputs, Options
from tests.cases import DTYPES
from tests.numerics import assert_gradient, assert_value

GAMMA, LAM = 0.99, 0.95


@dataclass(frozen=True)
class Call:
    """One call of an estimator. ``inputs`` are tensors on the CPU; a run moves them."""

    name: str  # of the public function
    inputs: dict
    options: dict = field(default_factory=dict)

    def on(self, device) -> Call:
        """The same on a device."""
        moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.options.items()}
        return Call(self.name, {k: v.to(device) for k, v in self.inputs.items()}, moved)

    def outputs(self) -> tuple:
        """What it returns, as a tuple."""
        out = getattr(rlfast, self.name)(**self.inputs, **self.options)
        return out if isinstance(out, tuple) else (out,)


def draw(shape, dtype="f32", seed=0, scale=1.0):
    """Seeded normal numbers."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=rng) * scale).to(DTYPES[dtype])


def mask_of(kind: str, rows: int, steps: int):
    """Padding on the right or on the left, holes in both, one row that is masked throughout."""
    if kind == "none":
        return None
    rng = torch.Generator().manual_seed(5)
    lengths = torch.randint(steps + 1, (rows, 1), generator=rng)
    place = torch.arange(steps).expand(rows, steps)
    if kind == "right":
        return place < lengths
    if kind == "left":
        return place >= steps - lengths
    holes = torch.rand(rows, steps, generator=rng) > 0.3
    holes[rows // 2] = False
    return holes


def call_of(name: str, rows=3, steps=37, dtype="f32", mask="none", seed=0, **options) -> Call:
    """A call with random inputs."""
    shape = (rows, steps)
    inputs = {"rewards": draw(shape, dtype, seed)}
    if name == "affine_scan":
        inputs = {"a": draw(shape, dtype, seed + 1).sigmoid(), "b": inputs["rewards"]}
    elif name not in ("discounted_returns", "reward_to_go"):
        inputs["values"] = draw(shape, dtype, seed + 1)
    if name in ("vtrace", "per_decision_td"):
        inputs["log_ratio"] = draw(shape, dtype, seed + 2, 0.4)
    options = dict(options)
    if name not in ("affine_scan", "reward_to_go"):
        options.setdefault("gamma", GAMMA)
    if name in ("gae", "lambda_returns", "vtrace", "per_decision_td"):
        options.setdefault("lam", LAM)
    valid = mask_of(mask, rows, steps)
    return Call(name, inputs, options | ({} if valid is None else {"mask": valid}))


def with_packed(call: Call, lengths) -> tuple[Call, torch.Tensor]:
    """The first tokens of each row, packed; and where they come from in the padded tensor."""
    steps = max(call.inputs.values(), key=torch.Tensor.dim).shape[-1]
    keep = torch.arange(steps) < torch.tensor(lengths).unsqueeze(-1)
    inputs = {k: v[keep] if v.dim() > 1 else v for k, v in call.inputs.items()}
    options = {
        k: v[keep] if isinstance(v, torch.Tensor) and v.shape == keep.shape else v for k, v in call.options.items()
    }
    cu = torch.tensor([0, *lengths]).cumsum(0)
    return Call(call.name, inputs, options | {"cu_seqlens": cu}), keep


def oracle(call: Call, dtype) -> tuple:
    """The outputs by the recurrences of the papers, in ``dtype`` from the same inputs, by autograd."""

    def by_reference(*args):
        return outputs(Inputs(*args[: scan_op.TENSORS]), Options(*args[scan_op.TENSORS : -1]), dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_op, "call", by_reference)
        patch.setattr(scan_op, "usual", lambda *_: None)
        return call.outputs()


def check(call: Call, backend: str, device: str = "cpu") -> tuple:
    """Every output against the oracle in float64, by the error of the oracle in float32."""
    with rlfast.use_backend(backend):
        got = call.on(device).outputs()
    wide = any(x.dtype == torch.float64 for x in call.inputs.values())
    for i, (x, truth, own) in enumerate(
        zip(got, oracle(call, torch.float64), oracle(call, torch.float32), strict=True)
    ):
        assert x.dtype == (torch.float64 if wide else torch.float32)
        assert_value(f"{call.name}[{i}]", x.cpu(), truth, own)
    return got


def gradients(call: Call, names, compute) -> dict:
    """∂/∂ of the inputs or options ``names`` of a random combination of the outputs of ``compute(call)``."""
    inputs = {k: v.detach().clone().requires_grad_(k in names) for k, v in call.inputs.items()}
    options = {k: v.detach().clone().requires_grad_() if k in names else v for k, v in call.options.items()}
    out = compute(Call(call.name, inputs, options))
    loss = sum((x * draw(x.shape, seed=9 + i).to(x)).sum() for i, x in enumerate(out))
    wanted = [inputs.get(name, options.get(name)) for name in names]
    return dict(zip(names, torch.autograd.grad(loss, wanted), strict=True))


def check_gradients(call: Call, names, backend: str, device: str = "cpu") -> None:
    """The derivative of the op against autograd through the oracle."""

    def ours(c):
        with rlfast.use_backend(backend):
            return c.outputs()

    got = gradients(call.on(device), names, ours)
    truth = gradients(
        Call(call.name, {k: v.double() for k, v in call.inputs.items()}, call.options),
        names,
        lambda c: oracle(c, torch.float64),
    )
    own = gradients(call, names, lambda c: oracle(c, torch.float32))
    for name in names:
        assert_gradient(f"{call.name}: {name}", got[name].cpu(), truth[name].double(), own[name])
