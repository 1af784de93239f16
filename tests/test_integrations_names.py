"""Each function of a trainer is under its own name, with its parameters and their defaults."""

from __future__ import annotations

import importlib
import inspect

import pytest

pytest.importorskip("trl", reason='the trl package is missing: pip install "trl==1.16.*"')
pytest.importorskip("verl", reason='the verl package is missing: pip install --no-deps "verl==0.9.*"')
from transformers.loss import loss_utils

from rlfast.integrations import openrlhf, torchrl, transformers, trl, verl
from rlfast.integrations.verl_megatron import MODULE
from tests import openrlhf_code

APPLIED = ("ChunkedLogProbFunction", "ChunkedDivergenceFunction", "FusedLinearForPPOFunction")  # an autograd function's
TRL = {
    "trl.trainer.utils": ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"),
    "trl.kernels.chunked_logprob": APPLIED[:1],
    "trl.kernels.chunked_divergence": APPLIED[1:2],
    "trl.experimental.gkd:GKDTrainer": ("generalized_jsd_loss",),
    "trl.experimental.cpo:CPOTrainer": ("get_batch_logps",),
    "trl.experimental.orpo:ORPOTrainer": ("get_batch_logps",),
}
VERL = {
    **{name: [ours.__name__ for ours, _ in place] for name, place in verl.PLACES.items() if name != MODULE},
    verl.FUSED: ("FusedLinearForPPOFunction", "FusedLinearForPPO"),
}


def place(dotted: str):
    module, _, owner = dotted.partition(":")
    found = importlib.import_module(module)
    return getattr(found, owner) if owner else found


def parameters(x, skip: str = "") -> list:
    return [(p.name, p.default) for p in inspect.signature(x).parameters.values() if p.name != skip]


def same(ours, theirs) -> None:
    """One has the parameters of the other; a class those of its constructor and of what it computes."""
    if theirs.__name__ in APPLIED:
        assert parameters(ours.apply) == parameters(theirs.forward, skip="ctx")
    elif isinstance(theirs, type):
        for method in ("__init__", "forward"):
            assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method)), method
    else:
        assert parameters(ours) == parameters(theirs)


@pytest.mark.parametrize("ours, where, name", [
    *((trl, where, name) for where, names in TRL.items() for name in names),
    *((verl, where, name) for where, names in VERL.items() for name in names),
    *((torchrl, "torchrl.objectives.value.functional", name) for name in torchrl.NAMES),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_names_and_parameters(ours, where, name):
    same(getattr(ours, name), getattr(place(where), name))


def test_those_of_openrlhf_and_transformers():
    utils, losses, maker = openrlhf_code.load()
    for name in {*openrlhf.__all__} - {"setup_worker", "RemoteExperienceMaker"}:
        same(getattr(openrlhf, name), getattr(utils, name, None) or getattr(losses, name))
    for name in ("get_advantages_and_returns", "get_cumulative_returns"):
        same(getattr(openrlhf.RemoteExperienceMaker, name), getattr(maker.RemoteExperienceMaker, name))
    same(transformers.ForCausalLMLoss, loss_utils.ForCausalLMLoss)


def test_another_default_or_name_is_noticed():
    def masked_mean(values, mask, axis=0):
        return values

    for wrong in (masked_mean, trl.entropy_from_logits):
        with pytest.raises(AssertionError):
            same(wrong, verl.masked_mean)
