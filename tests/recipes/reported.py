"""Every number that a recipe declares, written a second time: those of the reports, and ours where a report has none.

A recipe is a list of stages. A stage has its numbers by path, as ``Recipe.values`` has them, and what else it is told
(``dynamic``, ``outputs``, …) where that is not a stage's default.
"""

from __future__ import annotations

STAGE = {"learning_rate": 1e-6, "batch": 8, "candidates": 2, "temperature": 1.0}
POLICY = STAGE | {"warm_up": 0, "epochs": 1, "minibatches": 1}
GAE = {"advantage.gamma": 1.0, "advantage.lam": 0.95}
CLIP = {"loss.eps_low": 0.2, "loss.eps_high": 0.2}
GROUPS = {"advantage.method": "grpo"}
# PPO on a reward model where no number is disclosed
PPO = POLICY | CLIP | GAE | {"kl.beta": 0.05, "critic.clip": 0.2, "rewards": ("model",)}
DPO = STAGE | {"loss.beta": 0.1, "epochs": 1}
FIXED = {"sampler": "reference"}
AGENT = STAGE | CLIP | {"learning_rate": 3e-3, "advantage.gamma": 0.99, "advantage.lam": 0.95, "critic.clip": 0.2,
                        "share": 0.0, "epochs": 1}  # fmt: skip


def inner(stage: dict) -> dict:
    """The stage that another one runs; its own size is never used."""
    return STAGE | {f"stage.{path}": x for path, x in stage.items()}


REPORTED: dict[str, list[dict]] = {
    "instructgpt": [
        STAGE | {"learning_rate": 9e-6, "batch": 64, "candidates": 4},
        PPO | {"batch": 512, "kl.beta": 0.02, "critic_rate": 9e-6, "nll": 27.8, "minibatches": 8, "ema.decay": 0.992},
    ],
    "gpt4": [STAGE, PPO | {"rewards": ("model", "task")}],
    "internlm2": [
        STAGE | {"learning_rate": 1e-5, "loss.gamma": 2.0, "loss.barrier": 0.02},
        PPO | {"advantage.lam": 0.99, "kl.beta": 0.01, "critic_rate": 5e-6, "warm_up": 50, "nll": 0.5},
    ],
    "claude3": [STAGE, PPO],
    "reka": [STAGE, PPO],
    "chatglm": [
        STAGE,
        PPO | {"nll": 0.1, "baseline": "reference"},
        DPO | {"loss.nll": 0.1, "judge": "model"},
    ],
    "starling": [
        STAGE | {"candidates": 7},
        POLICY | GAE | {"loss.inv_lambda": 1.0, "critic.clip": 0.2, "rewards": ("model",)},
    ],
    "athene": [STAGE, PPO],
    "gemma": [
        STAGE,
        POLICY | GAE | {"advantage.lam": 1.0, "kl.beta": 0.1, "critic.clip": None, "rewards": ("model",)},
    ],
    "gemma2": [
        STAGE | {"divergence.kind": "jsd", "divergence.beta": 0.5},
        STAGE,
        inner(POLICY | {"advantage.method": "rloo", "kl.beta": 0.1, "kl.level": "sequence", "anchor.decay": 0.99,
                        "rewards": ("model",)}) | {"runs": 2, "merge.weight": 0.5, "back": 0.7},
    ],
    "zephyr": [DPO | FIXED | {"learning_rate": 5e-7, "batch": 32, "candidates": 4}],
    "zephyr_orpo": [DPO | FIXED | {"learning_rate": 5e-6, "loss.beta": 0.05, "epochs": 3}],
    "tr_dpo": [DPO | {"anchor.decay": 0.4}],
    "phi3": [DPO | FIXED],
    "llama3": [
        STAGE,
        STAGE | {"learning_rate": 1e-5, "candidates": 10, "judge": "model"},
        inner(DPO | {"learning_rate": 1e-5, "loss.nll": 0.2, "judge": "model", "skip": 1}) | {"runs": 2},
    ],
    "nemotron4": [
        STAGE | {"outputs": 5},
        DPO | {"learning_rate": 1e-7, "loss.beta": 1e-3, "loss.nll": 1e-4, "judge": "model"},
        DPO | FIXED | {"learning_rate": 3e-7, "loss.beta": 0.2, "loss.eta": 1.0, "loss.nll": 1e-5, "judge": "model"},
    ],
    "qwen2": [DPO | FIXED, STAGE, inner(DPO | {"candidates": 4, "judge": "model"}) | {"runs": 2, "back": 0.1}],
    "qwen2.5": [
        DPO | FIXED | {"learning_rate": 7e-7},
        STAGE,
        POLICY | CLIP | GROUPS | {"loss.beta": 0.04, "candidates": 8, "batch": 256, "rewards": ("model",)},
    ],
    "hermes3": [DPO | FIXED | {"learning_rate": 3e-6, "lora": 32}],
    "tulu3": [
        DPO | {"learning_rate": 5e-7, "batch": 128, "loss.beta": 5.0},
        POLICY | CLIP | GAE | {"learning_rate": 3e-7, "scale": 10.0, "kl.beta": 0.05, "critic.clip": 0.2, "epochs": 4},
    ],
    "deepseek_v2": [
        STAGE,
        POLICY | CLIP | GROUPS | {"loss.beta": 0.04, "candidates": 64, "batch": 16, "rewards": ("model", "task")},
    ],
    "kimi": [
        POLICY | {"loss.tau": 0.1, "advantage.method": "kimi", "candidates": 8, "epochs": 2, "refresh": 1,
                  "rewards": ("task", "length")},
    ],
    "deepseek_r1": [
        POLICY | GROUPS | {"loss.eps_low": 10.0, "loss.eps_high": 10.0, "loss.beta": 0.001, "candidates": 16,
                           "batch": 512, "minibatches": 16, "learning_rate": 3e-6, "refresh": 400},
    ],
    "dapo": [
        POLICY | GROUPS | {"loss.eps_low": 0.2, "loss.eps_high": 0.28, "candidates": 16, "batch": 512,
                           "minibatches": 16, "shaping.overlong.max_len": 20480, "shaping.overlong.buffer": 4096,
                           "rewards": ("task", "overlong"), "dynamic": True},
    ],
    "olmo3": [
        DPO | FIXED | {"loss.beta": 5.0},
        POLICY | {"loss.eps_low": 0.2, "loss.eps_high": 0.272, "loss.correction": "tis", "advantage.method": "dr_grpo",
                  "candidates": 8, "batch": 32, "dynamic": True},
    ],
    "scalerl": [
        POLICY | {"loss.cap": 5.0, "loss.reduce": "seq_mean_token_mean", "advantage.method": "batch_std",
                  "candidates": 16, "batch": 48, "learning_rate": 5e-7, "dynamic": True},
    ],
    "magistral": [
        POLICY | {"loss.eps_low": 0.2, "loss.eps_high": 0.28, "advantage.method": "reinforce++_baseline",
                  "candidates": 16, "epochs": 2, "shaping.overlong.max_len": 20480, "shaping.overlong.buffer": 4096,
                  "shaping.overlong.factor": 0.1, "rewards": ("task", "overlong"), "dynamic": True},
    ],
    "skywork": [
        POLICY | CLIP | GROUPS | {"candidates": 16, "batch": 64, "entropy.target": 0.2, "entropy.delta": 0.005,
                                  "dynamic": True},
    ],
    "rlaif": [
        STAGE | {"judge.both_orders": True},
        POLICY | GAE | {"advantage.lam": 1.0, "kl.beta": 0.05, "critic.clip": None, "rewards": ("model",)},
    ],
    "expo": [inner(DPO | FIXED) | {"extrapolate.alpha": 0.5}],
    "embedding_rewards": [
        STAGE | {"learning_rate": 1e-3, "ensemble.hidden": (256, 256), "ensemble.members": 4,
                 "pool.kind": "uncertainty", "pool.coef": 0.5, "updates": 4},
        STAGE | {"candidates": 4, "judge": "model"},
    ],
    "satori": [
        STAGE,
        POLICY | CLIP | GAE | {"critic.clip": 0.2, "restart.back": 4, "bonus.beta": 0.5, "learning_rate": 2e-7,
                               "critic_rate": 5e-6, "temperature": 0.6, "batch": 1024, "rewards": ("task", "model")},
    ],
    "inverse_rl": [
        inner({k: x for k, x in PPO.items() if k != "rewards"}) | {"loss.penalty": 2.0},
        PPO,
    ],
    "rlrf": [
        DPO | {"candidates": 30, "rate.ratings": {" bad": 0, " fair": 1, " good": 2},
               "aspects": ("factuality", "logical correctness", "insightfulness", "completeness", "readability",
                           "harmlessness")},
    ],
    "linvit": [STAGE | {"learning_rate": 3e-3, "loss.clip": None, "value.lam": 0.2, "gamma": 0.99}],
    "llm_feedback": [
        AGENT,
        STAGE | {"learning_rate": 3e-3, "judge.both_orders": True},
        AGENT | {"share": 1.0, "corner": False},
    ],
    "llm_teacher": [
        AGENT | {"candidates": 4, "feedback.method": "rloo", "teacher_rate": 1e-6, "corner": False},
    ],
}  # fmt: skip
