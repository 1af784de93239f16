"""``rlfast.patch("openrlhf")``, before its import and after it, in Ray's workers, and its undo."""

from __future__ import annotations

import importlib.metadata
import logging
import sys

import pytest
import torch

import rlfast
from rlfast.integrations import openrlhf as ours
from rlfast.integrations import patching
from tests import openrlhf_code
from tests.openrlhf_code import B, T, fields


def bindings() -> dict:
    """Every global of OpenRLHF's modules, and the attributes of their classes."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "openrlhf":
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {(name, key, attribute): x for attribute, x in vars(value).items()}
    return found


def replaced() -> list[str]:
    """The names in OpenRLHF's modules, and in their classes, that hold a function of rlfast."""
    found = []
    for key, value in bindings().items():
        if getattr(value, "__globals__", {}).get("__name__") == "rlfast.integrations.patching":
            found.append(".".join(key))
    return found


@pytest.fixture(scope="module")
def patched_before():
    """What a patch said and did that was there before OpenRLHF; it is undone."""
    for name in [name for name in sys.modules if name.split(".")[0] == "openrlhf"]:
        del sys.modules[name]
    ours.setup_worker()
    undo = rlfast.patch("openrlhf")
    said = repr(undo).rpartition(": ")[2].rstrip(">"), undo.active, undo.replaced
    openrlhf_code.load()
    held = replaced()
    undo()
    return said, held, replaced()


@pytest.fixture(scope="module")
def loaded(patched_before):
    return openrlhf_code.load()


def changed(before: dict) -> set[str]:
    after = bindings()
    return {".".join(key) for key in before if after.get(key) is not before[key]}


def test_patch_reaches_every_name_and_undo_restores_it(loaded):
    before, finders = bindings(), list(sys.meta_path)
    undo = rlfast.patch("openrlhf")
    try:
        names = changed(before)
        assert names == set(undo.replaced)
        assert {
            "openrlhf.models.actor.log_probs_from_logits",
            "openrlhf.models.actor.compute_entropy",
            "openrlhf.models.aggregate_loss",
            f"{openrlhf_code.MAKER}.compute_reward",
            f"{openrlhf_code.MAKER}.RemoteExperienceMaker.get_advantages_and_returns",
        } <= names
        assert not any(x in name for name in names for x in ("compute_approx_kl", "masked_"))
        with rlfast.patch("openrlhf") as again:
            assert changed(before) == names and again.replaced == undo.replaced
        assert undo.active
        d = fields(torch.float32)
        own = ours.PolicyLoss()(d.logp, d.old, d.adv, d.mask)
        for x, y in zip(loaded[1].PolicyLoss()(d.logp, d.old, d.adv, d.mask), own, strict=True):
            assert x is y is None or torch.equal(x, y)
    finally:
        undo()
    assert not changed(before) and sys.meta_path == finders
    assert not undo.active and undo.replaced == ()


def test_originals_run_where_rlfast_cannot_and_say_so_once(loaded, caplog):
    utils, loss, module = loaded
    d, maker_of = fields(torch.float32), module.RemoteExperienceMaker
    weights, ring = torch.rand(B, T), loss.GPTLMLoss()
    gated = loss.PolicyLoss(is_correction_level="token", is_correction_threshold=(2.0, 0.5))
    calls = {
        "holds other numbers than 0 and 1": lambda: loss.aggregate_loss(d.logp, weights, batch_num_tokens=9),
        "shapes are not one": lambda: loss.aggregate_loss(d.kl, d.mask[:1], batch_num_tokens=9),
        "a global count is 0": lambda: loss.aggregate_loss(d.logp, d.mask, batch_num_tokens=0),
        "advantages needs a gradient": lambda: loss.PolicyLoss()(d.logp, d.old, d.adv.requires_grad_(), d.mask)[0],
        "clip_eps is 0": lambda: loss.ValueLoss(0)(d.values, d.old, d.rewards, d.mask),
        "clip_eps is inf": lambda: loss.ValueLoss(float("inf"))(d.values, d.old, d.rewards, d.mask),
        "eps_low: expected": lambda: loss.PolicyLoss(clip_eps_low=-0.1)(d.logp, d.old, d.rewards, d.mask)[0],
        "gate_low, gate_high: expected": lambda: gated(d.logp, d.old, d.rewards, d.mask, d.rollout)[0],
        "beta: expected": lambda: loss.DPOLoss(0.0)(*d.pair)[0],
        "label_smoothing: expected": lambda: loss.DPOLoss(0.1, label_smoothing=1.5)(*d.pair)[0],
        "margin is no constant": lambda: loss.PairWiseLoss()(d.pair[0], d.pair[1], 0.5),
        "log-probs are of shape": lambda: loss.DPOLoss(0.1)(*d.pair[:, :, None])[0],
        "beside logits": lambda: utils.log_probs_from_logits(d.logits.double(), d.labels[:, :, None].expand(-1, -1, 1)),
        "not of one shape": lambda: utils.compute_reward(d.score, 0.1, d.kl, d.mask[:, 1:]),
        "rewards is torch.int64": lambda: maker_of.get_cumulative_returns(None, d.rewards.long(), d.mask, 1.0),
        "gamma is 1.5": lambda: maker_of.get_cumulative_returns(None, d.rewards, d.mask, 1.5),
    }
    ring.ring_attn_group = object()
    for reason, call in calls.items():
        patching.say_once.cache_clear()
        caplog.clear()
        outcomes = []
        with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("openrlhf"):
            for _ in range(2):
                outcomes.append(attempt(call))
        assert len(caplog.records) == 1 and reason in caplog.text and "runs as it is" in caplog.text, reason
        own = attempt(call)
        assert type(outcomes[0]) is type(own)
        if isinstance(own, torch.Tensor):
            torch.testing.assert_close(outcomes[0], own)
    assert "ring attention" in ours.losses.gpt_unsupported(ring, d.logits, d.labels)


def attempt(call):
    """What it returns or raises."""
    try:
        return call()
    except Exception as error:
        return error


def test_versions_and_signatures_that_are_not_known(loaded, monkeypatch, caplog):
    utils = loaded[0]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.12.0")
    with pytest.raises(RuntimeError, match=r"tested with openrlhf 0\.11, found 0\.12\.0.*untested=True"):
        rlfast.patch("openrlhf")
    monkeypatch.setattr(utils, "compute_reward", lambda r, kl: r)
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("openrlhf", untested=True) as patch:
        assert "openrlhf.models.utils.compute_entropy" in patch.replaced
        assert "openrlhf.models.utils.compute_reward" not in patch.replaced
    assert "compute_reward takes (r, kl), expected (r, kl_coef" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(utils, "compute_reward", lambda r, kl: r)
    with pytest.raises(RuntimeError, match="does not look as it should"):
        rlfast.patch("openrlhf")


def test_patch_before_the_import(patched_before):
    """As a worker's hook does it: nothing of OpenRLHF was there."""
    said, held, after = patched_before
    assert said == ("awaits its import", True, ())
    assert set(held) >= {
        "openrlhf.models.utils.log_probs_from_logits",
        "openrlhf.models.actor.compute_entropy",
        "openrlhf.models.aggregate_loss",
        "openrlhf.models.loss.PolicyLoss.forward",
        f"{openrlhf_code.MAKER}.compute_reward",
        f"{openrlhf_code.MAKER}.RemoteExperienceMaker.get_cumulative_returns",
    }
    assert after == []


@pytest.mark.slow
def test_a_ray_worker_is_patched_by_its_setup_hook():
    import ray

    path = [x for x in sys.path if x]
    environment = {"env_vars": {"PYTHONPATH": ":".join(path)}}
    hook = {"worker_process_setup_hook": "rlfast.integrations.openrlhf.setup_worker"}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False,
             runtime_env=environment | hook)  # fmt: skip
    try:

        @ray.remote
        def inside():
            waits = [x.names for x in sys.meta_path if type(x).__name__ == "AfterImport"]
            return waits, "deepspeed" in sys.modules or "openrlhf.models" in sys.modules

        assert ray.get(inside.remote(), timeout=300) == ([ours.WATCHED], False)
    finally:
        ray.shutdown()
