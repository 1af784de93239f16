"""Judges: probabilities of both orders against float64, ratings, a language model's own log-probs, bad input."""

from __future__ import annotations

import copy

import pytest
import torch

import rlfast
from rlfast.rewards import judge, rate
from rlfast.rollout import Engine
from tests.decoders import decoder
from tests.numerics import assert_same_bits, assert_value

PROMPTS, FIRST, SECOND = ["p", "q", "r"], ["a", "bb", "c{x}"], ["dd", "e", "f"]
SHORT = "{prompt}: {first} or {second}?"


class Table:
    """Log-probs that depend on the text alone, and on nothing but the bits of it that are asked for."""

    def __init__(self, verdicts: int = 2):
        self.verdicts, self.calls = verdicts, []

    def logp(self, text: str) -> torch.Tensor:
        rng = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31)
        return 3.0 * torch.randn(self.verdicts, generator=rng) - 4.0

    def choose(self, prompts, candidates):
        assert all(len(c) == self.verdicts for c in candidates)
        self.calls.append(list(prompts))
        return [self.logp(text) for text in prompts]


def probability(texts: list[str], dtype) -> torch.Tensor:
    """π(first verdict) among the two."""
    return torch.stack([Table().logp(text).to(dtype).softmax(0)[0] for text in texts])


def by_hand(templates, dtype) -> torch.Tensor:
    """[templates, 2, B]: P(first ≻ second) as the pair stands, and swapped."""
    found = []
    for write in templates:
        there = probability([write(*x) for x in zip(PROMPTS, FIRST, SECOND, strict=True)], dtype)
        back = probability([write(*x) for x in zip(PROMPTS, SECOND, FIRST, strict=True)], dtype)
        found.append(torch.stack((there, 1 - back)))
    return torch.stack(found)


def test_both_orders_are_averaged():
    engine = Table()
    said = judge(engine, PROMPTS, FIRST, SECOND, template=SHORT)
    truth, own = (by_hand([lambda p, a, b: f"{p}: {a} or {b}?"], t) for t in (torch.float64, torch.float32))
    assert_value("orders", said.orders, truth, own)
    assert_value("probability", said.probability, truth.mean((0, 1)), own.mean((0, 1)))
    assert_value("bias", said.bias, *((x[:, 0] - x[:, 1]).mean(0) for x in (truth, own)), size=torch.ones(3).double())
    assert len(engine.calls) == 1 and len(engine.calls[0]) == 6  # one batch
    swapped = judge(engine, PROMPTS, SECOND, FIRST, template=SHORT)
    torch.testing.assert_close(swapped.probability, 1 - said.probability)
    torch.testing.assert_close(swapped.bias, said.bias)


def test_several_templates_are_averaged():
    texts = [SHORT, lambda p, a, b: f"{b} | {a} | {p}"]
    said = judge(Table(), PROMPTS, FIRST, SECOND, template=texts)
    hands = [lambda p, a, b: f"{p}: {a} or {b}?", texts[1]]
    truth, own = (by_hand(hands, t) for t in (torch.float64, torch.float32))
    assert said.orders.shape == (2, 2, 3)
    assert_value("probability", said.probability, truth.mean((0, 1)), own.mean((0, 1)))


def test_one_order_is_biased_and_both_are_not():
    """A judge that only looks at the place."""

    class First:
        def choose(self, prompts, candidates):
            return [torch.tensor([-0.1, -2.4]) for _ in prompts]

    assert (judge(First(), PROMPTS, FIRST, SECOND, both_orders=False).probability > 0.9).all()
    said = judge(First(), PROMPTS, FIRST, SECOND)
    assert_same_bits("probability", said.probability, torch.full((3,), 0.5))
    assert (said.bias > 0.8).all()
    with pytest.raises(ValueError, match="orders: expected both orders of a pair: both_orders=True, got one"):
        _ = judge(First(), PROMPTS, FIRST, SECOND, both_orders=False).bias


def test_probabilities_within_bounds_are_soft_labels():
    said = judge(Table(), PROMPTS, FIRST, SECOND, template=SHORT, clip=(0.4, 0.6)).probability
    assert said.min() >= 0.4 and said.max() <= 0.6
    w, l_ = torch.tensor([1.0, -0.5, 0.2], requires_grad=True), torch.zeros(3)
    loss = rlfast.reward_loss("soft_label")(w, l_, probability=said).loss
    x, p = w.double(), said.double()
    logs = torch.nn.functional.logsigmoid
    truth = -(p * logs(x) + (1 - p) * logs(-x)).mean()
    assert_value("loss", loss, truth, truth.float())


@pytest.mark.parametrize("unit", (False, True))
def test_a_rating_is_an_expectation(unit):
    ratings = {"1": 1, "2": 2, (7, 8): 5.0}
    got = rate(Table(3), PROMPTS, FIRST, template="{prompt} {response}", ratings=ratings, unit=unit)
    values = torch.tensor([-1.0, -0.5, 1.0] if unit else [1.0, 2.0, 5.0])
    logp = torch.stack([Table(3).logp(f"{p} {a}") for p, a in zip(PROMPTS, FIRST, strict=True)])
    truth, own = ((logp.to(t).softmax(-1) * values.to(t)).sum(-1) for t in (torch.float64, torch.float32))
    assert_value("rating", got, truth, own, size=values.abs().sum().double().expand(3))


def test_aspects_are_columns():
    texts = ["{prompt} {response}", "{response} {prompt}"]
    got = rate(Table(3), PROMPTS, FIRST, template=texts, ratings={"1": 1, "2": 2, "3": 3})
    for k, text in enumerate(texts):
        one = rate(Table(3), PROMPTS, FIRST, template=text, ratings={"1": 1, "2": 2, "3": 3})
        assert_same_bits(text, got[:, k].contiguous(), one)


def test_nothing_to_judge():
    assert judge(Table(), [], [], []).probability.shape == (0,)
    assert rate(Table(5), [], []).shape == (0,)


class Bytes:
    """A token a byte."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + list(text.encode())}


def test_the_log_probs_are_the_models():
    """Of verdicts of several tokens, after a prompt that begins as prompts of this tokenizer do."""
    model = decoder("llama")
    said = judge(
        Engine(model, Bytes(), kv_budget=1 << 22), PROMPTS, FIRST, SECOND, template=SHORT, verdicts=("A", "BC")
    )

    def p(one, text: str) -> torch.Tensor:
        logs, prompt = [], [1, *text.encode()]
        for verdict in (b"A", b"BC"):
            logits = one(torch.tensor([[*prompt, *verdict]])).logits[0, len(prompt) - 1 : -1]
            logs.append(logits.log_softmax(-1).gather(1, torch.tensor([[t] for t in verdict])).sum())
        return torch.stack(logs).softmax(0)[0]

    found = []
    for one in (copy.deepcopy(model).double(), model):
        with torch.no_grad():
            there = [p(one, SHORT.format(prompt=x, first=a, second=b)) for x, a, b in zip(PROMPTS, FIRST, SECOND)]  # noqa: B905
            back = [p(one, SHORT.format(prompt=x, first=b, second=a)) for x, a, b in zip(PROMPTS, FIRST, SECOND)]  # noqa: B905
        found.append(0.5 * (torch.stack(there) + 1 - torch.stack(back)))
    assert_value("probability", said.probability, *found)


BAD = {
    "engine: expected what has choose": lambda: judge(object(), PROMPTS, FIRST, SECOND),
    "prompts: expected a list, got 'p'": lambda: judge(Table(), "p", FIRST, SECOND),
    "first: expected 3 of them, one a prompt, got 2": lambda: judge(Table(), PROMPTS, FIRST[:2], SECOND),
    "second: expected a list, got 'dd'": lambda: judge(Table(), PROMPTS, FIRST, "dd"),
    "template: expected a text with {prompt}, {first}, {second}, got fields first, prompt": lambda: judge(
        Table(), PROMPTS, FIRST, SECOND, template="{prompt}{first}"
    ),
    "template: expected a text with {prompt}, {first}, {second}, got '{prompt'": lambda: judge(
        Table(), PROMPTS, FIRST, SECOND, template="{prompt"
    ),
    "template: expected a template, or a list of them, got []": lambda: judge(
        Table(), PROMPTS, FIRST, SECOND, template=[]
    ),
    "template: expected a text with {prompt}, {first}, {second}, or a function of them, got 3": lambda: judge(
        Table(), PROMPTS, FIRST, SECOND, template=[3]
    ),
    "verdicts: expected 2 texts or lists of token ids, none empty, got ('A', '')": lambda: judge(
        Table(), PROMPTS, FIRST, SECOND, verdicts=("A", "")
    ),
    "verdicts: expected 2 texts or lists of token ids, none empty, got 'AB'": lambda: judge(
        Table(), PROMPTS, FIRST, SECOND, verdicts="AB"
    ),
    "verdicts: expected verdicts that differ": lambda: judge(Table(), PROMPTS, FIRST, SECOND, verdicts=("A", "A")),
    "verdicts: expected two of them, got 3": lambda: judge(Table(), PROMPTS, FIRST, SECOND, verdicts=("A", "B", "C")),
    "both_orders: expected True or False, got 1": lambda: judge(Table(), PROMPTS, FIRST, SECOND, both_orders=1),
    "clip: expected (low, high) with low <= high": lambda: judge(Table(), PROMPTS, FIRST, SECOND, clip=(0.6, 0.4)),
    "clip: expected a float in [0, 1], got 2": lambda: judge(Table(), PROMPTS, FIRST, SECOND, clip=(0.6, 2)),
    "responses: expected 3 of them": lambda: rate(Table(5), PROMPTS, FIRST[:1]),
    "ratings: expected {verdict: value}, got 5": lambda: rate(Table(5), PROMPTS, FIRST, ratings=5),
    "ratings: expected a finite float": lambda: rate(Table(5), PROMPTS, FIRST, ratings={"1": 1, "2": float("nan")}),
    "ratings: expected 2 texts or lists of token ids": lambda: rate(Table(5), PROMPTS, FIRST, ratings={"1": 1}),
    "ratings: expected values that differ": lambda: rate(Table(2), PROMPTS, FIRST, ratings={"1": 1, "2": 1}, unit=True),
    "template: expected a text with {prompt}, {response}, got fields none": lambda: rate(
        Table(5), PROMPTS, FIRST, template="rate it"
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_is_named(said):
    with pytest.raises((ValueError, TypeError)) as caught:
        BAD[said]()
    assert str(caught.value).startswith(said)
