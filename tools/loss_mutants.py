"""The mistakes planted in the Triton and the torch skeleton of the policy losses."""

from __future__ import annotations

from mutants import _python

LOSS_PYTHON = [
    *_python(
        "torch", "rlfast/fallback/token_loss.py",
        ("keep = mask if fields.keep is None else «mask & fields.keep»", "mask", "pairwise"),
        ("(b.old - b.rollout).nan_to_num(nan=«0.0»)", "1.0", "nan or adversarial"),
        ("exp().clamp(«s.weight_low», s.weight_high)", "0.0", "between_bounds or pairwise"),
        ("applied.log().clamp(«LOG_LEAST», 20.0)", "-1e30", "pairwise or adversarial"),
        ("return per_token * slope «* inside»", "", "pairwise"),
        ("total = total / b.rows(b.mask.to(slope.dtype)).clamp(min=1.0)", "total = total", "pairwise"),
        ("torch.where((adv >= 0) | (moved <= s.off_policy), multiplier, zero)", "multiplier", "pairwise"),
        ("d_kl = -d if plan.kl_through else d_kl", "d_kl = d_kl", "pairwise or estimator"),
        ("d_kl, through = d_kl «+ through * slope», zero", "", "pairwise or estimator"),
        ("n = n * max_len if reduce == records.SEQ_SUM_OVER_MAX_LEN else n", "n = n", "pairwise"),
        ("kept = b.keep.to(ones.dtype) if plan.entropy_mean else c", "kept = ones if plan.entropy_mean else c", "kept"),
        ("\"high\": total(clipped * (ratio >= 1))", "\"high\": total(clipped * (ratio > 1))", "pairwise or token_loss"),
    ),
    *_python(
        "triton", "kernels/loss_rows.py",
        ("x = tl.where(x == x, x, 0.0)\n    return x", "return x", "nan or adversarial"),
        ("return expm1(drift) «- drift»", "", "pairwise"),
        ("return (x >= s.gate_low) & «(x <= s.gate_high)»", "(x == x)", "pairwise"),
        ("s.«weight_low», s.weight_high)", "gate_low", "between_bounds"),
        ("tl.where(adv > 0.0, -INFINITE, low), tl.where(adv «<» 0.0, INFINITE, high)", "<=", "pairwise"),
        ("            log_rho = log_rho / n\n", "            log_rho = log_rho\n", "pairwise or between"),
        ("    if MASKS:\n        inside = inside & opened\n", "", "pairwise"),
    ),
    *_python(
        "triton", "kernels/token_loss.py",
        ("        slope = -d\n", "        slope = slope\n", "pairwise or estimator"),
        ("slope += tl.where(in_bounds, value, 0.0)", "slope += value", "pairwise"),
        ("tl.abs(value) < numbers.bounds.kl_max, value, 0.0", "value == value, value, 0.0", "pairwise"),
        ("tl.where(seq.moved <= numbers.settings.off_policy, factor, 0.0)", "factor", "pairwise"),
        ("tl.store(at, g + pulled, mask=inside & «in_bounds»)", "inside", "pairwise"),
        ("clipped = tl.where(in_bounds, clipped, 1.0)", "clipped = clipped", "pairwise"),
        ("by_x = tl.where(«in_unit», c * by_x, 0.0)", "inside", "pairwise"),
        ("                part = part / tl.maximum(seq.count, 1.0)\n", "                part = part\n", "pairwise"),
        ("bonus = tl.where(«kept», 1.0, 0.0)", "inside", "kept"),
    ),
    *_python(
        "triton", "kernels/loss_sums.py",
        ("w = ratio * applied", "w = ratio", "pairwise"),
        ("sequences = sequences * 0.0 + rows", "sequences = sequences", "pairwise"),
        ("        n = n * s.max_len\n", "        n = n\n", "pairwise"),
        ("- entropy_coef * («entropy_scale» * pick", "scale", "kept"),
        ("total(tl.where(ratio «>=» 1.0, hit, 0.0))", ">", "pairwise or without_a_mask"),
    ),
]  # fmt: skip
