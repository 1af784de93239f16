"""What each trainer does differently from the paper of a loss: options of ``rlfast.Loss``, by trainer and row.

Read in, and held by tests/test_presets.py to, TRL 1.16.0, verl 0.9.1, OpenRLHF 0.11.2 and Liger 0.8.5; NeMo-RL as of
November 2026, whose package on PyPI is a placeholder. An option has the trainer's own default, also where its
documentation recommends another value. docs/trainers.md says what no option reproduces.
"""

from __future__ import annotations

import math

from rlfast import validate
from rlfast.full_kl import FULL

SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM = "seq_mean_token_mean", "seq_mean_token_sum"
CLIP = {"eps_low": 0.2, "eps_high": 0.2}

# Bounds of |log π_ref − log π| and of the estimate itself, by trainer and estimator. Without an entry there are none.
# OpenRLHF bounds the difference at 10 on one side only; beyond 10 nats its estimates are at their own bound anyway.
KL_BOUNDS = {
    "verl": {"k3": (20.0, 10.0)},
    "openrlhf": {"k1": (math.inf, 10.0), "k2": (math.inf, 10.0), "k3": (20.0, 10.0)},
    "nemo-rl": {"k1": (20.0, 10.0), "k2": (20.0, 10.0), "k3": (20.0, 10.0)},
}

# A fully masked sequence counts in a mean over sequences. The KL is weighed by the ratio (use_bias_correction_kl).
_TRL = {"kl": "k3", "kl_ratio": "unit", "beta": 0.0, "count_empty": True, "entropy_mean": True}
_TRL_PLAIN = {"kl": None, "beta": 0.0, "count_empty": True}

# A fully masked sequence does not count. The difference of log-probs is bounded in these losses, not in the others.
_VERL = {"kl": "k3", "beta": 0.0}
_VERL_BOUNDED = _VERL | {"log_ratio_low": -20.0, "log_ratio_high": 20.0}
_VERL_VANILLA = _VERL_BOUNDED | CLIP | {"surrogate": "ppo_clip", "reduce": "token_mean", "dual_clip": 3.0}
_VERL_GSPO = _VERL | CLIP | {"unit": "seq_mean_through", "unit_high": 10.0, "reduce": SEQ_MEAN_TOKEN_MEAN}
_VERL_DPPO = _VERL_BOUNDED | CLIP | {"cap": 3.0}  # the cap is the setting that is the dual clip elsewhere

_OPENRLHF = {"kl": "k3", "beta": 0.0}
_OPENRLHF_PPO = _OPENRLHF | CLIP | {
    "surrogate": "ppo_clip", "reduce": "token_mean", "log_ratio_low": -20.0, "log_ratio_high": 20.0,
}  # fmt: skip

_NEMO = {"kl": "k3", "kl_ratio": "score", "beta": 0.01, "reduce": "token_mean"}
_NEMO_PPO = _NEMO | CLIP | {"surrogate": "ppo_clip"}
_NEMO_REINFORCE = _NEMO | {"surrogate": "reinforce"}

_LIGER = {"kl": "k3", "beta": 0.04, "count_empty": True}

PRESETS: dict[str, dict[str, dict]] = {
    "trl": {
        "grpo": _TRL,
        "bnpo": _TRL,
        "dr_grpo": _TRL,
        "dapo": _TRL | CLIP,
        "two_sided_grpo": _TRL,
        "gspo": _TRL | CLIP,
        "luspo": _TRL | CLIP,
        "cispo": _TRL | {"surrogate": "cispo_capped", "cap": 0.2},  # epsilon_high, an absolute bound; 5 is recommended
        "cispo_capped": _TRL,
        "sapo": _TRL,
        "vespo": _TRL | {"kl_ratio": "token"},
        "gmpo": _TRL_PLAIN | {"kl": "k3"},
        "rloo": _TRL_PLAIN | CLIP | {"surrogate": "ppo_clip", "unit": "seq_sum", "reduce": SEQ_MEAN_TOKEN_MEAN},
        "a_star_po": _TRL_PLAIN,
    },
    "verl": {
        "ppo": _VERL_VANILLA,
        "dual_clip_ppo": _VERL_VANILLA,
        "grpo": _VERL_VANILLA,
        "dapo": _VERL_VANILLA | {"eps_high": 0.28, "dual_clip": 10.0},  # as its script for DAPO sets them
        "dr_grpo": _VERL_VANILLA | {"reduce": "seq_sum_over_max_len"},
        "rloo": _VERL_VANILLA,
        "remax": _VERL_VANILLA,
        "opo": _VERL_VANILLA,
        "reinforce++": _VERL_VANILLA,
        "reinforce": _VERL,
        "gpg": _VERL,
        "gspo": _VERL_GSPO,
        "gspo_token": _VERL_GSPO,
        "cispo": _VERL_BOUNDED | CLIP,
        "sapo": _VERL_BOUNDED,
        "clip_cov": _VERL | CLIP,
        "kl_cov": _VERL | {"coef": 0.1},
        "gmpo": _VERL | {"log_ratio_low": -0.2, "log_ratio_high": 0.2, "count_empty": True},
        "dro": _VERL | {"surrogate": "quadratic_penalty", "unit": "token", "reduce": "token_mean", "tau": 1.0},
        "dppo_tv": _VERL_DPPO,
        "dppo_kl": _VERL_DPPO,
    },
    "openrlhf": {
        "ppo": _OPENRLHF_PPO,
        "dual_clip_ppo": _OPENRLHF_PPO | {"dual_clip": 3.0},
        "grpo": _OPENRLHF_PPO,
        "dapo": _OPENRLHF_PPO | {"eps_high": 0.28},
        "dr_grpo": _OPENRLHF_PPO,
        "rloo": _OPENRLHF_PPO,
        "reinforce++": _OPENRLHF_PPO,
        "gspo": _OPENRLHF | CLIP,
        "raft": {},
    },
    "nemo-rl": {
        "ppo": _NEMO_PPO,
        "dual_clip_ppo": _NEMO_PPO | {"dual_clip": 3.0},
        "grpo": _NEMO_PPO,
        "dapo": _NEMO_PPO | {"eps_high": 0.28, "dual_clip": 10.0, "beta": 0.0},  # as its configurations for DAPO
        "reinforce++": _NEMO_PPO | {"beta": 0.0},  # its KL is in the reward
        "reinforce": _NEMO_REINFORCE,
        "rloo": _NEMO_REINFORCE,
        "gspo": _NEMO | CLIP | {"reduce": SEQ_MEAN_TOKEN_MEAN},
        "cispo": _NEMO | CLIP,
        "raft": {},
    },
    "liger": {
        "grpo": _LIGER,
        "bnpo": _LIGER,
        "dr_grpo": _LIGER,
        "dapo": _LIGER | CLIP,
        "two_sided_grpo": _LIGER,
        "gspo": _LIGER | CLIP,
        "luspo": _LIGER | CLIP | {"beta": 0.0},  # with a KL it reads masked tokens
        "cispo": _LIGER | {"surrogate": "cispo_capped", "cap": 0.2},
        "cispo_capped": _LIGER,
        "sapo": _LIGER,
        "vespo": _LIGER,
    },
}  # fmt: skip

# The KL in the reward: of TRL's RLOO; of verl with use_kl_in_reward; of OpenRLHF without its KL loss; of NeMo-RL with
# use_kl_in_reward, as its REINFORCE++ has it.
REWARDS = {
    None: {"beta": 0.05, "kind": "k1", "level": "token"},
    "trl": {"beta": 0.05, "kind": "k1", "level": "sequence"},
    "verl": {"beta": 0.001, "kind": "k1", "level": "token"},
    "openrlhf": {"beta": 0.01, "kind": "k1", "level": "token", "clip": (-10.0, 10.0)},
    "nemo-rl": {"beta": 0.01, "kind": "k3", "level": "token"},
}
# The critic's loss: how far V may move, and the reduction. TRL's is that of its PPO trainer, which 1.16 has no more.
VALUES = {
    None: {"clip": 0.2, "reduce": "token_mean"},
    "trl": {"clip": 0.2, "reduce": "token_mean"},
    "verl": {"clip": 0.5, "reduce": "token_mean"},
    "openrlhf": {"clip": 0.5, "reduce": "token_mean"},
    "nemo-rl": {"clip": None, "reduce": "token_mean"},
}


def kl_bounds(like: str | None, kind: str | None) -> dict:
    """``kl_d_max`` and ``kl_max`` of an estimator as a trainer has it; no entries where it has no bounds."""
    bounds = KL_BOUNDS.get(like, {}).get((kind or "").removesuffix("+"))
    return dict(zip(("kl_d_max", "kl_max"), bounds, strict=True)) if bounds else {}


def trainer(like: str) -> str:
    """The trainer's name, if it is one.

    Raises:
        ValueError: it is not; the message lists them.
    """
    return validate.one_of("like", like, tuple(PRESETS))


def preset(name: str, like: str, kl=...) -> dict:
    """The options by which a row becomes a trainer's own.

    Args:
        name: of the row.
        like: of the trainer.
        kl: the estimator or None, where the caller asks for another than the trainer's default.

    Raises:
        ValueError: the trainer is unknown, or has no such loss.
    """
    rows = PRESETS[trainer(like)]
    if name not in rows:
        validate.fail("name", f"one of {', '.join(rows)} for like={like!r}", repr(name))
    if kl is None:
        return {option: x for option, x in rows[name].items() if option not in ("kl", "kl_ratio", "beta")}
    ratio = {"kl_ratio": None} if kl == FULL else {}
    return rows[name] | kl_bounds(like, rows[name].get("kl") if kl is ... else kl) | ratio
