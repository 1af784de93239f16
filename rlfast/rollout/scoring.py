"""Log-probs of tokens that are given, by the forward and the row statistics that rollouts come from."""

from __future__ import annotations

from itertools import pairwise

import torch

from rlfast import validate
from rlfast.logps import token_logps
from rlfast.rollout.api import Score, checked_prompt
from rlfast.rollout.attention import Packed
from rlfast.rollout.kv import OutOfPages
from rlfast.rollout.scheduler import Chunk

LOGIT_ROWS = 64  # rows of logits at once: 12 MB at 49152 columns


@torch.no_grad()
def score(decoder, sequences: list, budget: int) -> list[Score]:
    """Of each sequence, as many at a time as fit the budget of tokens; one at least."""
    found, at = [], 0
    while at < len(sequences):
        count = total = 0
        for sequence in sequences[at:]:
            total += len(sequence)
            if count and total > budget:
                break
            count += 1
        found += _packed(decoder, sequences[at : at + count])
        at += count
    return found


def _packed(decoder, sequences: list) -> list[Score]:
    device = decoder.device
    ids = torch.tensor([t for s in sequences for t in s], device=device)
    ends = torch.tensor([0, *map(len, sequences)]).cumsum(0)
    positions = torch.cat([torch.arange(len(s), device=device) for s in sequences])
    with decoder.installed():
        hidden = decoder.forward(ids, positions, Packed(ends.to(device, torch.int32)))
    rows = torch.cat([torch.arange(a, b - 1) for a, b in pairwise(ends.tolist())]).to(device)
    found = logps(decoder, hidden, rows, ids[rows + 1])
    sizes = [len(s) - 1 for s in sequences]
    return [Score(*pair) for pair in zip(*(x.split(sizes) for x in found), strict=True)]


def logps(decoder, hidden, rows, targets) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, entropies) of targets from some rows of hidden states, a few rows of logits at a time."""
    parts = []
    for start in range(0, max(len(rows), 1), LOGIT_ROWS):
        some = slice(start, start + LOGIT_ROWS)
        out = token_logps(decoder.head.logits(hidden[rows[some]]), targets[some], outputs=("logp", "entropy"))
        parts.append((out.logp.cpu(), out.entropy.cpu()))
    return tuple(torch.cat(x) for x in zip(*parts, strict=True))


@torch.no_grad()
def choose(engine, prompt, candidates) -> torch.Tensor:
    """Σ log p of each candidate's tokens; the candidates share the pages of the prompt."""
    decoder, pool = engine.decoder, engine.pool
    prompt = checked_prompt(prompt, engine.tokenizer, decoder.vocab, decoder.context)
    plain = None if engine.tokenizer is None else lambda text: engine.tokenizer(text, add_special_tokens=False)
    answers = [checked_prompt(c, plain, decoder.vocab, decoder.context - len(prompt), "candidates") for c in candidates]
    groups = _within(answers, engine.scheduler.token_budget)
    _make_room(engine, prompt, groups)
    table, waiting = pool.find(prompt[:-1]), list(pool.copies)
    try:
        last = _prefill(engine, table, prompt)
        found = [_chosen(engine, table, prompt, last, some) for some in groups]
    except OutOfPages as error:
        pool.copies = waiting  # a copy that was not made is of pages that are others' from now on
        validate.fail("candidates", "as many tokens as kv_budget has room for, beside their prompt", str(error))
    finally:
        pool.release(table)
    return torch.cat(found)


def _within(answers: list, budget: int) -> list[list]:
    """The answers, as many at a time as fit the budget of tokens; one at least."""
    groups, held = [], budget
    for answer in answers:
        if held + len(answer) > budget:
            groups.append([])
            held = 0
        groups[-1].append(answer)
        held += len(answer)
    return groups


def _make_room(engine, prompt, groups: list) -> None:
    """Where pages are short, what is under way gives its own back, and is computed again later."""
    pool, before = engine.pool, len(prompt)
    answers = max(sum(pool.pages_for(before + len(a)) - before // pool.size for a in some) for some in groups)
    if pool.pages_for(before) + answers > pool.free:
        engine.scheduler.recompute()


def _chosen(engine, table: list[int], prompt, last, answers: list) -> torch.Tensor:
    """Σ log p of some answers to a prompt whose pages these are, and whose last hidden state this is."""
    decoder, pool, tables, chunks = engine.decoder, engine.pool, [], []
    try:
        for answer in answers:
            tables.append(pool.fork(table))
            pool.reserve(tables[-1], len(prompt) + len(answer))
            pool.own(tables[-1], len(prompt))
            chunks.append(Chunk(tables[-1], [*prompt, *answer], len(prompt), len(prompt) + len(answer)))
        hidden, ends = engine.forward(chunks)
    finally:
        for one in reversed(tables):
            pool.release(one)
    hidden = torch.cat((last, hidden))  # row 0 is the prompt's last
    starts = [1, *(1 + end for end in ends[:-1])]
    rows = [r for start, a in zip(starts, answers, strict=True) for r in (0, *range(start, start + len(a) - 1))]
    targets = torch.tensor([t for a in answers for t in a], device=hidden.device)
    logp, _ = logps(decoder, hidden, torch.tensor(rows, device=hidden.device), targets)
    return torch.stack([x.double().sum().float() for x in logp.split([len(a) for a in answers])])


def _prefill(engine, table: list[int], prompt) -> torch.Tensor:
    """The prompt's keys and values into pages that are found by what they hold; its last hidden state [1, D]."""
    computed = len(table) * engine.pool.size
    while computed < len(prompt):
        stop = min(len(prompt), computed + engine.scheduler.token_budget)
        engine.pool.reserve(table, stop)
        hidden, _ = engine.forward([Chunk(table, list(prompt), computed, stop)])
        computed = stop
    engine.pool.publish(table, prompt)
    return hidden[-1:].clone()  # a graph's next step is written over it
