"""Preference losses: links between the scores of two responses, and the choices around them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch

from rlfast import backends, heads, limits, preference_inputs, preference_linear, validate
from rlfast.kernels.formulas import PAIRS, SCORES
from rlfast.loss_outputs import LossMetrics
from rlfast.ops import pair_loss as op
from rlfast.ops.preference_records import METRICS, REDUCTIONS, Settings, Term
from rlfast.preference_inputs import PairGiven

SORTS = (None, "pairs", "responses")
OF_PAIRS = ("margin", "extra", "weights")  # fields of a pair, which sorting takes apart
REFERENCED = ("log_ratio", "forward_kl", "jensen_shannon", "alpha_divergence")  # scores that read the reference


class PreferenceOutput(NamedTuple):
    """The loss, with its gradient, the metrics, and, where ``per_pair`` asks for them, each pair's loss and rewards."""

    loss: torch.Tensor  # []
    metrics: LossMetrics
    losses: torch.Tensor | None  # [B]
    chosen_rewards: torch.Tensor | None  # [B]
    rejected_rewards: torch.Tensor | None


@dataclass(frozen=True)
class Part:
    """One of the losses that are added up: weight · link(s_chosen, s_rejected).

    Args:
        link: name of a formula of ``rlfast.kernels.formulas.PAIRS``.
        hyper: its hyper-parameters by name; those not named have the formula's defaults.
        score: "log_ratio", "total", "power", "forward_kl", "jensen_shannon" or "alpha_divergence".
        score_hyper: the score's hyper-parameters.
        mean: the score is divided by the response's length.
        weight: of this loss in the sum.
    """

    link: str
    hyper: dict = field(default_factory=dict)
    score: str = "log_ratio"
    score_hyper: dict = field(default_factory=dict)
    mean: bool = False
    weight: float = 1.0

    def term(self, links: dict) -> Term:
        """As the op has it."""
        validate.one_of("link", self.link, tuple(links))
        validate.one_of("score", self.score, tuple(SCORES))
        numbers = _numbers("score_hyper", SCORES[self.score], self.score_hyper)
        weight = validate.finite("weight", self.weight)
        for low, high in limits.ORDERED_HYPER.get(links[self.link].hyper, ()):
            hyper = links[self.link].hyper(**self.hyper)
            validate.ordered(low, getattr(hyper, low), high, getattr(hyper, high))
        return Term(self.score, self.mean, self.link, weight, numbers, _numbers("hyper", links[self.link], self.hyper))

    def knows(self, links: dict) -> dict[str, str]:
        """Option → the field that it goes to."""
        own = {name: "score_hyper" for name in SCORES[self.score].hyper._fields}
        own |= {name: "hyper" for name in links[self.link].hyper._fields}
        own.pop("unused", None)
        return own

    def changed(self, links: dict, options: dict) -> Part:
        """With the options that this part knows."""
        own = self.knows(links)
        mine = {k: x for k, x in options.items() if k in own}
        fields_ = {to: getattr(self, to) | {k: x for k, x in mine.items() if own[k] == to} for to in set(own.values())}
        return replace(self, **fields_, **({"mean": options["mean"]} if "mean" in options else {}))


def _numbers(what: str, formula, given: dict) -> tuple[float, ...]:
    unknown = set(given) - set(formula.hyper._fields)
    if unknown:
        validate.fail(what, f"names among {', '.join(formula.hyper._fields)}", ", ".join(sorted(unknown)))
    ranges = limits.HYPER.get(formula.hyper, {})  # a user's formula may have any number
    return tuple(
        validate.number(k, x, ranges.get(k, limits.FINITE)) for k, x in formula.hyper(**given)._asdict().items()
    )


class Prepared(NamedTuple):
    """What of a loss no tensor changes: the op's arguments, and what a call must bring."""

    terms: tuple
    without_nll: tuple  # the terms where a call brings an NLL of its own
    lengths: bool
    referenced: bool
    reads: frozenset


@dataclass(frozen=True)
class PreferenceLoss:
    """One preference loss. ``rlfast.preference_loss(name)`` makes those of the table; this makes any other.

        loss = factor/n · Σ_i w_i·Σ_k weight_k·link_k(s_k(chosen_i), s_k(rejected_i))

    Args:
        parts: the losses that are added up.
        reduce: "mean" or "sum" over the pairs.
        reward: the score that metrics call the reward, times the first part's β.
        reward_mean: it is divided by the length.
        nll: weight of −log π of the chosen response; 0 is none.
        nll_reduce: over its tokens, "mean" or "sum"; "batch" is a mean over all chosen tokens of the batch.
        tail: weight of the tokens beyond the length of the shorter response (LD-DPO's α).
        kl: of the full-vocabulary KL(π_ref‖π) that the loss adds to a response's log-probs (TDPO); metrics do without.
        kl_detached: no gradient through the chosen response's.
        sort: "pairs" or "responses": differences, or each side's log-ratios, are sorted over the batch (AOT). Fields of
            pairs mean nothing then, and ``losses`` are those of the sorted places; rewards and metrics stay the pairs'.
        reference_free: the reference's log-probs are not asked for; they count as 0.
        needs: names of arguments without which the loss is another one.
        paper: arXiv id.

    Raises:
        ValueError, TypeError: an argument is not one of the above; the message names it.

    Example:
        >>> objective = rlfast.PreferenceLoss((rlfast.Part("hinge", {"beta": 0.5}),), reference_free=True)
        >>> out = objective(torch.tensor([-10.0]), torch.tensor([-11.0]))
        >>> out.loss.item()
        0.5
    """

    parts: tuple[Part, ...]
    reduce: str = "mean"
    reward: str = "log_ratio"
    reward_mean: bool = False
    nll: float = 0.0
    nll_reduce: str = "mean"
    tail: float = 1.0
    kl: float = 0.0
    kl_detached: bool = False
    sort: str | None = None
    reference_free: bool = False
    needs: tuple[str, ...] = ()
    name: str = "preference loss"
    paper: str = ""

    def __post_init__(self):
        if not self.parts or len(self.parts) > 6:
            validate.fail("parts", "one to six", str(len(self.parts)))
        validate.one_of("reduce", self.reduce, REDUCTIONS)
        validate.one_of("reward", self.reward, tuple(SCORES))
        validate.one_of("sort", self.sort, SORTS)
        validate.one_of("nll_reduce", self.nll_reduce, ("mean", "sum", "batch"))
        for name in ("nll", "tail", "kl"):
            validate.number(name, getattr(self, name), limits.OPTIONS[name])
        object.__setattr__(self, "prepared", self._prepare())
        plain = replace(self, sort=None, kl=0.0, nll=0.0) if self.sort or self.kl else None  # what metrics are of
        object.__setattr__(self, "plain", plain)

    def _prepare(self) -> Prepared:
        score = next((p.score_hyper for p in self.parts if p.score == self.reward), {})
        terms = with_nll = terms_with_reward(self.parts, PAIRS, self.reward, score, self.reward_mean)
        if self.nll and not self.apart:
            link = "batch_nll" if self.nll_reduce == "batch" else "nll"
            nll = Part(link, score="total", mean=self.nll_reduce == "mean", weight=self.nll)
            with_nll = [*terms, nll.term(PAIRS)]
        lengths = any(t.mean or t.score == "power" for t in with_nll)
        lengths |= any(p.hyper.get("length_price") for p in self.parts) or bool(self.nll and self.nll_reduce != "sum")
        referenced = any(p.score in REFERENCED for p in self.parts) and not self.reference_free
        reads = read_by(self.parts, PAIRS) - (set(OF_PAIRS) if self.sort else set())
        return Prepared(flat(with_nll), flat(terms), lengths, referenced, reads)

    @cached_property
    def apart(self) -> bool:
        """Whether the likelihood is added by torch: sums that are sorted, or have a KL in them, are no longer those of
        responses, and a link may want ``shared`` for itself, where the kernel has the batch's mean length."""
        shares = self.nll_reduce == "batch" and "shared" in read_by(self.parts, PAIRS)
        return bool(self.nll) and bool(self.sort or self.kl or shares)

    def with_options(self, **options) -> PreferenceLoss:
        """The same loss with some options changed; a hyper-parameter of a part's link or score by its own name."""
        return changed(self, PAIRS, options)

    def __call__(
        self, chosen_logps, rejected_logps, *, ref_chosen_logps=None, ref_rejected_logps=None, chosen_lengths=None,
        rejected_lengths=None, chosen_mask=None, rejected_mask=None, chosen_cu_seqlens=None, rejected_cu_seqlens=None,
        chosen_kl=None, rejected_kl=None, margin=None, extra=None, shared=None, weights=None, nll=None, num_items=None,
        world_size=1, accumulation=1, per_pair=False,
    ) -> PreferenceOutput:  # fmt: skip
        """The loss of a batch of pairs, in one launch with its gradient by the log-probs.

        Args:
            chosen_logps: [B] float, the sums of log π over each chosen response; or its tokens, [B, T] padded with
                ``chosen_mask``, or [N] packed with ``chosen_cu_seqlens``: then the kernel sums them. With gradient.
            rejected_logps: the same of the rejected responses; T or N may differ.
            ref_chosen_logps, ref_rejected_logps: like them. log π_ref.
            chosen_lengths, rejected_lengths: [B] numbers, the tokens of the responses, where only sums are given.
            chosen_mask, rejected_mask: like tokens, bool or number. 0 takes a token out; what it holds has no effect.
            chosen_cu_seqlens, rejected_cu_seqlens: int [B + 1], where the packed responses begin and end.
            chosen_kl, rejected_kl: like the log-probs. KL(π_ref‖π) over the vocabulary, for TDPO; with gradient.
            margin: [B]. Subtracted from the difference of scores; of RPO the difference of the true rewards.
            extra: [B]. What the link calls ``extra``: a soft label, a probability, a pair's own factor of β.
            shared: a number or 0-dim tensor: what the link calls ``shared``, BCO's δ.
            weights: [B]. Multiply each pair's loss; 0 takes a pair out, not out of n.
            nll: a 0-dim tensor with gradient, in place of the NLL that ``self.nll`` weighs.
            num_items: number or 0-dim tensor in place of the number of pairs in n.
            world_size, accumulation: the loss is multiplied by one and divided by the other.
            per_pair: whether to return each pair's loss and rewards too.

        Returns:
            PreferenceOutput. A batch without pairs gives a loss of 0.

        Raises:
            ValueError: a shape is wrong, what this loss needs is missing, or it has no use for what is given; the
                message names it.
            TypeError: a dtype is wrong.
        """
        chosen = preference_inputs.Given(
            chosen_logps, ref_chosen_logps, chosen_lengths, chosen_mask, chosen_cu_seqlens, chosen_kl
        )
        rejected = preference_inputs.Given(
            rejected_logps, ref_rejected_logps, rejected_lengths, rejected_mask, rejected_cu_seqlens, rejected_kl
        )
        rest = self._given(margin, extra, shared, weights, num_items)
        return self.run(chosen, rejected, rest, nll, validate.share(world_size, accumulation), per_pair)

    def rows(
        self, logps, *, ref_logps=None, lengths=None, mask=None, cu_seqlens=None, kl=None, margin=None, extra=None,
        shared=None, weights=None, nll=None, num_items=None, world_size=1, accumulation=1, per_pair=False,
    ) -> PreferenceOutput:  # fmt: skip
        """The same of one batch of 2B responses, the B chosen ones first, as a concatenated forward leaves them.

        Args:
            logps: [2B] sums, [2B, T] tokens, or [N] packed tokens with ``cu_seqlens`` [2B + 1].
            ref_logps, mask, kl: like logps.
            lengths: [2B].
        """
        both = preference_inputs.Given(logps, ref_logps, lengths, mask, cu_seqlens, kl)
        rest = self._given(margin, extra, shared, weights, num_items)
        return self.run(
            both, None, rest, nll, validate.share(world_size, accumulation), per_pair, (preference_inputs.ROWS,)
        )

    def linear(
        self, chosen_hidden, rejected_hidden, weight, chosen_targets, rejected_targets, bias=None, *,
        ref_chosen_logps=None, ref_rejected_logps=None, chosen_mask=None, rejected_mask=None, chosen_cu_seqlens=None,
        rejected_cu_seqlens=None, temperature=1.0, softcap=None, logit_scale=1.0,
        memory_budget=None, margin=None, extra=None, shared=None, weights=None, nll=None,
        num_items=None, world_size=1, accumulation=1, per_pair=False, process_group=None,
    ) -> PreferenceOutput:  # fmt: skip
        """The loss of pairs from the last hidden states and the head, without their logits.

            logp_t = log softmax((hidden_t·weightᵀ + bias)·logit_scale, soft-capped, ÷ temperature)[target_t]

        A few pairs at a time: their logits, their log-probs, the loss's gradients, and, while the logits are still
        there, ∂hidden, ∂weight and ∂bias.

        Args:
            chosen_hidden: [B, T, D], or [N, D] packed with ``chosen_cu_seqlens``: the last hidden states of the
                chosen responses, float32, bfloat16 or float16. With gradient.
            rejected_hidden: the same of the rejected; T or N may differ.
            weight: [V, D] of hidden's dtype: the head. Frozen if it needs no gradient, which then costs nothing.
            chosen_targets, rejected_targets: [B, T] or [N] ids in [0, V); −100 marks a token that is not counted.
            bias: [V] of hidden's dtype, or None.
            ref_chosen_logps, ref_rejected_logps: log π_ref of the targets, shaped like them; or the sums [B].
            chosen_mask, rejected_mask, chosen_cu_seqlens, rejected_cu_seqlens: as when called with tokens.
            temperature, softcap, logit_scale: as in ``rlfast.linear_token_logps``; the temperature is a number.
            memory_budget: bytes of float32 logits that may be there at once; by default 512 MiB, or, up to 2 GiB, those
                of 512 rows or of the longest pair. If all fit, the backward keeps them; if
                those of some pairs (of 512 rows at least) do, the forward takes the gradients so many pairs at a time:
                three GEMMs either way. Else, and where the batch has to be sorted (AOT), the backward makes the
                logits again in tiles: four.
            margin, extra, shared, weights, nll, num_items, world_size, accumulation, per_pair: as when called.
            process_group: as in ``rlfast.linear_token_logps``.

        Returns:
            PreferenceOutput, as when called with the log-probs.

        Raises:
            ValueError, TypeError: as when called, and as in ``rlfast.linear_token_logps``.

        Example:
            >>> hidden, head = torch.randn(2, 2, 5, 16), torch.randn(100, 16)
            >>> targets = torch.randint(100, (2, 2, 5))
            >>> simpo = rlfast.preference_loss("simpo")
            >>> out = simpo.linear(*hidden, head, *targets)
            >>> out.loss.shape
            torch.Size([])
        """
        chosen = chosen_hidden, chosen_targets, ref_chosen_logps, chosen_mask, chosen_cu_seqlens
        rejected = rejected_hidden, rejected_targets, ref_rejected_logps, rejected_mask, rejected_cu_seqlens
        sides = tuple(preference_linear.Tokens(*side) for side in (chosen, rejected))
        head = heads.Head(weight, bias, temperature, softcap, logit_scale, memory_budget, False, process_group)
        rest = self._given(margin, extra, shared, weights, num_items)
        factor = validate.share(world_size, accumulation)
        return preference_linear.run(self, head, sides, rest, nll, factor, per_pair)[0]

    def linear_rows(
        self, hidden, weight, targets, bias=None, *, ref_logps=None, mask=None, cu_seqlens=None, temperature=1.0,
        softcap=None, logit_scale=1.0, memory_budget=None, margin=None, extra=None,
        shared=None, weights=None, nll=None, num_items=None, world_size=1, accumulation=1, per_pair=False,
        process_group=None,
    ) -> PreferenceOutput:  # fmt: skip
        """``linear`` of one batch of 2B responses, the B chosen ones first, as a concatenated forward leaves them.

        Args:
            hidden: [2B, T, D], or [N, D] packed with ``cu_seqlens`` [2B + 1].
            targets, mask: [2B, T] or [N].
            ref_logps: like targets, or sums [2B].
        """
        side = preference_linear.Tokens(hidden, targets, ref_logps, mask, cu_seqlens)
        head = heads.Head(weight, bias, temperature, softcap, logit_scale, memory_budget, False, process_group)
        rest = self._given(margin, extra, shared, weights, num_items)
        factor = validate.share(world_size, accumulation)
        return preference_linear.run(self, head, (side,), rest, nll, factor, per_pair)[0]

    def _given(self, *fields) -> PairGiven:
        """The fields of a call, which the loss has a use for."""
        rest = PairGiven(*fields)
        preference_inputs.asked_for(self, self.prepared.reads, rest._asdict())
        return rest

    def run(
        self, chosen, rejected, rest, nll, factor: float, per_pair: bool, names=preference_inputs.SIDES
    ) -> PreferenceOutput:
        """A call whose arguments are gathered; ``names`` is what those of the sides are called."""
        if nll is not None:
            validate.scalar("nll", nll)
        out = self._launch(chosen, rejected, rest, nll, factor, per_pair, names)
        loss = out.loss if nll is None or not self.nll else out.loss + self.nll * nll
        if self.apart and nll is None:
            loss, out = self._with_likelihood(out, chosen, rejected is None, rest, factor, names)
        if self.plain is not None:
            sides = (x if x is None else x._replace(kl=None) for x in (chosen, rejected))
            with torch.no_grad():
                pairs = self.plain._launch(*sides, rest, None, factor, per_pair, names)
            out = out._replace(metrics=torch.cat((out.metrics[:1], pairs.metrics[1:])), rewards=pairs.rewards)
        detail = (out.losses, *out.rewards) if per_pair else (None, None, None)
        return PreferenceOutput(loss, LossMetrics(out.metrics, METRICS), *detail)

    def _with_likelihood(self, out, chosen, together: bool, rest, factor: float, names) -> tuple:
        """(the loss, the op's output), with the likelihood of the chosen responses."""
        each = self.nll * preference_inputs.likelihoods(chosen._replace(kl=None), names[0], together, self.nll_reduce)
        if rest.weights is not None:
            each = torch.where(rest.weights != 0, rest.weights * each, 0.0)
        n = rest.num_items
        n = (1 if self.reduce == "sum" else max(each.shape[0], 1)) if n is None else n
        total = each.sum(dtype=torch.float64).mul(factor).div(n).to(each.dtype)
        metrics = out.metrics.clone()
        metrics[0] += total.detach()
        losses = out.losses + each.detach() if out.losses.numel() else out.losses
        return out.loss + total, out._replace(metrics=metrics, losses=losses)

    def gradients(self, chosen, rejected, rest, nll, factor: float) -> tuple:
        """∂loss/∂logp of both sides of a call whose arguments are gathered."""
        return self._launch(chosen, rejected, rest, nll, factor, False, preference_inputs.SIDES, (True, True))[2:4]

    def _launch(self, chosen, rejected, rest, nll, factor: float, per_pair: bool, names, needs=None):
        """The op; ``needs`` says which sides need a gradient, None that the log-probs know."""
        ready = self.prepared
        checked = preference_inputs.checked((chosen, rejected), names, rest, self, ready.lengths, ready.referenced)
        terms = ready.terms if nll is None else ready.without_nll
        needs = [*(needs or (_needs(checked[0]), _needs(checked[op.SIDE]))), per_pair]
        settings = Settings(float(self.tail), float(factor))
        return op.call(*checked, *terms, settings, REDUCTIONS.index(self.reduce), needs, backends.requested())


def terms_with_reward(parts, links: dict, score: str = "log_ratio", hyper=(), mean: bool = False) -> list[Term]:
    """The terms of the parts, and before them the reward: a score times the β of the first part."""
    first = parts[0]
    terms = [part.term(links) for part in parts]
    beta = first.hyper.get("beta", getattr(links[first.link].hyper(), "beta", 1.0))
    return [Term(score, mean, "", float(beta), _numbers("reward", SCORES[score], dict(hyper)), ()), *terms]


def read_by(parts, links: dict) -> frozenset:
    """What the links of the parts read of their records; each takes weights."""
    return frozenset({"weights"}).union(*(links[part.link].reads for part in parts))


def changed(loss, links: dict, options: dict):
    """A loss with some options changed: its own, or those of its parts' links and scores."""
    names = {f.name for f in fields(loss)} - {"parts", "name", "paper", "needs"}
    known = names.union({"mean"}, *(part.knows(links) for part in loss.parts))
    validate.options(options, known, loss.name)
    parts = tuple(part.changed(links, options) for part in loss.parts)
    return replace(loss, parts=parts, **{k: x for k, x in options.items() if k in names})


def flat(terms: list[Term]) -> tuple:
    """Terms as the op's schema has them: scores, means, links, numbers."""
    return (
        [t.score for t in terms], [t.mean for t in terms], [t.link for t in terms],
        [x for t in terms for x in t.numbers()],
    )  # fmt: skip


def _needs(x) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()
