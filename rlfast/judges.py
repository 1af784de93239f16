"""Feedback of a language model: which of two responses is better, and how good one is, read off log-probs of verdicts.

A judge is anything with ``choose(prompts, candidates)``, as ``rlfast.rollout.Engine`` has it. A prompt is computed once
for all of its verdicts, so that a verdict costs its own tokens and no generation.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from rlfast import limits, validate

COMPARE = (
    "Here is a request and two responses to it. Which response is more helpful, honest and harmless?\n\n"
    "Request: {prompt}\n\nResponse A: {first}\n\nResponse B: {second}\n\nThe better response:"
)
VERDICTS = (" A", " B")
RATE = (
    "Here is a request and a response to it. How good is the response, from 1 (useless) to 5 (perfect)?\n\n"
    "Request: {prompt}\n\nResponse: {response}\n\nThe rating:"
)
RATINGS = {f" {k}": float(k) for k in range(1, 6)}


class Judged(NamedTuple):
    """What a judge says of pairs of responses."""

    probability: torch.Tensor  # float32 [B]: P(first ≻ second), for ``reward_loss("soft_label")``
    orders: torch.Tensor  # float32 [templates, orders, B]: the same of each template, the pair as it is and swapped

    @property
    def bias(self) -> torch.Tensor:
        """[B] How much likelier a response is preferred for being shown first; 0 of a judge without position bias."""
        if self.orders.shape[1] == 1:
            validate.fail("orders", "both orders of a pair: both_orders=True", "one")
        return (self.orders[:, 0] - self.orders[:, 1]).mean(0)


def _texts(name: str, x, count: int | None = None) -> list:
    if isinstance(x, str) or not isinstance(x, Sequence):
        validate.fail(name, "a list", repr(x)[:60], TypeError)
    if count is not None and len(x) != count:
        validate.fail(name, f"{count} of them, one a prompt", str(len(x)))
    return list(x)


def _writers(name: str, templates, fields: tuple[str, ...]) -> list[Callable]:
    """Functions of a template's fields, from strings or functions, one or several."""
    given = [templates] if isinstance(templates, str) or callable(templates) else templates
    if not isinstance(given, Sequence) or not given:
        validate.fail(name, "a template, or a list of them", repr(templates)[:60], TypeError)
    return [x if callable(x) else _writer(name, x, fields) for x in given]


def _writer(name: str, template, fields: tuple[str, ...]) -> Callable:
    wanted = "a text with " + ", ".join(f"{{{x}}}" for x in fields)
    if not isinstance(template, str):
        validate.fail(name, f"{wanted}, or a function of them", repr(template)[:60], TypeError)
    try:
        found = {field for _, field, *_ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        validate.fail(name, wanted, f"{template[:60]!r}: {error}")
    if found != set(fields):
        validate.fail(name, wanted, f"fields {', '.join(sorted(found)) or 'none'}")
    return lambda *texts: template.format(**dict(zip(fields, texts, strict=True)))


def _verdicts(name: str, verdicts, least: int = 2) -> list:
    """At least two different ones."""
    given = list(verdicts) if isinstance(verdicts, Sequence | Mapping) and not isinstance(verdicts, str) else []
    if len(given) < least or any(not x for x in given):
        validate.fail(name, f"{least} texts or lists of token ids, none empty", repr(verdicts)[:60])
    if len({x if isinstance(x, str) else tuple(x) for x in given}) < len(given):
        validate.fail(name, "verdicts that differ", repr(verdicts)[:60])
    return given


def _log_probs(engine, prompts: list, verdicts: list) -> torch.Tensor:
    """float32 [prompts, verdicts]: the log-prob of each verdict."""
    if not callable(getattr(engine, "choose", None)):
        wanted = "what has choose(prompts, candidates), such as rlfast.rollout.Engine"
        validate.fail("engine", wanted, repr(engine)[:60], TypeError)
    found = engine.choose(prompts, [verdicts] * len(prompts)) if prompts else []
    return torch.stack([torch.as_tensor(x) for x in found]).float() if prompts else torch.empty(0, len(verdicts))


def judge(
    engine, prompts, first, second, *, template=COMPARE, verdicts=VERDICTS, both_orders: bool = True, clip=None
) -> Judged:
    """How probably one response is preferred to another, by the log-probs of two verdicts of a judge.

        p(x, y, z) = π(v_1|t)/(π(v_1|t) + π(v_2|t)),   t = template(x, y, z)
        P(y ≻ z) = ½[p(x, y, z) + 1 − p(x, z, y)]

    Both orders of a pair are asked for and averaged, so that a judge that likes the response that it reads first has no
    say: a judge that only looks at the place gives ½.

    Args:
        engine: the judge: an ``rlfast.rollout.Engine``, or another with its ``choose``.
        prompts: [B] what was asked, strings (or whatever the templates take).
        first, second: [B] the two responses to each.
        template: a text with {prompt}, {first} and {second}, or a function (prompt, first, second) of a string or of
            token ids, for chat templates. Or a list of them, such as one a principle: the probabilities are averaged.
        verdicts: the answers that say "the first" and "the second": strings, each encoded by itself, or token ids.
        both_orders: False asks for each pair as it stands, at half the cost, position bias included.
        clip: (low, high): bounds of the averaged probability. Constitutional AI: (0.4, 0.6) after a chain of thought.

    Returns:
        Judged(probability [B], orders [templates, orders, B]); its ``bias`` is that of the place.

    Raises:
        ValueError, TypeError: an argument has the wrong type or length, a template lacks a field, verdicts are the
            same; the message names it.

    Reference:
        Constitutional AI, arXiv 2212.08073; RLAIF, 2309.00267 (both orders, §2.1).

    Example:
        >>> class Judge:
        ...     def choose(self, prompts, candidates):  # likes what it reads first, and polite answers
        ...         return [torch.tensor([1.0 + 2.0 * ("A: please" in p), 2.0 * ("B: please" in p)]) for p in prompts]
        >>> said = rlfast.rewards.judge(Judge(), ["Help?"], ["please"], ["no"])
        >>> said.probability, said.bias
        (tensor([0.8418]), tensor([0.2215]))
    """
    prompts = _texts("prompts", prompts)
    first, second = _texts("first", first, len(prompts)), _texts("second", second, len(prompts))
    writers = _writers("template", template, ("prompt", "first", "second"))
    answers = _verdicts("verdicts", verdicts)
    if len(answers) != 2:
        validate.fail("verdicts", "two of them", str(len(answers)))
    ways = ((first, second), (second, first))[: 1 + validate.flag("both_orders", both_orders)]
    asked = [write(*x) for write in writers for one, other in ways for x in zip(prompts, one, other, strict=True)]
    logp = _log_probs(engine, asked, answers)
    gap = (logp[:, 0] - logp[:, 1]).reshape(len(writers), len(ways), len(prompts))
    orders = torch.sigmoid(gap * gap.new_tensor([[1.0], [-1.0]])[: len(ways)])  # of a swapped pair, 1 − p
    probability = orders.mean((0, 1))
    if clip is not None:
        probability = probability.clamp(*validate.span("clip", clip, limits.SHARE))
    return Judged(probability, orders)


def rate(engine, prompts, responses, *, template=RATE, ratings=RATINGS, unit: bool = False) -> torch.Tensor:
    """How good responses are, by the log-probs of a judge's ratings.

        s(x, y) = Σ_k v_k·π(k|t)/Σ_j π(j|t),   t = template(x, y)

    Args:
        engine: the judge, as in ``judge``.
        prompts, responses: [B].
        template: a text with {prompt} and {response}, or a function of them; or a list of them, one an aspect.
        ratings: {verdict: its value}.
        unit: the ratings' range is mapped to [−1, 1], as RLAIF does it.

    Returns:
        float32 [B], or [B, aspects] where ``template`` is a list: fine-grained feedback.

    Raises:
        ValueError, TypeError: as in ``judge``.

    Reference:
        d-RLAIF, arXiv 2309.00267 §2.2.2 (ratings 1 to 10); aspects: RLRF, 2403.14238 (three levels each).

    Example:
        >>> class Judge:
        ...     def choose(self, prompts, candidates):
        ...         return [torch.tensor([0.0, 0.0, 1.0]) for _ in prompts]
        >>> rlfast.rewards.rate(Judge(), ["Why?"], ["So."], ratings={"bad": 0, "fair": 1, "good": 2})
        tensor([1.3642])
    """
    prompts = _texts("prompts", prompts)
    responses, writers = (
        _texts("responses", responses, len(prompts)),
        _writers("template", template, ("prompt", "response")),
    )
    if not isinstance(ratings, Mapping):
        validate.fail("ratings", "{verdict: value}", repr(ratings)[:60], TypeError)
    values = torch.tensor([validate.finite("ratings", x) for x in ratings.values()])
    answers = [list(x) if isinstance(x, tuple) else x for x in _verdicts("ratings", ratings)]
    if validate.flag("unit", unit):
        low, high = values.aminmax()
        if low == high:
            validate.fail("ratings", "values that differ, to be mapped to [−1, 1]", repr(ratings)[:60])
        values = 2.0 * (values - low) / (high - low) - 1.0
    asked = [write(*x) for x in zip(prompts, responses, strict=True) for write in writers]
    scores = torch.softmax(_log_probs(engine, asked, answers), -1) @ values
    several = not (isinstance(template, str) or callable(template))
    return scores.reshape(len(prompts), len(writers)) if several else scores
