"""OpenRLHF's functions on rlfast equal its own, value and gradient."""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch

from rlfast.integrations import flash_attn
from rlfast.integrations import openrlhf as ours
from tests import openrlhf_code
from tests.numerics import assert_gradient, assert_same_bits, assert_value
from tests.openrlhf_code import fields
from tools.trainer_code import in_float64

MASKS = (torch.bool, torch.int64, torch.float32)
TOLERANCE = {torch.float32: (3e-5, 3e-6), torch.float64: (1e-9, 1e-12)}
CORRECTIONS = (
    {},
    *(
        {"is_correction_level": level, "is_correction_mode": mode, "is_correction_gating": gating,
         "is_correction_threshold": threshold}
        for level, mode, gating, threshold in (
            ("token", "mask", "ratio", (0.5, 5.0)),
            ("token", "mask", "ratio", (0.9, 1.2)),
            ("token", "clip", "ratio", (0.9, 1.2)),
            ("seq", "mask", "ratio", (0.9, 1.05)),
            ("token", "mask", "binary_kl", (0.0, 0.01)),
            ("seq", "mask", "binary_kl", (0.0, 0.02)),
            ("token", "mask", "tv", (0.0, 0.05)),
            ("seq", "mask", "tv", (0.0, 0.06)),
        )
    ),
)  # fmt: skip
# Powers of two: a launch has its numbers in float32, and these are the same in float64.
GLOBAL = {"dp_size": 2, "batch_num_tokens": 64.0, "global_batch_size": 8.0}


@pytest.fixture(scope="module")
def loaded():
    return openrlhf_code.load()


def gathered(utils, loss, maker) -> SimpleNamespace:
    """OpenRLHF's names in one place."""
    names = vars(loss) | vars(utils) | {"RemoteExperienceMaker": maker.RemoteExperienceMaker}
    return SimpleNamespace(**{name: names[name] for name in ours.__all__ if name != "setup_worker"})


@pytest.fixture
def theirs(loaded):
    """Its own functions; the entropy without its compiler, which takes longer than all tests."""
    found = gathered(*loaded)
    found.compute_entropy = found.compute_entropy._torchdynamo_orig_callable
    return found


def by_logits(m, d):
    return m.log_probs_from_logits(d.logits, d.labels)


def warm(m, d):
    return m.log_probs_from_logits(d.logits * 1.0, d.labels, temperature=0.7)


def scored(m, d):
    return m.compute_reward(d.score, 0.05, d.kl, action_mask=d.mask, reward_clip_range=(-1.0, 1.0))


def maker(m, d):
    return m.RemoteExperienceMaker.get_advantages_and_returns(None, d.values, d.rewards, d.mask, 0.99, 0.95)


def returns(m, d):
    return m.RemoteExperienceMaker.get_cumulative_returns(None, d.rewards, d.mask, 0.97)


def dpo(m, d, **options):
    return m.DPOLoss(0.125, **options)(*d.pair)


CASES = {
    "log_probs_from_logits": (by_logits, "logits"),
    "log_probs_from_logits, tempered": (warm, "logits"),
    "compute_entropy": (lambda m, d: m.compute_entropy(d.logits), "logits"),
    **{
        f"compute_approx_kl, {kind} {unbiased} {old}": (
            lambda m, d, kind=kind, unbiased=unbiased, old=old: m.compute_approx_kl(
                d.logp, d.ref, d.old if old else None, kl_estimator=kind, unbiased_gradient=unbiased
            ),
            "logp",
        )
        for kind, unbiased, old in itertools.product(("k1", "k2", "k3"), (False, True), (False, True))
    },
    "compute_reward": (scored, "kl score"),
    "compute_reward, no KL": (lambda m, d: m.compute_reward(d.score, -1.0, d.kl, d.mask), "score"),
    "masked_mean": (lambda m, d: m.masked_mean(d.logp, d.mask), "logp"),
    "masked_mean, rows": (lambda m, d: m.masked_mean(d.logp[:2], d.mask[:2], dim=-1), "logp"),
    "masked_mean, no mask": (lambda m, d: m.masked_mean(d.logp, None, dim=1), "logp"),
    "masked_normalize": (lambda m, d: m.masked_normalize(d.logp, d.mask), "logp"),
    "masked_normalize, columns": (lambda m, d: m.masked_normalize(d.logp, d.mask, dim=0, eps=1e-3), "logp"),
    **{
        f"{name}, {level} {bool(counts)}": (
            lambda m, d, call=call, level=level, counts=counts: call(m, d, level, counts), leaf,
        )
        for (name, (call, leaf)), level, counts in itertools.product(
            {
                "aggregate_loss": (lambda m, d, x, n: m.aggregate_loss(d.kl, d.mask, token_level_loss=x, **n), "kl"),
                "SFTLoss": (lambda m, d, x, n: m.SFTLoss(x)(d.logp, d.mask, **n), "logp"),
                "ValueLoss": (
                    lambda m, d, x, n: m.ValueLoss(0.2, x)(d.values, d.old, d.rewards, d.mask, **n), "values"),
                "ValueLoss, free": (
                    lambda m, d, x, n: m.ValueLoss(None, x)(d.values, d.old, d.rewards, d.mask, **n), "values"),
            }.items(), (True, False), ({}, GLOBAL),
        )
    },
    "GPTLMLoss": (lambda m, d: m.GPTLMLoss()(d.logits, d.labels.masked_fill(~(d.mask != 0), -100)), "logits"),
    "PairWiseLoss": (lambda m, d: m.PairWiseLoss()(d.pair[0], d.pair[1]), "pair"),
    "PairWiseLoss, margin": (lambda m, d: m.PairWiseLoss()(d.pair[0][:, None], d.pair[1][:, None], d.margin[:, None]),
                             "pair"),
    "LogExpLoss": (lambda m, d: m.LogExpLoss()(d.pair[0], d.pair[1]), "pair"),
    "DPOLoss": (dpo, "pair"),
    "DPOLoss, smoothed": (functools.partial(dpo, label_smoothing=0.25), "pair"),
    "DPOLoss, ipo": (functools.partial(dpo, ipo=True), "pair"),
    "get_advantages_and_returns": (maker, ""),
    "get_advantages_and_returns, no mask": (
        lambda m, d: m.RemoteExperienceMaker.get_advantages_and_returns(None, d.values, d.rewards, None, 1.0, 1.0), ""),
    "get_cumulative_returns": (returns, ""),
}  # fmt: skip
NAMES = {name.split(",")[0] for name in CASES} - {"get_advantages_and_returns", "get_cumulative_returns"}


def outcome(call, leaves: str, m, d) -> dict[str, torch.Tensor]:
    """What a call returns, and its gradients."""
    wanted = [getattr(d, name).requires_grad_() for name in leaves.split()]
    if leaves == "pair":  # the reference's log-probs are constants
        d.pair = [*d.pair[:2], *d.pair[2:].detach()]
    out = call(m, d)
    out = out if isinstance(out, tuple) else (out,)
    found = {f"output {i}": x.detach() for i, x in enumerate(out) if x is not None}
    if wanted:
        pull = torch.linspace(0.5, 1.5, out[0].numel()).to(out[0]).reshape(out[0].shape)
        (out[0] * pull).sum().backward()
    return found | {f"d{name}": x.grad for name, x in zip(leaves.split(), wanted, strict=True)}


def compare(got: dict, expected: dict, dtype=torch.float32) -> None:
    """Equal within the rounding of sums."""
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        # what is counted and logged beside a loss is float32
        rtol, atol = TOLERANCE[torch.float32 if name[:6] == "output" and name != "output 0" else dtype]
        torch.testing.assert_close(
            got[name].to(x), x, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("name", CASES)
def test_equals_openrlhf(theirs, name):
    call, leaves = CASES[name]
    for dtype, mask in itertools.product(TOLERANCE, MASKS):
        with in_float64() if dtype == torch.float64 else torch.enable_grad():
            got, expected = (outcome(call, leaves, m, fields(dtype, mask)) for m in (ours, theirs))
        assert all(x.dtype == dtype for x in got.values())
        compare(got, expected, dtype)


def test_every_function_has_a_case():
    assert {*ours.__all__} - {"PolicyLoss", "RemoteExperienceMaker", "setup_worker"} == NAMES


def policy(m, d, options, counts):
    return m.PolicyLoss(**options)(d.logp, d.old, d.adv, d.mask, rollout_log_probs=d.rollout, **counts)


@pytest.mark.parametrize("correction", CORRECTIONS, ids=lambda c: "-".join(map(str, c.values())) or "off")
@pytest.mark.parametrize("kind", ("ppo", "gspo"))
def test_policy_loss_equals_openrlhf(theirs, kind, correction):
    grid = itertools.product((None, 3.0), (True, False), MASKS, ({}, GLOBAL), TOLERANCE)
    for dual, level, mask, counts, dtype in grid:
        options = {"policy_loss_type": kind, "dual_clip": dual, "token_level_loss": level} | correction
        call = functools.partial(policy, options=options, counts=counts)
        with in_float64() if dtype == torch.float64 else torch.enable_grad():
            got, expected = (outcome(call, "logp", m, fields(dtype, mask)) for m in (ours, theirs))
        compare(got, expected, dtype)


def test_policy_loss_far_from_the_old_policy(theirs):
    for kind in ("ppo", "gspo"):
        drifts = [fields(torch.float64) for _ in range(2)]
        for d in drifts:
            d.old = d.logp + 12.0 * d.kl
        call = functools.partial(policy, options={"policy_loss_type": kind, "dual_clip": 3.0}, counts={})
        compare(*(outcome(call, "logp", m, d) for m, d in zip((ours, theirs), drifts, strict=True)), torch.float64)


class Off:
    """rlfast's functions with an error of one percent in what they return."""

    def __getattr__(self, name):
        real = getattr(ours, name)
        if name == "RemoteExperienceMaker":
            return SimpleNamespace(**{n: self.wrong(getattr(real, n)) for n in vars(real) if n.startswith("get_")})
        return lambda *args, **kw: (
            self.wrong(real(*args, **kw)) if isinstance(real, type) else self.wrong(real)(*args, **kw)
        )

    @staticmethod
    def wrong(function):
        def call(*args, **kwargs):
            out = function(*args, **kwargs)
            return tuple(x if x is None else 1.01 * x for x in out) if isinstance(out, tuple) else 1.01 * out

        return call


@pytest.mark.parametrize("name", [*CASES, "PolicyLoss"])
def test_an_error_of_one_percent_is_noticed(theirs, name):
    call, leaves = CASES.get(name) or (functools.partial(policy, options={}, counts={}), "logp")
    got, expected = (outcome(call, leaves, m, fields(torch.float32)) for m in (Off(), theirs))
    with pytest.raises(AssertionError):
        compare(got, expected)
    for name in got:  # each alone would be noticed too
        with pytest.raises(AssertionError):
            compare({name: got[name]}, {name: expected[name]})


@pytest.mark.parametrize("mask", MASKS)
def test_nothing_to_average_is_nan_as_in_openrlhf(theirs, mask):
    for m in (ours, theirs):
        d = fields(torch.float32, mask)
        d.mask = torch.zeros_like(d.mask)
        for out in (
            m.masked_mean(d.logp, d.mask), m.masked_mean(d.logp, d.mask, dim=-1), m.SFTLoss()(d.logp, d.mask),
            m.aggregate_loss(d.logp, d.mask, token_level_loss=False), m.ValueLoss()(d.values, d.old, d.adv, d.mask),
            *m.PolicyLoss()(d.logp, d.old, d.adv, d.mask)[:3],
        ):  # fmt: skip
            assert out.isnan().all()
        assert m.PolicyLoss()(d.logp, d.old, d.adv, d.mask, **GLOBAL)[0] == 0
        pairs = d.pair[:, :0]
        for out in (m.PairWiseLoss()(*pairs[:2]), m.LogExpLoss()(*pairs[:2]), m.DPOLoss(0.1)(*pairs)[0]):
            assert out.isnan()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_a_large_vocabulary_and_half_precision(theirs, dtype):
    """The truth is OpenRLHF's function of the same numbers in float64, and the yardstick it in float32."""
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 5, 50257).mul(3).to(dtype), torch.randint(50257, (2, 4))

    def run(call, x):
        leaf = x.clone().requires_grad_()
        out = call(leaf[:, :-1])
        out.sum().backward()
        return out.detach(), leaf.grad

    for call in (lambda m, x: m.log_probs_from_logits(x, labels), lambda m, x: m.compute_entropy(x)):
        got = run(functools.partial(call, ours), logits)
        truth, yardstick = (run(functools.partial(call, theirs), logits.to(d)) for d in (torch.float64, torch.float32))
        assert got[0].dtype == torch.float32 and got[1].dtype == dtype
        assert_value("value", got[0], truth[0], yardstick[0])
        assert_gradient("gradient", got[1], truth[1], yardstick[1])


def test_the_temperature_divides_the_logits_as_in_openrlhf(theirs):
    d, own = fields(torch.float32), fields(torch.float32)
    ours.log_probs_from_logits(d.logits, d.labels, temperature=0.6)
    theirs.log_probs_from_logits(own.logits, own.labels, temperature=0.6)
    assert_same_bits("logits", d.logits, own.logits)


def test_openrlhf_takes_the_stand_in_for_flash_attn(loaded, monkeypatch):
    """Its own function, which asks for flash-attn's cross-entropy at each call."""
    calls, kernel = [], flash_attn.token_logps
    monkeypatch.setattr(flash_attn, "token_logps", lambda *args, **kw: calls.append(1) or kernel(*args, **kw))
    d = fields(torch.float32)
    own = loaded[0].log_probs_from_logits(d.logits, d.labels)
    with flash_attn.install():
        got = loaded[0].log_probs_from_logits(d.logits, d.labels)
    assert len(calls) == 1
    torch.testing.assert_close(got, own, rtol=1e-5, atol=1e-6)


def test_a_policy_loss_that_cannot_be():
    for options in (
        {"is_correction_level": "word"}, {"is_correction_mode": "cut"}, {"is_correction_gating": "kl"},
        {"is_correction_mode": "clip", "is_correction_level": "seq"}, {"policy_loss_type": "dapo"},
        {"is_correction_gating": "tv", "is_correction_level": "token"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options)) if len(options) == 1 else "is_correction_"):
            ours.PolicyLoss(**options)
    with pytest.raises(AssertionError, match="dual_clip"):
        ours.PolicyLoss(dual_clip=0.5)
    with pytest.raises(ValueError, match="ring_attn_group"):
        ours.GPTLMLoss(ring_attn_group=object())
    d = fields(torch.float32)
    with pytest.raises(TypeError, match="rollout_log_probs: expected a tensor with is_correction"):
        ours.PolicyLoss(is_correction_level="seq")(d.logp, d.old, d.adv, d.mask)
    with pytest.raises(TypeError, match="action_mask: expected"):
        ours.compute_reward(d.score, 0.1, d.kl)
    with pytest.raises(ValueError, match="kl_estimator"):
        ours.compute_approx_kl(torch.zeros(2), torch.zeros(2), kl_estimator="abs")
