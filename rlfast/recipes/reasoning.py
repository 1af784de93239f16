"""Systems of the survey that learn from rewards which can be checked, group against group."""

from __future__ import annotations

from rlfast.recipes.row import Policy, Preference, Recipe, RewardModel, said, undisclosed, use

R1, DAPO, KIMI, SCALE = "2501.12948", "2503.14476", "2501.12599", "2510.13786"
OLMO, MAGISTRAL, SKYWORK, V2 = "allenai/open-instruct, scripts of Olmo 3", "2506.10910", "2505.22312", "2405.04434"

ROWS = (
    Recipe(
        "deepseek_v2", "DeepSeek-V2", "2405.04434, 2402.03300", "PK",
        (
            RewardModel(loss=use("reward_loss", "bradley_terry")),
            Policy(
                loss=use("loss", "grpo", eps_low=undisclosed(0.2), eps_high=undisclosed(0.2),
                         beta=said(0.04, "2402.03300 §4.2")),
                advantage=use("group_advantage", method=said("grpo", V2)),
                rewards=("model", "task"),
                candidates=said(64, "2402.03300 §4.2"),
                batch=said(16, "2402.03300 §4.2: 1024 answers"),
                epochs=said(1, "2402.03300 §4.2"),
                learning_rate=said(1e-6, "2402.03300 §4.2"),
            ),
        ),
        "The numbers are DeepSeekMath's. Helpfulness, safety and rules are added up with undisclosed weights, here 1.",
    ),
    Recipe(
        "kimi", "Kimi k1.5", "2501.12599", "PS",
        (
            Policy(
                loss=use("loss", "kimi", tau=undisclosed(0.1)),
                advantage=use("group_advantage", method=said("kimi", KIMI)),
                rewards=("task", "length"),
                shaping={"length": use("length_reward")},
                candidates=undisclosed(8),
                epochs=undisclosed(2),
                refresh=said(1, f"{KIMI}: the reference is the policy of the iteration before"),
            ),
        ),
        "The weight of the length reward and when it sets in are undisclosed. Its rollouts go on where the last one "
        "left them, which ``Engine.pause`` and ``resume`` do; this loop lets them end.",
    ),
    Recipe(
        "deepseek_r1", "DeepSeek-R1", "2501.12948", "SK",
        (
            Policy(
                loss=use("loss", "grpo", eps_low=said(10.0, R1), eps_high=said(10.0, R1), beta=said(0.001, R1)),
                advantage=use("group_advantage", method=said("grpo", R1)),
                rewards=("task",),
                candidates=said(16, R1),
                batch=said(512, f"{R1}: 8192 answers"),
                minibatches=said(16, R1),
                learning_rate=said(3e-6, R1),
                temperature=said(1.0, R1),
                refresh=said(400, R1),
            ),
        ),
        "The first stage, R1-Zero's; the report goes on with cold-start data, rejection sampling and a second stage.",
    ),
    Recipe(
        "dapo", "DAPO", "2503.14476", "SK",
        (
            Policy(
                loss=use("loss", "dapo", eps_low=said(0.2, DAPO), eps_high=said(0.28, DAPO)),
                advantage=use("group_advantage", method=said("grpo", DAPO)),
                rewards=("task", "overlong"),
                shaping={"overlong": use("overlong_penalty", max_len=said(20480, DAPO), buffer=said(4096, DAPO))},
                candidates=said(16, DAPO),
                batch=said(512, DAPO),
                minibatches=said(16, DAPO),
                learning_rate=said(1e-6, DAPO),
                dynamic=True,
            ),
        ),
    ),
    Recipe(
        "olmo3", "Olmo 3", "2512.13961", "SV",
        (
            Preference(
                loss=use("preference_loss", "dpo_norm", beta=said(5.0, OLMO)), sampler="reference",
                learning_rate=undisclosed(1e-6), note="Pairs of a large and a small model's answers.",
            ),
            Policy(
                loss=use("loss", "dapo", eps_low=said(0.2, OLMO), eps_high=said(0.272, OLMO),
                         correction=said("tis", f"{OLMO}: cap 2")),
                advantage=use("group_advantage", method=said("dr_grpo", f"{OLMO}: centered")),
                rewards=("task",),
                candidates=said(8, OLMO),
                batch=said(32, OLMO),
                learning_rate=said(1e-6, OLMO),
                temperature=said(1.0, OLMO),
                dynamic=True,
            ),
        ),
    ),
    Recipe(
        "scalerl", "ScaleRL", "2510.13786", "SK",
        (
            Policy(
                loss=use("loss", "cispo_capped", cap=said(5.0, f"{SCALE}: unverified; 4 to 8 do the same"),
                         reduce=said("seq_mean_token_mean", f"{SCALE}: a mean over prompts")),
                advantage=use("group_advantage", method=said("batch_std", SCALE)),
                rewards=("task",),
                candidates=said(16, SCALE),
                batch=said(48, f"{SCALE}: 768 answers"),
                learning_rate=said(5e-7, SCALE),
                dynamic=True,
                note="Logits in float32, which rlfast's head always has. Prompts that are solved are not drawn again: "
                     "left out here.",
            ),
        ),
    ),
    Recipe(
        "magistral", "Magistral", "2506.10910", "SK",
        (
            Policy(
                loss=use("loss", "dapo", eps_low=undisclosed(0.2), eps_high=said(0.28, f"{MAGISTRAL}: 0.26 to 0.28")),
                advantage=use("group_advantage", method=said("reinforce++_baseline", MAGISTRAL)),
                rewards=("task", "overlong"),
                shaping={"overlong": use("overlong_penalty", max_len=undisclosed(20480), buffer=undisclosed(4096),
                                         factor=said(0.1, MAGISTRAL))},
                candidates=undisclosed(16),
                epochs=undisclosed(2),
                dynamic=True,
            ),
        ),
        "r − the group's mean, divided by the deviation over the mini-batch.",
    ),
    Recipe(
        "skywork", "Skywork-OR1", "2505.22312", "SK",
        (
            Policy(
                loss=use("loss", "dapo", eps_low=said(0.2, SKYWORK), eps_high=said(0.2, SKYWORK)),
                advantage=use("group_advantage", method=said("grpo", SKYWORK)),
                rewards=("task",),
                candidates=said(16, SKYWORK),
                batch=said(64, SKYWORK),
                learning_rate=said(1e-6, SKYWORK),
                temperature=said(1.0, SKYWORK),
                dynamic=True,
                entropy=use("AdaptiveEntropy", target=said(0.2, SKYWORK), delta=said(0.005, SKYWORK)),
            ),
        ),
    ),
)  # fmt: skip
