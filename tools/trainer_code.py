"""The trainers' own loss functions, called on given tensors: stand-ins for what surrounds them, nothing inside.

A trainer's package is loaded from an installed copy (TRL, Liger) or from a folder that holds an unpacked wheel (verl,
OpenRLHF, Liger). Of verl and OpenRLHF only the modules with the arithmetic are loaded; what those import beside torch
is replaced by empty modules, so that neither needs its dependencies.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import sys
import types
from collections import defaultdict
from pathlib import Path

import torch


@contextlib.contextmanager
def in_float64():
    """Within it ``x.float()`` is float64, so that a trainer's casts do not hide its arithmetic."""
    cast = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = cast


def _module(name: str, **contents):
    """An importable module, or package, with these contents."""
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(contents)
    sys.modules[name] = made
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, made)
    return made


def _load(name: str, file: Path):
    """One file as the module ``name``."""
    spec = importlib.util.spec_from_file_location(name, file)
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, made)
    return made


def version_of(folder: Path, package: str) -> str:
    """The version of an unpacked wheel."""
    found = sorted(folder.glob(f"{package}-*.dist-info"))
    return found[0].name.removeprefix(f"{package}-").removesuffix(".dist-info") if found else "unknown"


class Settings(dict):
    """A mapping whose entries are attributes too, as the trainers' configurations are."""

    __getattr__ = dict.__getitem__


class _Class:
    """A type that nothing is an instance of."""


@functools.cache
def verl(folder: Path):
    """(core_algos, rollout_corr_helper) of verl."""
    for name in ("omegaconf", "tensordict", "ray"):
        _module(name, DictConfig=dict, TensorDict=_Class)
    for name in ("verl", "verl.utils", "verl.trainer", "verl.trainer.ppo", "verl.workers"):
        _module(name)
    vars(sys.modules["verl.utils"]).update(as_torch_index=None, group_mean_std=None)
    _module("verl.utils.device", get_device_name=lambda: "cpu", get_torch_device=lambda: None, is_cuda_available=False)
    _module("verl.utils.import_utils", deprecated=lambda *_: lambda function: function)
    _module("verl.trainer.config", AlgoConfig=_Class)
    _module("verl.trainer.config.algorithm", RolloutCorrectionConfig=_Class)
    _module("verl.workers.config", ActorConfig=Settings)
    _module("verl.workers.config.actor", PolicyLossConfig=_Class)
    _module("verl.protocol", DataProto=_Class)
    _load("verl.utils.torch_functional", folder / "verl" / "utils" / "torch_functional.py")
    parts = ("core_algos", "rollout_corr_helper")
    return tuple(_load(f"verl.trainer.ppo.{x}", folder / "verl" / "trainer" / "ppo" / f"{x}.py") for x in parts)


@functools.cache
def openrlhf(folder: Path):
    """(models.loss, models.utils, trainer.ppo_utils.length_penalty) of OpenRLHF."""
    root = next(p for p in (folder / "openrlhf", *folder.glob("openrlhf-*.data/purelib/openrlhf")) if p.is_dir())
    _module("deepspeed")
    for name in ("openrlhf", "openrlhf.models", "openrlhf.utils", "openrlhf.trainer", "openrlhf.trainer.ppo_utils"):
        _module(name)
    _module("openrlhf.utils.logging_utils", init_logger=lambda _: None)
    utils = _load("openrlhf.models.utils", root / "models" / "utils.py")
    loss = _load("openrlhf.models.loss", root / "models" / "loss.py")
    lengths = "openrlhf.trainer.ppo_utils.length_penalty"
    return loss, utils, _load(lengths, root / "trainer" / "ppo_utils" / "length_penalty.py")


def liger(folder: Path | None):
    """Liger's chunked GRPO loss."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOFunction


class _OneProcess:
    """accelerate's Accelerator where there is one process."""

    sync_gradients = True

    def __init__(self, num_processes: int):
        self.num_processes = num_processes

    def reduce(self, x, reduction="sum"):
        return x

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def pad_across_processes(self, x, **_):
        return x


def trl_ratio(old_logp, rollout_logp, mask, mode: str, low: float | None, high: float | None):
    """TRL's importance ratio to the sampler: it is made amid the generation, in no function of its own."""
    drift = ((old_logp - rollout_logp) * mask).nan_to_num(nan=0.0)
    ratio = (drift.sum(-1, keepdim=True) if mode.startswith("sequence") else drift).exp()
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def trl_trainer(fields: dict, settings: dict):
    """What ``GRPOTrainer._compute_loss`` reads of its trainer, with the defaults of GRPOConfig."""
    from trl import GRPOTrainer

    given = {
        "loss_type": "dapo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "max_completion_length": 512,
        "current_gradient_accumulation_steps": 1, "num_processes": 1, "steps_per_generation": 1, "entropy_coef": 0.0,
        "use_bias_correction_kl": True, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
        "use_adaptive_entropy": False, "entropy_target": 0.2, "entropy_coef_delta": 0.005, "entropy_coef_min": 0.0,
        "entropy_coef_max": 1.0, "use_vllm": False, "vllm_importance_sampling_correction": True, "beta2": 1e-3,
    } | settings  # fmt: skip
    trainer = types.SimpleNamespace(
        **given, args=types.SimpleNamespace(**given), aux_loss_enabled=False,
        model=types.SimpleNamespace(training=True), accelerator=_OneProcess(given["num_processes"]),
        _entropy_bonus_enabled=given["entropy_coef"] != 0.0 or given["use_adaptive_entropy"],
        _metrics={"train": defaultdict(list)}, _last_world_entropy=math.inf, _entropy_window_stats=None,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, get_gamma_weights=GRPOTrainer.get_gamma_weights,
    )  # fmt: skip
    trainer.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, trainer)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (fields["logp"], fields["entropy"], None)
    trainer._get_sequence_logps = lambda *_: (fields["logp"] * fields["mask"]).sum(-1)
    return trainer


def trl_inputs(fields: dict, names: tuple[str, ...], ratio=None, num_items=None) -> dict:
    """The batch of a TRL trainer; the mask is the completion's."""
    mask = fields["mask"].long()
    prompt = torch.zeros(mask.shape[0], 1, dtype=torch.long)
    inputs = {
        "prompt_ids": prompt, "prompt_mask": prompt + 1, "completion_ids": mask, "completion_mask": mask,
        "advantages": fields["adv"], "importance_sampling_ratio": ratio,
        "num_items_in_batch": torch.tensor(float(mask.sum() if num_items is None else num_items)),
    }  # fmt: skip
    called = {"old_logp": "old_per_token_logps", "ref_logp": "ref_per_token_logps",
              "rollout_logp": "sampling_per_token_logps"}  # fmt: skip
    inputs |= {called[name]: fields[name] for name in names if name in called}
    return inputs | {
        "old_logps": (fields["old_logp"] * mask).sum(-1), "ref_logps": (fields["ref_logp"] * mask).sum(-1),
        "rewards": fields["adv"], "v_star": torch.zeros_like(fields["adv"]),
        "input_ids": None, "attention_mask": None, "logits_to_keep": None,
    }  # fmt: skip
