"""Run the trainers' own losses on the tests' batch, and write what they return to tests/data/trainers.json.

    python tools/golden_losses.py --verl FOLDER --openrlhf FOLDER [--liger FOLDER]

FOLDER is where the trainer's wheel was unpacked; TRL, and Liger if its folder is left out, are the installed ones.
Everything is computed in float64. A case says which row and options of rlfast must give the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import trainer_code as code  # noqa: E402

from tests import golden_inputs  # noqa: E402

OLD, REF, ROLLOUT = ("old_logp",), ("old_logp", "ref_logp"), ("old_logp", "rollout_logp")


class Case(NamedTuple):
    """One call of a trainer's loss, and the same call of rlfast."""

    loss: str  # a row of rlfast.LOSSES
    settings: dict = {}  # the trainer's own
    options: dict = {}  # of rlfast.loss
    fields: tuple[str, ...] = OLD  # "ours=theirs" where the names differ
    call: dict = {}  # other arguments of the loss
    inputs: str = "near"
    level: str = "token"  # "sequence": the trainer's metrics are means over sequences, and are left out
    select: dict = {}  # the function of rlfast that chooses tokens as the trainer does, and its arguments


def trl_cases() -> list[Case]:
    """Every loss_type of GRPOConfig, its options, and the losses of the other trainers."""
    kl = {"beta": 0.1}
    grpo, dapo, bnpo = {"loss_type": "grpo"}, {"loss_type": "dapo"}, {"loss_type": "bnpo"}
    vespo, sapo = {"loss_type": "vespo"}, {"loss_type": "sapo"}
    gspo = grpo | {"importance_sampling_level": "sequence"}
    luspo = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
    cases = [
        Case("grpo", grpo),
        Case("grpo", grpo, inputs="far"),
        Case("grpo", grpo | kl, kl, REF),
        Case("grpo", grpo | kl | {"use_bias_correction_kl": False}, kl | {"kl_ratio": None}, REF, inputs="far"),
        Case("grpo", grpo, fields=()),
        Case("grpo", grpo | {"current_gradient_accumulation_steps": 4}, call={"accumulation": 4}),
        Case("bnpo", bnpo | kl, kl, REF),
        Case("dr_grpo", {"loss_type": "dr_grpo"}, call={"max_len": 512}),
        Case("dapo", dapo),
        Case("dapo", dapo | {"epsilon_high": 0.28}, {"eps_high": 0.28}, inputs="far"),
        Case("dapo", dapo | kl | {"num_items": 57, "num_processes": 2, "current_gradient_accumulation_steps": 4,
                                  "steps_per_generation": 8}, kl, REF,
             {"num_items": 57 / 8, "world_size": 2, "accumulation": 4}),
        Case("two_sided_grpo", grpo | {"delta": 4.0}, inputs="far"),
        Case("gspo", gspo, level="sequence"),
        Case("gspo", gspo | kl, kl, REF, level="sequence"),
        Case("luspo", luspo, level="sequence"),
        Case("luspo", luspo | kl, kl, REF, level="sequence"),
        Case("cispo", {"loss_type": "cispo"}),
        Case("cispo_capped", {"loss_type": "cispo", "epsilon_high": 5.0}, inputs="far"),
        Case("sapo", sapo | kl, kl, REF),
        Case("sapo", sapo, inputs="far"),
        Case("vespo", vespo),
        Case("vespo", vespo | kl, kl, REF),
        Case("vespo", vespo, inputs="far"),
        Case("gmpo", {"epsilon_low": 0.4, "epsilon_high": 0.4}, level="sequence"),
        Case("gmpo", kl | {"epsilon_low": 0.4, "epsilon_high": 0.4}, kl, REF, inputs="far", level="sequence"),
        Case("rloo", {}, level="sequence"),
        Case("rloo", {}, inputs="far", level="sequence"),
        Case("a_star_po", {}, fields=("old_logp=ref_logp",)),  # its ratio is to the reference
    ]  # fmt: skip
    ratios = (  # the mode of vllm_importance_sampling_mode, its bounds, and our correction
        ("sequence_mask", None, 3.0, "sequence_mask"),
        ("sequence_truncate", None, 1.1, {"weight": "seq_sum", "high": 1.1}),
        ("token_truncate", 0.9, 1.2, {"weight": "token", "low": 0.9, "high": 1.2}),
        ("token_mask", 0.9, 1.2, {"weight": "token", "gate": "token", "gate_ratio": [0.9, 1.2]}),
    )
    for mode, low, high, correction in ratios:
        used = {"use_vllm": True, "ratio": (mode, low, high)}
        options = {"correction": correction}
        cases.append(Case("dapo", dapo | used, options, ROLLOUT))
        cases.append(Case("gspo", gspo | used | kl, options | kl, (*REF, "rollout_logp"), level="sequence"))
        if mode.startswith("token"):
            cases.append(Case("vespo", vespo | used, options, ROLLOUT))
    return cases + [
        Case("grpo", grpo | {"off_policy_mask_threshold": 0.01}, {"off_policy": 0.01}),
        Case("grpo", grpo | {"off_policy_mask_threshold": 0.01}, {"off_policy": 0.01}, ROLLOUT),
        Case("gspo", gspo | {"off_policy_mask_threshold": 0.01}, {"off_policy": 0.01}, level="sequence"),
        Case("bnpo", bnpo | {"entropy_coef": 0.05, "current_gradient_accumulation_steps": 2}, {"entropy_coef": 0.05},
             (*OLD, "entropy"), {"accumulation": 2}),
        Case("sapo", sapo | {"entropy_coef": 0.05, "top_entropy_quantile": 0.4}, {"entropy_coef": 0.05},
             (*OLD, "entropy"), select={"name": "top_entropy_keep", "quantile": 0.6}),
        Case("dapo", dapo | kl | {"top_entropy_quantile": 0.4}, kl, (*REF, "entropy"),
             select={"name": "top_entropy_keep", "quantile": 0.6}),
    ]  # fmt: skip


def run_trl(case: Case, fields: dict):
    """(loss, metrics)."""
    from trl import GRPOTrainer, RLOOTrainer
    from trl.experimental.a2po import A2POTrainer
    from trl.experimental.gmpo import GMPOTrainer

    trainer = code.trl_trainer(fields, case.settings)
    ratio = None
    if "ratio" in case.settings:
        ratio = code.trl_ratio(fields["old_logp"], fields["rollout_logp"], fields["mask"], *case.settings["ratio"])
    inputs = code.trl_inputs(fields, case.fields, ratio, case.settings.get("num_items"))
    compute = {
        "rloo": RLOOTrainer._compute_loss, "gmpo": GMPOTrainer._compute_loss, "a_star_po": A2POTrainer.compute_loss,
    }.get(case.loss, GRPOTrainer._compute_loss)  # fmt: skip
    loss = compute(trainer, None, inputs)
    names = {"clip_ratio/low_mean": "clip_low", "clip_ratio/high_mean": "clip_high", "kl": "kl", "entropy": "entropy"}
    said = trainer._metrics["train"]
    if "entropy" not in case.fields:
        names.pop("entropy")
    plain = case.level == "token" and "rollout_logp" not in case.fields and "off_policy" not in case.options
    return loss, {ours: said[theirs][0] for theirs, ours in names.items() if theirs in said and plain and not case.select}


def verl_cases() -> list[Case]:
    """Every registered policy loss, the reductions, and the corrections for the rollout."""
    kl = {"beta": 0.1}
    shared = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 11}
    tokens, sequences = {"num_items": 100, "world_size": 2}, {"num_items": 11, "world_size": 2}
    by_sequence = {"agg": "seq-mean-token-mean"}
    seq_mean_token_mean = {"reduce": "seq_mean_token_mean"}
    gspo = {"mode": "gspo"} | by_sequence
    dppo_kl, dppo_tv = {"mode": "dppo_kl"}, {"mode": "dppo_tv"}
    cases = [
        Case("ppo"),
        Case("ppo", inputs="far"),
        Case("ppo", {"token_adv": True}),
        Case("ppo", {"info": shared}, call=tokens),
        Case("ppo", {"info": shared} | by_sequence, seq_mean_token_mean, call=sequences),
        Case("ppo", {"agg": "seq-mean-token-sum"}, {"reduce": "seq_mean_token_sum"}),
        Case("ppo", {"agg": "token-sum"}, {"reduce": "token_sum"}),
        Case("dual_clip_ppo", {"clip_ratio_c": 1.3}, {"dual_clip": 1.3}, inputs="far"),
        Case("grpo", kl, kl, REF),
        Case("grpo", kl, kl, REF, inputs="far"),
        Case("dapo", {"clip_ratio_high": 0.28}),
        Case("dr_grpo", {"agg": "seq-mean-token-sum-norm"}),
        Case("dr_grpo", {"agg": "seq-mean-token-sum-norm", "info": {"loss_scale_factor": 512}}, call={"max_len": 512}),
        Case("gspo", gspo),
        Case("gspo", gspo | kl, kl, REF),
        Case("gspo", gspo, inputs="far"),
        Case("gspo_token", gspo | {"agg": "token-mean", "token_adv": True}, {"reduce": "token_mean"}),
        Case("cispo", {"mode": "cispo"}),
        Case("cispo", {"mode": "cispo"}, inputs="far"),
        Case("sapo", {"mode": "sapo"}),
        Case("sapo", {"mode": "sapo"}, inputs="far"),
        Case("gpg", {"mode": "gpg"}),
        Case("clip_cov", {"mode": "clip_cov", "clip_cov_ratio": 1.0, "clip_cov_lb": 0.05, "clip_cov_ub": 0.4},
             select={"name": "clip_cov_keep", "ratio": 1.0, "low": 0.05, "high": 0.4}),
        Case("kl_cov", {"mode": "kl_cov", "kl_cov_ratio": 0.2}, select={"name": "kl_cov_extra", "ratio": 0.2}),
        Case("kl_cov", {"mode": "kl_cov", "kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0}, {"coef": 1.0}, inputs="far",
             select={"name": "kl_cov_extra", "ratio": 0.2}),
        Case("gmpo", {"mode": "geo_mean"}),
        Case("gmpo", {"mode": "geo_mean", "token_adv": True}),
        Case("dro", {"mode": "dro", "dro_beta": 1.0}),
        Case("dro", {"mode": "dro", "dro_beta": 0.3}, {"tau": 0.3}, inputs="far"),
        Case("dppo_tv", dppo_tv | {"clip_ratio": 0.02}, {"eps_low": 0.02, "eps_high": 0.02}),
        Case("dppo_tv", dppo_tv, inputs="far"),
        Case("dppo_kl", dppo_kl | {"clip_ratio": 0.002}, {"eps_low": 0.002, "eps_high": 0.002}),
        Case("dppo_kl", dppo_kl, inputs="far"),
        Case("ppo", {"entropy_coeff": 0.05} | by_sequence, {"entropy_coef": 0.05} | seq_mean_token_mean,
             (*OLD, "entropy")),
    ]  # fmt: skip
    for kind in ("k1", "abs", "k2", "k3+", "k1+"):
        ours = "absolute" if kind == "abs" else kind
        cases.append(Case("grpo", kl | {"kl_loss_type": kind}, kl | {"kl": ours}, REF, inputs="far"))
    weights = (
        ({"rollout_is": "token", "rollout_is_threshold": 1.1}, {"weight": "token", "high": 1.1}),
        ({"rollout_is": "token", "rollout_is_threshold": "0.9_1.2"},
         {"weight": "token", "gate": "token", "gate_ratio": [0.9, 1.2]}),
        ({"rollout_is": "sequence", "rollout_is_threshold": 1.1}, {"weight": "seq_sum", "high": 1.1}),
    )  # fmt: skip
    # k1 is −log ratio there: its bounds change sides
    gates = (
        ("token_k1", "0.8_1.1", {"gate": "token", "gate_ratio": [1 / 1.1, 1 / 0.8]}),
        ("seq_sum_k1", "0.9_1.3", {"gate": "seq_sum", "gate_ratio": [1 / 1.3, 1 / 0.9]}),
        ("seq_mean_k1", "0.97_1.05", {"gate": "seq_mean", "gate_ratio": [1 / 1.05, 1 / 0.97]}),
        ("token_k2", "0.02", {"gate": "token", "gate_kind": "k2", "gate_high": 0.02}),
        ("seq_sum_k2", "0.1", {"gate": "seq_sum", "gate_kind": "k2", "gate_high": 0.1}),
        ("seq_mean_k3", "0.02", {"gate": "seq_mean", "gate_kind": "k3", "gate_high": 0.02}),
    )
    for settings, correction in weights:
        cases.append(Case("ppo", settings, {"correction": correction}, ROLLOUT))
    for rejection, threshold, correction in gates:
        settings = {"rollout_rs": rejection, "rollout_rs_threshold": threshold}
        options = {"correction": correction | {"masks": True}}
        cases.append(Case("ppo", settings, options, ROLLOUT))
        cases.append(Case("ppo", settings | weights[0][0] | by_sequence,
                          {"correction": correction | {"masks": True} | weights[0][1]} | seq_mean_token_mean, ROLLOUT))  # fmt: skip
    cases.append(Case("reinforce", {"mode": "reinforce"} | weights[0][0], {"correction": weights[0][1]},
                      ("rollout_logp",)))  # fmt: skip
    return cases


def run_verl(case: Case, fields: dict, folder: Path):
    """(loss, metrics)."""
    core, corrections = code.verl(folder)
    s = case.settings
    policy = {"clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1,
              "dro_beta": None}  # fmt: skip
    info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None}
    info |= s.get("info", {})
    config = code.Settings(
        {"clip_ratio": 0.2, "clip_ratio_low": s.get("clip_ratio", 0.2), "clip_ratio_c": 3.0, "tau_pos": 1.0,
         "tau_neg": 1.05, "clip_ratio_high": s.get("clip_ratio", 0.2)} | s
        | {"policy_loss": code.Settings(policy | s), "global_batch_info": info}
    )  # fmt: skip
    mask = fields["mask"]
    weights = None
    logp, old = fields["logp"], fields["old_logp"]
    drift = (logp.detach() if s.get("mode") == "reinforce" else old) - fields["rollout_logp"]
    if "rollout_is" in s:
        chosen = {name: s[name] for name in ("rollout_is", "rollout_is_threshold")}
        weights = corrections.compute_rollout_correction_weights(drift, mask, **chosen)[0]
    if "rollout_rs" in s:
        chosen = {name: s[name] for name in ("rollout_rs", "rollout_rs_threshold")}
        mask = corrections.compute_rollout_rejection_mask(drift, mask, **chosen)[0]
    adv = fields["token_adv"] if s.get("token_adv") else fields["adv"][:, None].expand_as(logp).contiguous()
    agg, mode = s.get("agg", "token-mean"), s.get("mode", "vanilla")
    if mode == "reinforce":
        loss, said = core.compute_policy_loss_reinforce(fields["rollout_logp"], logp, adv, mask, agg, config, weights)
    else:
        loss, said = core.get_policy_loss_fn(mode)(old, logp, adv, mask, agg, config, weights)
    if s.get("beta"):
        kl = core.kl_penalty(logp, fields["ref_logp"], s.get("kl_loss_type", "low_var_kl"))
        loss = loss + s["beta"] * core.agg_loss(kl, mask, agg, **info)
    if s.get("entropy_coeff"):
        loss = loss - s["entropy_coeff"] * core.agg_loss(fields["entropy"], mask, agg, **info)
    metrics = {}
    if "rollout_logp" not in case.fields and mode != "kl_cov" and "actor/ppo_kl" in said:
        metrics["approx_kl_k1"] = said["actor/ppo_kl"]
        if case.inputs == "near" and mode in ("vanilla", "cispo", "gspo"):
            metrics["clip"] = said["actor/pg_clipfrac"] + said["actor/pg_clipfrac_lower"]
    return loss, metrics


def openrlhf_cases() -> list[Case]:
    """PolicyLoss, its corrections, and the KL of the actor's step."""
    kl = {"beta": 0.1}
    shared = {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 11}
    gspo = {"policy_loss_type": "gspo"}
    cases = [
        Case("ppo"),
        Case("ppo", inputs="far"),
        Case("ppo", {"info": shared}, call={"num_items": 100, "world_size": 2}),
        Case("ppo", {"token_level_loss": False}, {"reduce": "seq_mean_token_mean"}),
        Case("dual_clip_ppo", {"dual_clip": 3.0}, inputs="far"),
        Case("dapo", {"clip_eps_high": 0.28}),
        Case("gspo", gspo),
        Case("gspo", gspo | {"info": shared}, call={"num_items": 11, "world_size": 2}),
        Case("gspo", gspo | kl, kl, REF),
        Case("ppo", {"entropy_coef": 0.05}, {"entropy_coef": 0.05}, (*OLD, "entropy")),
        Case("raft", {"sft": True}, fields=()),
    ]
    for kind in ("k1", "k2", "k3", "k2+", "k3+"):
        cases.append(Case("grpo", kl | {"kl": kind}, kl | {"kl": kind}, REF, inputs="far"))
    corrections = (
        ({"is_correction_level": "token"}, [0.9, 1.2], {"gate": "token", "gate_ratio": [0.9, 1.2]}),
        ({"is_correction_level": "token", "is_correction_mode": "clip"}, [0.9, 1.2], {"low": 0.9, "high": 1.2}),
        ({"is_correction_level": "seq"}, [0.97, 1.02], {"gate": "seq_mean", "gate_ratio": [0.97, 1.02]}),
    )
    for settings, threshold, correction in corrections:
        options = {"correction": correction | {"weight": "token"}}
        cases.append(Case("ppo", settings | {"is_correction_threshold": threshold}, options, ROLLOUT))
    return cases


def run_openrlhf(case: Case, fields: dict, folder: Path):
    """(loss, metrics)."""
    losses, utils, _ = code.openrlhf(folder)
    s, info = dict(case.settings), {}
    for name in ("info", "beta", "kl", "entropy_coef", "sft"):
        s.pop(name, None)
    info = case.settings.get("info", {})
    logp, old, mask = fields["logp"], fields["old_logp"], fields["mask"]
    if case.settings.get("sft"):
        return losses.SFTLoss()(logp, mask, **info), {}
    policy = losses.PolicyLoss(**s)
    adv = fields["adv"][:, None].expand_as(logp)
    loss, clip, ppo_kl, *_ = policy(logp, old, adv, mask, fields["rollout_logp"], **info)
    shared = {"token_level_loss": policy.token_level_loss} | info
    if "beta" in case.settings:
        kind = case.settings.get("kl", "k3")
        straight = {"unbiased_gradient": kind.endswith("+")}
        kl = utils.compute_approx_kl(logp, fields["ref_logp"], kl_estimator=kind.removesuffix("+"), **straight)
        loss = loss + case.settings["beta"] * losses.aggregate_loss(kl, mask, **shared)
    if "entropy_coef" in case.settings:
        bonus = losses.aggregate_loss(fields["entropy"], mask, **shared)
        loss = loss - case.settings["entropy_coef"] * bonus
    metrics = {"approx_kl_k1": ppo_kl.item()} if case.inputs == "near" and "rollout_logp" not in case.fields else {}
    if metrics and s.get("dual_clip") is None and policy.policy_loss_type == "ppo":
        metrics["clip"] = clip.item()
    return loss, metrics


def liger_cases() -> list[Case]:
    """Every loss_type of LigerFusedLinearGRPOLoss."""
    sequence = {"importance_sampling_level": "sequence"}
    names = ("grpo", "bnpo", "dapo", "sapo", "vespo")
    return [
        *(Case(name, {"loss_type": name}, fields=REF) for name in names),
        *(Case(name, {"loss_type": name, "beta": 0.0}, {"beta": 0.0}, inputs="far") for name in names),
        Case("dr_grpo", {"loss_type": "dr_grpo", "max_completion_length": 512}, {}, REF, {"max_len": 512}),
        Case("dapo", {"loss_type": "dapo", "num_items_in_batch": 57}, {}, REF, {"num_items": 57}),
        Case("two_sided_grpo", {"loss_type": "grpo", "delta": 4.0}, fields=REF, inputs="far"),
        Case("grpo", {"loss_type": "grpo", "use_bias_correction_kl": True}, {"kl_ratio": "unit"}, REF),
        Case("gspo", {"loss_type": "grpo"} | sequence, fields=REF),
        Case("luspo", {"loss_type": "luspo", "beta": 0.0} | sequence),
        Case("cispo", {"loss_type": "cispo"}, fields=REF),
        Case("cispo_capped", {"loss_type": "cispo", "epsilon_high": 5.0}, fields=REF, inputs="far"),
    ]


def run_liger(case: Case, fields: dict, folder: Path | None):
    """(loss, metrics)."""
    mask = fields["mask"].double()
    loss, said = code.liger(folder).ppo_loss_fn(
        fields["logp"], mask, fields["adv"], mask, ref_per_token_logps=fields["ref_logp"],
        old_per_token_logps=fields["old_logp"], **case.settings,
    )  # fmt: skip
    clipped = case.settings["loss_type"] in ("grpo", "bnpo", "dapo", "dr_grpo") and "level" not in str(case.settings)
    metrics = {"clip": said[-1].item()} if clipped else {}
    return loss, metrics | ({"kl": said[0].item()} if len(said) == 2 else {})


def losses(paths: argparse.Namespace) -> list[dict]:
    """Every policy loss of every trainer: what it was given, the loss, its gradients and the metrics that we have."""
    trainers = {
        "trl": (trl_cases(), run_trl),
        "verl": (verl_cases(), lambda *given: run_verl(*given, paths.verl)),
        "openrlhf": (openrlhf_cases(), lambda *given: run_openrlhf(*given, paths.openrlhf)),
        "liger": (liger_cases(), lambda *given: run_liger(*given, paths.liger)),
    }
    found = []
    for trainer, (cases, run) in trainers.items():
        for case in cases:
            fields = golden_inputs.batch(case.inputs)
            leaves = {name: fields[name].requires_grad_() for name in ("logp", "entropy")}
            with code.in_float64():
                loss, metrics = run(case, fields)
                loss.backward()
            record = {"trainer": trainer} | {k: v for k, v in case._asdict().items() if v} | {"loss": case.loss}
            record.pop("level", None)
            theirs = record.pop("settings", {})
            record |= {"settings": theirs, "value": loss.item(), "gradient": leaves["logp"].grad.tolist()}
            if leaves["entropy"].grad is not None:
                record["entropy_gradient"] = leaves["entropy"].grad.tolist()
            found.append(record | {"metrics": metrics})
    return found


def estimates(paths: argparse.Namespace) -> list[dict]:
    """Per-token estimates of the KL and their gradients."""
    core, utils = code.verl(paths.verl)[0], code.openrlhf(paths.openrlhf)[1]
    calls = [("verl", kind, lambda a, b, kind=kind: core.kl_penalty(a, b, "abs" if kind == "absolute" else kind))
             for kind in ("k1", "k2", "k3", "absolute", "k1+", "k3+")]  # fmt: skip
    calls += [("openrlhf", kind, lambda a, b, kind=kind: utils.compute_approx_kl(
                  a, b, kl_estimator=kind[:2], unbiased_gradient=kind.endswith("+")))
              for kind in ("k1", "k2", "k3", "k1+", "k2+", "k3+")]  # fmt: skip
    found = []
    for trainer, kind, function in calls:
        fields = golden_inputs.batch("far")
        logp = fields["logp"].requires_grad_()
        with code.in_float64():
            kl = function(logp, fields["ref_logp"])
            kl.sum().backward()
        found.append({"trainer": trainer, "kind": kind, "value": kl.tolist(), "gradient": logp.grad.tolist()})
    return found


def value_losses(paths: argparse.Namespace) -> list[dict]:
    """The critics' losses."""
    core, models = code.verl(paths.verl)[0], code.openrlhf(paths.openrlhf)[0]
    calls = [("verl", {"clip": 0.5}, lambda *x: core.compute_value_loss(*x, cliprange_value=0.5)[0]),
             ("verl", {"clip": 0.2, "reduce": "seq_mean_token_mean"}, lambda *x: core.compute_value_loss(
                 *x, cliprange_value=0.2, loss_agg_mode="seq-mean-token-mean")[0]),
             ("openrlhf", {"clip": 0.5}, lambda v, r, o, m: models.ValueLoss(0.5)(v, o, r, m)),
             ("openrlhf", {"clip": None}, lambda v, r, o, m: models.ValueLoss(None)(v, o, r, m))]  # fmt: skip
    found = []
    for trainer, options, function in calls:
        fields = golden_inputs.batch()
        values = fields["values"].requires_grad_()
        loss = function(values, fields["returns"], fields["old_values"], fields["mask"])
        loss.backward()
        gradient = values.grad.tolist()
        found.append({"trainer": trainer, "options": options, "value": loss.item(), "gradient": gradient})
    return found


def rewards(paths: argparse.Namespace) -> dict:
    """Rewards with a KL in them, and the overlong penalties."""
    from trl.rewards import get_soft_overlong_punishment

    core = code.verl(paths.verl)[0]
    _, utils, lengths = code.openrlhf(paths.openrlhf)
    fields = golden_inputs.batch("far")
    old, ref, mask, scores = (fields[name] for name in ("old_logp", "ref_logp", "mask", "scores"))
    with code.in_float64():
        kl = utils.compute_approx_kl(old, ref, kl_estimator="k1")
        openrlhf = utils.compute_reward(scores.clone(), 0.05, kl, mask, (-1.0, 1.0))
    verl = core.compute_rewards(fields["token_adv"], old, ref, 0.05)
    counts = [0, 50, 80, 81, 90, 100, 101, 130]
    held = argparse.Namespace(response_length=torch.tensor(counts), rewards=torch.zeros(len(counts)).double())
    lengths.apply_overlong_penalty([held], 100, 20, 0.5)
    return {
        "openrlhf": openrlhf.tolist(),
        "verl": verl.tolist(),
        "lengths": counts,
        "overlong_trl": get_soft_overlong_punishment(100, 20)([[0] * n for n in counts]),
        "overlong_openrlhf": held.rewards.tolist(),
    }


def main():
    """Write every golden value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("verl", "openrlhf", "liger"):
        parser.add_argument(f"--{name}", type=Path, required=name != "liger")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "data" / "trainers.json")
    paths = parser.parse_args()
    if paths.liger is not None:
        sys.path.append(str(paths.liger))
    installed = {"torch": version("torch"), "trl": version("trl"), "liger": version("liger-kernel")}
    unpacked = {name: code.version_of(getattr(paths, name), name) for name in ("verl", "openrlhf")}
    fields = golden_inputs.batch()
    result = {
        "command": "python tools/golden_losses.py --verl FOLDER --openrlhf FOLDER",
        "versions": installed | unpacked,
        "inputs": {name: float(x.double().sum()) for name, x in fields.items()},
        "losses": losses(paths),
        "estimates": estimates(paths),
        "value_losses": value_losses(paths),
        "rewards": rewards(paths),
    }
    lines = [f'"{k}": ' + _lines(v) for k, v in result.items()]
    paths.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{paths.out}: {len(result['losses'])} losses")


def _lines(value) -> str:
    """JSON with an entry of a list a line."""
    if not isinstance(value, list):
        return json.dumps(value)
    return "[\n" + ",\n".join(json.dumps(x) for x in value) + "\n]"


if __name__ == "__main__":
    main()
