"""Losses of ranked groups, K candidates a prompt, and their table."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from rlfast import backends, preference_inputs, validate
from rlfast.kernels.formulas import RANKINGS
from rlfast.loss_inputs import boundaries, counted, like_first
from rlfast.loss_outputs import LossMetrics
from rlfast.ops import ranked_loss as op
from rlfast.ops.preference_records import REDUCTIONS
from rlfast.ops.ranked_records import METRICS, Groups, Settings
from rlfast.ops.response_sums import response_sums

RANKS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, *validate.FLOATS)


class RankedOutput(NamedTuple):
    """The loss, with its gradient, the metrics, and, where ``per_group`` asks for them, each group's loss."""

    loss: torch.Tensor  # []
    metrics: LossMetrics
    losses: torch.Tensor | None  # [P]


class Given(NamedTuple):
    """The arguments of a call as they came."""

    scores: object
    ranks: object
    rewards: object
    mask: object
    lengths: object
    ref_scores: object
    cu_seqlens: object
    weights: object
    num_items: object


@dataclass(frozen=True)
class RankedLoss:
    """One loss of ranked groups. ``rlfast.ranked_loss(name)`` makes those of the table; this makes any other.

        x = beta·(s − s_ref)/n^alpha
        loss = factor/P · Σ_g w_g·[form(x_g, r_g) − nll·s_best]      (nll·(K − 1)² if nll_by_size)

    A group of one candidate or none has the loss 0, and stays in P.

    Args:
        form: name of a formula of ``rlfast.kernels.formulas.RANKINGS``, whose docstring has the equation:
            "plackett_luce", "pro", "bradley_terry", "hinge", "reverse_kl", "cross_entropy" or "nca".
        beta: factor of the scores, > 0.
        alpha: exponent of the candidate's length that divides its score; 0 asks for no lengths.
        tau: temperature of the rewards where they make a distribution (EXO's β_r, NCA's α), > 0.
        top: places of "plackett_luce" and "pro" that count; None is all. 1 is the softmax cross-entropy of the best.
        nll: weight of −score of the best candidate, 0 is none: its NLL where scores are log-probs.
        nll_by_size: it is multiplied by (K − 1)².
        reduce: "mean" or "sum" over the groups.
        referenced: the score is a log-ratio: ``ref_scores`` are asked for, unless ``reference_free``.
        reference_free: the reference's log-probs are not asked for; they count as 0.
        needs: names of arguments without which the loss is another one.
        paper: arXiv id.

    Raises:
        ValueError, TypeError: an argument is not one of the above; the message names it.

    Example:
        >>> objective = rlfast.RankedLoss("hinge")
        >>> out = objective(torch.tensor([[1.0, 3.0, 2.5]]), ranks=torch.tensor([[1, 2, 3]]))
        >>> out.loss.item()
        3.5
    """

    form: str
    beta: float = 1.0
    alpha: float = 0.0
    tau: float = 1.0
    top: int | None = None
    nll: float = 0.0
    nll_by_size: bool = False
    reduce: str = "mean"
    referenced: bool = False
    reference_free: bool = False
    needs: tuple[str, ...] = ()
    name: str = "ranked loss"
    paper: str = ""

    def __post_init__(self):
        validate.one_of("form", self.form, tuple(RANKINGS))
        validate.one_of("reduce", self.reduce, REDUCTIONS)
        for name in ("beta", "tau"):
            validate.positive(name, getattr(self, name))
        validate.finite("alpha", self.alpha), validate.finite("nll", self.nll)
        if self.top is not None and (not isinstance(self.top, int) or isinstance(self.top, bool) or self.top < 1):
            validate.fail("top", "an int ≥ 1, or None", repr(self.top))
        object.__setattr__(self, "unreferenced", replace(self, referenced=False) if self.referenced else self)

    def with_options(self, **options) -> RankedLoss:
        """The same loss with some options changed."""
        known = {f.name for f in fields(self)} - {"form", "name", "paper", "needs", "referenced"}
        validate.options(options, known, self.name)
        return replace(self, **options)

    def __call__(
        self, scores, *, ranks=None, rewards=None, mask=None, lengths=None, ref_scores=None, cu_seqlens=None,
        weights=None, num_items=None, world_size=1, accumulation=1, max_candidates=None, per_group=False,
    ) -> RankedOutput:  # fmt: skip
        """The loss of some groups, in one launch with its gradient by the scores.

        Args:
            scores: [P, K] float, a group a row; or [N] packed with ``cu_seqlens``. A reward model's outputs, or
                the sums of log π over each candidate (``rows`` takes the tokens). With gradient. Triton takes K up to
                64; the CPU and torch any K.
            ranks: like scores, numbers: the smaller the better. Or
            rewards: like scores: the larger the better. Without either the candidates are in order, the best first.
            mask: like scores, bool or number. 0 takes a candidate out; what it holds has no effect.
            lengths: like scores, numbers > 0, the tokens of each candidate, where alpha is not 0.
            ref_scores: like scores. log π_ref, where the loss takes log-ratios.
            cu_seqlens: int [P + 1], where packed groups begin and end.
            weights: [P]. Multiply each group's loss; 0 takes a group out, not out of P.
            num_items: number or 0-dim tensor in place of the number of groups P.
            world_size, accumulation: the loss is multiplied by one and divided by the other.
            max_candidates: of packed groups on a GPU, a bound on their size: the tile is made for it, and a larger
                group has the loss NaN. None: 64.
            per_group: whether to return each group's loss too.

        Returns:
            RankedOutput. Equal ranks or rewards are no pair of "bradley_terry", "hinge" or the accuracy; the other
            forms take the one that comes first for the better one, and so does "the best". Of ranks, ``best_reward``
            is the mean of −rank, of neither 0.

        Raises:
            ValueError: a shape is wrong, or what this loss needs is missing; the message names it.
            TypeError: a dtype is wrong.
        """
        given = Given(scores, ranks, rewards, mask, lengths, ref_scores, cu_seqlens, weights, num_items)
        groups = checked(given, self)
        top = math.inf if self.top is None else float(self.top)
        settings = Settings(
            float(self.beta), float(self.tau), top, float(self.nll), float(self.nll_by_size),
            validate.share(world_size, accumulation),
        )  # fmt: skip
        needs = [groups.scores.requires_grad and torch.is_grad_enabled(), per_group]
        most = groups.scores.shape[1] if cu_seqlens is None else bound(max_candidates)
        reduce = REDUCTIONS.index(self.reduce)
        out = op.call(*groups, self.form, settings, reduce, most, needs, backends.requested())
        return RankedOutput(out.loss, LossMetrics(out.metrics, METRICS), out.losses if per_group else None)

    def rows(
        self, logps, groups, *, ref_logps=None, lengths=None, mask=None, cu_seqlens=None, ranks=None, rewards=None,
        weights=None, num_items=None, world_size=1, accumulation=1, max_candidates=None, per_group=False,
    ) -> RankedOutput:  # fmt: skip
        """The same of the candidates' tokens, one candidate after the other, as a forward leaves them.

        One kernel sums policy and reference, in float64 and rounded once; the gradient goes back to the tokens.

        Args:
            logps: [C, T] float, log π of the tokens of C candidates, padded with ``mask``; or [N] packed with
                ``cu_seqlens``; or the sums [C]. With gradient.
            groups: an int K, the candidates of each group; or int [P + 1], where the groups begin and end among the C.
            ref_logps: like logps. log π_ref, where the loss takes log-ratios.
            lengths: [C] numbers > 0, the tokens of each candidate, where only sums are given and alpha is not 0.
            mask: like tokens, bool or number. 0 takes a token out; what it holds has no effect. A candidate without
                tokens stays, with a sum of 0.
            cu_seqlens: int [C + 1], where the packed candidates begin and end.
            ranks, rewards: [C], as when called.
            weights, num_items, world_size, accumulation, max_candidates, per_group: as when called.

        Returns:
            RankedOutput, as when called with the sums.

        Raises:
            ValueError, TypeError: as when called.

        Example:
            >>> logps = torch.tensor([[-1.0, -2.0], [-1.5, -1.0], [-2.0, -2.0], [-0.5, -9.0]])
            >>> mask = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0]])
            >>> out = rlfast.ranked_loss("dpo_list").rows(logps, 2, ref_logps=torch.zeros(4, 2) - 1, mask=mask)
            >>> round(out.loss.item(), 6)
            0.7722
        """
        given = preference_inputs.Given(logps, ref_logps, lengths, mask, cu_seqlens, None)
        referenced = self.referenced and not self.reference_free
        side = preference_inputs.side_of(given, preference_inputs.ROWS, self.name, bool(self.alpha), referenced)
        scores, ref = _sums(side, bool(self.nll))
        found = {"ranks": ranks, "rewards": rewards}
        for name, x in found.items():
            if x is not None:
                validate.tensor(name, x, RANKS)
                if x.shape != scores.shape:
                    validate.fail(name, f"shape {validate.shape(scores)}, one a candidate", validate.shape(x))
        found |= {"ref_scores": ref, "lengths": _counts(side) if self.alpha else None}
        if isinstance(groups, torch.Tensor):
            found["cu_seqlens"] = boundaries(groups, scores, "logps", "groups")
        else:
            if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or scores.shape[0] % groups:
                wanted = f"an int that divides {scores.shape[0]} candidates, or a tensor of boundaries"
                validate.fail("groups", wanted, repr(groups))
            scores = scores.view(-1, groups)
            found = {name: x if x is None else x.reshape(-1, groups) for name, x in found.items()}
        return (self.unreferenced if ref is None else self)(
            scores, **found, weights=weights, num_items=num_items, world_size=world_size, accumulation=accumulation,
            max_candidates=max_candidates, per_group=per_group,
        )  # fmt: skip


def _sums(side, both: bool) -> tuple:
    """(scores, ref_scores) of candidates: S and S_ref where both are needed or given, else D = S − S_ref."""
    if not preference_inputs.is_tokens(side):
        return side.logp, side.ref_logp
    total, ratio = response_sums(side, backends.requested())
    return (total, (total - ratio).detach()) if both and side.ref_logp is not None else (ratio, None)


def _counts(side):
    """The tokens of each candidate, 1 at least; nothing is read from a device."""
    if not preference_inputs.is_tokens(side):
        return side.lengths
    if side.mask is None:
        rows = preference_inputs.rows_of(side)
        n = torch.full((rows,), side.logp.shape[-1]) if side.cu_seqlens is None else side.cu_seqlens.diff()
        return n.to(side.logp.device).clamp(min=1)
    if side.cu_seqlens is None:
        return side.mask.sum(-1).clamp(min=1)
    return torch.nn.functional.pad(side.mask.cumsum(0), (1, 0))[side.cu_seqlens].diff().clamp(min=1)


def checked(given: Given, objective: RankedLoss) -> Groups:
    """The tensors of the op, or an error that names the argument."""
    scores = given.scores
    validate.tensor("scores", scores)
    if scores.dim() != (2 if given.cu_seqlens is None else 1):
        validate.fail("scores", "shape [P, K], or [N] with cu_seqlens", validate.shape(scores))
    for name in objective.needs:
        if getattr(given, name) is None:
            validate.fail(name, f"a tensor: {objective.name} needs it", "None")
    if given.ref_scores is None and objective.referenced and not objective.reference_free:
        validate.fail("ref_scores", f"a tensor: {objective.name} needs it", "None")
    if given.lengths is None and objective.alpha:
        validate.fail("lengths", f"a tensor: {objective.name} divides by it", "None")
    if given.ranks is not None and given.rewards is not None:
        validate.fail("ranks", "None beside rewards", "both")
    ends = boundaries(given.cu_seqlens, scores, "scores")
    rows = scores.shape[0] if ends is None else ends.shape[0] - 1
    return Groups(
        scores, _constant("ref_scores", given.ref_scores, scores), _rewards(given, scores), _divisor(given, objective),
        validate.mask_like(given.mask, "scores", scores), ends, _weights(given.weights, scores, rows),
        counted(given.num_items, scores),
    )  # fmt: skip


def bound(most) -> int:
    """``max_candidates`` as the op has it."""
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        validate.fail("max_candidates", "an int ≥ 1, or None", repr(most))
    return most or 0


def _constant(name: str, x, scores):
    if isinstance(x, torch.Tensor) and x.requires_grad:
        validate.fail(name, "a tensor that needs no gradient", "requires_grad=True")
    return like_first(name, x, scores, "scores")


def _numbers(name: str, x, scores, dtypes):
    """A constant of any of these dtypes, in the compute dtype."""
    validate.tensor(name, x, dtypes)
    x = x.to(torch.float64 if scores.dtype == torch.float64 else torch.float32)
    return _constant(name, x, scores)


def _rewards(given: Given, scores):
    if given.ranks is None:
        return _constant("rewards", given.rewards, scores)
    return _numbers("ranks", given.ranks, scores, RANKS).neg()


def _divisor(given: Given, objective: RankedLoss):
    """n^alpha; where alpha is 1, the lengths as they came."""
    if not objective.alpha:
        return None
    lengths = _numbers("lengths", given.lengths, given.scores, RANKS)
    # a power in float32 is off by some ulps
    return lengths if objective.alpha == 1 else lengths.double().pow(objective.alpha).to(lengths.dtype)


def _weights(x, scores, rows: int):
    if x is None:
        return None
    validate.tensor("weights", x)
    if x.requires_grad:
        validate.fail("weights", "a tensor that needs no gradient", "requires_grad=True")
    if tuple(x.shape) != (rows,):
        validate.fail("weights", f"shape ({rows},), one a group", validate.shape(x))
    validate.same_device("weights", x, "scores", scores)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return x if (x.dtype == torch.float64) == (scores.dtype == torch.float64) else x.to(wide)


def _row(name: str, form: str, paper: str, **options) -> RankedLoss:
    return RankedLoss(form, name=name, paper=paper, **options)


_RATIOS = {"beta": 0.1, "referenced": True}
RANKED = {
    row.name: row
    for row in (
        # of a reward model's scores
        _row("plackett_luce", "plackett_luce", "2301.11270"),
        _row("all_pairs", "bradley_terry", "2203.02155"),
        _row("best_of_k", "plackett_luce", "1807.03748", top=1),
        # of log-ratios to a reference
        _row("dpo_list", "plackett_luce", "2305.18290", **_RATIOS),
        _row("exo", "reverse_kl", "2402.00856", needs=("rewards",), **_RATIOS),
        _row("info_nca", "cross_entropy", "2402.05369", needs=("rewards",), **_RATIOS),
        _row("nca", "nca", "2402.05369", needs=("rewards",), **_RATIOS),
        # of mean log-probs, beside the likelihood of the best; PRO's weight of it is the paper's 0.05·(K − 1)²
        _row("rrhf", "hinge", "2304.05302", alpha=1.0, nll=1.0),
        _row("pro", "pro", "2306.17492", alpha=1.0, nll=0.05, nll_by_size=True, needs=("rewards",)),
    )
}


def ranked_loss(name: str, **options) -> RankedLoss:
    """A loss of ranked groups.

        plackett_luce   Σ_j [log Σ_{k≥j} e^s_k − s_j]                   in order of ranks; arXiv 2301.11270
        all_pairs       mean over pairs of −log σ(s_i − s_j)             InstructGPT, 2203.02155
        best_of_k       −log softmax(s)_best                             InfoNCE, 1807.03748
        dpo_list        plackett_luce of β·D                             DPO's appendix A.3, 2305.18290
        exo             KL(softmax(β·D) ‖ softmax(r/τ))                  2402.00856
        info_nca        −Σ_k softmax(r/τ)_k·log softmax(β·D)_k           2402.05369
        nca             −Σ_k [softmax(r/τ)_k·log σ(β·D_k) + log σ(−β·D_k)/K]
        rrhf            Σ_{r_i<r_j} max(0, p_i − p_j) − S_best           p = S/n^α; 2304.05302
        pro             Σ_k [log(e^{p_k·T_k} + Σ_{j>k} e^{p_j·T_kj}) − p_k·T_k] − w·(K − 1)²·S_best,
                        T_kj = r_k − r_j, T_k = max_j T_kj               2306.17492

    s are scores, D = S − S_ref log-ratios. Of equal ranks or rewards the first one counts for the better one, but in
    all_pairs and rrhf they are no pair.

    Args:
        name: a row of ``rlfast.RANKED``.
        options: any option of ``rlfast.RankedLoss`` by name; PRO's w is ``nll``.

    Raises:
        ValueError: the name is unknown; the message lists what there is.
        TypeError: there is no such option.

    Example:
        >>> loss = rlfast.ranked_loss("plackett_luce")
        >>> round(loss(torch.tensor([[2.0, 1.0, 0.5, -1.0]])).loss.item(), 6)
        1.251552
    """
    if name not in RANKED:
        validate.fail("name", f"one of {', '.join(RANKED)}", repr(name))
    return RANKED[name].with_options(**options) if options else RANKED[name]
