"""What ``rlfast train`` trains: a tiny random model on a toy, or SmolLM2 and any other model on sums."""

from __future__ import annotations

import random
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from rlfast.demo import model as smollm2
from rlfast.demo.settings import INSTALL, DemoError
from rlfast.demo.task import closeness, problems
from rlfast.recipes.session import Task

VOCAB = 64  # of the tiny model


class Loaded(NamedTuple):
    """A model with what it is trained on."""

    model: torch.nn.Module
    tokenizer: object | None
    task: Task


class Words:
    """The tiny model's tokenizer: a token is a word. "w7" is token 7; all other words share what tokens there are."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [self._token(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        """The words, without those that end a response."""
        return " ".join(f"w{token}" for token in ids if not skip_special_tokens or token > 2)

    def get_vocab(self) -> dict[str, int]:
        """Tokens by their words."""
        return {f"w{token}": token for token in range(VOCAB)}

    def _token(self, word: str) -> int:
        own = word[1:]
        return int(own) if word[:1] == "w" and own.isdecimal() else 3 + sum(word.encode()) % (VOCAB - 3)


def arithmetic(tokenizer, size: int = 256, seed: int = 0) -> Task:
    """Sums of two one-digit numbers as chats, and how close an answer's last number comes."""
    rows = problems(size, seed)
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)
        for row in rows
    ]
    answers = [[*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id] for row in rows]

    def reward(number, rollout) -> float:
        return closeness([[{"content": rollout.text}]], [rows[number]["answer"]])[0]

    return Task(prompts, answers, reward)


def toy(size: int = 64, seed: int = 0) -> Task:
    """Random tokens; the reward is the share of even ones in the answer, all of the reference answers'."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 6))] for _ in range(size)]
    answers = [[2 * rng.randrange(2, VOCAB // 2) for _ in range(4)] for _ in range(size)]

    def reward(_, rollout) -> float:
        return sum(t % 2 == 0 for t in rollout.tokens) / len(rollout.tokens)

    return Task(prompts, answers, reward)


def tiny(seed: int = 0) -> torch.nn.Module:
    """A random decoder of one layer."""
    import transformers

    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, vocab_size=VOCAB, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def loaded(name: str, seed: int = 0) -> Loaded:
    """The model of ``read`` with its task: a toy for "tiny", sums for all others.

    Raises:
        DemoError: there is no such model, or the package that makes the sums is not installed.
    """
    model, tokenizer = read(name, seed, "--model")
    if name == "tiny":
        return Loaded(model, tokenizer, toy(seed=seed))
    with _installed("--model", name):
        return Loaded(model, tokenizer, arithmetic(tokenizer, seed=seed))


def read(name: str, seed: int, option: str) -> tuple[torch.nn.Module, object]:
    """A model and its tokenizer: "tiny", "smollm2" (its weights are converted once), or what ``from_pretrained`` takes.

    Raises:
        DemoError: there is no such model, or its package is not installed; ``option`` is what asked for it.
    """
    if name == "tiny":
        return tiny(seed), Words()
    import transformers

    wanted = "expected tiny, smollm2, or a folder or name that from_pretrained takes"
    with _installed(option, name):
        where = str(smollm2.prepare()) if name == "smollm2" else name
    if (where.startswith((".", "/", "~")) or where.count("/") > 1) and not Path(where).is_dir():
        raise DemoError(f"{option}: {wanted}; there is no folder {name!r}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise DemoError(f"{option}: {wanted}, got {name!r}: {str(error).splitlines()[0]}") from None
    return model.cuda() if torch.cuda.is_available() else model, tokenizer


@contextmanager
def _installed(option: str, name: str):
    try:
        yield
    except ImportError as error:
        raise DemoError(f"{option} {name}: {error}; to install what it needs: {INSTALL}") from None
