"""Systems of the survey whose centre is a reward model and PPO, or what came in its place."""

from __future__ import annotations

from rlfast.recipes.row import Policy, Recipe, RewardModel, said, undisclosed, use

GPT = "2203.02155 §C.4"

ROWS = (
    Recipe(
        "instructgpt", "InstructGPT", "2203.02155", "S",
        (
            RewardModel(
                loss=use("ranked_loss", "all_pairs"),
                candidates=said(4, "2203.02155 §3.5 (4 to 9)"),
                learning_rate=said(9e-6, "2203.02155 §C.2"),
            ),
            Policy(
                loss=use("loss", "ppo", eps_low=said(0.2, GPT), eps_high=said(0.2, GPT)),
                advantage=use("gae", gamma=said(1.0, GPT), lam=undisclosed(0.95)),
                rewards=("model",),
                kl=use("shape_rewards", beta=said(0.02, GPT)),
                critic=use("value_loss", clip=undisclosed(0.2)),
                nll=said(27.8, GPT),
                temperature=said(1.0, GPT),
                ema=use("ema_update", decay=said(0.992, GPT)),
            ),
        ),
    ),
)  # fmt: skip
