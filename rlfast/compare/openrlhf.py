"""OpenRLHF's functions and losses stock and patched, on batches of a training step's kind."""

from __future__ import annotations

import importlib

import torch

import rlfast
from rlfast.compare import openrlhf_code
from rlfast.compare.functions import Case
from rlfast.compare.openrlhf_code import LOSS, MAKER, UTILS

LIBRARY, OURS = "openrlhf", "rlfast.integrations.openrlhf"
ROWS, LENGTH, VOCAB = 32, 96, 8192


class Foreign(torch.Tensor):
    """Not a plain tensor: rlfast gives it to OpenRLHF's own function."""


def load() -> list[str]:
    """Import what is compared; with stand-ins for what its trainers need, where that is missing."""
    try:
        for name in (UTILS, LOSS, MAKER):
            importlib.import_module(name)
    except ImportError as error:
        openrlhf_code.load()
        return [
            f"OpenRLHF was imported with stand-ins for what its trainers need ({error}): its arithmetic is compared, "
            "no run"
        ]
    return []


def patch():
    """rlfast's functions in their place."""
    return rlfast.patch("openrlhf")


def _normal(draw, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=draw)


def _mask(draw):
    """float: responses of 1 token to all."""
    return (torch.arange(LENGTH) < torch.randint(1, LENGTH + 1, (ROWS, 1), generator=draw)).float()


def _logits(draw) -> dict:
    return {"logits": _normal(draw, 2, LENGTH, VOCAB, scale=3.0)}


def _labelled(draw) -> dict:
    return _logits(draw) | {"labels": torch.randint(VOCAB, (2, LENGTH), generator=draw), "temperature": 0.7}


def _log_probs(draw) -> tuple:
    old = -_normal(draw, ROWS, LENGTH).abs()
    return old + _normal(draw, ROWS, LENGTH, scale=0.3), old


def _kl(kind):
    def given(draw):
        logp, base = _log_probs(draw)
        return {"log_probs": logp, "log_probs_base": base, "kl_estimator": kind}

    return given


def _reward(draw) -> dict:
    kl = _normal(draw, ROWS, LENGTH)
    return {"r": _normal(draw, ROWS), "kl_coef": 0.1, "kl": kl, "action_mask": _mask(draw)}


def _masked(**options):
    return lambda draw: {"tensor": _normal(draw, ROWS, LENGTH), "mask": _mask(draw)} | options


def _policy(draw) -> dict:
    logp, old = _log_probs(draw)
    given = {"log_probs": logp, "old_log_probs": old, "advantages": _normal(draw, ROWS, LENGTH)}
    return given | {"action_mask": _mask(draw), "rollout_log_probs": old + _normal(draw, ROWS, LENGTH, scale=0.1)}


def _critic(draw) -> dict:
    old = _normal(draw, ROWS, LENGTH)
    given = {"values": old + _normal(draw, ROWS, LENGTH, scale=0.5), "old_values": old}
    return given | {"returns": old + _normal(draw, ROWS, LENGTH), "action_mask": _mask(draw)}


def _sft(draw) -> dict:
    return {"per_token_logps": -_normal(draw, ROWS, LENGTH).abs(), "loss_mask": _mask(draw)}


def _matrix(draw) -> dict:
    return {"loss": _normal(draw, ROWS, LENGTH), "loss_mask": _mask(draw)}


def _texts(draw) -> dict:
    labels = torch.randint(VOCAB, (2, LENGTH), generator=draw)
    return _logits(draw) | {"labels": labels.masked_fill(torch.arange(LENGTH) < 9, -100)}


def _pair(draw) -> dict:
    return {"chosen_reward": _normal(draw, ROWS), "reject_reward": _normal(draw, ROWS)}


def _preference(draw) -> dict:
    names = ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps")
    return {name: -_normal(draw, ROWS).abs() for name in names}


def _rewards(draw) -> dict:
    return {"self": None, "rewards": _normal(draw, ROWS, LENGTH), "action_mask": _mask(draw), "gamma": 0.99}


def _foreign(draw) -> dict:
    given = _rewards(draw)
    return given | {"rewards": given["rewards"].as_subclass(Foreign)}


def _gae(draw) -> dict:
    return _rewards(draw) | {"values": _normal(draw, ROWS, LENGTH), "lambd": 0.95}


POLICIES = {
    "ppo": {},
    "dual clip": {"dual_clip": 3.0},
    "mean of sequences": {"token_level_loss": False},
    "gspo": {"policy_loss_type": "gspo"},
    "token mask": {"is_correction_level": "token"},
    "token clip": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "seq mask": {"is_correction_level": "seq"},
}
CHOSEN = ("policy_chosen_logps", "policy_rejected_logps")

CASES = (
    Case(UTILS, "log_probs_from_logits", _labelled, ("logits",)),
    Case(UTILS, "compute_entropy", _logits, ("logits",)),
    *(Case(UTILS, "compute_approx_kl", _kl(kind), ("log_probs",), note=kind) for kind in ("k1", "k2", "k3")),
    Case(UTILS, "compute_reward", _reward),
    Case(UTILS, "masked_mean", _masked(), ("tensor",)),
    Case(UTILS, "masked_mean", _masked(dim=1), ("tensor",), note="of rows"),
    Case(UTILS, "masked_normalize", _masked(), ("tensor",)),
    Case(MAKER, "RemoteExperienceMaker.get_advantages_and_returns", _gae),
    Case(MAKER, "RemoteExperienceMaker.get_cumulative_returns", _rewards, note="reinforce"),
    Case(MAKER, "RemoteExperienceMaker.get_cumulative_returns", _foreign, note="of a tensor's subclass"),
    *(Case(LOSS, "PolicyLoss", _policy, ("log_probs",), made, name) for name, made in POLICIES.items()),
    Case(LOSS, "ValueLoss", _critic, ("values",), {"clip_eps": 0.2}),
    Case(LOSS, "aggregate_loss", _matrix, ("loss",)),
    Case(LOSS, "GPTLMLoss", _texts, ("logits",), {}),
    Case(LOSS, "SFTLoss", _sft, ("per_token_logps",), {}),
    Case(LOSS, "DPOLoss", _preference, CHOSEN, {"beta": 0.1}),
    Case(LOSS, "DPOLoss", _preference, CHOSEN, {"beta": 0.1, "ipo": True}, "ipo"),
    Case(LOSS, "PairWiseLoss", _pair, ("chosen_reward", "reject_reward"), {}),
    Case(LOSS, "LogExpLoss", _pair, ("chosen_reward", "reject_reward"), {}),
)
