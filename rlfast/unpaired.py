"""Losses of single responses that are desirable or not, and their table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from rlfast import backends, preference_inputs, validate
from rlfast.kernels.formulas import SINGLES
from rlfast.loss_outputs import LossMetrics
from rlfast.ops import unpaired_loss as op
from rlfast.ops.preference_records import REDUCTIONS, SINGLE_METRICS, Settings
from rlfast.preference import REFERENCED, Part, changed, flat, read_by, terms_with_reward
from rlfast.preference_inputs import PairGiven
from rlfast.statistics import kto_reference_point


class UnpairedOutput(NamedTuple):
    """The loss, with its gradient, the metrics, and, where asked for, each response's loss and reward."""

    loss: torch.Tensor  # []
    metrics: LossMetrics
    losses: torch.Tensor | None  # [B]
    rewards: torch.Tensor | None  # [B]


class Prepared(NamedTuple):
    """What of a loss no tensor changes: the op's arguments, and what a call must bring."""

    terms: tuple
    lengths: bool
    referenced: bool
    reads: frozenset


@dataclass(frozen=True)
class UnpairedLoss:
    """One loss of single responses. ``rlfast.unpaired_loss(name)`` makes those of the table; this makes any other.

        loss = factor/n · Σ_i w_i·Σ_k weight_k·link_k(s_k(response_i), desirable_i)

    Args:
        parts: the losses that are added up; their links are formulas of ``rlfast.kernels.formulas.SINGLES``.
        reduce: "mean" or "sum" over the responses.
        reference_free: the reference's log-probs are not asked for; they count as 0.
        needs: names of arguments without which the loss is another one.
        paper: arXiv id.

    Raises:
        ValueError, TypeError: an argument is not one of the above; the message names it.

    Example:
        >>> objective = rlfast.UnpairedLoss((rlfast.Part("kto"),), reference_free=True)
        >>> out = objective(torch.tensor([2.0, -5.0]), torch.tensor([True, False]), shared=0.5)
        >>> round(out.loss.item(), 6)
        0.414217
    """

    parts: tuple[Part, ...]
    reduce: str = "mean"
    reference_free: bool = False
    needs: tuple[str, ...] = ()
    name: str = "unpaired loss"
    paper: str = ""

    def __post_init__(self):
        if not self.parts or len(self.parts) > 7:
            validate.fail("parts", "one to seven", str(len(self.parts)))
        validate.one_of("reduce", self.reduce, REDUCTIONS)
        object.__setattr__(self, "prepared", self._prepare())

    def _prepare(self) -> Prepared:
        terms = terms_with_reward(self.parts, SINGLES)
        lengths = any(t.mean or t.score == "power" for t in terms)
        referenced = any(p.score in REFERENCED for p in self.parts)
        return Prepared(flat(terms), lengths, referenced, read_by(self.parts, SINGLES))

    def with_options(self, **options) -> UnpairedLoss:
        """The same loss with some options changed; a hyper-parameter of a part's link or score by its own name."""
        return changed(self, SINGLES, options)

    def __call__(
        self, logps, desirable, *, ref_logps=None, lengths=None, mask=None, cu_seqlens=None, kl_logps=None,
        ref_kl_logps=None, extra=None, shared=None, weights=None, num_items=None, world_size=1, accumulation=1,
        per_response=False,
    ) -> UnpairedOutput:  # fmt: skip
        """The loss of a batch of responses, in one launch with its gradient by the log-probs.

        Args:
            logps: [B] float, the sums of log π over each response; or its tokens, [B, T] padded with ``mask``, or [N]
                packed with ``cu_seqlens``: then the kernel sums them. With gradient.
            desirable: bool [B].
            ref_logps: like logps. log π_ref.
            lengths: [B] numbers, the tokens of the responses, where only sums are given.
            mask: like tokens, bool or number. 0 takes a token out; what it holds has no effect.
            cu_seqlens: int [B + 1], where the packed responses begin and end.
            kl_logps, ref_kl_logps: [K] sums of log π and log π_ref over responses to other prompts: KTO's z comes of
                them, max(0, mean(kl_logps − ref_kl_logps)), without gradient.
            extra: [B]. What the link calls ``extra``: of DRO-V r − V, the reward above the prompt's value. V is trained
                on ½ of the same square: the loss is ``value_loss(values, None, r − τ·(logps − ref_logps), clip=None)``.
            shared: a number or 0-dim tensor: what the link calls ``shared``, KTO's z or BCO's δ. Without gradient.
            weights: [B]. Multiply each response's loss; 0 takes it out, not out of n.
            num_items: number or 0-dim tensor in place of the number of responses in n.
            world_size, accumulation: the loss is multiplied by one and divided by the other.
            per_response: whether to return each response's loss and reward too.

        Returns:
            UnpairedOutput. A batch without responses gives a loss of 0.

        Raises:
            ValueError: a shape is wrong, what this loss needs is missing, or it has no use for what is given; the
                message names it.
            TypeError: a dtype is wrong.
        """
        if kl_logps is not None:
            if shared is not None:
                validate.fail("shared", "None beside kl_logps", "both")
            shared = kto_reference_point(kl_logps, ref_kl_logps)
        given = {"extra": extra, "shared": shared, "weights": weights}
        ready = self.prepared
        preference_inputs.asked_for(self, ready.reads, given)
        one = preference_inputs.Given(logps, ref_logps, lengths, mask, cu_seqlens, None)
        checked = preference_inputs.checked_single(
            one, desirable, PairGiven(None, **given, num_items=num_items), self.name, ready.lengths,
            ready.referenced and not self.reference_free,
        )  # fmt: skip
        needs = [logps.requires_grad and torch.is_grad_enabled(), per_response]
        settings = Settings(1.0, validate.share(world_size, accumulation))
        out = op.call(*checked, *ready.terms, settings, REDUCTIONS.index(self.reduce), needs, backends.requested())
        detail = (out.losses, out.rewards[0]) if per_response else (None, None)
        return UnpairedOutput(out.loss, LossMetrics(out.metrics, SINGLE_METRICS), *detail)


def _row(name: str, link: str, paper: str, more=(), **options) -> UnpairedLoss:
    return UnpairedLoss((Part(link), *more), name=name, paper=paper, **options)


UNPAIRED = {
    row.name: row
    for row in (
        _row("kto", "kto", "2402.01306", needs=("shared",)),
        _row("bco", "bco_unpaired", "2404.04656", needs=("shared",)),
        _row("apo_zero", "apo_zero_unpaired", "2408.06266"),
        _row("apo_down", "apo_down_unpaired", "2408.06266", needs=("shared",)),
        _row("npo", "npo", "2404.05868"),
        _row("npo_retain", "npo", "2404.05868", more=(Part("retain", score="total", mean=True),)),
        _row("dro_v", "dro", "2405.19107", needs=("extra",)),
    )
}
# What a trainer does differently from the paper; they agree on what is here.
PRESETS = {"trl": ("kto", "apo_zero"), "liger": ("kto",), "halos": ("kto",)}


def unpaired_loss(name: str, *, like: str | None = None, **options) -> UnpairedLoss:
    """A loss of single responses.

    Args:
        name: a row of ``rlfast.UNPAIRED``.
        like: "trl", "liger" or "halos": that trainer's semantics.
        options: any option of ``rlfast.UnpairedLoss``, or a hyper-parameter of the row's link or score, by name.

    Raises:
        ValueError: the name is unknown, or the trainer has no such loss; the message lists what there is.
        TypeError: the row has no such option.

    Example:
        >>> kto = rlfast.unpaired_loss("kto", beta=0.1, undesirable_weight=1.5)
        >>> logps, ref_logps = torch.tensor([-40.0, -55.0]), torch.tensor([-42.0, -50.0])
        >>> out = kto(logps, torch.tensor([True, False]), ref_logps=ref_logps, shared=0.5)
        >>> round(out.loss.item(), 6)
        0.505683
    """
    if name not in UNPAIRED:
        validate.fail("name", f"one of {', '.join(UNPAIRED)}", repr(name))
    if like is not None and name not in PRESETS[validate.one_of("like", like, tuple(PRESETS))]:
        validate.fail("name", f"one of {', '.join(PRESETS[like])} for like={like!r}", repr(name))
    row = UNPAIRED[name]
    return row.with_options(**options) if options else row
