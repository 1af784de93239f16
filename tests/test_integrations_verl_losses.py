"""verl's losses, patched and not: the same losses, gradients and metrics."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("verl", reason='the verl package is missing: pip install --no-deps "verl==0.9.*"')
import rlfast
from rlfast.integrations import patching, verl_losses
from rlfast.integrations import verl as ours
from tests.verl_parity import MASKS, VERL, actor, batch, mask_of, same, stock

NAMES = tuple(x for x in verl_losses.POLICIES if x != "reinforce")
MODES = tuple(verl_losses.REDUCTIONS)
# So that something is chosen among a few hundred tokens.
CHOICES = {
    "clip_cov_ratio": 0.05, "clip_cov_lb": 0.05, "clip_cov_ub": 4.0, "kl_cov_ratio": 0.05, "ppo_kl_coef": 0.7,
    "dro_beta": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def patched():
    with rlfast.patch("verl"):
        yield


@pytest.fixture(autouse=True)
def as_they_are(monkeypatch):
    """Why a call went to verl; a test that expects none of that finds it empty."""
    said = []
    monkeypatch.setattr(patching, "runs_as_it_is", lambda original, reason: said.append(reason))
    yield said
    assert not said


def run(name, config, mask, mode="token-mean", weighted=False):
    """A registered loss as verl's worker calls it, with what it does to the result."""

    def call(verl, old_log_prob, log_prob, advantages, rollout_is_weights):
        torch.manual_seed(3)  # Clip-Cov draws
        loss, said = verl.core.get_policy_loss_fn(name)(
            old_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages, response_mask=mask,
            loss_agg_mode=mode, config=config, rollout_is_weights=rollout_is_weights if weighted else None,
        )  # fmt: skip
        loss -= 0.5  # the worker takes the entropy bonus off in place
        return loss, said

    return call


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spread", (0.15, 12.0))
def test_policy_losses(name, spread):
    config = actor(**CHOICES)
    same(run(name, config, mask_of()), batch(spread))
    same(run(name, config, mask_of(), weighted=True), batch(spread, seed=1))


@pytest.mark.parametrize("name", NAMES)
def test_policy_losses_with_an_advantage_a_token(name):
    same(run(name, actor(**CHOICES), mask_of()), batch(0.3, token_adv=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ("vanilla", "gspo", "cispo", "gpg"))
def test_modes_and_global_batches(name, mode):
    for info in (
        {},
        {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 17, "loss_scale_factor": 64},
        {"dp_size": 1, "batch_num_tokens": torch.tensor(300), "global_batch_size": torch.tensor(17)},
    ):
        same(run(name, actor(info=info), mask_of(), mode), batch())


@pytest.mark.parametrize("dtype", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_masks(name, dtype):
    same(run(name, actor(**CHOICES), mask_of(dtype)), batch())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name):
    same(run(name, actor(**CHOICES), mask_of()), batch(0.3), torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
def test_own_clip_ranges_and_a_dual_clip_that_acts(name):
    settings = {"clip_ratio": 0.3, "clip_ratio_low": None, "clip_ratio_high": 0.05, "clip_ratio_c": 1.2}
    same(run(name, actor(**CHOICES, **settings), mask_of()), batch(0.4))


@pytest.mark.parametrize("name", ("vanilla", "dppo_tv", "gspo", "cispo", "clip_cov"))
def test_weights_of_zero_hide_nothing_from_the_metrics(name):
    fields = batch(0.4)
    fields["rollout_is_weights"][:, ::3] = 0.0
    same(run(name, actor(**CHOICES), mask_of(), weighted=True), fields)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch(mode):
    same(run("vanilla", actor(), torch.zeros_like(mask_of()), mode), batch())
    info = {"batch_num_tokens": 100, "global_batch_size": 4}
    same(run("vanilla", actor(info=info), torch.zeros_like(mask_of()), mode), batch())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", ((0, 5), (3, 0)))
def test_batches_without_a_row_or_a_column(name, shape):
    fields = dict.fromkeys(batch(), torch.zeros(shape))
    same(run(name, actor(**CHOICES), torch.ones(shape, dtype=torch.bool)), fields)


def test_nan_outside_the_mask_is_not_seen():
    mask, fields = mask_of(), batch()
    config = actor()
    clean = ours.compute_policy_loss_vanilla(**_named(fields), response_mask=mask, config=config)
    fields = {k: torch.where(mask, x, torch.nan) for k, x in fields.items()}
    dirty = ours.compute_policy_loss_vanilla(**_named(fields), response_mask=mask, config=config)
    assert clean[0] == dirty[0] and dirty[1] == pytest.approx(clean[1])


def _named(fields):
    return {k: fields[k] for k in ("old_log_prob", "log_prob", "advantages")}


def test_reinforce_and_the_bypass_mode():
    mask, fields = mask_of(), batch(0.5)

    def reinforce(verl, old_log_prob, log_prob, advantages, rollout_is_weights):
        return verl.core.compute_policy_loss_reinforce(
            rollout_log_prob=old_log_prob, log_prob=log_prob, advantages=advantages, response_mask=mask,
            config=actor(), rollout_is_weights=rollout_is_weights,
        )  # fmt: skip

    same(reinforce, fields)
    for kind in ("reinforce", "ppo_clip"):
        config = actor()
        correction = {"loss_type": kind, "rollout_is": "token", "rollout_is_threshold": 1.2}
        config = types.SimpleNamespace(
            policy_loss={"rollout_correction": correction}, global_batch_info={}, get=config.get,
            **{x: getattr(config, x) for x in ("clip_ratio", "clip_ratio_low", "clip_ratio_high")},
        )  # fmt: skip
        same(run("bypass_mode", config, mask), fields)


@pytest.mark.parametrize("mode", MODES)
def test_agg_loss(mode):
    torch.manual_seed(5)
    losses, counts = torch.randn(9, 40), {"batch_num_tokens": 90, "global_batch_size": 21, "loss_scale_factor": 33}
    for dtype in MASKS:
        same(
            lambda verl, loss_mat, dtype=dtype: verl.core.agg_loss(loss_mat, mask_of(dtype), mode), {"loss_mat": losses}
        )
    same(lambda verl, loss_mat: verl.core.agg_loss(loss_mat, mask_of(), mode, 4, **counts), {"loss_mat": losses})
    same(lambda verl, loss_mat: verl.core.agg_loss(loss_mat, mask_of(), mode), {"loss_mat": losses}, torch.bfloat16)
    same(lambda verl, loss_mat: verl.core.agg_loss(loss_mat, torch.zeros_like(mask_of()), mode), {"loss_mat": losses})


def test_agg_loss_tolerates_nan_outside_the_mask():
    losses = torch.where(mask_of(), torch.randn(9, 40), torch.nan)
    assert torch.equal(ours.agg_loss(losses, mask_of(), "token-mean").isnan(), torch.tensor(False))


@pytest.mark.parametrize("function", ("stock", "patched", "ours"))
def test_agg_loss_complains_as_verl_does(function):
    function = {"stock": stock().core, "patched": VERL.core, "ours": ours}[function].agg_loss
    losses, mask = torch.randn(9, 40), mask_of()
    with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
        function(losses, mask, "mean")
    with pytest.raises(ValueError, match=r"\(global\) batch_num_tokens is required when dp_size > 1"):
        function(losses, mask, "token-mean", dp_size=2)
    with pytest.raises(ValueError, match="global_batch_size is required when dp_size > 1"):
        function(losses, mask, "seq-mean-token-sum", dp_size=2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("mode", MODES)
def test_value_loss(mode, dtype):
    torch.manual_seed(6)
    fields = {"vpreds": torch.randn(9, 40), "returns": torch.randn(9, 40), "old": torch.randn(9, 40)}
    for mask in (mask_of(), mask_of(torch.int64), torch.zeros_like(mask_of())):
        for counts in ({}, {"dp_size": 2, "batch_num_tokens": 90, "global_batch_size": 21}):

            def call(verl, vpreds, returns, old, mask=mask, counts=counts):
                return verl.core.compute_value_loss(
                    vpreds=vpreds, returns=returns, values=old, response_mask=mask, cliprange_value=0.5,
                    loss_agg_mode=mode, **counts,
                )  # fmt: skip

            same(call, fields, dtype)


KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", (*KINDS, *(f"{kind}+" for kind in KINDS)))
def test_kl_penalty(kind, dtype):
    for spread in (0.3, 15.0):
        fields = batch(spread)
        leaves = {"log_prob": fields["log_prob"], "ref": fields["old_log_prob"]}
        same(lambda verl, log_prob, ref: verl.core.kl_penalty(log_prob, ref, kind), leaves, dtype)


@pytest.mark.parametrize("function", ("stock", "patched", "ours"))
def test_kl_penalty_of_another_kind(function):
    function = {"stock": stock().core, "patched": VERL.core, "ours": ours}[function].kl_penalty
    for kind in ("full", "k4"):
        with pytest.raises(NotImplementedError):
            function(torch.zeros(2, 2), torch.zeros(2, 2), kind)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_configuration_they_fail_as_verl_does(name):
    fields = _named(batch())
    for module in (stock().core, VERL.core, ours):
        with pytest.raises(AssertionError):
            getattr(module, f"compute_policy_loss_{name}")(**fields, response_mask=mask_of())


REASONS = {
    "weights in the mask": lambda x: x | {"mask": mask_of(torch.float32) * 0.5},
    "an advantage a sequence": lambda x: x | {"advantages": x["advantages"][:, :1]},
    "an old policy with a gradient": lambda x: x | {"old_log_prob": x["old_log_prob"].requires_grad_()},
    "a count of 0": lambda x: x | {"info": {"batch_num_tokens": 0}},
    "a clip range below 0": lambda x: x | {"low": -0.1},
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_rlfast_does_not_take_goes_to_verl(reason, as_they_are):
    given = REASONS[reason](batch() | {"mask": mask_of(), "info": {}, "low": 0.2})
    config = actor(info=given["info"], clip_ratio_low=given["low"])

    theirs, got = (
        x.core.get_policy_loss_fn("vanilla")(**_named(given), response_mask=given["mask"], config=config)
        for x in (stock(), VERL)
    )
    assert as_they_are
    as_they_are.clear()
    assert torch.equal(got[0], theirs[0]) or bool(got[0].isnan() & theirs[0].isnan())
    assert got[1] == theirs[1]


def test_a_mixture_of_zero_advantages_keeps_verls_geometric_mean(as_they_are):
    fields = batch(0.3, token_adv=True)
    fields["advantages"][1, 3] = 0.0
    VERL.core.get_policy_loss_fn("geo_mean")(**_named(fields), response_mask=mask_of(), config=actor())
    assert as_they_are.pop() == "the advantage is 0 at some tokens of a sequence and not at others"


@pytest.mark.parametrize("wrong", ({"eps_low": 0.202}, {"dual_clip": 3.03}, {"world_size": 1.01}))
def test_a_loss_that_is_off_by_a_hundredth_is_noticed(wrong, monkeypatch):
    def off(name, like, **options):
        made = rlfast.loss(name, like=like, **options | {k: x for k, x in wrong.items() if k in options})
        factor = {k: x for k, x in wrong.items() if k not in options}
        return lambda logp, **call: made(logp, **call | factor)

    monkeypatch.setattr(verl_losses, "objective", off)
    with pytest.raises(AssertionError, match=r"off by|beside"):
        same(run("vanilla", actor(), mask_of()), batch(2.0, seed=2))
