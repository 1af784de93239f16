"""The range of every number of an objective, and of the helpers around it: beyond it, a number is refused."""

from __future__ import annotations

import math

from rlfast.kernels.formulas import anchored, pair, reward, score, token, unpaired, value
from rlfast.validate import FLOAT32_MAX, LEAST, MOST, Limit

ANY = Limit("a float", -math.inf, math.inf)
FINITE = Limit("a finite float", -FLOAT32_MAX, FLOAT32_MAX)
NOT_NEGATIVE = Limit("a finite float ≥ 0", 0.0, FLOAT32_MAX)
POSITIVE = Limit(f"a float > 0, from {LEAST:g} to {MOST:g}", LEAST, MOST)
# inf turns them off
BOUND = Limit("a float ≥ 0 (inf is off)", 0.0, math.inf)
POSITIVE_BOUND = Limit("a float > 0 (inf is off)", LEAST, math.inf)
FROM_ONE = Limit("a float ≥ 1 (inf is off)", 1.0, math.inf)
SHARE = Limit("a float in [0, 1]", 0.0, 1.0)
SOME = Limit("a float > 0, and at most 1", LEAST, 1.0)
BELOW_ONE = Limit("a float in [0, 1)", 0.0, 1.0 - 2.0**-24)  # the largest below 1 in float32
INSIDE = Limit("a float in (0, 1)", LEAST, 1.0 - 2.0**-24)
BELOW_HALF = Limit("a float in [0, ½)", 0.0, 0.5 - 2.0**-25)

# Beyond 1, eps_low leaves a ratio without a lower bound: verl's recipe for CISPO has 10.
_RANGE = {"eps_low": BOUND, "eps_high": BOUND}
_BETA = {"beta": POSITIVE}

# Of the formulas, by the record of their hyper-parameters. One that is not here, a user's, may have any number.
HYPER = {
    token.NoHyper: {},
    token.Range: _RANGE,
    token.Clip: _RANGE | {"dual_clip": FROM_ONE, "delta": POSITIVE_BOUND},
    token.Cap: {"cap": POSITIVE_BOUND},
    token.Sapo: {"tau_pos": POSITIVE, "tau_neg": POSITIVE},
    token.Vespo: {name: NOT_NEGATIVE for name in token.Vespo._fields},
    token.Squared: {"tau": NOT_NEGATIVE, "scale": NOT_NEGATIVE},
    token.Apa: {"inv_lambda": NOT_NEGATIVE},
    token.Awr: {"coef": FINITE, "max_weight": POSITIVE_BOUND},
    token.Dppo: _RANGE | {"cap": POSITIVE_BOUND},
    token.KlCov: {"coef": NOT_NEGATIVE},
    token.NashMd: {"pull": NOT_NEGATIVE},
    token.Cpgd: {"eps_low": BELOW_ONE, "eps_high": BOUND, "alpha": NOT_NEGATIVE},  # log(1 − eps_low)
    value.ValueClip: {"clip": POSITIVE_BOUND},
    value.Huber: {"delta": POSITIVE, "clip": POSITIVE_BOUND},
    # of preference losses
    score.Alpha: {"alpha": FINITE},
    score.Divergence: {"alpha": FINITE},
    pair.Beta: _BETA,
    pair.Logistic: _BETA | {"label_smoothing": SHARE, "gamma": FINITE, "length_price": FINITE},
    pair.Smoothed: _BETA | {"label_smoothing": BELOW_HALF},
    pair.Hinge: _BETA | {"delta": FINITE},
    pair.Exo: _BETA | {"label_smoothing": INSIDE},
    pair.Disco: _BETA | {"tau": POSITIVE},
    pair.Rpo: _BETA | {"eta": FINITE},
    pair.Unequal: _BETA | {"alpha": NOT_NEGATIVE},
    pair.Weighted: _BETA | {"eta": FINITE},
    anchored.Sppo: _BETA | {"scale": NOT_NEGATIVE},
    anchored.Positive: _BETA | {"penalty": NOT_NEGATIVE},
    anchored.Calibrated: _BETA | {"calibration": NOT_NEGATIVE},
    anchored.Explored: {"alpha": FINITE},
    reward.Focal: {"gamma": NOT_NEGATIVE},
    reward.Barrier: {"limit": POSITIVE, "edge": POSITIVE, "barrier": FINITE},
    reward.MaxMargin: {"penalty": NOT_NEGATIVE},
    reward.Point: {"target": FINITE},
    unpaired.Kto: _BETA | {"desirable_weight": NOT_NEGATIVE, "undesirable_weight": NOT_NEGATIVE},
    unpaired.Dro: {"tau": POSITIVE},
}

# Pairs of hyper-parameters, the first no larger than the second.
ORDERED_HYPER = {reward.Barrier: (("edge", "limit"),)}

# Of ``rlfast.Loss``, ``rlfast.Correction`` and ``rlfast.PreferenceLoss``, by the name of the option.
OPTIONS = {
    "beta": FINITE,
    "entropy_coef": FINITE,
    "kl_d_max": BOUND,
    "kl_max": BOUND,
    "off_policy": BOUND,
    "log_ratio_low": ANY,
    "log_ratio_high": ANY,
    "unit_low": ANY,
    "unit_high": ANY,
    "low": BOUND,
    "high": BOUND,
    "gate_low": ANY,
    "gate_high": ANY,
    "nll": FINITE,
    "tail": SHARE,
    "kl": FINITE,
}
# Pairs of them, the first no larger than the second.
ORDERED = (("log_ratio_low", "log_ratio_high"), ("unit_low", "unit_high"))
FLAGS = ("entropy_mean", "weight_in_ratio", "signed", "mean_adv", "count_empty")
