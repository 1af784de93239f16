"""``rlfast.patch("trl")``: what it reaches, that it comes off again, and what it refuses."""

from __future__ import annotations

import importlib
import inspect
import logging
import sys

import pytest

import rlfast

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from trl.trainer import utils  # noqa: E402


def bindings():
    """Every global of every loaded TRL module, and the static methods of its classes that the patch knows."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name == "trl" or name.startswith("trl."):
            for key, value in list(vars(module).items()):
                found[name, key] = value
                for method in ("get_batch_logps", "generalized_jsd_loss") if inspect.isclass(value) else ():
                    if method in vars(value):
                        found[name, key, method] = vars(value)[method]
    return found


def changed(before, after):
    return {key for key in before if after.get(key) is not before[key]}


BY_NAME = (
    "a2po.a2po_trainer.selective_log_softmax",
    "cpo.cpo_trainer.selective_log_softmax",
    "cpo.cpo_trainer.CPOTrainer.get_batch_logps",
    "orpo.orpo_trainer.selective_log_softmax",
    "orpo.orpo_trainer.ORPOTrainer.get_batch_logps",
    "sdft.loss_utils.selective_log_softmax",
    "sdft.sdft_trainer.selective_log_softmax",
    "sdpo.loss_utils.selective_log_softmax",
    "sdpo.sdpo_trainer.selective_log_softmax",
    "tpo.tpo_trainer.selective_log_softmax_and_entropy",
    "gkd.gkd_trainer.GKDTrainer.generalized_jsd_loss",
    "gold.gold_trainer.GOLDTrainer.generalized_jsd_loss",
    "iw_opd.iw_opd_trainer.IWOPDTrainer.generalized_jsd_loss",
)


def test_undo_restores_everything_and_says_what_was_replaced():
    for name in BY_NAME:
        importlib.import_module("trl.experimental." + ".".join(name.split(".")[:2]))
    importlib.import_module("trl.trainer.distillation_trainer")
    before = bindings()
    undo = rlfast.patch("trl")
    try:
        names = {".".join(key) for key in changed(before, bindings())}
        assert {
            "trl.trainer.utils._ChunkedLogProbFunction",
            "trl.trainer.utils._use_triton",
            "trl.trainer.utils.selective_log_softmax",
            "trl.trainer.utils.entropy_from_logits",
            "trl.trainer.utils.selective_log_softmax_and_entropy",
            "trl.kernels.ChunkedLogProbFunction",
            "trl.kernels.chunked_divergence.ChunkedDivergenceFunction",
            "trl.trainer.distillation_trainer.ChunkedDivergenceFunction",
            "trl.trainer.distillation_trainer._use_triton",
            *(f"trl.experimental.{name}" for name in BY_NAME),
        } <= names & set(undo.replaced)
        assert "trl.kernels.chunked_logprob._use_triton" not in names, "TRL's own kernel must still ask the device"
        assert all(name in repr(undo) for name in undo.replaced)
    finally:
        undo()
    assert not changed(before, bindings())
    assert not undo.active and undo.replaced == () and "undone" in repr(undo)
    undo()
    assert not changed(before, bindings())


def test_undo_reaches_modules_imported_meanwhile():
    name = "trl.experimental.a2po.a2po_trainer"
    sys.modules.pop(name, None)
    original = utils.selective_log_softmax
    with rlfast.patch("trl"):
        module = importlib.import_module(name)
        assert module.selective_log_softmax is utils.selective_log_softmax is not original
    assert module.selective_log_softmax is original


def test_patching_twice_is_one_patch():
    before = bindings()
    with rlfast.patch("trl") as outer:
        once = bindings()
        with rlfast.patch("trl") as inner:
            assert not changed(once, bindings())
            assert inner.replaced == outer.replaced
        assert outer.active and not changed(once, bindings())
    assert not changed(before, bindings())
    rlfast.patch("trl")
    rlfast.patch("trl").undo()
    assert not changed(before, bindings())


def test_an_exception_inside_undoes_the_patch():
    before = bindings()
    with pytest.raises(KeyError), rlfast.patch("trl"):
        raise KeyError
    assert not changed(before, bindings())


def test_unknown_trainer():
    with pytest.raises(ValueError, match=r"trainer: expected one of \('trl', .*\), got 'trlx'"):
        rlfast.patch("trlx")


def test_options_are_checked():
    for options in ({"untested": "no"}, {"rollouts": 1}, {"rollouts": True, "bitwise": "yes"}):
        with pytest.raises(TypeError, match=f"{list(options)[-1]}: expected True or False"):
            rlfast.patch("trl", **options)
    for option in ("rollouts", "bitwise"):
        with pytest.raises(ValueError, match=f"{option}: expected False: torchrl has no such option"):
            rlfast.patch("torchrl", **{option: True})


def test_trl_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install \"trl==1\.16\.\*\""):
        rlfast.patch("trl")


def test_an_untested_version_is_refused_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(trl, "__version__", "1.17.0")
    with pytest.raises(RuntimeError, match=r"tested with TRL 1\.16, found 1\.17\.0.*untested=True"):
        rlfast.patch("trl")
    with rlfast.patch("trl", untested=True) as patch:
        assert "trl.trainer.utils._ChunkedLogProbFunction" in patch.replaced


def test_a_changed_signature_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(utils, "entropy_from_logits", lambda logits, rows_at_once=1: logits)
    with pytest.raises(
        RuntimeError, match=r"entropy_from_logits takes \(logits, rows_at_once\), expected \(logits, chunk_size\)"
    ):
        rlfast.patch("trl")
    with caplog.at_level(logging.WARNING, "rlfast.integrations"), rlfast.patch("trl", untested=True) as patch:
        assert "trl.trainer.utils.entropy_from_logits" not in patch.replaced
        assert "trl.trainer.utils.selective_log_softmax" in patch.replaced
    assert "it is left alone" in caplog.text
