"""The batch that the trainers' own functions and rlfast are both given: by seed, and exact in float32."""

from __future__ import annotations

import torch

ROWS, LENGTH = 6, 9
LENGTHS = (9, 5, 7, 1, 0, 4)  # one token, and none
SEED = 20412
POINTS = {
    "near": (),
    "unscored": (("rollout_logp", 0, 2, float("nan")), ("rollout_logp", 3, 0, float("nan"))),
    "far": (
        ("old_logp", 0, 0, -26.0), ("logp", 0, 0, -1.0), ("old_logp", 0, 1, -1.0), ("logp", 0, 1, -26.0),
        ("old_logp", 1, 0, -1.0), ("logp", 1, 0, -13.0), ("ref_logp", 1, 1, -30.0),
        ("logp", 1, 2, -30.0), ("old_logp", 1, 2, -30.25), ("ref_logp", 1, 2, -5.0),
        ("ref_logp", 2, 0, -14.0), ("logp", 2, 0, -2.0), ("logp", 2, 1, -12.0), ("ref_logp", 2, 1, -1.5),
        ("rollout_logp", 5, 0, -26.0), ("rollout_logp", 2, 2, -1.0), ("old_logp", 2, 2, -4.0),
    ),
    "drift": (
        ("old_logp", 0, 0, -26.0), ("logp", 0, 0, -1.0), ("old_logp", 3, 0, -13.0), ("logp", 3, 0, -0.5),
        # probabilities from .30 to .55 and .65, and back
        ("old_logp", 1, 0, -1.2), ("logp", 1, 0, -0.6), ("old_logp", 1, 3, -1.204), ("logp", 1, 3, -0.431),
        ("old_logp", 5, 0, -0.6), ("logp", 5, 0, -1.2), ("old_logp", 5, 1, -0.431), ("logp", 5, 1, -1.204),
    ),
}  # fmt: skip


def batch(kind: str = "near") -> dict[str, torch.Tensor]:
    """Every field of a loss, in float64.

    "near" has the ratios of a training step. "unscored" lacks log-probs of the sampler. "far" adds differences of 10.5,
    12 and 25 nats, on both sides of every bound that a trainer has. "drift" moves whole sequences with and against
    their advantages, one of them by 12.5 nats.
    """
    draw = torch.Generator().manual_seed(SEED)

    def normal(scale: float):
        return scale * torch.randn(ROWS, LENGTH, generator=draw)

    old = -3.0 * torch.rand(ROWS, LENGTH, generator=draw) - 1.0
    fields = {
        "logp": old + normal(0.25), "old_logp": old, "ref_logp": old + normal(0.3), "rollout_logp": old + normal(0.2),
        "entropy": 2.0 * torch.rand(ROWS, LENGTH, generator=draw),
        "adv": torch.randn(ROWS, generator=draw),
        "token_adv": normal(1.0),
        "values": normal(1.0), "old_values": normal(1.0), "returns": normal(1.0),
        "scores": torch.randn(ROWS, generator=draw),
    }  # fmt: skip
    fields["adv"][4] = 0.0  # of the empty sequence: some trainers add −A of it to the loss, a constant
    if kind == "drift":
        fields["logp"] += torch.tensor([0.35, 0.35, -0.35, 0.0, 0.0, -0.35])[:, None]
        fields["adv"] = torch.tensor([-1.1, 0.7, 0.9, -0.8, 0.0, -0.6])
    for name, row, column, value in POINTS[kind]:
        fields[name][row, column] = value
    fields = {name: x.float().double() for name, x in fields.items()}
    mask = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    mask[2, 3] = False  # what a tool wrote, in the midst of a sequence
    return fields | {"mask": mask}
