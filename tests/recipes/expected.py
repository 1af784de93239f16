"""What each recipe has to compute, written again by hand: the numbers of the reports and the names in ``truth``.

The sizes are those of the test: two prompts, four answers, three epochs, two minibatches where a row has several.
"""

from __future__ import annotations

PPO = {"kind": "policy", "loss": "ppo", "low": 0.2, "high": 0.2, "adv": "gae", "gamma": 1.0, "lam": 0.95,
       "rewards": ("model",), "kl": 0.05, "value_clip": 0.2}  # fmt: skip
BT = {"kind": "reward_model", "loss": "bradley_terry"}
DPO = {"kind": "preference", "loss": "dpo", "beta": 0.1, "judge": "task"}

EXPECTED: dict[str, list[dict]] = {
    "instructgpt": [
        {"kind": "reward_model", "loss": "all_pairs"},
        PPO | {"kl": 0.02, "nll": 27.8, "ema": 0.992, "minibatches": 2},
    ],
    "gpt4": [BT, PPO | {"rewards": ("model", "task")}],
    "internlm2": [
        {"kind": "reward_model", "loss": "focal_barrier", "gamma": 2.0, "barrier": 0.02},
        PPO | {"lam": 0.99, "kl": 0.01, "nll": 0.5, "warm_up": 1},
    ],
    "claude3": [{"kind": "reward_model", "loss": "soft_label"}, PPO],
    "reka": [BT, PPO],
    "chatglm": [
        BT,
        PPO | {"baseline": True, "nll": 0.1},
        DPO | {"nll": 0.1, "judge": "model"},
    ],
    "starling": [
        {"kind": "reward_model", "loss": "plackett_luce"},
        PPO | {"loss": "apa", "inv_lambda": 1.0, "kl": None},
    ],
    "athene": [BT, PPO],
    "gemma": [BT, PPO | {"loss": "reinforce", "lam": 1.0, "kl": 0.1, "value_clip": None}],
    "gemma2": [
        {"kind": "distil", "beta": 0.5},
        BT,
        {"kind": "average", "runs": 2, "merge": "slerp", "weight": 0.5, "back": 0.7,
         "stage": {"kind": "policy", "loss": "reinforce", "adv": "rloo", "rewards": ("model",), "kl": 0.1,
                   "kl_level": "sequence", "anchor": 0.99}},
    ],
    "zephyr": [DPO],
    "zephyr_orpo": [{"kind": "preference", "loss": "orpo", "beta": 0.05, "judge": "task"}],
    "tr_dpo": [DPO | {"anchor": 0.4}],
    "phi3": [DPO],
    "llama3": [
        BT,
        {"kind": "best_of", "judge": "model"},
        {"kind": "average", "runs": 2, "merge": "mean",
         "stage": DPO | {"nll": 0.2, "judge": "model", "skip": 1}},
    ],
    "nemotron4": [
        {"kind": "reward_model", "loss": "regression", "outputs": 5},
        DPO | {"beta": 1e-3, "nll": 1e-4, "judge": "model"},
        {"kind": "preference", "loss": "rpo", "beta": 0.2, "eta": 1.0, "nll": 0.1, "judge": "model"},
    ],
    "qwen2": [
        DPO,
        BT,
        {"kind": "average", "runs": 2, "merge": "mean", "back": 0.1, "stage": DPO | {"judge": "model"}},
    ],
    "qwen2.5": [
        DPO,
        BT,
        {"kind": "policy", "loss": "grpo", "low": 0.2, "high": 0.2, "beta": 0.04, "adv": "grpo", "rewards": ("model",)},
    ],
    "hermes3": [DPO | {"lora": 32}],
    "tulu3": [
        {"kind": "preference", "loss": "dpo_norm", "beta": 5.0, "judge": "task"},
        PPO | {"rewards": ("task",), "scale": 10.0, "whiten": True},
    ],
    "deepseek_v2": [
        BT,
        {"kind": "policy", "loss": "grpo", "low": 0.2, "high": 0.2, "beta": 0.04, "adv": "grpo",
         "rewards": ("model", "task")},
    ],
    "kimi": [{"kind": "policy", "loss": "kimi", "tau": 0.1, "adv": "centred", "rewards": ("task", "length")}],
    "deepseek_r1": [
        {"kind": "policy", "loss": "grpo", "low": 0.2, "high": 10.0, "beta": 0.001, "adv": "grpo",
         "rewards": ("task",), "refresh": 1},
    ],
    "dapo": [
        {"kind": "policy", "loss": "ppo", "low": 0.2, "high": 0.28, "adv": "grpo", "rewards": ("task", "overlong"),
         "max_len": 6, "buffer": 1, "factor": 1.0, "dynamic": True, "minibatches": 2},
    ],
    "olmo3": [
        {"kind": "preference", "loss": "dpo_norm", "beta": 5.0, "judge": "task"},
        {"kind": "policy", "loss": "ppo", "low": 0.2, "high": 0.272, "tis": 2.0, "adv": "centred", "rewards": ("task",),
         "dynamic": True},
    ],
    "scalerl": [
        {"kind": "policy", "loss": "cispo", "cap": 5.0, "adv": "batch_std", "rewards": ("task",), "dynamic": True},
    ],
    "magistral": [
        {"kind": "policy", "loss": "ppo", "low": 0.2, "high": 0.28, "adv": "whitened", "rewards": ("task", "overlong"),
         "max_len": 6, "buffer": 1, "factor": 0.1, "dynamic": True},
    ],
    "skywork": [
        {"kind": "policy", "loss": "ppo", "low": 0.2, "high": 0.2, "adv": "grpo", "rewards": ("task",),
         "target": 10.0, "delta": 0.005, "dynamic": True},
    ],
}  # fmt: skip
