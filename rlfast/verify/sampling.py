"""A sampled token's numbers: every option by row, edits and an allowed mask, given the token that float64 samples."""

from __future__ import annotations

import torch

from rlfast import sampling
from rlfast.reference import sample as oracle
from rlfast.verify.subject import Problem, Subject

OUTPUTS = ("logp_raw", "logp", "kept", "entropy")
SIZES = {True: (8, 4500), False: (20, 50257)}  # rows, vocabulary
OPTIONS = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")


def nucleus(q: torch.Tensor, n: int) -> float:
    """A top_p that n of the distribution reach and n − 1 do not, as far from both as can be."""
    mass = q.sort(descending=True).values.cumsum(0)
    return float((mass[n - 1] + mass[n - 2]) / 2) / float(mass[-1])


def floor(q: torch.Tensor, n: int) -> float:
    """A min_p between the n-th and the next of the probabilities that differ."""
    values = q.unique().flip(0)
    return float((values[n - 1] * values[n]).sqrt() / values[0])


def options_of(logits, edits: list, allowed, seed: int = 0) -> dict:
    """Options of each row, every way to cut in turn, with no threshold near a probability."""
    rows, draw = logits.shape[0], torch.Generator().manual_seed(seed)
    temperature = torch.tensor([1.0, 0.7, 1.3, 0.7, 0.0])[torch.arange(rows) % 5]
    top_k = torch.zeros(rows, dtype=torch.int32)
    top_p, min_p = torch.ones(rows), torch.zeros(rows)
    for i in range(rows):
        w = oracle.edited(logits[i].double(), edits[i], allowed[i])
        q = oracle.probabilities(w, float(temperature[i]))
        if i % 4 in (1, 3):
            top_k[i] = 20
        if i % 4 in (2, 3):
            kept = torch.where(oracle.keeps(w, q, int(top_k[i]), 1.0, 0.0), q, 0.0)
            top_p[i] = nucleus(kept, 9 + i % 5)
        if i % 3 == 1:
            min_p[i] = floor(q, 6 + i % 7)
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=draw)
    positions = torch.randint(0, 2**40, (rows,), generator=draw)
    return dict(zip(OPTIONS, (temperature, top_k, top_p, min_p, seeds, positions), strict=True))


def edits_of(rows: int, vocab: int, draw) -> list[list[tuple]]:
    """Some (id, value) pairs a row; the first id twice, of which the second counts, and none in the first row."""
    found = [[]]
    for _ in range(rows - 1):
        ids = torch.randint(vocab, (7,), generator=draw).tolist()
        values = (torch.randn(7, generator=draw) * 4).tolist()
        found.append([*zip(ids, values, strict=True), (ids[0], 5.0), (ids[1], float("-inf"))])
    return found


def ragged(edits: list) -> sampling.Edits:
    """Pairs of each row as the public function takes them."""
    ends = torch.tensor([0, *(len(row) for row in edits)]).cumsum(0)
    pairs = [pair for row in edits for pair in row]
    ids, values = zip(*pairs, strict=True) if pairs else ((), ())
    return sampling.Edits(ends, torch.tensor(ids, dtype=torch.int64), torch.tensor(values, dtype=torch.float32))


def _inputs(dtype: torch.dtype, device: str, small: bool) -> Problem:
    rows, vocab = SIZES[small]
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, vocab, generator=draw) * 4).to(dtype)
    edits, allowed = edits_of(rows, vocab, draw), torch.rand(rows, vocab, generator=draw) < 0.9
    # values that are float32, as the op takes them
    edits = [[(i, float(torch.tensor(value))) for i, value in row] for row in edits]
    options = options_of(logits, edits, allowed)
    tokens = oracle.sample(logits, **options, edits=edits, allowed=allowed, dtype=torch.float64)[0]
    rest = {name: x.to(device) for name, x in options.items()}
    rest |= {"edits": edits, "allowed": allowed.to(device), "tokens": tokens}
    return Problem({"logits": logits.to(device)}, rest, {})


def _public(leaves, rest) -> dict:
    device = leaves["logits"].device
    edits = sampling.Edits(*(x.to(device) for x in ragged(rest["edits"])))
    given = {name: x for name, x in rest.items() if name not in ("edits", "tokens")}
    return sampling.sample(**leaves, **given, edits=edits)._asdict()


def _reference(leaves, rest, dtype) -> dict:
    found = oracle.sample(**leaves, **rest, dtype=dtype)
    return dict(zip(("tokens", *OUTPUTS), found, strict=True))


def _reordered(problem: Problem, seed: int) -> tuple[Problem, dict]:
    """The vocabulary shuffled, and the token with it."""
    logits, rest = problem.leaves["logits"], problem.rest
    ids = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed)).to(logits.device)
    place = ids.argsort()
    moved = {
        "edits": [[(int(place[i]), value) for i, value in row] for row in rest["edits"]],
        "allowed": rest["allowed"][:, ids],
        "tokens": torch.where(rest["tokens"] < 0, -1, place.cpu()[rest["tokens"].clamp(min=0)]),
    }
    return problem._replace(leaves={"logits": logits[:, ids]}, rest=rest | moved), {}


SUBJECTS = {"sample": (Subject(_inputs, _public, _reference, OUTPUTS, _reordered),)}
