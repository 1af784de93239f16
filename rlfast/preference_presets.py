"""What each trainer does differently from the paper of a preference loss: options, by trainer and row.

Of TRL 1.16.0, Liger 0.8.5 and OpenRLHF 0.11.2, and of HALOs as of November 2026. A row without options is there because
the trainer has it and agrees.
"""

from __future__ import annotations

from rlfast import validate

# The likelihood beside a loss is a mean over all tokens of the batch, as these trainers have it.
_BATCH = {"nll_reduce": "batch"}
BY_BATCH = ("trl", "liger")

PRESETS: dict[str, dict[str, dict]] = {
    "trl": {
        "dpo": {},
        "robust": {"label_smoothing": 0.0},
        "hinge": {},
        "ipo": {"mean": True},
        "dpo_norm": {"beta": 0.1},
        "ld_dpo": {},
        "wpo": {},
        "exo_pair": {},
        "nca_pair": {},
        "bco_pair": {},
        "sppo_hard": {"beta": 0.1, "scale": 1.0},
        "aot": {},
        "aot_unpaired": {},
        "apo_zero": {},
        "apo_down": {},
        "discopop": {},
        "f_dpo_reverse_kl": {},
        "f_dpo_forward_kl": {},
        "f_dpo_js": {},
        "f_dpo_alpha": {},
        "mpo": _BATCH,
        "irpo": _BATCH,
        "cpo": _BATCH | {"beta": 0.1},
        "cpo_hinge": _BATCH,
        "cpo_ipo": _BATCH | {"mean": True},
        "simpo": {"beta": 0.1, "gamma": 0.5},
        "cpo_simpo": _BATCH | {"beta": 0.1, "gamma": 0.5},
        "alpha_po": {"beta": 0.1, "gamma": 0.5, "alpha": 0.0},
        "orpo": _BATCH,  # and over prompt and response, which the caller hands in as ``nll``
    },
    "liger": {
        "dpo": {},
        "robust": {"label_smoothing": 0.0},
        "hinge": {},
        "exo_pair": {},
        "discopop": {},
        "apo_zero": {},
        "apo_down": {},
        "bco_pair": {},
        "sppo_hard": {"beta": 0.1, "scale": 1.0},
        "nca_pair": {},
        "cpo": _BATCH,
        "simpo": _BATCH | {"beta": 0.1, "gamma": 0.5, "nll": 1.0},  # its module adds the likelihood, its function not
        "orpo": _BATCH,
    },
    "openrlhf": {
        "dpo": {},
        "cdpo": {},
        "ipo": {},
        "irpo": {},
    },
    "halos": {
        "dpo": {},
        "cdpo": {"label_smoothing": 0.2},
        "ipo": {"mean": True},
        "slic_hf": {},
        "simpo": {"beta": 10.0, "gamma": 3.0},  # it has γ/β, 0.3
    },
}


def preset(name: str, like: str) -> dict:
    """The options by which a row becomes a trainer's own.

    Raises:
        ValueError: the trainer is unknown, or has no such loss.
    """
    rows = PRESETS[validate.one_of("like", like, tuple(PRESETS))]
    if name not in rows:
        validate.fail("name", f"one of {', '.join(rows)} for like={like!r}", repr(name))
    return rows[name]
