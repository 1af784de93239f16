"""Systems of the survey that train on preferences."""

from __future__ import annotations

from rlfast.recipes.row import Average, BestOf, Policy, Preference, Recipe, RewardModel, said, undisclosed, use

ZEPHYR, ORPO = "2310.16944", "huggingface/alignment-handbook, zephyr-141b-A35b"
LLAMA, NEMOTRON, HERMES, TULU = "2407.21783 §4.1", "2406.11704 §3.3", "2408.11857", "2411.15124"
TR_DPO = "2404.09656"
QWEN2, QWEN25 = "2407.10671", "2412.15115"
BT = use("reward_loss", "bradley_terry")
DPO = use("preference_loss", "dpo", beta=undisclosed(0.1))

ROWS = (
    Recipe(
        "zephyr", "Zephyr 7B β", "2310.16944", "SV",
        (
            Preference(
                loss=use("preference_loss", "dpo", beta=said(0.1, ZEPHYR)),
                sampler="reference",
                candidates=said(4, f"{ZEPHYR}: the best and one of the others of UltraFeedback's four"),
                learning_rate=said(5e-7, ZEPHYR),
                batch=said(32, ZEPHYR),
            ),
        ),
        "Its pairs are other models'. The authors' configuration file for the full model has β 0.01 today.",
    ),
    Recipe(
        "zephyr_orpo", "Zephyr ORPO 141B", "2403.07691", "V",
        (
            Preference(
                loss=use("preference_loss", "orpo", beta=said(0.05, ORPO)),
                sampler="reference",
                learning_rate=said(5e-6, ORPO),
                epochs=said(3, ORPO),
            ),
        ),
    ),
    Recipe(
        "tr_dpo", "TR-DPO", "2404.09656", "SP",
        (
            Preference(
                loss=use("preference_loss", "dpo", beta=said(0.1, "DPO's own, 2305.18290 §6")),
                anchor=use("ema_update", decay=said(0.4, f"{TR_DPO}: α = 0.6")),
            ),
        ),
        "The soft update, after every step; the hard one takes the policy's weights every 512 steps. Its pairs are a "
        "data set's; here they are the policy's.",
    ),
    Recipe(
        "phi3", "Phi-3", "2404.14219", "K",
        (Preference(loss=DPO, sampler="reference"),),
        "DPO is named, its numbers are not.",
    ),
    Recipe(
        "llama3", "Llama 3", "2407.21783", "SK",
        (
            RewardModel(loss=BT, note="Without the margin that Llama 2 had."),
            BestOf(
                loss=use("loss", "raft"), judge="model", candidates=said(10, f"{LLAMA}: 10 to 30"),
                learning_rate=said(1e-5, LLAMA),
            ),
            Average(
                stage=Preference(
                    loss=use("preference_loss", "irpo", beta=said(0.1, LLAMA), nll=said(0.2, LLAMA)),
                    judge="model",
                    learning_rate=said(1e-5, LLAMA),
                    skip=1,
                    note="Header and termination tokens take no part; of the answers here that is the first token.",
                ),
                runs=undisclosed(2),
                merge=use("merge"),
            ),
        ),
        "Six rounds of this; one here.",
    ),
    Recipe(
        "nemotron4", "Nemotron-4 340B", "2406.11704", "SVK",
        (
            RewardModel(loss=use("attribute_regression_loss"), outputs=5, candidates=undisclosed(2)),
            Preference(
                loss=use("preference_loss", "irpo", beta=said(1e-3, f"{NEMOTRON}: 3e-4 to 3e-3"),
                         nll=said(1e-4, f"{NEMOTRON}: 1e-5 to 1e-3")),
                judge="model",
                learning_rate=said(1e-7, f"{NEMOTRON}: 3e-8 to 3e-7"),
            ),
            Preference(
                loss=use("preference_loss", "rpo_backward_kl", beta=said(0.2, "NeMo-Aligner's default"),
                         eta=said(1.0, "NeMo-Aligner's default"), nll=said(1e-5, NEMOTRON)),
                judge="model",
                sampler="reference",
                learning_rate=said(3e-7, NEMOTRON),
                note="Three iterations; one here.",
            ),
        ),
        "The reward of the five attributes is their weighted mean, of undisclosed weights: here the plain one.",
    ),
    Recipe(
        "qwen2", "Qwen2", "2407.10671", "S",
        (
            Preference(loss=DPO, sampler="reference"),
            RewardModel(loss=BT),
            Average(
                stage=Preference(loss=DPO, judge="model", candidates=undisclosed(4)),
                runs=undisclosed(2),
                merge=use("merge"),
                back=undisclosed(0.1),
                note="It merges at every step, by an optimiser whose rule the report leaves to another paper.",
            ),
        ),
    ),
    Recipe(
        "qwen2.5", "Qwen2.5", "2412.15115", "SK",
        (
            Preference(loss=DPO, sampler="reference", learning_rate=said(7e-7, QWEN25)),
            RewardModel(loss=BT),
            Policy(
                loss=use("loss", "grpo", eps_low=undisclosed(0.2), eps_high=undisclosed(0.2), beta=undisclosed(0.04)),
                advantage=use("group_advantage", method=said("grpo", QWEN25)),
                rewards=("model",),
                candidates=said(8, QWEN25),
                batch=said(256, f"{QWEN25}: 2048 answers"),
            ),
        ),
    ),
    Recipe(
        "hermes3", "Hermes 3", "2408.11857", "PK",
        (
            Preference(
                loss=DPO,
                sampler="reference",
                lora=said(32, HERMES),
                learning_rate=said(3e-6, HERMES),
                note="α is 16; the reference is the model with the adapter switched off.",
            ),
        ),
        "It was trained with RMSProp; here, as everywhere, with AdamW.",
    ),
    Recipe(
        "tulu3", "Tülu 3", "2411.15124", "SK",
        (
            Preference(
                loss=use("preference_loss", "dpo_norm", beta=said(5.0, TULU)),
                learning_rate=said(5e-7, f"{TULU}: of the 8B"),
                batch=said(128, TULU),
            ),
            Policy(
                loss=use("loss", "ppo", eps_low=said(0.2, TULU), eps_high=said(0.2, TULU)),
                advantage=use("gae", gamma=said(1.0, TULU), lam=said(0.95, TULU)),
                whiten=use("masked_whiten"),
                rewards=("task",),
                scale=said(10.0, f"{TULU}: of a right answer"),
                kl=use("shape_rewards", beta=said(0.05, f"{TULU}: of the 8B")),
                critic=use("value_loss", clip=said(0.2, TULU)),
                learning_rate=said(3e-7, TULU),
                epochs=said(4, TULU),
                temperature=said(1.0, TULU),
            ),
        ),
    ),
)  # fmt: skip
