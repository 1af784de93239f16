"""``rlfast.patch("verl")``: what it replaces, what it undoes, and how verl's processes ask for it."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys

import pytest

verl = pytest.importorskip("verl", reason='the verl package is missing: pip install --no-deps "verl==0.9.*"')

import rlfast  # noqa: E402
from rlfast.integrations import patching  # noqa: E402
from rlfast.integrations import verl as ours  # noqa: E402
from tests.verl_parity import VERL  # noqa: E402

core, functional = VERL.core, VERL.functional


def bindings() -> dict:
    """Every global of every loaded module of verl, and the entries of its registries."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name == "verl" or name.startswith("verl."):
            found |= {(name, key): value for key, value in list(vars(module).items())}
    for registry in ours.REGISTRIES:
        found |= {(registry, key): value for key, value in getattr(core, registry).items()}
    return found


def changed(before: dict, after: dict) -> set:
    return {key for key in before | after if after.get(key) is not before.get(key)}


def test_undo_restores_everything_and_says_what_was_replaced():
    for name in ("verl.trainer.distillation.losses", ours.CROSS_ENTROPY):
        importlib.import_module(name)
    before = bindings()
    with rlfast.patch("verl") as patch:
        after = changed(before, bindings())
        assert ("verl.trainer.distillation.losses", "agg_loss") in after  # by value
        assert ("POLICY_LOSS_REGISTRY", "rlfast_vanilla") in after
        assert ("ADV_ESTIMATOR_REGISTRY", "rlfast_rloo") in after
        assert ("ADV_ESTIMATOR_REGISTRY", "rlfast_grpo") not in after
        assert {(*name.rpartition(".")[::2],) for name in patch.replaced} == {
            (f"{ours.CORE}.{owner}" if owner in ours.REGISTRIES else owner, key) for owner, key in after
        }
        assert core.get_policy_loss_fn("rlfast_gspo") is core.compute_policy_loss_gspo
    assert not changed(before, bindings())
    assert not patch.active and patch.replaced == ()


def test_every_registered_loss_and_estimator_but_the_bypass_is_replaced():
    with rlfast.patch("verl"):
        found = {
            registry: {n for n, f in getattr(core, registry).items() if getattr(f, "__wrapped__", None) is None}
            for registry in ours.REGISTRIES
        }
    assert found == {"POLICY_LOSS_REGISTRY": {"bypass_mode"}, "ADV_ESTIMATOR_REGISTRY": set()}


def test_patching_twice_is_one_patch():
    before = bindings()
    with rlfast.patch("verl"):
        once = bindings()
        with rlfast.patch("verl"):
            assert not changed(once, bindings())
        assert not changed(once, bindings())
    assert not changed(before, bindings())


def test_what_is_registered_meanwhile_stays():
    def mine(*args, **kwargs):
        return None

    original = core.POLICY_LOSS_REGISTRY["gpg"]
    try:
        with rlfast.patch("verl"):
            core.register_policy_loss("gpg")(mine)
        assert core.POLICY_LOSS_REGISTRY["gpg"] is mine
    finally:
        core.POLICY_LOSS_REGISTRY["gpg"] = original


def test_an_untested_version_is_refused_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(verl, "__version__", "0.10.1")
    with pytest.raises(RuntimeError, match=r"tested with verl 0\.9, found 0\.10\.1.*untested=True"):
        rlfast.patch("verl")
    with rlfast.patch("verl", untested=True) as patch:
        assert f"{ours.CORE}.agg_loss" in patch.replaced


def test_a_changed_signature_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(functional, "entropy_from_logits", lambda logits, rows_at_once=1: logits)
    with pytest.raises(RuntimeError, match=r"entropy_from_logits takes \(logits, rows_at_once\), expected \(logits\)"):
        rlfast.patch("verl")
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("verl", untested=True) as patch:
        assert f"{ours.FUNCTIONAL}.entropy_from_logits" not in patch.replaced
        assert f"{ours.FUNCTIONAL}.logprobs_from_logits" in patch.replaced
    assert "it is left alone" in caplog.text


def test_a_module_that_cannot_be_imported_is_left_alone(monkeypatch, caplog):
    patching.say_once.cache_clear()
    monkeypatch.setitem(sys.modules, ours.CROSS_ENTROPY, None)
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("verl") as patch:
        assert f"{ours.CORE}.agg_loss" in patch.replaced
        assert not any("linear_cross_entropy" in name for name in patch.replaced)
    assert "cannot be imported" in caplog.text


def test_the_plug_in_waits_for_its_setting(monkeypatch, caplog):
    plugin = importlib.import_module("rlfast.integrations.verl_plugin")
    before = bindings()
    for value in (None, "0", ""):
        monkeypatch.delenv("RLFAST_VERL", raising=False) if value is None else monkeypatch.setenv("RLFAST_VERL", value)
        importlib.reload(plugin)
        assert not changed(before, bindings())
    monkeypatch.setenv("RLFAST_VERL", "1")
    importlib.reload(plugin)
    assert hasattr(core.agg_loss, "__wrapped__")
    rlfast.patch("verl").undo()
    assert not changed(before, bindings())
    monkeypatch.setattr(verl, "__version__", "0.10.1")
    with caplog.at_level(logging.ERROR, "rlfast.integrations"), pytest.raises(RuntimeError):
        importlib.reload(plugin)
    assert "verl runs without rlfast: " in caplog.text


def test_to_import_the_external_module_is_to_patch():
    before = bindings()
    module = importlib.import_module("rlfast.integrations.verl_external")
    assert module.patched.active
    module.patched.undo()
    assert not changed(before, bindings())


SCRIPTS = {
    "nothing by itself": ("import rlfast, verl\nimport rlfast.integrations.verl_plugin", {}, False),
    "the plug-in, asked": ("import verl\nimport rlfast.integrations.verl_plugin", {"RLFAST_VERL": "1"}, True),
    "an external module": ("import verl", {"VERL_USE_EXTERNAL_MODULES": "rlfast.integrations.verl_external"}, True),
    "before verl": ("import rlfast\nrlfast.patch('verl')\nimport verl", {}, True),
    "after verl": ("import verl.workers.utils.losses\nimport rlfast\nrlfast.patch('verl')", {}, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_in_a_process_of_its_own(script):
    text, environment, wanted = SCRIPTS[script]
    text += (
        "\nfrom verl.trainer.ppo import core_algos"
        "\nfrom verl.workers.utils import losses"
        "\nprint([hasattr(x, '__wrapped__') for x in (core_algos.compute_gae_advantage_return, losses.agg_loss)])"
    )
    out = subprocess.run(
        [sys.executable, "-c", text], env=os.environ | environment,
        capture_output=True, text=True, timeout=300, check=True,
    ).stdout  # fmt: skip
    assert out.split("\n")[-2] == str([wanted] * 2)
