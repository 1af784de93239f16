"""The mixins: one trainer class with what the patch does, and TRL's own as it was."""

from __future__ import annotations

import pytest
import torch

import rlfast
from rlfast import preference, preference_linear, unpaired
from rlfast.integrations import trl as ours
from rlfast.integrations import trl_head, trl_mixins, trl_rollout
from rlfast.losses import Loss

trl = pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
from trl.trainer import utils  # noqa: E402

from rlfast.compare.trainers import KINDS, Kind  # noqa: E402
from rlfast.compare.trainers import trainer_of as built  # noqa: E402
from tests.trl_trainers import ALL, STEPS, Watch, assert_same_steps, saved  # noqa: E402

pytestmark = pytest.mark.usefixtures("frozen_objects")
BASES = {
    "GRPO": (ours.RlfastGRPOMixin, trl.GRPOTrainer),
    "RLOO": (ours.RlfastHeadMixin, trl.RLOOTrainer),
    "SFT": (ours.RlfastHeadMixin, trl.SFTTrainer),
    "DPO": (ours.RlfastDPOMixin, trl.DPOTrainer),
    "KTO": (ours.RlfastKTOMixin, trl.KTOTrainer),
    "Reward": (ours.RlfastRewardMixin, trl.RewardTrainer),
}
MIXED = {name: type(f"Fast{name}Trainer", bases, {}) for name, bases in BASES.items()}


def steps_of(name: str, cls, folder) -> Watch:
    """What a trainer of this class does; the data and options are those of the comparison."""
    reward = name == "Reward"
    kind = Kind("Reward", {}, KINDS["dpo"].columns) if reward else KINDS[name.lower()]
    head = {"task": "SequenceClassification", "num_labels": 1} if reward else {"tie_word_embeddings": False}
    watch = Watch()
    given = ALL | {"output_dir": str(folder)} | kind.options
    trainer = built(kind, given, saved(folder, **head), [watch], cls=cls)
    trainer.train()
    return watch


def counted(monkeypatch) -> dict:
    """How often rlfast's head is called, and its losses are."""
    calls = {"head": 0, "loss": 0}

    def count(owner, name, key):
        call = getattr(owner, name)

        def counting(*args, **kwargs):
            calls[key] += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(trl_head, "compute_dtype", "head")  # which each call of the head asks once
    for owner, name in ((Loss, "linear"), (preference_linear, "run"), (preference.op, "call"), (unpaired.op, "call")):
        count(owner, name, "loss")
    return calls


@pytest.mark.parametrize("name", BASES)
def test_a_mixed_trainer_takes_the_same_steps(name, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    stock = steps_of(name, BASES[name][1], tmp_path / "stock")
    assert calls == {"head": 0, "loss": 0}
    mine = steps_of(name, MIXED[name], tmp_path / "rlfast")
    assert (calls["head"] >= STEPS) == (name != "Reward")
    assert (calls["loss"] >= STEPS) == (name not in ("RLOO", "SFT"))
    assert_same_steps(mine, stock)


def test_trls_classes_stay_as_they_are(tmp_path):
    head, add, compute = utils._ChunkedLogProbFunction, utils.add_fused_lm_head, trl.DPOTrainer._compute_loss
    steps_of("DPO", MIXED["DPO"], tmp_path)
    assert utils._ChunkedLogProbFunction is head and trl.DPOTrainer._compute_loss is compute
    assert utils.add_fused_lm_head is add and trl.trainer.dpo_trainer.add_fused_lm_head is add


def test_an_error_of_the_constructor_leaves_trl_as_it_is(tmp_path):
    add = utils.add_fused_lm_head
    with pytest.raises(TypeError):
        MIXED["DPO"](nonesuch=1)
    assert utils.add_fused_lm_head is add


def test_a_mixed_trainer_where_trl_is_patched(tmp_path, monkeypatch):
    """It is once: the objective of a step is made once."""
    trl_mixins._replacements.cache_clear()
    stock = steps_of("GRPO", trl.GRPOTrainer, tmp_path / "stock")
    calls = counted(monkeypatch)
    with rlfast.patch("trl"):
        mine = steps_of("GRPO", MIXED["GRPO"], tmp_path / "rlfast")
    assert calls["loss"] == STEPS
    assert_same_steps(mine, stock)
    original = trl.GRPOTrainer._compute_loss
    assert not hasattr(original, "__wrapped__")


@pytest.mark.parametrize("bitwise", (False, True))
def test_rollouts_by_the_engine(bitwise, tmp_path, monkeypatch):
    class Generating(ours.RlfastGRPOMixin, trl.GRPOTrainer, rollouts=True, bitwise=bitwise):
        pass

    class Derived(Generating):
        """Has what its base has."""

    prompts = []
    generated = trl_rollout.generated
    monkeypatch.setattr(
        trl_rollout, "generated", lambda engine, ids, params: prompts.append(ids) or generated(engine, ids, params)
    )
    watch = steps_of("GRPO", Derived, tmp_path)
    assert len(prompts) == STEPS == len(watch.loss)
    assert ("training_step" in Derived._own) == bitwise


class OtherLoss(trl.GRPOTrainer):
    """A trainer whose loss rlfast does not know."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs)


@pytest.mark.parametrize("base", (OtherLoss, trl.RLOOTrainer, object), ids=lambda c: c.__name__)
def test_another_base_is_refused(base):
    with pytest.raises(TypeError, match=r"bases: expected TRL's GRPOTrainer after RlfastGRPOMixin"):
        type("Wrong", (ours.RlfastGRPOMixin, base), {})


def test_options_are_checked():
    with pytest.raises(TypeError, match="rollouts: expected True or False"):
        type("Wrong", (ours.RlfastGRPOMixin, trl.GRPOTrainer), {}, rollouts="yes")


def test_the_derived_class_may_go_on(tmp_path):
    """A method of the derived class calls the mixin's."""
    seen = []

    class Watching(ours.RlfastDPOMixin, trl.DPOTrainer):
        def _compute_loss(self, *args, **kwargs):
            loss = super()._compute_loss(*args, **kwargs)
            seen.append(loss)
            return loss

    steps_of("DPO", Watching, tmp_path)
    assert len(seen) == STEPS and all(torch.is_tensor(loss) for loss in seen)
