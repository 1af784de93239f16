"""``affine_scan`` and the estimators on top of it, on every backend."""

from __future__ import annotations

import math

import pytest
import torch

import rlfast
from rlfast import backends
from rlfast.ops import affine_scan as scan_op
from rlfast.reference import affine_scan as reference
from tests import shared
from tests.cases import few, interpreted
from tests.numerics import assert_same_bits, assert_value, assert_zero
from tests.scan_cases import Call, call_of, check, check_gradients, draw, mask_of, with_packed

OP = "affine_scan"
KERNELS = ("cpu", "triton", "cuda")
ESTIMATORS = (
    "gae", "lambda_returns", "td_residuals", "discounted_returns", "reward_to_go", "vtrace", "per_decision_td",
    "affine_scan",
)  # fmt: skip
MASKS = ("none", "right", "left", "holes")
SIZES = ((1, 1), (3, 37), (17, 16), (9, 150))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimator(backend, device, name, mask):
    for rows, steps in SIZES[: few(len(SIZES), 2)]:
        check(call_of(name, rows, steps, mask=mask), backend, device)


@pytest.mark.parametrize("isa", backends.isas())
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.backends("cpu")
def test_estimator_on_every_isa(backend, device, name, mask, isa):
    with backends.use_isa(isa):
        for rows, steps in SIZES:
            check(call_of(name, rows, steps, mask=mask), backend, device)


@pytest.mark.parametrize("dtype", ("bf16", "f16"))
@pytest.mark.parametrize("name", ("gae", "vtrace", "affine_scan"))
def test_narrow_inputs(backend, device, name, dtype):
    check(call_of(name, 5, 40, dtype, "holes"), backend, device)


@pytest.mark.parametrize("name", ("gae", "vtrace", "affine_scan"))
@pytest.mark.backends("torch", "reference")
def test_float64(backend, device, name):
    call = call_of(name, 5, 40, mask="holes")
    check(Call(name, {k: v.double() for k, v in call.inputs.items()}, call.options), backend, device)


@pytest.mark.parametrize("name", ("gae", "affine_scan"))
def test_inputs_of_different_dtypes(backend, device, name):
    call = call_of(name, 5, 40, mask="right")
    last = next(reversed(call.inputs))
    check(Call(name, call.inputs | {last: call.inputs[last].bfloat16()}, call.options), backend, device)


def options_of(rows: int, steps: int) -> dict:
    """name → options beyond the usual ones, on tensors of these sizes."""
    rng = torch.Generator().manual_seed(3)
    some = torch.rand(rows, steps, generator=rng) < 0.15
    others = torch.rand(rows, steps, generator=rng) < 0.15
    by_row, by_token = draw((rows,), seed=6), draw((rows, steps), seed=7)
    return {
        "done": {"done": some},
        "bootstrap": {"bootstrap": by_row},
        "truncated": {"truncated": others, "bootstrap": by_token},
        "done and truncated": {"done": some, "truncated": others, "bootstrap": by_token},
        "value after the last token": {"bootstrap": by_token},
        "rates a row": {"gamma": torch.rand(rows, generator=rng), "lam": torch.rand(rows, generator=rng)},
        "rates a token": {"gamma": torch.rand(rows, steps, generator=rng)},
        "both rates a token": {
            "gamma": torch.rand(rows, steps, generator=rng).bfloat16(),
            "lam": torch.rand(rows, steps, generator=rng),
        },
        "no discount": {"gamma": 1.0, "lam": 1.0},
        "no trace": {"lam": 0.0},
    }


GAE_ONLY = {
    "two λ": {"critic_lam": 1.0},
    "two λ, one a row": {"lam": torch.tensor([0.2, 0.9, 0.5, 0.7]), "critic_lam": torch.tensor([1.0, 0.3, 0.8, 0.0])},
    "kl": {"kl": draw((4, 45), seed=8), "kl_coef": 0.3},
}


@pytest.mark.parametrize("masking", ("carry", "zero"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", options_of(1, 1))
@pytest.mark.parametrize("name", ("gae", "vtrace"))
def test_options(backend, device, name, option, mask, masking):
    if interpreted() and mask in ("left", "none"):
        return
    options = options_of(4, 45)[option]
    check(call_of(name, 4, 45, mask=mask, masking=masking, **options), backend, device)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", GAE_ONLY)
def test_options_of_gae(backend, device, option, mask):
    check(call_of("gae", 4, 45, mask=mask, **GAE_ONLY[option]), backend, device)
    check(call_of("gae", 4, 45, mask=mask, done=options_of(4, 45)["done"]["done"], **GAE_ONLY[option]), backend, device)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kl", (False, True))
def test_a_reward_for_the_whole_row(backend, device, mask, kl):
    """It is earned at the last valid token, and the penalty on each token comes off it."""
    call = call_of("gae", 9, 45, mask=mask)
    options = call.options | ({"kl": draw((9, 45), seed=8), "kl_coef": 0.3} if kl else {})
    check(Call("gae", call.inputs | {"rewards": draw((9,), seed=4)}, options), backend, device)


@pytest.mark.parametrize("clips", ((0.5, 0.7, 1.3), (None, None, None), (1.0, 0.0, math.inf)), ids=str)
def test_clips(backend, device, clips):
    named = dict(zip(("clip_rho", "clip_c", "clip_pg_rho"), clips, strict=True))
    check(call_of("vtrace", 4, 45, mask="holes", **named), backend, device)


@pytest.mark.backends("torch", *KERNELS)
def test_ratios_beyond_float32(backend, device):
    """exp overflows to infinity, which a clip takes back; NaN stays NaN, in its own row."""
    call = call_of("vtrace", 3, 20)
    log_ratio = call.inputs["log_ratio"].clone()
    log_ratio[0, 7], log_ratio[1, 7] = 300.0, float("nan")
    inputs = {k: v.to(device) for k, v in (call.inputs | {"log_ratio": log_ratio}).items()}
    with rlfast.use_backend(backend):
        adv, target = rlfast.vtrace(**inputs, gamma=0.9)
        free = rlfast.vtrace(**inputs, gamma=0.9, clip_rho=None)[1]
    assert bool(adv[0].isfinite().all()) and bool(target[2].isfinite().all())
    assert bool(target[1, :8].isnan().all()) and bool(target[1, 8:].isfinite().all())
    assert bool(free[0, 7].isinf())


LENGTHS = (5, 0, 37, 1, 16, 0, 33, 48)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_packed(backend, device, name):
    packed, _ = with_packed(call_of(name, len(LENGTHS), 48), LENGTHS)
    check(packed, backend, device)


@pytest.mark.parametrize("option", options_of(1, 1))
def test_packed_options(backend, device, option):
    call = call_of("gae", len(LENGTHS), 48, mask="holes", **options_of(len(LENGTHS), 48)[option])
    check(with_packed(call, LENGTHS)[0], backend, device)


def outputs_on(call: Call, backend: str, device: str) -> list:
    with rlfast.use_backend(backend):
        return [x.cpu() for x in call.on(device).outputs()]


@pytest.mark.parametrize("lengths", ((1, 1, 1), (0, 3, 0)), ids=str)
def test_as_many_packed_rows_as_tokens(backend, device, lengths):
    """Values after truncated tokens are one a token, rewards too; other tensors of that shape are one a row."""
    call = call_of("gae", 3, 3, truncated=torch.ones(3, 3), bootstrap=draw((3, 3), seed=4))
    packed, keep = with_packed(call, lengths)
    for a, b in zip(check(packed, backend, device), outputs_on(call, backend, device), strict=True):
        assert_same_bits("padded", a.cpu(), b[keep])
    rates = {"gamma": torch.tensor([0.3, 0.5, 0.9]), "bootstrap": torch.tensor([1.0, 2.0, 3.0])}
    by_row = call_of("gae", 3, 3, mask="none", **rates)
    packed, keep = with_packed(by_row, lengths)
    expected = Call("gae", by_row.inputs, by_row.options | {"mask": keep})
    for a, b in zip(outputs_on(packed, backend, device), outputs_on(expected, backend, device), strict=True):
        assert_same_bits("one a row", a, b[keep])
    check_gradients(packed, ["rewards", "values", "bootstrap"], backend, device)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_padded_equals_packed_to_the_bit(backend, device, name):
    """Padded on the right, on the left, and packed; whitened too."""
    padded_and_packed(backend, device, name)


@pytest.mark.backends("torch")
def test_padded_equals_packed_in_float64(backend, device):
    padded_and_packed(backend, device, "gae", torch.float64)


def padded_and_packed(backend, device, name, dtype=torch.float32):
    """Both, to the bit."""
    rows, steps = few(40, 6), few(700, 90)
    rng = torch.Generator().manual_seed(2)
    lengths = torch.randint(steps + 1, (rows,), generator=rng).tolist()
    options = {"whiten": True, "critic_lam": 0.99} if name == "gae" else {}
    call = call_of(name, rows, steps, **options)
    call = Call(name, {k: v.to(dtype) for k, v in call.inputs.items()}, call.options)
    right = torch.arange(steps) < torch.tensor(lengths).unsqueeze(-1)
    left = right.flip(-1)
    packed, _ = with_packed(call, lengths)
    moved = {k: torch.zeros_like(v).masked_scatter(left, v[right]) for k, v in call.inputs.items()}
    found = outputs_on(packed, backend, device)
    garbage = {k: torch.where(right, v, torch.nan) for k, v in call.inputs.items()}
    on_right = outputs_on(Call(name, garbage, call.options | {"mask": right}), backend, device)
    on_left = outputs_on(Call(name, moved, call.options | {"mask": left}), backend, device)
    for a, b, c in zip(found, on_right, on_left, strict=True):
        assert_same_bits(f"{name}, right", b[right], a)
        assert_same_bits(f"{name}, left", c[left], a)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.backends("cpu")
def test_holes_do_not_change_bits(backend, device, name):
    """Tokens that are left out might as well not be there."""
    call = call_of(name, 20, 300, mask="holes")
    mask = call.options["mask"]
    lengths = mask.sum(-1).tolist()
    packed = {k: v[mask] for k, v in call.inputs.items()}
    options = {k: v for k, v in call.options.items() if k != "mask"}
    cu = torch.tensor([0, *lengths]).cumsum(0)
    without = outputs_on(Call(name, packed, options | {"cu_seqlens": cu}), backend, device)
    for a, b in zip(outputs_on(call, backend, device), without, strict=True):
        assert_same_bits(name, a[mask], b)


@pytest.mark.parametrize("mask", ("none", "holes"))
@pytest.mark.parametrize("name", ("gae", "vtrace", "affine_scan"))
@pytest.mark.backends("cpu", "torch")
def test_threads_do_not_change_bits(backend, device, name, mask, threads):
    shared.skip_unless_cores(2)
    options = {"whiten": True} if name == "gae" else {}
    call, found = call_of(name, 37, 900, mask=mask, **options), []
    for n in (1, 2, 3):
        threads(n)
        found.append(outputs_on(call, backend, device))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(name, a, b)


def test_a_row_alone_and_in_a_batch(backend, device):
    call = call_of("gae", 20, 130, mask="holes")
    whole = outputs_on(call, backend, device)
    for r in (0, 7, 19):
        one = Call("gae", {k: v[r : r + 1] for k, v in call.inputs.items()},
                   call.options | {"mask": call.options["mask"][r : r + 1]})  # fmt: skip
        for a, b in zip(outputs_on(one, backend, device), whole, strict=True):
            assert_same_bits("row", a[0], b[r])


@pytest.mark.parametrize("steps, gamma, lam", ((131072, 1.0, 1.0), (131072, 0.999, 0.95), (200_000, 1.0, 1.0)))
@pytest.mark.backends("torch", *KERNELS)
def test_long_rows(backend, device, steps, gamma, lam):
    """max|error| ≤ 1e-6·max|A| at 131072 tokens, and over more segments than two: the carry is a float64."""
    steps = few(steps, 3000)
    call = call_of("gae", 2, steps, gamma=gamma, lam=lam)
    truth = slow_gae(call.inputs["rewards"], call.inputs["values"], gamma, lam)
    adv, ret = outputs_on(call, backend, device)
    for got, wanted in ((adv, truth), (ret, truth + call.inputs["values"].double())):
        assert bool(((got - wanted).abs().amax(-1) <= 1e-6 * wanted.abs().amax(-1)).all())


def slow_gae(rewards, values, gamma, lam):
    """The loop of the paper in float64."""
    r, v = rewards.double().T.tolist(), values.double().T.tolist()
    state, ahead, out = [0.0] * len(r[0]), [0.0] * len(r[0]), [None] * len(r)
    for t in reversed(range(len(r))):
        state = [x + gamma * n - y + gamma * lam * s for x, n, y, s in zip(r[t], ahead, v[t], state, strict=True)]
        ahead, out[t] = v[t], state
    return torch.tensor(out, dtype=torch.float64).T


SEGMENT_CASES = ("plain", "holes", "ends", "decoupled", "vtrace", "bare", "bare forward", "zero", "zero, ends")


def segment_call(case: str, rows: int, steps: int) -> Call:
    """Rows of several segments; with "zero" more than one of them is masked after the last valid token."""
    rng = torch.Generator().manual_seed(1)
    some, by_row, by_token = torch.rand(rows, steps, generator=rng), draw((rows,), seed=5), draw((rows, steps), seed=5)
    name = "vtrace" if case == "vtrace" else "affine_scan" if case.startswith("bare") else "gae"
    zero = {"mask": torch.arange(steps).expand(rows, steps) < 0.3 * steps, "masking": "zero"}
    options = {
        "holes": {"mask": some > 0.2},
        "ends": {"truncated": some < 3 / steps, "done": some > 1 - 2 / steps, "bootstrap": by_token},
        "decoupled": {"critic_lam": 1.0},
        "bare forward": {"reverse": False},
        "zero": zero | {"bootstrap": by_row},
        "zero, ends": zero | {"bootstrap": by_token},
    }.get(case, {})
    call = call_of(name, rows, steps, **options, **({} if name == "affine_scan" else {"gamma": 1.0}))
    return Call(name, call.inputs | ({"rewards": draw((rows,), seed=4)} if case == "zero" else {}), call.options)


@pytest.mark.backends("torch", *KERNELS)
def test_rates_are_not_rounded(backend, device):
    """A reward far away arrives as (γλ)ᵏ; float32 rates would be 2e-4 off after 8192 tokens."""
    steps, gamma, lam = few(8192, 2000), 0.9999, 0.99999
    rewards = torch.zeros(2, steps).index_fill(1, torch.tensor(steps - 1), 1.0)
    call = Call("gae", {"rewards": rewards, "values": torch.zeros(2, steps)}, {"gamma": gamma, "lam": lam})
    both = Call("gae", call.inputs, {"gamma": lam, "lam": 1.0, "critic_lam": gamma})
    truth = (gamma * lam) ** torch.arange(steps - 1, -1, -1, dtype=torch.float64).expand(2, steps)
    for got in (outputs_on(call, backend, device)[0], outputs_on(both, backend, device)[1]):
        torch.testing.assert_close(got.double(), truth, rtol=2e-7, atol=0)


@pytest.mark.parametrize("case", SEGMENT_CASES)
@pytest.mark.backends("cpu", "cuda", "triton")
def test_segments_of_a_long_row_do_not_change_bits(backend, device, case, threads):
    """A row alone is scanned in segments side by side; among others, one after another."""
    if interpreted():
        return
    call = segment_call(case, 24, 3 * 65536 + 777)
    found = outputs_on(call, backend, device)
    for n in (1, 2):
        threads(n)
        one = Call(call.name, {k: v[:1] for k, v in call.inputs.items()},
                   {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in call.options.items()})  # fmt: skip
        for a, b in zip(outputs_on(one, backend, device), found, strict=True):
            assert_same_bits(case, a[0], b[0])


@pytest.mark.backends("torch", *KERNELS)
def test_zeros_that_fill_a_segment(backend, device):
    """Masked tokens after the last valid one, as many as a segment has: that one still gets what comes to it."""
    steps, valid = few(70_000, 17_000), 10
    mask, values = (torch.arange(steps) < valid).expand(1, steps), draw((1, steps))
    rest = {"mask": mask, "masking": "zero", "gamma": 1.0, "lam": 1.0}
    for rewards, bootstrap, truth in (
        (torch.tensor([7.0]), torch.tensor([0.5]), 7.5),
        (torch.zeros(1, steps), torch.full((1, steps), 5.0), 5.0),
    ):
        call = Call("gae", {"rewards": rewards, "values": values}, rest | {"bootstrap": bootstrap})
        assert outputs_on(call, backend, device)[1][0, :valid].tolist() == pytest.approx([truth] * valid, rel=1e-6)


@pytest.mark.parametrize("case", SEGMENT_CASES)
@pytest.mark.backends("triton")
def test_triton_splits_rows(backend, device, case, monkeypatch):
    """Segments of 1024 tokens, side by side and one after another: right, and the same bits; packed too."""
    from rlfast.kernels import affine_scan as kernel

    monkeypatch.setattr(kernel, "SEGMENT", 1024)
    call = segment_call(case, 2, 2600)
    packed, _ = with_packed(call, (2600, 2600))
    found = []
    for busy in (0, 528):
        monkeypatch.setattr(kernel, "BUSY", busy)
        found.append([x.cpu() for x in check(call, backend, device)])
        found.append([x.view(2, 2600) for x in outputs_on(packed, backend, device)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert_same_bits(case, a, b)


@pytest.mark.backends("torch", *KERNELS)
def test_one_row_of_a_million_tokens(backend, device):
    n = few(1 << 20, 2000)
    r, v = draw((n,)), draw((n,), seed=1)
    with rlfast.use_backend(backend):
        adv, _ = rlfast.gae(r.to(device), v.to(device), gamma=1.0, lam=1.0)
    truth = r.double().flip(0).cumsum(0).flip(0) - v.double()
    assert float((adv.cpu() - truth).abs().max()) <= 1e-6 * float(truth.abs().max())


@pytest.mark.backends("torch", *KERNELS)
def test_a_hundred_thousand_rows_of_five(backend, device):
    rows = few(100_000, 50)
    call = call_of("gae", rows, 5)
    packed, _ = with_packed(call, [5] * rows)
    whole = outputs_on(call, backend, device)
    for a, b in zip(outputs_on(packed, backend, device), whole, strict=True):
        assert_same_bits("packed", a, b.reshape(-1))
    some = Call("gae", {k: v[-40:] for k, v in call.inputs.items()}, call.options)
    for a, b in zip(check(some, backend, device), whole, strict=True):
        assert_same_bits("the last rows", a.cpu(), b[-40:])


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0), (0,), (7,), (2, 3, 4), (2, 0, 4)), ids=str)
def test_shapes(backend, device, shape):
    """No rows, no tokens, a single row, many leading dimensions."""
    inputs = {"rewards": draw(shape), "values": draw(shape, seed=1)}
    adv, ret = outputs_on(Call("gae", inputs, {"gamma": 0.9, "lam": 0.8}), backend, device)
    assert adv.shape == ret.shape == shape
    if math.prod(shape) and backend != "reference":
        flat = Call("gae", {k: v.reshape(-1, shape[-1]) for k, v in inputs.items()}, {"gamma": 0.9, "lam": 0.8})
        assert_same_bits("rows", adv.reshape(-1, shape[-1]), outputs_on(flat, backend, device)[0])


def test_rows_that_are_masked_throughout(backend, device):
    nothing = torch.zeros(5, 33, dtype=torch.bool)
    inputs = {"rewards": torch.full((5, 33), torch.nan), "values": torch.full((5, 33), torch.inf)}
    for x in outputs_on(Call("gae", inputs, {"gamma": 0.9, "lam": 0.8, "mask": nothing}), backend, device):
        assert_zero("masked", x)


@pytest.mark.parametrize("masking", ("carry", "zero"))
def test_masked_positions_have_no_effect(backend, device, masking):
    """NaN, infinity or anything else there: the same bits, and 0 comes out."""
    call = call_of("gae", 9, 80, mask="holes", masking=masking, done=mask_of("holes", 9, 80).flip(0))
    mask = call.options["mask"]
    spoiled = {k: torch.where(mask, v, torch.nan) for k, v in call.inputs.items()}
    for a, b in zip(outputs_on(call, backend, device), outputs_on(Call("gae", spoiled, call.options), backend, device),
                    strict=True):  # fmt: skip
        assert_same_bits("spoiled", b, a)
        assert_zero("masked", a[~mask])


def test_nan_stays_in_its_row(backend, device):
    call = call_of("gae", 9, 40)
    rewards = call.inputs["rewards"].clone()
    rewards[4, 20] = torch.nan
    adv, _ = outputs_on(Call("gae", call.inputs | {"rewards": rewards}, call.options), backend, device)
    assert bool(adv[4, :21].isnan().all()) and bool(adv[4, 21:].isfinite().all())
    assert bool(adv[torch.arange(9) != 4].isfinite().all())


@pytest.mark.parametrize("layout", ("sliced", "transposed", "expanded", "shifted"))
def test_strides_do_not_change_bits(backend, device, layout):
    make = {
        "sliced": lambda x: x.repeat(1, 3)[:, :40],
        "transposed": lambda x: x.T.contiguous().T,
        "expanded": lambda x: x[:1].expand(7, 40),
        "shifted": lambda x: torch.cat((x[:, :1], x, x[:, :3]), 1)[:, 1:41],
    }[layout]
    call = call_of("gae", 7, 40, mask="right")
    options = {k: make(v) if isinstance(v, torch.Tensor) else v for k, v in call.options.items()}
    strided = Call("gae", {k: make(v) for k, v in call.inputs.items()}, options)
    dense = Call("gae", {k: v.contiguous() for k, v in strided.inputs.items()},
                 {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in options.items()})  # fmt: skip
    for a, b in zip(outputs_on(strided, backend, device), outputs_on(dense, backend, device), strict=True):
        assert_same_bits(layout, a, b)


@pytest.mark.parametrize("masking", ("carry", "zero"))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("option", ("no discount", "done and truncated", "bootstrap", "rates a row", "rates a token"))
def test_gradients(backend, device, option, mask, masking):
    options = options_of(4, 21)[option]
    if interpreted() and mask != "holes":
        return
    names = ["rewards", "values"] + ["bootstrap"] * ("bootstrap" in options)
    call = call_of("gae", 4, 21, mask=mask, masking=masking, **options)
    check_gradients(call, names, backend, device)


@pytest.mark.parametrize("name", ("lambda_returns", "td_residuals", "discounted_returns"))
def test_gradients_of_the_others(backend, device, name):
    check_gradients(call_of(name, 4, 21, mask="holes"), ["rewards"], backend, device)


def test_gradients_of_what_is_folded_in(backend, device):
    """Two λ, a penalty on each token, a reward for the whole row, whitening, packed rows."""
    call = call_of("gae", 4, 45, mask="holes", **GAE_ONLY["kl"], critic_lam=0.5)
    check_gradients(call, ["rewards", "values", "kl"], backend, device)
    check_gradients(Call("gae", call.inputs | {"rewards": draw((4,))}, call.options), ["rewards"], backend, device)
    packed, _ = with_packed(call_of("gae", len(LENGTHS), 48, bootstrap=draw((len(LENGTHS),), seed=3)), LENGTHS)
    check_gradients(packed, ["rewards", "values", "bootstrap"], backend, device)


@pytest.mark.parametrize("mask", ("none", "holes"))
@pytest.mark.parametrize("rate", ("one for all", "one a row", "one a token"))
@pytest.mark.backends("torch", *KERNELS)
def test_gradients_far_away(backend, device, rate, mask):
    """∂A_0/∂r_k = (γλ)ᵏ over the valid tokens: rates rounded to float32 would be 2e-4 off after 8192 of them."""
    steps, gamma, lam = few(8192, 2000), 0.9999, 0.99999
    shape = {"one for all": (), "one a row": (1,), "one a token": (1, steps)}[rate]
    rates = [x if rate == "one for all" else torch.full(shape, x, dtype=torch.float64) for x in (gamma, lam)]
    options = {"gamma": rates[0], "lam": rates[1]}
    valid = torch.ones(1, steps, dtype=torch.bool)
    if mask == "holes":
        valid = options["mask"] = mask_of("holes", 3, steps)[:1]
    inputs = {"rewards": torch.zeros(1, steps, device=device, requires_grad=True), "values": torch.zeros(1, steps)}
    with rlfast.use_backend(backend):
        adv, _ = Call("gae", inputs, options).on(device).outputs()
        adv[0, valid[0].nonzero()[0, 0]].backward()
    truth = (gamma * lam) ** torch.arange(int(valid.sum()), dtype=torch.float64)
    torch.testing.assert_close(inputs["rewards"].grad.cpu()[valid].double(), truth, rtol=2e-7, atol=0)


@pytest.mark.parametrize("reverse", (True, False))
@pytest.mark.parametrize("mask", ("none", "holes"))
def test_gradients_of_the_bare_scan(backend, device, mask, reverse):
    """The derivative of a scan is the scan the other way."""
    call = call_of("affine_scan", 4, 21, mask=mask, reverse=reverse, initial=draw((4,), seed=3))
    check_gradients(call, ["a", "b", "initial"], backend, device)


@pytest.mark.parametrize("name", ("gae", "affine_scan"))
def test_a_gradient_that_is_expanded(backend, device, name):
    """`.sum()` sends one number with strides of 0."""
    call, found = call_of(name, 4, 21, mask="holes").on(device), []
    for scale in (None, 1.0):
        leaves = {k: v.clone().requires_grad_() for k, v in call.inputs.items()}
        with rlfast.use_backend(backend):
            out = Call(name, leaves, call.options).outputs()[0]
        (out if scale is None else out * torch.ones_like(out)).sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for a, b in zip(*found, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.backends("torch")
def test_gradcheck(backend, device):
    mask = mask_of("holes", 3, 9)
    r, v, start = (draw(shape, seed=i).double().requires_grad_() for i, shape in enumerate(((3, 9), (3, 9), (3,))))

    def gae(r, v, start):
        return rlfast.gae(r, v, mask, gamma=0.9, lam=0.8, bootstrap=start, whiten=True)

    def bare(a, b):
        return rlfast.affine_scan(a, b, mask=mask)

    assert torch.autograd.gradcheck(gae, (r, v, start)) and torch.autograd.gradcheck(bare, (r, v))


def test_vtrace_is_a_constant(backend, device):
    x = draw((2, 5)).to(device).requires_grad_()
    with rlfast.use_backend(backend):
        assert not any(y.requires_grad for y in rlfast.vtrace(x, x, x, gamma=0.9))


@pytest.mark.parametrize("whiten", (
    rlfast.Whiten(), rlfast.Whiten(bessel=False, eps=1e-2), rlfast.Whiten(where="outside", eps=1e-2),
    rlfast.Whiten(where="floor", eps=4.0), rlfast.Whiten(shift_mean=False)), ids=str)  # fmt: skip
def test_whitening(backend, device, whiten):
    for mask in ("none", "holes"):
        check(call_of("gae", 9, 70, mask=mask, whiten=whiten), backend, device)
    packed, _ = with_packed(call_of("gae", len(LENGTHS), 48, whiten=whiten), LENGTHS)
    check(packed, backend, device)


@pytest.mark.parametrize("like", ("trl", "verl", "openrlhf", "torchrl"))
@pytest.mark.parametrize("valid", (0, 1, 2))
def test_whitening_of_hardly_any_tokens(backend, device, valid, like):
    """Masked positions are 0; alone, a token is at the mean."""
    mask = (torch.arange(6) < valid).view(2, 3)
    call = call_of("gae", 2, 3, like=like, whiten=True)
    call = Call("gae", call.inputs, call.options | {"mask": mask})
    adv, _ = outputs_on(call, backend, device)
    assert_zero("masked", adv[~mask])
    assert adv[mask].tolist() == [0.0] if valid == 1 else bool(adv.isfinite().all())
    check(call, backend, device)
    recorded = Call("gae", call.inputs | {"values": call.inputs["values"].clone().requires_grad_()}, call.options)
    adv, _ = [x.detach() for x in outputs_on(recorded, backend, device)]
    assert_zero("masked, recorded", adv[~mask])
    assert adv[mask].tolist() == [0.0] if valid == 1 else bool(adv.isfinite().all())


@pytest.mark.backends("torch", *KERNELS)
@pytest.mark.parametrize("steps", (70, 8000))
def test_whitening_far_from_zero(backend, device, steps):
    """A common offset of 1e6 does not cost the variance its digits, although no double holds the sum of squares."""
    call = call_of("gae", 9 if steps < 100 else 1, few(steps, steps // 10), gamma=0.0, whiten=True)
    inputs = call.inputs | {"rewards": call.inputs["rewards"] + 1e6}
    adv, _ = outputs_on(Call("gae", inputs, call.options), backend, device)
    rounded = (inputs["rewards"].double() - inputs["values"].double()).float()
    truth = reference.masked_whiten(rounded.double(), None)
    assert_value("whitened", adv, truth, truth.float())


def test_scan_forward_is_reverse_of_the_flipped(backend, device):
    a, b = (draw((5, 70), seed=i).sigmoid() for i in (0, 1))
    with rlfast.use_backend(backend):
        forward = rlfast.affine_scan(a.to(device), b.to(device), reverse=False)
        backward = rlfast.affine_scan(a.flip(-1).to(device), b.flip(-1).to(device)).flip(-1)
    assert_same_bits("flipped", forward, backward)


@pytest.mark.backends("torch", *KERNELS)
def test_identities(backend, device):
    """λ-returns, TD errors, returns and per-decision weights by their own definitions."""
    r, v, w = draw((3, 30)), draw((3, 30), seed=1), draw((3, 30), seed=2, scale=0.3)
    with rlfast.use_backend(backend):
        on = [x.to(device) for x in (r, v, w)]
        found = [
            rlfast.lambda_returns(*on[:2], gamma=0.9, lam=0.8),
            rlfast.per_decision_td(*on, gamma=0.9, lam=0.8),
            rlfast.n_step_returns(*on[:2], gamma=0.9, n=1) - on[1],
            rlfast.reward_to_go(on[0]),
        ]
        residuals = rlfast.td_residuals(*on[:2], gamma=0.9)

    def truths(dtype):
        x, y, z = (t.to(dtype) for t in (r, v, w))
        return [
            reference.lambda_returns(x, y, gamma=0.9, lam=0.8),
            reference.per_decision(x, y, z, gamma=0.9, lam=0.8),
            reference.n_step_returns(x, y, gamma=0.9, n=1) - y,
            x.flip(-1).cumsum(-1).flip(-1),
        ]

    for i, (got, truth, own) in enumerate(zip(found, truths(torch.float64), truths(torch.float32), strict=True)):
        assert_value(str(i), got.cpu(), truth, own)
    assert_value("one step", residuals.cpu(), truths(torch.float64)[2], truths(torch.float32)[2])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.backends("cpu")
def test_the_usual_call_has_the_bits_of_the_op(backend, device, mask):
    """It goes past the op where nobody would see it there, and only then."""
    call = call_of("gae", 9, 70, mask=mask)
    short = outputs_on(call, backend, device)
    for a, b in zip(short, outputs_on(Call("gae", call.inputs, call.options | {"masking": "carry"}), backend, device),
                    strict=True):  # fmt: skip
        assert_same_bits(mask, a, b)
    seen = torch.profiler.profile()
    with seen, rlfast.use_backend(backend):
        call.outputs()
    assert any(event.key == "rlfast::affine_scan" for event in seen.key_averages())


def test_the_usual_call_looks_at_devices():
    """A tensor on another device is not read there: the op says what is wrong with it."""
    here, elsewhere = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
    assert scan_op._dense(here, here) and not scan_op._dense(elsewhere, here)
    assert scan_op.usual(elsewhere, here, None, 0.9, 0.9) is None
    assert scan_op.usual(here, here, elsewhere.bool(), 0.9, 0.9) is None


@pytest.mark.gpu
@pytest.mark.backends("cuda")
def test_tensors_on_different_devices(backend, device):
    here, there = torch.zeros(2, 3), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="rewards: expected device cpu like values, got cuda"):
        rlfast.gae(there, here, gamma=0.9, lam=0.9)
    with pytest.raises(ValueError, match="mask: expected device cpu like values, got cuda"):
        rlfast.gae(here, here, there.bool(), gamma=0.9, lam=0.9)


@pytest.mark.parametrize("n", (1, 2, 3, 7, 30, 100))
def test_n_step_returns(n):
    r, v, start = draw((3, 30)), draw((3, 30), seed=1), draw((3,), seed=2)
    got = rlfast.n_step_returns(r, v, gamma=0.9, n=n, bootstrap=start)
    truth = reference.n_step_returns(r.double(), v.double(), gamma=0.9, n=n, bootstrap=start.double())
    own = reference.n_step_returns(r, v, gamma=0.9, n=n, bootstrap=start)
    assert_value(str(n), got, truth, own)
    mask = mask_of("holes", 3, 30)
    masked = rlfast.n_step_returns(torch.where(mask, r, torch.nan), v, mask, gamma=0.9, n=n)
    lengths = mask.sum(-1)
    cu = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    packed = rlfast.n_step_returns(r[mask], v[mask], gamma=0.9, n=n, cu_seqlens=cu)
    assert_same_bits("holes", masked[mask], packed)
    assert_zero("masked", masked[~mask])
    ended = rlfast.n_step_returns(r, v, gamma=0.9, n=n, done=torch.ones(3, 30))
    assert_value("every step ends", ended, r.double(), r)


@pytest.mark.parametrize("shape", ((5,), (4, 5), (2, 3, 5)), ids=str)
def test_n_step_returns_with_a_rate_a_token(shape):
    r, v, gamma = draw(shape), draw(shape, seed=1), torch.rand(shape, generator=torch.Generator().manual_seed(2))
    got = rlfast.n_step_returns(r, v, gamma=gamma, n=2)
    by_row = rlfast.n_step_returns(r, v, gamma=torch.full(shape[:-1], 0.9, dtype=torch.float64), n=2)
    following = [torch.nn.functional.pad(x[..., k:], (0, k)).double() for x in (r, v, gamma) for k in (1, 2)]
    truth = r.double() + gamma * (following[0] + following[4] * following[3])
    assert_value("a token", got, truth, truth.float())
    assert_same_bits("a row", by_row, rlfast.n_step_returns(r, v, gamma=0.9, n=2))


def test_n_step_returns_of_as_many_packed_rows_as_tokens():
    """A rate of that shape is one a row, as in the other estimators."""
    r, v, cu = draw((3,)), draw((3,), seed=1), torch.tensor([0, 0, 3, 3])
    got = rlfast.n_step_returns(r, v, gamma=torch.tensor([0.3, 0.5, 0.9]), n=2, cu_seqlens=cu)
    assert_same_bits("of the second row", got, rlfast.n_step_returns(r, v, gamma=0.5, n=2))


def test_gradcheck_of_n_step_returns():
    mask, done = mask_of("holes", 3, 9), mask_of("holes", 3, 9).flip(0)
    r, v, start = (draw(shape, seed=i).double().requires_grad_() for i, shape in enumerate(((3, 9), (3, 9), (3,))))

    def returns(r, v, start):
        return rlfast.n_step_returns(r, v, mask, gamma=0.9, n=3, done=done, bootstrap=start)

    assert torch.autograd.gradcheck(returns, (r, v, start))


def test_vapo_lam():
    lengths = torch.tensor([1, 20, 40, 2000])
    assert rlfast.vapo_lam(lengths).tolist() == [0.0, 0.0, 0.5, 0.99]


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("gae", "vtrace", "affine_scan"))
def test_opcheck(name):
    call = call_of(name, 4, 21, mask="holes")
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        original = scan_op.call
        patch.setattr(scan_op, "call", lambda *args: (recorded.append(args), original(*args))[1])
        patch.setattr(scan_op, "usual", lambda *_: None)
        call.outputs()
    for grad in (False, True):
        args = [x.detach().requires_grad_(grad and x.is_floating_point() and name != "vtrace")
                if isinstance(x, torch.Tensor) else x for x in recorded[0]]  # fmt: skip
        torch.library.opcheck(scan_op.op, tuple(args))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ("gae", "vtrace", "affine_scan", "discounted_returns"))
def test_compiled_without_a_graph_break(name):
    call = call_of(name, 4, 21, mask="holes", **({"whiten": True} if name == "gae" else {}))
    function = torch.compile(getattr(rlfast, name), fullgraph=True, backend="aot_eager")
    out = function(**call.inputs, **call.options)
    for a, b in zip(out if isinstance(out, tuple) else (out,), call.outputs(), strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.unpoisoned
def test_compiled_backward():
    call = call_of("gae", 4, 21, mask="holes")
    found = []
    for function in (rlfast.gae, torch.compile(rlfast.gae, fullgraph=True, backend="aot_eager")):
        leaves = {k: v.clone().requires_grad_() for k, v in call.inputs.items()}
        adv, ret = function(**leaves, **call.options)
        (adv.square().sum() + ret.sum()).backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for a, b in zip(*found, strict=True):
        assert_same_bits("gradient", a, b)


@pytest.mark.large
@pytest.mark.parametrize("name", ("gae", "vtrace"))
@pytest.mark.parametrize("shape", ((256, 8192), (64, 32768), (3, 1 << 20)), ids=str)
@pytest.mark.backends("torch", *KERNELS)
def test_full_size(backend, device, shape, name):
    """Some rows of a large batch against the same rows alone, to the bit, and those against the oracle."""
    rows, steps = shape if not interpreted() else (3, 3000)
    call = call_of(name, rows, steps, mask="right")
    whole = outputs_on(call, backend, device)
    for r in (0, rows - 1):
        one = Call(name, {k: v[r : r + 1] for k, v in call.inputs.items()},
                   call.options | {"mask": call.options["mask"][r : r + 1]})  # fmt: skip
        for a, b in zip(outputs_on(one, backend, device), whole, strict=True):
            assert_same_bits(name, a[0], b[r])
        few_steps = Call(name, {k: v[:, -9000:] for k, v in one.inputs.items()},
                         one.options | {"mask": one.options["mask"][:, -9000:]})  # fmt: skip
        check(few_steps, backend, device)


@pytest.mark.gpu
@pytest.mark.backends("triton", "cuda")
def test_cuda_graph(backend, device):
    call = call_of("gae", 16, 3000, mask="right").on(device)
    with rlfast.use_backend(backend):
        call.outputs()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call.outputs()
        for x in call.inputs.values():
            x.mul_(2.0)
        graph.replay()
        for a, b in zip(out, call.outputs(), strict=True):
            assert_same_bits("replayed", a, b)


def test_the_backward_runs_on_the_backend_of_the_forward(monkeypatch):
    """Also where another is asked for, or none, by the time that it runs."""
    used = []
    real = backends.select

    def noted(op, device_type, dtype, name):
        used.append(real(op, device_type, dtype, name))
        return used[-1]

    monkeypatch.setattr(backends, "select", noted)
    values = torch.randn(2, 5, requires_grad=True)
    with rlfast.use_backend("torch"):
        _, returns = rlfast.gae(torch.randn(2, 5), values, gamma=0.9, lam=0.8)
    returns.sum().backward()
    assert len(used) > 1 and set(used) == {"torch"}
