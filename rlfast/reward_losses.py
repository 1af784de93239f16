"""Losses of reward models: pairs of rewards, by the kernels of preference losses, and the regressions beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from rlfast import limits, validate
from rlfast.kernels.formulas import PAIRS
from rlfast.logps import token_logps
from rlfast.loss_outputs import LossMetrics
from rlfast.preference import Part, PreferenceLoss, PreferenceOutput
from rlfast.preference_inputs import Given, Names, PairGiven, asked_for

CHOSEN, REJECTED = (Names(*(f"{side}_rewards",) * 6) for side in ("chosen", "rejected"))  # they are all there is
ONE = {"beta": 1.0}
NOT_OPTIONS = ("unused", "length_price")  # hyper-parameters of links that mean nothing for rewards


@dataclass(frozen=True)
class RewardLoss:
    """One loss of a pair of rewards; ``rlfast.reward_loss(name)`` makes those of the table.

    Args:
        objective: the same as a preference loss, of scores that are rewards.

    Raises:
        ValueError: it reads a reference, lengths, tokens or a KL, or sorts the batch.
    """

    objective: PreferenceLoss

    def __post_init__(self):
        o = self.objective
        if o.prepared.referenced or o.prepared.lengths or o.tail != 1.0 or o.kl or o.sort:
            validate.fail("objective", "a loss of two scores and nothing else of the responses", o.name)

    @property
    def name(self) -> str:
        """Of the row."""
        return self.objective.name

    @property
    def reduce(self) -> str:
        """Over the pairs."""
        return self.objective.reduce

    def with_options(self, **options) -> RewardLoss:
        """The same loss with some options changed: hyper-parameters of its links, ``reduce``, ``centring``.

        Raises:
            TypeError: there is no such option; the message lists what there is.
        """
        objective = self.objective
        hyper = {name for part in objective.parts for name in PAIRS[part.link].hyper._fields}
        validate.options(options, {"reduce", "centring"} | hyper - {*NOT_OPTIONS}, self.name)
        if "centring" in options:
            weight = validate.finite("centring", options.pop("centring"))
            parts = tuple(p for p in objective.parts if p.link != "centring")
            extra = (Part("centring", score="total", weight=weight),) if weight else ()
            objective = replace(objective, parts=(*parts, *extra))
        return replace(self, objective=objective.with_options(**options))

    def __call__(
        self, chosen_rewards, rejected_rewards, *, margin=None, probability=None, weights=None, num_items=None,
        world_size=1, accumulation=1, per_pair=False,
    ) -> PreferenceOutput:  # fmt: skip
        """The loss of a batch of pairs, in one launch with its gradient.

        Args:
            chosen_rewards, rejected_rewards: [B] float: r at the last token of each response. With gradient.
            margin: [B]. Subtracted from the difference.
            probability: [B] in [0, 1]: of soft labels, that the chosen response is preferred.
            weights: [B]. Multiply each pair's loss; 0 takes a pair out, not out of n.
            num_items: number or 0-dim tensor in place of the number of pairs in n.
            world_size, accumulation: the loss is multiplied by one and divided by the other.
            per_pair: whether to return each pair's loss and rewards too.

        Returns:
            PreferenceOutput; its metrics have the accuracy, the margin and the mean rewards.

        Raises:
            ValueError: a shape is wrong, or what this loss needs is missing; the message names it.
            TypeError: a dtype is wrong.
        """
        for name, x in ((CHOSEN.logps, chosen_rewards), (REJECTED.logps, rejected_rewards)):
            validate.tensor(name, x)
            if x.dim() != 1:
                validate.fail(name, "shape [B], one reward a response", validate.shape(x))
        given = {"margin": margin, "extra": probability, "weights": weights}
        asked_for(self.objective, self.objective.prepared.reads, given, {"extra": "probability"})
        validate.within("probability", probability, limits.SHARE)
        sides = (Given(x, *(None,) * 5) for x in (chosen_rewards, rejected_rewards))
        rest = PairGiven(margin, probability, None, weights, num_items)
        return self.objective.run(
            *sides, rest, None, validate.share(world_size, accumulation), per_pair, (CHOSEN, REJECTED)
        )


def _row(name: str, link: str, paper: str, hyper=None, more=(), **options) -> RewardLoss:
    parts = (Part(link, hyper or {}, "total"), *more)
    objective = PreferenceLoss(parts, name=name, paper=paper, reward="total", reference_free=True, **options)
    return RewardLoss(objective)


REWARD_LOSSES = {
    row.name: row
    for row in (
        _row("bradley_terry", "logistic", "Bradley and Terry 1952", ONE),
        _row("margin", "logistic", "2307.09288", ONE, needs=("margin",)),
        _row("centred", "logistic", "2312.09244", ONE, (Part("centring", score="total", weight=0.01),)),
        _row("soft_label", "soft_label", "2212.08073", ONE, needs=("extra",)),
        _row("scaled", "logistic", "2410.01257", ONE, needs=("weights",)),
        _row("focal_barrier", "focal", "2403.17297", None, (Part("barrier", score="total"),)),
        _row("max_margin", "max_margin", "2410.12491"),
        _row("gpm", "logistic", "2410.02197", ONE),
        _row("gpm_regression", "regression", "2410.02197"),
    )
}


def reward_loss(name: str, **options) -> RewardLoss:
    """A loss of a reward model on pairs.

    Args:
        name: a row of ``rlfast.REWARD_LOSSES``. Losses of K ranked answers are ``rlfast.ranked_loss``.
        options: hyper-parameters of the row's links by name, of the barrier too, whose weight is ``barrier``;
            ``centring``, the weight of (r_w + r_l)²; ``reduce``.

    Raises:
        ValueError: the name is unknown; the message lists what there is.
        TypeError: the row has no such option.

    Example:
        >>> chosen, rejected = torch.tensor([1.5]), torch.tensor([0.3])
        >>> round(rlfast.reward_loss("bradley_terry")(chosen, rejected).loss.item(), 6)
        0.263282
    """
    if name not in REWARD_LOSSES:
        validate.fail("name", f"one of {', '.join(REWARD_LOSSES)}", repr(name))
    row = REWARD_LOSSES[name]
    return row.with_options(**options) if options else row


def gpm_scores(chosen, rejected, *, tau: float = 0.1):
    """The general preference model's score of a pair, s = Σ_k (v_w·R·v_l)/τ over planes (2k, 2k + 1).

        s = (v_w0·v_l1 − v_w1·v_l0)/τ in each plane

    Args:
        chosen, rejected: [B, 2k] float, embeddings of the responses.
        tau: a float > 0.

    Returns:
        (s, 0), [B] each: the two rewards for ``reward_loss("gpm")`` or "gpm_regression".

    Reference: arXiv 2410.02197.
    """
    validate.tensor("chosen", chosen)
    validate.tensor("rejected", rejected)
    if chosen.dim() != 2 or chosen.shape[1] % 2:
        validate.fail("chosen", "shape [B, 2k]", validate.shape(chosen))
    if rejected.shape != chosen.shape:
        validate.fail("rejected", f"shape {validate.shape(chosen)} like chosen", validate.shape(rejected))
    acc = torch.promote_types(torch.promote_types(chosen.dtype, rejected.dtype), torch.float32)
    w, l_ = (x.to(acc).unflatten(1, (-1, 2)) for x in (chosen, rejected))
    s = (w[..., 0] * l_[..., 1] - w[..., 1] * l_[..., 0]).sum(1) / validate.positive("tau", tau)
    return s, torch.zeros_like(s)


def grm_loss(chosen_rewards, rejected_rewards, text_loss, *, alpha: float = 0.01):
    """A reward model regularised by its language head: (1 − α)·BT + α·(SFT or DPO loss of the same responses).

    Args:
        chosen_rewards, rejected_rewards: [B] float. With gradient.
        text_loss: [] float: ``preference_loss("dpo")(...).loss``, or an NLL.
        alpha: α, a float in [0, 1].

    Reference: arXiv 2406.10216.
    """
    alpha = validate.number("alpha", alpha, limits.SHARE)
    return (1 - alpha) * reward_loss("bradley_terry")(chosen_rewards, rejected_rewards).loss + alpha * text_loss


def _attributes(predicted, target, mask, dims: int = 2):
    """Predictions, targets and mask in float32, checked."""
    validate.tensor("predicted", predicted)
    validate.tensor("target", target)
    if predicted.dim() != dims:
        wanted = "shape [B, A]" if dims == 2 else "shape [B, A, Q]"
        validate.fail("predicted", wanted, validate.shape(predicted))
    if target.shape != predicted.shape[:2]:
        validate.fail("target", f"shape {tuple(predicted.shape[:2])}, one an attribute", validate.shape(target))
    keep = validate.mask_like(mask, "target", target)
    keep = torch.ones_like(target, dtype=torch.bool) if keep is None else keep
    acc = torch.promote_types(predicted.dtype, torch.float32)
    return predicted.to(acc), torch.where(keep, target.to(acc), 0.0), keep


def _mean(x, keep):
    """Over what counts; 0 if nothing does."""
    return torch.where(keep, x, 0.0).sum() / keep.sum().clamp(min=1)


def attribute_regression_loss(predicted, target, mask=None):
    """Σ m(ŷ − y)²/Σ m over B responses and A attributes.

    Args:
        predicted: [B, A] float. With gradient.
        target: [B, A] float.
        mask: like target. 0 where an attribute was not annotated.

    Reference: HelpSteer2, arXiv 2406.08673.
    """
    predicted, target, keep = _attributes(predicted, target, mask)
    return _mean((torch.where(keep, predicted, 0.0) - target).square(), keep)


def quantile_loss(predicted, target, quantiles, mask=None):
    """The pinball loss Σ m·max(τ(y − ŷ), (τ − 1)(y − ŷ))/Σ m, a mean over quantiles.

    Args:
        predicted: [B, A, Q] float: Q quantiles of each attribute. With gradient.
        target: [B, A] float.
        quantiles: [Q] float in (0, 1).
        mask: like target.

    Reference: quantile reward models, arXiv 2409.10164.
    """
    predicted, target, keep = _attributes(predicted, target, mask, 3)
    validate.tensor("quantiles", quantiles)
    if quantiles.shape != predicted.shape[2:]:
        validate.fail("quantiles", f"shape {tuple(predicted.shape[2:])}", validate.shape(quantiles))
    validate.within("quantiles", quantiles, limits.INSIDE)
    error = target.unsqueeze(-1) - torch.where(keep.unsqueeze(-1), predicted, 0.0)
    tau = quantiles.to(error)
    return _mean(torch.maximum(tau * error, (tau - 1) * error).mean(-1), keep)


def gaussian_reward_loss(mean, log_variance, target, mask=None):
    """½(log σ² + (y − μ)²/σ²), an uncertainty-aware reward model's: a mean over what counts.

    Args:
        mean, log_variance: [B, A] float. With gradient.
        target: [B, A] float.
        mask: like target.

    Reference: URM, arXiv 2410.00847.
    """
    mean, target, keep = _attributes(mean, target, mask)
    validate.tensor("log_variance", log_variance)
    if log_variance.shape != mean.shape:
        validate.fail("log_variance", f"shape {validate.shape(mean)} like mean", validate.shape(log_variance))
    log_variance = torch.where(keep, log_variance.to(mean), 0.0)
    error = torch.where(keep, mean, 0.0) - target
    return _mean(0.5 * (log_variance + error.square() * torch.exp(-log_variance)), keep)


def process_reward_loss(logits, labels):
    """Cross-entropy at the step separators of a process reward model.

    Args:
        logits: [..., V] float.
        labels: [...] int, the label token (good or bad) at a separator, −100 elsewhere.

    Returns:
        (loss [], LossMetrics of "accuracy" and "steps").

    Reference: arXiv 2305.20050.
    """
    out = token_logps(logits, labels, outputs=("logp", "is_top1"))
    steps = labels != -100
    n = steps.sum().clamp(min=1)
    found = torch.stack([(out.is_top1 & steps).sum() / n, steps.sum().to(out.logp.dtype)]).to(out.logp.dtype)
    return -torch.where(steps, out.logp, 0.0).sum() / n, LossMetrics(found.detach(), ("accuracy", "steps"))


def generative_reward_loss(logits, correct, *, yes_id: int, no_id: int):
    """A generative verifier: −log p("Yes") of a correct answer, −log p("No") of another, and log-odds as the reward.

    Args:
        logits: [B, V] float, where the verdict is generated.
        correct: bool [B].
        yes_id, no_id: token ids of the two verdicts.

    Returns:
        (loss [], rewards [B]: log p(yes) − log p(no), with gradient).

    Reference: arXiv 2408.15240.
    """
    validate.tensor("correct", correct, (torch.bool,))
    validate.tensor("logits", logits)
    if logits.dim() != 2 or correct.shape != logits.shape[:1]:
        validate.fail("correct", f"shape {tuple(logits.shape[:1])}, one a row of logits", validate.shape(correct))
    both = torch.tensor([yes_id, no_id], device=logits.device).expand(logits.shape[0], 2)
    logp = token_logps(logits, both).logp
    loss = -torch.where(correct, logp[:, 0], logp[:, 1])
    return loss.mean() if loss.numel() else loss.sum(), logp[:, 0] - logp[:, 1]
