"""Random models of a few thousand weights, a tokenizer and data that need no download."""

from __future__ import annotations

WORDS = "the a cat dog sat ran on mat hill red blue big small and or then one two three four is was no".split()  # noqa: SIM905
PROMPTS = ("the cat sat", "a dog ran on the hill", "one and two is", "big red mat", "no", "the small blue dog was not")
VOCAB = 151  # the head has more rows than the tokenizer has words, and an odd number of them


def word_tokenizer():
    """One token a word, with a chat template."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", "user", "assistant", ":", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' <eos> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=template
    )


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.3,  # large, so that the log-probs of a random model are far from uniform
}


def tiny(family: str = "Llama", task: str = "CausalLM", **options):
    """A random model of a family."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **options})
    return getattr(transformers, f"{family}For{task}")(config)


def conversations(*columns):
    """Rows of preference, completion or plain data over the tiny vocabulary."""
    rows = []
    for i, prompt in enumerate(PROMPTS):
        say = lambda text: [{"role": "assistant", "content": text}]  # noqa: E731
        row = {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": say("yes the " + prompt),
            "rejected": say("no " + " ".join(WORDS[i : i + 4])),
            "completion": say(prompt + " and then " + WORDS[-i]),
            "label": i % 2 == 0,
            "margin": 0.25 * i,
        }
        rows.append({name: row[name] for name in columns})
    return rows


def rewards(completions, **_):
    """How many words of each completion are different."""
    return [len(set(c[0]["content"].split())) / 8 for c in completions]
