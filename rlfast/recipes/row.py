"""A recipe is data: stages, what of rlfast each of them calls, and where each number is from."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace

import rlfast
from rlfast import validate

SURE = {
    "V": "read in a library's or the author's code",
    "P": "read in the primary report",
    "S": "read in a page that cites the primary report",
    "K": "from memory",
}
NAMED = ("loss", "preference_loss", "unpaired_loss", "ranked_loss", "reward_loss")  # they make an object of a table


@dataclass(frozen=True)
class Value:
    """A number or a name, and the report that says so; without a source it is undisclosed, and a default of ours."""

    value: object
    source: str = ""

    def __repr__(self):
        return f"{self.value!r}" if self.source else f"{self.value!r} (undisclosed)"


def said(value, source: str) -> Value:
    """What a report says, and where."""
    return Value(value, source)


def undisclosed(value) -> Value:
    """What no report says: the value is a common default."""
    return Value(value)


@dataclass(frozen=True)
class Use:
    """A public function of rlfast with some of its arguments; calling it calls what they make.

    Args:
        function: its name in ``rlfast``.
        name: a row of its table, if it has one (``NAMED``).
        options: a ``Value`` for each argument.
    """

    function: str
    name: str | None = None
    options: dict[str, Value] = field(default_factory=dict)

    @property
    def values(self) -> dict:
        """The arguments without their sources."""
        return {name: x.value for name, x in self.options.items()}

    @functools.cached_property
    def ready(self):
        """The loss object, or the function with these arguments bound."""
        function = operator.attrgetter(self.function)(rlfast)
        if self.function in NAMED:
            return function(self.name, **self.values)
        return functools.partial(function, **self.values)

    def __call__(self, *args, **kwargs):
        return self.ready(*args, **kwargs)

    def __repr__(self):
        given = [] if self.name is None else [repr(self.name)]
        return f"{self.function}({', '.join(given + [f'{k}={x!r}' for k, x in self.options.items()])})"


def use(function: str, name: str | None = None, **options: Value) -> Use:
    """``use("loss", "ppo", eps_low=said(0.2, "1707.06347"))``."""
    return Use(function, name, options)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What every stage says.

    Args:
        learning_rate: of AdamW.
        batch: prompts a step; reports give those of clusters, so a run may have fewer.
        candidates: answers to a prompt.
        temperature: of sampling, and of the log-probs.
        note: what of the report is no argument here.
    """

    learning_rate: Value = Value(1e-6)
    batch: Value = Value(8)
    candidates: Value = Value(2)
    temperature: Value = Value(1.0)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RewardModel(Stage):
    """A scalar head on a copy of the policy's body, trained on answers that the task's reward ranks.

    Args:
        loss: ``reward_loss`` of pairs, ``ranked_loss`` of groups, or ``attribute_regression_loss``.
        outputs: of the head: more than one for attributes, whose mean is the reward.
    """

    loss: Use
    outputs: int = 1


@dataclass(frozen=True, kw_only=True)
class Policy(Stage):
    """Rollouts, rewards, advantages, and so many updates on them.

    Args:
        loss: ``loss``.
        advantage: ``group_advantage`` over the answers to a prompt, or ``gae`` over tokens, which needs a critic.
        rewards: what is added up: "model" (the reward model), "task" (rules), "length", "overlong".
        shaping: "length": ``length_reward``; "overlong": ``overlong_penalty``.
        scale: of the rewards of the task.
        kl: ``shape_rewards``: the KL to the reference is in the reward.
        whiten: ``masked_whiten`` of the advantages of tokens.
        critic: ``value_loss``.
        critic_rate: learning rate of the critic; the policy's if None.
        warm_up: steps in which the critic alone is trained.
        nll: weight of the likelihood of the task's texts (pre-training or SFT data) in the loss.
        epochs: how often a batch of rollouts is gone through.
        minibatches: updates each time.
        dynamic: groups whose rewards are all equal are left out, and others take their place.
        baseline: "reference": the reward of the task's own answer to the prompt is taken off.
        refresh: steps after which the reference becomes the policy.
        anchor: ``ema_update``: after each step the reference moves towards the policy.
        entropy: ``AdaptiveEntropy``: the coefficient of the entropy bonus.
        ema: ``ema_update`` of the weights that the stage ends with.
    """

    loss: Use
    advantage: Use
    rewards: tuple[str, ...] = ("task",)
    shaping: dict[str, Use] = field(default_factory=dict)
    scale: Value | None = None
    kl: Use | None = None
    whiten: Use | None = None
    critic: Use | None = None
    critic_rate: Value | None = None
    warm_up: Value = Value(0)
    nll: Value | None = None
    epochs: Value = Value(1)
    minibatches: Value = Value(1)
    dynamic: bool = False
    baseline: str | None = None
    refresh: Value | None = None
    anchor: Use | None = None
    entropy: Use | None = None
    ema: Use | None = None


@dataclass(frozen=True, kw_only=True)
class Preference(Stage):
    """The best and the worst of some answers to a prompt are a pair.

    Args:
        loss: ``preference_loss``; one that needs a margin is given the difference of the rewards.
        sampler: "policy": fresh answers each step; "reference": the reference's, which the stage begins with.
        judge: "model" (the reward model) or "task".
        epochs: updates on a batch of pairs.
        lora: rank of an adapter; the reference is then the model without it.
        skip: tokens at the beginning of a response that take no part, as a header's.
        anchor: ``ema_update``: after each step the reference moves towards the policy; not with ``lora``.
    """

    loss: Use
    sampler: str = "policy"
    judge: str = "task"
    epochs: Value = Value(1)
    lora: Value | None = None
    skip: int = 0
    anchor: Use | None = None


@dataclass(frozen=True, kw_only=True)
class BestOf(Stage):
    """Rejection sampling: the likelihood of the best of some answers.

    Args:
        loss: ``loss("raft")``.
        judge: "model" or "task".
    """

    loss: Use
    judge: str = "task"


@dataclass(frozen=True, kw_only=True)
class Distil(Stage):
    """A divergence between student and teacher over the vocabulary, on answers of the student.

    Args:
        divergence: ``linear_divergence``.
    """

    divergence: Use


@dataclass(frozen=True, kw_only=True)
class Average(Stage):
    """A stage is run several times from the same weights, with other prompts and samples; then the models are merged.

    Args:
        stage: what is run.
        runs: how often.
        merge: ``merge`` or ``slerp``.
        back: weight of the model that the stage began with in the result (WARP's interpolation towards it).
    """

    stage: Stage
    runs: Value = Value(2)
    merge: Use
    back: Value | None = None


@dataclass(frozen=True)
class Recipe:
    """One system: ``rlfast.recipe(name)`` finds it.

    Args:
        name: of the row.
        system: as its authors call it.
        paper: arXiv id, or where its report is.
        sure: a letter for each way in which what the row says was checked, of ``SURE``.
        stages: in their order.
        note: what is undisclosed, or left out.
    """

    name: str
    system: str
    paper: str
    sure: str
    stages: tuple[Stage, ...]
    note: str = ""

    def __post_init__(self):
        for letter in self.sure:
            validate.one_of("sure", letter, tuple(SURE))

    def values(self) -> Iterator[tuple[str, Value]]:
        """(path, Value) of everything that the row says, in its order: ("1.loss.eps_low", Value(0.2, "…"))."""
        for number, stage in enumerate(self.stages):
            yield from _values(str(number), stage)

    def replaced(self, path: str, value) -> Recipe:
        """The same recipe with another number at a path of ``values``."""
        number, _, rest = path.partition(".")
        known = [p for p, _ in self.values()]
        validate.one_of("path", path, tuple(known))
        stages = list(self.stages)
        stages[int(number)] = _replaced(stages[int(number)], rest.split("."), value)
        return replace(self, stages=tuple(stages))


def _values(path: str, x) -> Iterator[tuple[str, Value]]:
    if isinstance(x, Value):
        yield path, x
    elif isinstance(x, Use):
        yield from _values(path, x.options)
    elif isinstance(x, dict):
        for key, one in x.items():
            yield from _values(f"{path}.{key}", one)
    elif is_dataclass(x):
        for f in fields(x):
            yield from _values(f"{path}.{f.name}", getattr(x, f.name))


def _replaced(x, names: list[str], value):
    if not names:
        return Value(value, x.source)
    first, *rest = names
    if isinstance(x, Use):
        return replace(x, options=_replaced(x.options, names, value))
    if isinstance(x, dict):
        return x | {first: _replaced(x[first], rest, value)}
    return replace(x, **{first: _replaced(getattr(x, first), rest, value)})
