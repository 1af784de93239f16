"""``token_loss`` on every backend against the oracle, over its axes and where losses go wrong."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import rlfast
from rlfast.kernels.formulas import ESTIMATORS
from tests.cases import f32, few, interpreted, pairwise, product
from tests.loss_cases import AXES, BUILT_IN, LossCase, case_of, check, drawn, hold, oracle, run, yardsticks
from tests.numerics import assert_same_bits, assert_value, assert_zero

OP = "token_loss"
# What can interact inside a kernel, for the full product.
PRODUCT = {
    "surrogate": ("ppo_clip", "sapo", "squared_residual"),
    "unit": AXES["unit"],
    "reduce": AXES["reduce"],
    "kl": (None, "k3"),
    "correction": ("none", "icepop", "masked_tokens", "masked_sequences"),
    "bounds": ("none", "signed"),
    "layout": ("padded", "packed", "by_token"),
}


def label(combination: dict) -> str:
    """A test id: what differs from the defaults."""
    parts = [f"{k}={v}" for k, v in combination.items() if v != AXES[k][0]]
    return ",".join(parts) or "defaults"


def pytest_generate_tests(metafunc):
    if "combination" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full-product")
        rows = product(PRODUCT) if full and not interpreted() else pairwise(AXES)
        metafunc.parametrize("combination", rows, ids=[label(row) for row in rows])


def test_pairwise(backend, device, combination):
    check(case_of(combination), backend, device)


@pytest.mark.parametrize("surrogate", BUILT_IN)
@pytest.mark.parametrize("unit", ("token", "seq_mean"))
@pytest.mark.parametrize("hyper", AXES["hyper"])
def test_every_surrogate(backend, device, surrogate, unit, hyper):
    check(case_of({"surrogate": surrogate, "unit": unit, "hyper": hyper}), backend, device)


@pytest.mark.parametrize("kl", ESTIMATORS)
def test_every_estimator(backend, device, kl):
    check(case_of({"kl": kl, "kl_ratio": "token", "reduce": "seq_mean_token_mean"}), backend, device)


def adversarial(name: str) -> LossCase:
    """The inputs that losses are known to go wrong on."""
    case = case_of({"kl": "k3", "entropy_coef": 0.125})
    fields = dict(case.fields)
    logp, mask = fields["logp"].clone(), fields["mask"].clone()
    if name == "at the clip's edges":
        # an edge is met exactly at r = 1 with ε = 0; the others from both sides, closer than any real batch comes
        edges = torch.tensor([0.8, 0.8, 3.0, 3.0]) * torch.tensor([1 - 1e-5, 1 + 1e-5, 1 - 1e-5, 1 + 1e-5])
        fields["old_logp"] = logp - torch.cat((edges.log(), torch.zeros(4)))[torch.arange(logp.shape[1]) % 8]
        hyper = {"dual_clip": 3.0, "eps_low": 0.2, "eps_high": 0.0}
        case = replace(case, objective=replace(case.objective, hyper=hyper))
    if name == "no advantage":
        fields["adv"] = torch.zeros_like(fields["adv"])
    if name == "80 nats apart":
        fields["old_logp"] = logp - torch.where(torch.arange(logp.shape[1]) % 2 == 0, 80.0, -80.0)
    if name == "garbage under the mask":
        for field, x in fields.items():
            if field not in ("mask", "keep", "adv"):
                bad = torch.where(torch.arange(logp.shape[1]) % 2 == 0, torch.nan, -torch.inf)
                fields[field] = torch.where(mask, x, bad.to(x.dtype))
        fields["adv"] = torch.where(mask, fields["adv"], torch.nan)
    if name == "masked sequences":
        mask[::2] = False
        fields["mask"] = mask
    if name == "nothing counts":
        fields["mask"] = torch.zeros_like(mask)
    if name == "one token":
        fields = {k: x[:1, :1] for k, x in fields.items()}
        fields["mask"] = torch.ones(1, 1, dtype=torch.bool)
    if name == "an integer mask":
        fields["mask"] = mask.long()
    if name == "a float mask":
        fields["mask"] = mask.float()
    if name == "very uneven lengths":
        fields["mask"] = torch.arange(logp.shape[1]) < (torch.arange(logp.shape[0]) ** 2).unsqueeze(1) % logp.shape[1]
    if name == "NaN of the sampler":
        fields["rollout_logp"] = torch.where(mask & (logp < -1.0), torch.nan, fields["rollout_logp"])
        case = replace(case, objective=replace(case.objective, correction="icepop", off_policy=0.01))
    return replace(case, fields=fields)


ADVERSARIAL = (
    "at the clip's edges", "no advantage", "80 nats apart", "garbage under the mask", "masked sequences",
    "nothing counts", "one token", "an integer mask", "a float mask", "very uneven lengths", "NaN of the sampler",
)  # fmt: skip


@pytest.mark.parametrize("unit", ("token", "seq_mean"))
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial(backend, device, name, unit):
    case = adversarial(name)
    check(replace(case, objective=replace(case.objective, unit=unit)), backend, device)


@pytest.mark.parametrize("surrogate", BUILT_IN)
@pytest.mark.parametrize("unit", ("token", "seq_mean"))
def test_a_nan_that_counts_is_in_the_loss(backend, device, surrogate, unit):
    """No clip hides it; what other sequences have is what they had."""
    case = case_of({"surrogate": surrogate, "unit": unit, "reduce": "seq_mean_token_mean"})
    row, column = case.fields["mask"].nonzero()[0].tolist()
    logp = case.fields["logp"].clone()
    logp[row, column] = torch.nan
    clean, gradients = run(case, backend, device)
    out, with_nan = run(replace(case, fields=case.fields | {"logp": logp}), backend, device)
    assert clean.loss.isfinite() and out.loss.isnan()
    assert all(out.metrics[name].isnan() for name in ("policy_loss", "ess", "ratio_mean", "ratio_max", "approx_kl_k1"))
    others = torch.arange(logp.shape[0]) != row
    assert_same_bits("the others' gradient", with_nan["logp"].cpu()[others], gradients["logp"].cpu()[others])


@pytest.mark.parametrize("shape", ((0, 5), (3, 0), (0, 0)))
@pytest.mark.parametrize("name", ("ppo", "gspo"))
def test_an_empty_batch(backend, device, shape, name):
    logp = torch.zeros(shape, device=device, requires_grad=True)
    with rlfast.use_backend(backend):
        out = rlfast.loss(name)(logp, adv=torch.zeros(shape, device=device), old_logp=logp.detach())
        out.loss.backward()
    assert out.loss.item() == 0.0 and logp.grad.shape == shape
    assert out.metrics["tokens"].item() == 0.0


def test_empty_packed(backend, device):
    logp = torch.zeros(0, device=device, requires_grad=True)
    ends = torch.zeros(3, dtype=torch.int64, device=device)
    with rlfast.use_backend(backend):
        out = rlfast.loss("grpo", kl=None)(logp, adv=torch.zeros(2, device=device), cu_seqlens=ends)
        out.loss.backward()
    assert out.loss.item() == 0.0 and logp.grad.numel() == 0


@pytest.mark.parametrize("name", ("grpo", "gspo", "vespo", "kimi"))
def test_packed_is_padded(backend, device, name):
    """The same tokens, with and without the padding between them."""
    objective = rlfast.loss(name)
    fields = drawn(12, few(50, 9), "f32")
    del fields["weights"], fields["keep"]
    padded, packed = LossCase(objective, fields), LossCase(objective, fields, packed=True)
    truths, own = oracle(padded, torch.float64), yardsticks(padded)
    for case in (padded, packed):
        hold(padded, *run(case, backend, device), truths, own)


@pytest.mark.parametrize("unit", ("token", "seq_sum"))
def test_the_same_bits_run_after_run(backend, device, unit, threads):
    case = case_of({"unit": unit, "kl": "k3", "reduce": "seq_mean_token_mean"})
    case = replace(case, fields=drawn(few(64, 4), few(300, 20), "f32"))
    first, gradients = run(case, backend, device)
    for count in (1, 2) * few(5, 1):
        if backend == "cpu":
            threads(count)
        again, others = run(case, backend, device)
        assert_same_bits("metrics", again.metrics.values, first.metrics.values)
        assert_same_bits("gradient", others["logp"], gradients["logp"])


@pytest.mark.parametrize("unit", ("token", "seq_mean"))
@pytest.mark.parametrize("length", (1, 13, 37))
def test_without_a_mask(backend, device, length, unit):
    """What lies beyond the last whole vector of a row is no token."""
    fields = {k: x for k, x in drawn(few(5, 3), length, "f32").items() if k not in ("mask", "keep")}
    objective = rlfast.Loss("ppo_clip", kl="k3", beta=0.25, unit=unit, entropy_coef=0.5)
    check(LossCase(objective, fields), backend, device)


@pytest.mark.parametrize("level", ("token", "seq_sum", "seq_mean"))
def test_a_weight_between_bounds(backend, device, level):
    correction = rlfast.corrections.Correction(weight=level, low=f32(0.98), high=f32(1.01))
    check(LossCase(rlfast.Loss("ppo_clip", correction=correction), drawn(few(12, 3), 21, "f32")), backend, device)


@pytest.mark.parametrize("kl_ratio", ("unit", "token", "score"))
def test_a_bounded_kl(backend, device, kl_ratio):
    """Beyond its bound an estimate is a constant, and has no score term."""
    bounds = {"kl_d_max": f32(0.25), "kl_max": f32(0.02)}
    objective = rlfast.Loss("ppo_clip", kl="k2", beta=0.25, kl_ratio=kl_ratio, **bounds)
    check(LossCase(objective, drawn(few(12, 4), 21, "f32")), backend, device)


@pytest.mark.parametrize("limit", (0.0, 0.005, 0.02))
def test_what_is_too_far_off_policy(backend, device, limit):
    objective = rlfast.Loss("ppo_clip", off_policy=f32(limit))
    check(LossCase(objective, drawn(few(12, 8), 21, "f32")), backend, device)


def test_the_mean_entropy_is_of_the_kept_tokens(backend, device):
    objective = rlfast.Loss("ppo_clip", entropy_coef=0.5, entropy_mean=True)
    check(LossCase(objective, drawn(few(12, 3), 21, "f32")), backend, device)


def test_a_row_does_not_depend_on_its_batch(backend, device):
    """The gradient of a sequence's tokens, but for the denominator, has the same bits alone and among others."""
    objective = rlfast.loss("grpo", reduce="token_sum", kl="k3", unit="seq_mean")
    fields = drawn(5, few(300, 20), "f32")
    _, together = run(LossCase(objective, fields), backend, device)
    alone = {k: x[2:3] for k, x in fields.items()}
    _, single = run(LossCase(objective, alone), backend, device)
    assert_same_bits("gradient", single["logp"], together["logp"][2:3])


@pytest.mark.backends("reference", "torch", "cpu", "cuda")
def test_many_rows(backend, device):
    """More rows than a grid has in its second and third dimension."""
    rows = 70_000
    fields = {k: x for k, x in drawn(rows, 2, "f32").items() if k in ("logp", "old_logp", "adv", "mask")}
    check(LossCase(rlfast.loss("gspo"), fields), backend, device)


def test_strides(backend, device):
    """An expanded advantage, sliced and transposed fields."""
    fields = drawn(few(12, 3), few(40, 10), "f32")
    plain = LossCase(rlfast.loss("grpo"), fields)
    truths, own = oracle(plain, torch.float64), yardsticks(plain)
    moved = {k: x.T.contiguous().T for k, x in fields.items()}
    moved["adv"] = fields["adv"].expand(fields["logp"].shape)
    moved["old_logp"] = torch.cat((fields["old_logp"],) * 2, 1)[:, : fields["logp"].shape[1]]
    hold(plain, *run(replace(plain, fields=moved), backend, device), truths, own)


def test_upstream_and_second_backward(backend, device):
    """The gradient scales with what comes from above, and the graph can be walked twice."""
    fields = drawn(few(12, 3), few(40, 10), "f32")
    logp = fields["logp"].to(device).requires_grad_()
    rest = {k: fields[k].to(device) for k in ("old_logp", "mask")} | {"adv": fields["adv"].squeeze(1).to(device)}
    with rlfast.use_backend(backend):
        loss = rlfast.loss("ppo")(logp, **rest).loss
    (once,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logp, retain_graph=True)
    assert_same_bits("gradient", again, once)
    (tripled,) = torch.autograd.grad(3.0 * loss, logp, retain_graph=True)
    assert_value("3 × gradient", tripled.cpu(), 3.0 * once.cpu().double(), 3.0 * once.cpu())
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (g,) = torch.autograd.grad(loss, logp, create_graph=True)
        g.sum().backward()


def test_no_gradient_is_asked_for(backend, device):
    fields = drawn(few(12, 3), few(40, 10), "f32")
    with torch.no_grad(), rlfast.use_backend(backend):
        out = rlfast.loss("ppo")(
            fields["logp"].to(device), adv=fields["adv"].squeeze(1).to(device), old_logp=fields["old_logp"].to(device)
        )
    assert not out.loss.requires_grad and math.isfinite(out.loss.item())


def test_only_the_entropy_needs_a_gradient(backend, device):
    fields = drawn(few(12, 3), few(40, 10), "f32")
    entropy = fields["entropy"].to(device).requires_grad_()
    with rlfast.use_backend(backend):
        out = rlfast.loss("ppo", entropy_coef=0.5)(
            fields["logp"].to(device), adv=fields["adv"].squeeze(1).to(device), entropy=entropy,
            mask=fields["mask"].to(device),
        )  # fmt: skip
        out.loss.backward()
    assert_zero("gradient of masked entropies", entropy.grad.cpu()[~fields["mask"]])
    wanted = -0.5 * fields["mask"].double() / fields["mask"].sum()
    assert_value("gradient of the entropy", entropy.grad.cpu(), wanted, wanted.float())


@pytest.mark.large
@pytest.mark.backends("torch", "cpu", "triton", "cuda")
@pytest.mark.parametrize("name", ("grpo", "gspo"))
def test_full_size(backend, device, name):
    """4M tokens."""
    fields = drawn(few(4096, 8), few(1024, 64), "f32")
    check(LossCase(rlfast.loss(name), fields), backend, device)
