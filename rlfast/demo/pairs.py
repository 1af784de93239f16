"""Pairs for DPO: the model answers each problem several times, and a right answer is put beside a wrong one."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path

from rlfast.demo.settings import DemoError, DpoSettings
from rlfast.demo.task import closeness, problems
from rlfast.demo.trainer import quiet
from rlfast.demo.workers import Worker

AT_ONCE = 16  # problems that are answered together
SOURCE = ("seed", "pairs", "problems", "samples", "max_completion", "temperature")  # what the pairs depend on


def prepare(settings: DpoSettings, progress) -> Path:
    """The file of the pairs, beside the weights; made once, in a process of its own.

    Raises:
        DemoError: the problems are used up and there are too few pairs.
    """
    path = _path(settings)
    if path.exists():
        return path
    worker = Worker(_sample, settings)
    try:
        while isinstance(message := worker.receive(), str):
            progress(message)
    finally:
        worker.close()
    if len(message) < settings.pairs:
        raise DemoError(
            f"only {len(message)} pairs of a right and a wrong answer to {settings.problems} problems, wanted "
            f"{settings.pairs}: raise --samples or --problems, or lower --pairs"
        )
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(message, indent=1) + "\n", encoding="utf-8")
    scratch.rename(path)  # whole or not there: an interrupted run leaves nothing behind
    return path


def read(settings: DpoSettings) -> list[dict]:
    """Rows of prompt, chosen and rejected, conversations all."""
    return json.loads(Path(settings.pairs_file).read_text(encoding="utf-8"))


def _path(settings: DpoSettings) -> Path:
    model = Path(settings.model)
    source = json.dumps([getattr(settings, name) for name in SOURCE])
    return model.parent / f"{model.name}-pairs-{hashlib.sha256(source.encode()).hexdigest()[:12]}.json"


def _sample(channel, settings: DpoSettings) -> None:
    """Runs in a process of its own: answers problems until there are enough pairs, and sends them."""
    quiet()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if settings.threads:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(settings.model).eval()
    rows, found = iter(problems(settings.problems, settings.seed)), []
    while len(found) < settings.pairs and (batch := list(islice(rows, AT_ONCE))):
        channel.send(f"{len(found)} of {settings.pairs} pairs")
        found += [pair for row, said in zip(batch, _answers(model, tokenizer, batch, settings), strict=True)
                  for pair in pairs_of(row, said)]  # fmt: skip
    channel.send(found[: settings.pairs])


def _answers(model, tokenizer, rows: list[dict], settings: DpoSettings) -> list[list[str]]:
    """The samples of each problem."""
    import torch

    prompts = [tokenizer.apply_chat_template(r["prompt"], tokenize=False, add_generation_prompt=True) for r in rows]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            **inputs, do_sample=True, temperature=settings.temperature, top_k=0, top_p=1.0,
            max_new_tokens=settings.max_completion, num_return_sequences=settings.samples,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )  # fmt: skip
    said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [said[k : k + settings.samples] for k in range(0, len(said), settings.samples)]


def pairs_of(row: dict, said: list[str]) -> list[dict]:
    """As many pairs of different answers to one problem as it has right ones, or wrong ones if those are fewer."""
    answers = [[{"role": "assistant", "content": text}] for text in dict.fromkeys(said)]
    grades = closeness(answers, [row["answer"]] * len(answers))
    right = [a for a, grade in zip(answers, grades, strict=True) if grade == 1.0]
    wrong = [a for a, grade in zip(answers, grades, strict=True) if grade < 1.0]
    return [{"prompt": row["prompt"], "chosen": w, "rejected": l_} for w, l_ in zip(right, wrong, strict=False)]
