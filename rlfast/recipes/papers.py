"""The algorithms of the survey's related papers."""

from __future__ import annotations

from rlfast.recipes.paper_stages import (
    Advised,
    Agent,
    Compared,
    Demonstrated,
    Embedded,
    Extrapolated,
    Feedback,
    Guided,
    Rated,
    Restarted,
)
from rlfast.recipes.row import BestOf, Policy, Preference, Recipe, RewardModel, said, undisclosed, use

EXPO, EMBEDDED, SATORI, IRL, RLRF = "2404.16792", "2502.04357", "2502.02508", "2410.12491", "2403.14238"
LINVIT, MISGENERAL, TEACHER, RLAIF = "2402.16181", "2401.07181", "2401.06603", "2309.00267"
SCRIPT = "the authors' script"

PPO = use("loss", "ppo", eps_low=undisclosed(0.2), eps_high=undisclosed(0.2))
GAE = use("gae", gamma=undisclosed(1.0), lam=undisclosed(0.95))
CRITIC = use("value_loss", clip=undisclosed(0.2))
AGENT = {
    "loss": PPO,
    "advantage": use("gae", gamma=undisclosed(0.99), lam=undisclosed(0.95)),
    "critic": CRITIC,
    "batch": undisclosed(8),
    "learning_rate": undisclosed(3e-3),
}
ASPECTS = ("factuality", "logical correctness", "insightfulness", "completeness", "readability", "harmlessness")

ROWS = (
    Recipe(
        "rlaif", "RLAIF", "2309.00267, 2212.08073", "PK",
        (
            Compared(
                loss=use("reward_loss", "soft_label"),
                judge=use("rewards.judge", both_orders=said(True, f"{RLAIF} §2.1.1")),
                candidates=said(2, RLAIF),
                note="Cross-entropy to the softmax of the judge's two verdicts, averaged over both orders.",
            ),
            Policy(
                loss=use("loss", "reinforce"),
                advantage=use("gae", gamma=undisclosed(1.0), lam=undisclosed(1.0)),
                rewards=("model",),
                kl=use("shape_rewards", beta=said(0.05, f"{RLAIF}: from memory")),
                critic=use("value_loss", clip=undisclosed(None)),
            ),
        ),
        "The policy learns by REINFORCE with a value model, as the paper's does; Claude 3's row has PPO in its place.",
    ),
    Recipe(
        "expo", "ExPO", EXPO, "PK",
        (
            Extrapolated(
                stage=Preference(loss=use("preference_loss", "dpo", beta=undisclosed(0.1)), sampler="reference"),
                extrapolate=use("extrapolate", alpha=said(0.5, f"{EXPO}: from memory, 0.3 to 0.5; searched for")),
            ),
        ),
        "Any aligned model and the one that it was trained from will do.",
    ),
    Recipe(
        "embedding_rewards", "Embedding-based reward models", EMBEDDED, "K",
        (
            Embedded(
                loss=use("reward_loss", "bradley_terry"),
                ensemble=use("EmbeddingRewards", hidden=undisclosed((256, 256)), members=undisclosed(4)),
                pool=use("pooled_rewards", kind=undisclosed("uncertainty"), coef=undisclosed(0.5)),
                updates=undisclosed(4),
                learning_rate=undisclosed(1e-3),
            ),
            BestOf(loss=use("loss", "raft"), judge="model", candidates=undisclosed(4)),
        ),
        "The paper evaluates by best-of-N; here the policy is trained on the best.",
    ),
    Recipe(
        "satori", "Satori", SATORI, "PV",
        (
            RewardModel(loss=use("reward_loss", "bradley_terry"), note="Of right and wrong answers to one problem."),
            Restarted(
                loss=PPO,
                advantage=GAE,
                critic=CRITIC,
                rewards=("task", "model"),
                restart=use("rollout.restarts", back=undisclosed(4)),
                bonus=use("reflection_bonus", beta=said(0.5, SCRIPT)),
                learning_rate=said(2e-7, SCRIPT),
                critic_rate=said(5e-6, SCRIPT),
                temperature=said(0.6, SCRIPT),
                batch=said(1024, SCRIPT),
                note="r = 1[right] − 1 + σ(the reward model's) + bonus.",
            ),
        ),
        "Restarts end with a reflect token, for models that have one. The paper distils between rounds: left out.",
    ),
    Recipe(
        "inverse_rl", "Max-margin inverse RL", IRL, "S",
        (
            Demonstrated(
                stage=Policy(
                    loss=PPO, advantage=GAE, rewards=("task",), kl=use("shape_rewards", beta=undisclosed(0.05)),
                    critic=CRITIC, note="The model whose training's goal is looked for.",
                ),
                loss=use("reward_loss", "max_margin", penalty=said(2.0, f"{IRL}: −x where x > 0, else −2x")),
            ),
            Policy(
                loss=PPO, advantage=GAE, rewards=("model",), kl=use("shape_rewards", beta=undisclosed(0.05)),
                critic=CRITIC, note="A model that is trained on what was found.",
            ),
        ),
    ),
    Recipe(
        "rlrf", "RLRF", RLRF, "SK",
        (
            Rated(
                loss=use("preference_loss", "dpo", beta=undisclosed(0.1)),
                rate=use("rewards.rate", ratings=said({" bad": 0, " fair": 1, " good": 2}, f"{RLRF}: three levels")),
                aspects=said(ASPECTS, RLRF),
                candidates=said(30, f"{RLRF}: with those that the model refined"),
            ),
        ),
        "How pairs are picked and β are unverified; the judge's words are ours. Refining promising answers by the text "
        "of the feedback is left out.",
    ),
    Recipe(
        "linvit", "LINVIT", LINVIT, "K",
        (
            Guided(
                loss=use("value_loss", clip=undisclosed(None)),
                value=use("regularized_value", lam=undisclosed(0.2)),
                gamma=undisclosed(0.99),
                batch=undisclosed(8),
                learning_rate=undisclosed(3e-3),
            ),
        ),
        "The value is the paper's; its bonuses for rare states are left out, and its tables are a network here.",
    ),
    Recipe(
        "llm_feedback", "LLM feedback against goal misgeneralisation", MISGENERAL, "S",
        (
            Agent(**AGENT),
            Feedback(
                loss=use("reward_loss", "soft_label"),
                judge=use("rewards.judge", both_orders=said(True, MISGENERAL)),
                batch=undisclosed(8),
                learning_rate=undisclosed(3e-3),
                note="Episodes in rooms whose goals are anywhere, which the paper's LLM thinks of itself.",
            ),
            Agent(
                **AGENT,
                corner=False,
                share=said(1.0, f"{MISGENERAL}: λ"),
                note="On the preferences alone. The paper goes on in its first rooms; here a cell says nothing of "
                     "another, so that an agent has to have seen it.",
            ),
        ),
        "In the toy room, not in Procgen's maze.",
    ),
    Recipe(
        "llm_teacher", "Bi-directional feedback of LLM and RL agent", TEACHER, "K",
        (
            Advised(
                **AGENT,
                corner=False,
                teacher=use("loss", "reinforce"),
                feedback=use("group_advantage", method=undisclosed("rloo")),
                candidates=undisclosed(4),
            ),
        ),
        "The paper's loop is this: the LLM advises, the agent's results correct it. Its rules were not verified; ours "
        "are PPO on observations with the advice, and REINFORCE on the advice.",
    ),
)  # fmt: skip
