"""Systems of the survey with a reward model and a policy gradient."""

from __future__ import annotations

from rlfast.recipes.row import Average, Distil, Policy, Preference, Recipe, RewardModel, said, undisclosed, use

PPO = use("loss", "ppo", eps_low=undisclosed(0.2), eps_high=undisclosed(0.2))
GAE = use("gae", gamma=undisclosed(1.0), lam=undisclosed(0.95))
CRITIC = use("value_loss", clip=undisclosed(0.2))
KL = use("shape_rewards", beta=undisclosed(0.05))
BT = use("reward_loss", "bradley_terry")

GPT, INTERN, CAI, GLM = "2203.02155 §C.4", "2403.17297 §4.3", "2212.08073", "2404.00934"
WARP, LABS = "2406.16768", "2301.11270"

ROWS = (
    Recipe(
        "instructgpt", "InstructGPT", "2203.02155", "SK",
        (
            RewardModel(
                loss=use("ranked_loss", "all_pairs"),
                candidates=said(4, "2203.02155 §3.5: 4 to 9"),
                learning_rate=said(9e-6, "2203.02155 §C.2"),
                batch=said(64, "2203.02155 §C.2"),
            ),
            Policy(
                loss=use("loss", "ppo", eps_low=said(0.2, GPT), eps_high=said(0.2, GPT)),
                advantage=use("gae", gamma=said(1.0, GPT), lam=undisclosed(0.95)),
                rewards=("model",),
                kl=use("shape_rewards", beta=said(0.02, GPT)),
                critic=CRITIC,
                critic_rate=said(9e-6, GPT),
                nll=said(27.8, GPT),
                batch=said(512, GPT),
                temperature=said(1.0, GPT),
                epochs=said(1, GPT),
                minibatches=said(8, GPT),
                ema=use("ema_update", decay=said(0.992, GPT)),
            ),
        ),
        "The bound of the critic's step and λ are not in the report.",
    ),
    Recipe(
        "gpt4", "GPT-4, Gemini", "2303.08774, 2312.11805", "K",
        (
            RewardModel(loss=BT),
            Policy(loss=PPO, advantage=GAE, rewards=("model", "task"), kl=KL, critic=CRITIC),
        ),
        "Disclosed are PPO on a reward model and that rule-based rewards are added to it; no number is.",
    ),
    Recipe(
        "internlm2", "InternLM2 (COOL RLHF)", "2403.17297", "SVK",
        (
            RewardModel(
                loss=use("reward_loss", "focal_barrier", gamma=said(2.0, INTERN), barrier=said(0.02, INTERN)),
                learning_rate=said(1e-5, INTERN),
            ),
            Policy(
                loss=use("loss", "ppo", eps_low=undisclosed(0.2), eps_high=undisclosed(0.2)),
                advantage=use("gae", gamma=undisclosed(1.0), lam=said(0.99, INTERN)),
                rewards=("model",),
                kl=use("shape_rewards", beta=said(0.01, INTERN)),
                critic=CRITIC,
                learning_rate=said(1e-6, INTERN),
                critic_rate=said(5e-6, INTERN),
                warm_up=said(50, INTERN),
                nll=said(0.5, INTERN),
            ),
        ),
        "The reward model is conditioned by a system prompt for each kind of preference; here it has one kind.",
    ),
    Recipe(
        "claude3", "Claude 3 (constitutional AI, RLAIF)", "2212.08073", "K",
        (
            RewardModel(loss=use("reward_loss", "soft_label"), note="The label is σ of the difference of scores."),
            Policy(loss=PPO, advantage=GAE, rewards=("model",), kl=KL, critic=CRITIC),
        ),
        "Claude 3's own report gives no number; the stages are constitutional AI's.",
    ),
    Recipe(
        "reka", "Reka Core, Flash, Edge", "2404.12387", "P",
        (
            RewardModel(loss=BT),
            Policy(loss=PPO, advantage=GAE, rewards=("model",), kl=KL, critic=CRITIC),
        ),
        "PPO is named, its numbers are not.",
    ),
    Recipe(
        "chatglm", "ChatGLM, GLM-4", "2404.00934, 2406.12793", "PK",
        (
            RewardModel(loss=BT, note="Its loss has an L2 term on the rewards, of an undisclosed weight."),
            Policy(
                loss=PPO, advantage=GAE, rewards=("model",), baseline="reference", kl=KL, critic=CRITIC,
                nll=undisclosed(0.1), note="The reward of a reference answer is taken off.",
            ),
            Preference(
                loss=use("preference_loss", "irpo", beta=undisclosed(0.1), nll=undisclosed(0.1)), judge="model",
                note="The other of its two ways: DPO with a likelihood beside it.",
            ),
        ),
    ),
    Recipe(
        "starling", "Starling-7B", "2306.02231, 2301.11270", "V",
        (
            RewardModel(loss=use("ranked_loss", "plackett_luce"), candidates=said(7, f"{LABS}, Nectar: 7 answers")),
            Policy(
                loss=use("loss", "apa", inv_lambda=said(1.0, "Starling's code")),
                advantage=GAE,
                rewards=("model",),
                critic=CRITIC,
            ),
        ),
        "π_old of the loss is the policy that sampled.",
    ),
    Recipe(
        "athene", "Athene-70B", "the model's page", "K",
        (
            RewardModel(loss=BT),
            Policy(loss=PPO, advantage=GAE, rewards=("model",), kl=KL, critic=CRITIC),
        ),
        "An undisclosed RLHF: everything here is a default.",
    ),
    Recipe(
        "gemma", "Gemma 1", "2403.08295", "K",
        (
            RewardModel(loss=BT),
            Policy(
                loss=use("loss", "reinforce"),
                advantage=use("gae", gamma=undisclosed(1.0), lam=undisclosed(1.0)),
                rewards=("model",),
                kl=use("shape_rewards", beta=undisclosed(0.1)),
                critic=use("value_loss", clip=undisclosed(None)),
            ),
        ),
        "A variant of REINFORCE with a KL to the initial policy; the baseline is undisclosed.",
    ),
    Recipe(
        "gemma2", "Gemma 2", "2408.00118, 2406.16768", "K",
        (
            Distil(divergence=use("linear_divergence", kind=undisclosed("jsd"), beta=undisclosed(0.5))),
            RewardModel(loss=BT),
            Average(
                stage=Policy(
                    loss=use("loss", "reinforce"),
                    advantage=use("group_advantage", method=undisclosed("rloo")),
                    rewards=("model",),
                    kl=use("shape_rewards", beta=said(0.1, WARP), level=said("sequence", WARP)),
                    candidates=undisclosed(2),
                    anchor=use("ema_update", decay=said(0.99, f"{WARP}: μ = 0.01")),
                ),
                runs=said(2, WARP),
                merge=use("slerp", weight=said(0.5, WARP)),
                back=said(0.7, f"{WARP}: η = 0.3"),
            ),
        ),
        "The head's logits are soft-capped at 30, which a model's configuration says and the log-probs then have.",
    ),
)  # fmt: skip
