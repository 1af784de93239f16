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

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import trainer_code as code  # noqa: E402
from golden_cases import OLD, Case, liger_cases, openrlhf_cases, trl_cases, verl_cases  # noqa: E402

from tests import golden_inputs  # noqa: E402


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
    return loss, {
        ours: said[theirs][0] for theirs, ours in names.items() if theirs in said and plain and not case.select
    }


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
    if s.get("entropy_coef"):
        loss = loss - s["entropy_coef"] * core.agg_loss(fields["entropy"], mask, agg, **info)
    metrics = {}
    if not {"rollout_is", "rollout_rs"} & set(s) and mode != "kl_cov" and "actor/ppo_kl" in said:
        metrics["approx_kl_k1"] = said["actor/ppo_kl"]
        if case.inputs == "near" and mode in ("vanilla", "cispo", "gspo"):
            metrics["clip"] = said["actor/pg_clipfrac"] + said["actor/pg_clipfrac_lower"]
    return loss, metrics


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


def controllers(paths: argparse.Namespace) -> dict:
    """What the controllers do, step by step: measurements, and the coefficient after each."""
    from trl import GRPOTrainer

    core = code.verl(paths.verl)[0]
    measured, control = [[0.05, 64], [0.105, 64], [0.3, 128], [0.1, 64]], core.AdaptiveKLController(0.2, 0.1, 1000)
    values = []
    for kl, n in measured:
        control.update(kl, n)
        values.append(float(control.value))
    fields = golden_inputs.batch()
    level = float(fields["entropy"][fields["mask"]].mean())
    settings = {"loss_type": "bnpo", "use_adaptive_entropy": True, "entropy_coef": 0.01, "entropy_coef_max": 0.02}
    trainer = code.trl_trainer(fields, settings)
    inputs, steps, drawn = code.trl_inputs(fields, OLD), [], fields["entropy"]
    plain = run_trl(Case("bnpo", {"loss_type": "bnpo"}), fields)[0].item()
    for entropy in (0.5, 0.15, 0.1, 0.1, 0.3, 0.19):
        fields["entropy"] = drawn * (entropy / level)
        with code.in_float64():
            bonus = plain - GRPOTrainer._compute_loss(trainer, None, inputs).item()
        steps.append({"entropy": entropy, "applied": bonus / entropy, "coef": trainer.entropy_coef})
    return {"kl": {"measured": measured, "values": values}, "entropy": steps}


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
        "controllers": controllers(paths),
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
