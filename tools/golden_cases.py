"""Which calls of the trainers' losses are recorded: a row, the trainer's settings, and what rlfast is given instead."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import NamedTuple

NOTHING = MappingProxyType({})
OLD, REF, ROLLOUT = ("old_logp",), ("old_logp", "ref_logp"), ("old_logp", "rollout_logp")


class Case(NamedTuple):
    """One call of a trainer's loss, and the same call of rlfast."""

    loss: str  # a row of rlfast.LOSSES
    settings: dict = NOTHING  # the trainer's own
    options: dict = NOTHING  # of rlfast.loss
    fields: tuple[str, ...] = OLD  # "ours=theirs" where the names differ
    call: dict = NOTHING  # other arguments of the loss
    inputs: str = "near"
    level: str = "token"  # "sequence": the trainer's metrics are means over sequences, and are left out
    select: dict = NOTHING  # the function of rlfast that chooses tokens as the trainer does, and its arguments


def widened(cases: list[Case], without_kl=()) -> list[Case]:
    """The cases, and for the first one of each row: every batch, a KL, and a bonus of entropy."""
    first = {}
    for case in cases:
        first.setdefault(case.loss, case)
    added = []
    for name, case in first.items():
        added += [case._replace(inputs=kind) for kind in ("near", "far", "drift")]
        if name not in without_kl:
            fields = (*dict.fromkeys((*case.fields, "ref_logp", "entropy")),)
            both = {"beta": 0.2, "entropy_coef": 0.05}
            more = {"settings": case.settings | both, "options": case.options | both, "fields": fields}
            added.append(case._replace(inputs="near", **more))
    return cases + [case for case in added if case not in cases]


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
        Case("bnpo", bnpo),
        Case("bnpo", bnpo | kl, kl, REF),
        Case("dr_grpo", {"loss_type": "dr_grpo"}, call={"max_len": 512}),
        Case("dapo", dapo),
        Case("dapo", dapo | {"epsilon_high": 0.28}, {"eps_high": 0.28}, inputs="far"),
        Case("dapo", dapo | kl | {"num_items": 57, "num_processes": 2, "current_gradient_accumulation_steps": 4,
                                  "steps_per_generation": 8}, kl, REF,
             {"num_items": 57 / 8, "world_size": 2, "accumulation": 4}),
        Case("dapo", dapo | {"entropy_coef": 0.05, "num_items": 57}, {"entropy_coef": 0.05}, (*OLD, "entropy"),
             {"num_items": 57}),
        Case("two_sided_grpo", grpo | {"delta": 4.0}, inputs="far"),
        Case("gspo", gspo, level="sequence"),
        Case("gspo", gspo | kl, kl, REF, level="sequence"),
        Case("luspo", luspo, level="sequence"),
        Case("luspo", luspo | kl, kl, REF, level="sequence"),
        Case("cispo", {"loss_type": "cispo"}),
        Case("cispo_capped", {"loss_type": "cispo", "epsilon_high": 5.0}, inputs="far"),
        Case("sapo", sapo),
        Case("sapo", sapo | kl, kl, REF),
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
    return [
        *widened(cases, ("rloo", "a_star_po", "gmpo")),
        Case("dapo", dapo | {"use_vllm": True, "ratio": ("sequence_mask", None, 3.0)}, {"correction": "sequence_mask"},
             ROLLOUT, inputs="unscored"),
        Case("dapo", dapo | {"use_vllm": True, "ratio": ("token_truncate", None, 1.2)},
             {"correction": {"weight": "token", "high": 1.2}}, ROLLOUT, inputs="unscored"),
        Case("grpo", grpo | {"off_policy_mask_threshold": 0.01}, {"off_policy": 0.01}, ROLLOUT, inputs="unscored"),
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
        Case("dual_clip_ppo"),
        Case("dual_clip_ppo", {"clip_ratio_c": 1.3}, {"dual_clip": 1.3}, inputs="far"),
        Case("grpo"),
        Case("grpo", kl, kl, REF, inputs="far"),
        Case("dapo", {"clip_ratio_high": 0.28, "clip_ratio_c": 10.0}),
        Case("dr_grpo", {"agg": "seq-mean-token-sum-norm"}),
        Case("dr_grpo", {"agg": "seq-mean-token-sum-norm", "info": {"loss_scale_factor": 512}}, call={"max_len": 512}),
        Case("gspo", gspo),
        Case("gspo", gspo | kl, kl, REF),
        Case("gspo", gspo, inputs="far"),
        Case("gspo_token", gspo),
        Case("gspo_token", gspo | {"agg": "token-mean", "token_adv": True}, {"reduce": "token_mean"}),
        Case("cispo", {"mode": "cispo"}),
        Case("cispo", {"mode": "cispo"}, inputs="far"),
        Case("sapo", {"mode": "sapo"}),
        Case("sapo", {"mode": "sapo"}, inputs="far"),
        Case("sapo", {"mode": "sapo"} | by_sequence | kl, kl, REF),
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
        Case("dppo_tv", dppo_tv),
        Case("dppo_tv", dppo_tv | {"clip_ratio": 0.02}, {"eps_low": 0.02, "eps_high": 0.02}),
        Case("dppo_kl", dppo_kl),
        Case("dppo_kl", dppo_kl | {"clip_ratio": 0.002}, {"eps_low": 0.002, "eps_high": 0.002}),
        Case("ppo", {"entropy_coef": 0.05} | by_sequence, {"entropy_coef": 0.05} | seq_mean_token_mean,
             (*OLD, "entropy")),
    ]  # fmt: skip
    for kind in ("k1", "abs", "k2", "k3+", "k1+"):
        ours = "absolute" if kind == "abs" else kind
        cases.append(Case("grpo", kl | {"kl_loss_type": kind}, kl | {"kl": ours}, REF, inputs="far"))
    least = math.exp(-20.0)  # log ratios are bounded at ±20
    weights = (
        ({"rollout_is": "token", "rollout_is_threshold": 1.1}, {"weight": "token", "low": least, "high": 1.1}),
        ({"rollout_is": "token", "rollout_is_threshold": "0.9_1.2"},
         {"weight": "token", "gate": "token", "gate_ratio": [0.9, 1.2]}),
        ({"rollout_is": "sequence", "rollout_is_threshold": 1.1}, {"weight": "seq_sum", "low": least, "high": 1.1}),
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
        options = {"correction": options["correction"] | weights[0][1]} | seq_mean_token_mean
        cases.append(Case("ppo", settings | weights[0][0] | by_sequence, options, ROLLOUT))
    chosen = (  # criteria that are several, or of the largest token
        ("seq_max_k2", "0.05", [{"kind": "k2", "level": "seq_max", "high": 0.05}]),
        ("seq_max_k3", "0.05", [{"kind": "k3", "level": "seq_max", "high": 0.05}]),
        ("token_k2,seq_mean_k3", "0.05,0.02",
         [{"kind": "k2", "high": 0.05}, {"kind": "k3", "level": "seq_mean", "high": 0.02}]),
    )  # fmt: skip
    for rejection, threshold, gates in chosen:
        settings = {"rollout_rs": rejection, "rollout_rs_threshold": threshold}
        select = {"name": "rollout_keep", "field": "mask", "gates": gates}
        cases.append(Case("ppo", settings, select=select))
    cases.append(Case("reinforce", {"mode": "reinforce"} | weights[0][0], {"correction": weights[0][1]},
                      ("rollout_logp",)))  # fmt: skip
    cases.append(Case("reinforce", {"mode": "reinforce"} | kl, kl, ("ref_logp",)))
    return widened(cases, ("gmpo", "sapo", "reinforce"))  # the reduction of the KL of the first two is another there


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
        Case("grpo"),
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
    for gating in ("binary_kl", "tv"):
        for level, ours in (("token", "token"), ("seq", "seq_mean")):
            high = {"binary_kl": 0.01, "tv": 0.03}[gating]
            settings = {"is_correction_level": level, "is_correction_gating": gating}
            select = {"name": "rollout_keep", "field": "keep", "gates": [{"kind": gating, "level": ours, "high": high}]}
            cases.append(Case("ppo", settings | {"is_correction_threshold": [0.0, high]}, {"correction": "decoupled"},
                              ROLLOUT, select=select))  # fmt: skip
    return widened(cases, ("raft",))


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
        Case("gspo", {"loss_type": "grpo"} | sequence, fields=REF, inputs="drift"),
        Case("luspo", {"loss_type": "luspo", "beta": 0.0} | sequence),
        Case("luspo", {"loss_type": "luspo", "beta": 0.0} | sequence, inputs="drift"),
        Case("cispo", {"loss_type": "cispo"}, fields=REF),
        Case("cispo_capped", {"loss_type": "cispo", "epsilon_high": 5.0}, fields=REF, inputs="far"),
    ]
