"""What some preference losses know of the batches before: explicit objects, whose value a loss takes as an argument."""

from __future__ import annotations

import torch

from rlfast import limits, validate
from rlfast.distributed.ranks import Ranks, gathered, gathered_batch, ranks_of, summed

TINY = torch.finfo(torch.float32).tiny


def means_of(vectors, ranks: Ranks | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(means, counts) in float64 of some vectors over every rank of a group, where they may have other lengths; one
    collective. The mean of none is 0."""
    parts = torch.stack([x.detach().double().sum() for x in vectors])
    counts = torch.tensor([float(x.numel()) for x in vectors], dtype=torch.float64, device=parts.device)
    both = torch.stack((parts, counts))
    both = both if ranks is None else summed(both, ranks, "a mean over the ranks")
    return both[0] / both[1].clamp(min=1), both[1]


def kto_reference_point(kl_logps, ref_kl_logps, *, process_group=None) -> torch.Tensor:
    """KTO's z = max(0, mean(log π − log π_ref)) over responses that belong to other prompts, without gradient.

    Args:
        kl_logps: [K] float, sums of log π over the mismatched responses.
        ref_kl_logps: [K], the same of log π_ref.
        process_group: the mean is over all of its ranks (or a ``DeviceMesh``'s, of one dimension).

    Returns:
        float32 [], for ``shared`` of ``rlfast.unpaired_loss("kto")``.

    Reference: arXiv 2402.01306.
    """
    validate.tensor("kl_logps", kl_logps)
    if kl_logps.dim() != 1:
        validate.fail("kl_logps", "shape [K] of sums", validate.shape(kl_logps))
    if ref_kl_logps is None:
        validate.fail("ref_kl_logps", "a tensor beside kl_logps", "None")
    validate.tensor("ref_kl_logps", ref_kl_logps)
    if kl_logps.shape != ref_kl_logps.shape:
        validate.fail("ref_kl_logps", f"shape {validate.shape(kl_logps)} like kl_logps", validate.shape(ref_kl_logps))
    gaps = kl_logps.float() - ref_kl_logps.float()
    return means_of((gaps,), ranks_of(process_group))[0][0].float().clamp(min=0)


class RunningDelta:
    """BCO's δ: the running mean of the mean rewards of desirable and undesirable responses.

        δ ← m·δ + (1 − m)·½(mean(r_w) + mean(r_l))

    Args:
        momentum: m; 0 is the batch's own mean, "average" the mean over all batches so far.

    Reference: arXiv 2404.04656.

    Example:
        >>> delta = rlfast.RunningDelta()
        >>> delta.update(torch.tensor([1.0, 3.0]), torch.tensor([0.0]))
        >>> delta.value.item()
        1.0
    """

    def __init__(self, momentum: float | str = "average"):
        if momentum != "average" and not 0 <= validate.finite("momentum", momentum) < 1:
            validate.fail("momentum", "a number in [0, 1), or 'average'", repr(momentum))
        self.momentum, self.value, self.count = momentum, torch.zeros(()), 0

    def update(self, chosen_rewards, rejected_rewards, *, process_group=None) -> torch.Tensor:
        """δ after one more batch; a side without responses leaves the other's mean."""
        for name, x in (("chosen_rewards", chosen_rewards), ("rejected_rewards", rejected_rewards)):
            validate.tensor(name, x)
        sides = chosen_rewards, rejected_rewards
        if process_group is None and not any(x.numel() for x in sides):
            return self.value
        means, counts = means_of(sides, ranks_of(process_group))
        if process_group is not None and not counts.any():  # of any rank: looked at, as the collective was waited for
            return self.value
        mean = (means.sum() / (counts > 0).sum()).float()
        keep = self.count / (self.count + 1) if self.momentum == "average" else self.momentum * (self.count > 0)
        self.value = self.value.to(mean.device) * keep + mean * (1 - keep)
        self.count += 1
        return self.value

    def state_dict(self) -> dict:
        """What a checkpoint needs."""
        return {"value": self.value.item(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.value, self.count = torch.tensor(float(state["value"])), int(state["count"])


class DynamicBeta:
    """β-DPO's batch statistics: M₀ and σ of the reward gap as exponential averages, and from them each pair's factor.

        β_i/β = max(1 + a(gap_i − M₀), least),   kept where exp(−(gap_i − M₀)²/(2σ²)) is among the largest

    Args:
        a: how strongly β follows the gap.
        momentum: of the averages.
        filtered: share of the pairs, those furthest from M₀ in units of σ, that are left out.
        least: the smallest β.

    Reference: arXiv 2407.08639.
    """

    def __init__(self, a: float = 0.6, momentum: float = 0.9, filtered: float = 0.2, least: float = 1e-3):
        self.a, self.least = validate.finite("a", a), validate.positive("least", least)
        self.momentum, self.filtered = validate.finite("momentum", momentum), validate.finite("filtered", filtered)
        if not 0 <= momentum < 1 or not 0 <= filtered < 1:
            validate.fail("momentum and filtered", "numbers in [0, 1)", f"{momentum} and {filtered}")
        self.mean, self.std, self.count = torch.zeros(()), torch.ones(()), 0

    def update(self, gaps, beta: float, *, generator=None, process_group=None) -> tuple[torch.Tensor, torch.Tensor]:
        """(factors of β [B], weights [B] of 0 and 1) for ``extra`` and ``weights`` of ``preference_loss("beta_dpo")``.

        Args:
            gaps: [B] float, β(D_w − D_l) of the batch, without gradient.
            beta: the β that the factors multiply.
            generator: a ``torch.Generator``: the pairs that stay are drawn by it with those probabilities, as the
                authors' code does. Without one the most probable stay.
            process_group: M₀ and σ are of the gaps of all of its ranks, and so is the share that is filtered. With a
                generator the first rank draws for all.

        Raises:
            ValueError, TypeError: an argument is of the wrong type, shape or range; then nothing has changed.
        """
        validate.tensor("gaps", gaps)
        if gaps.dim() != 1:
            validate.fail("gaps", "shape [B], one a pair", validate.shape(gaps))
        least, gaps = self.least / validate.positive("beta", beta), gaps.detach().float()
        ranks, own = ranks_of(process_group), slice(None)
        if ranks is not None:
            whole, own = gathered_batch({"gaps": gaps}, ranks)
            gaps = whole["gaps"]
        if not gaps.numel():  # on any rank
            return gaps, gaps.clone()
        self._average(gaps)
        factor = (1 + self.a * (gaps - self.mean)).clamp(min=least)
        weights = self._kept(gaps, generator)
        if ranks is not None and generator is not None:
            weights = gathered(weights, ranks, "the pairs that stay")[0]
        return factor[own], weights[own]

    def _kept(self, gaps, generator) -> torch.Tensor:
        """1 where a pair stays, else 0."""
        distance = (gaps - self.mean).abs()
        kept = gaps.numel() - int(self.filtered * gaps.numel())
        if generator is None:
            stay = distance.sort(stable=True).indices[:kept]
        else:  # to the smallest float32, so that there are as many as are wanted
            odds = -0.5 * (distance / self.std.clamp(min=TINY)).square()
            odds = (odds - odds.max()).exp().clamp(min=TINY)
            stay = torch.multinomial(odds, kept, replacement=False, generator=generator)
        return torch.zeros_like(gaps).index_fill_(0, stay, 1.0)

    def _average(self, gaps) -> None:
        """M₀ and σ after one more batch."""
        mean, square = means_of((gaps, gaps.double().square()))[0]
        m, std = self.momentum if self.count else 0.0, (square - mean.square()).clamp(min=0).sqrt()
        self.mean = m * self.mean.to(gaps.device) + (1 - m) * mean.float()
        self.std = m * self.std.to(gaps.device) + (1 - m) * std.float()
        self.count += 1

    def state_dict(self) -> dict:
        """What a checkpoint needs."""
        return {"mean": self.mean.item(), "std": self.std.item(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a checkpoint."""
        self.mean, self.std = torch.tensor(float(state["mean"])), torch.tensor(float(state["std"]))
        self.count = int(state["count"])


def udm_weights(desirable_probability, *, low: float = 0.5, high: float = 10.0) -> torch.Tensor:
    """BCO's weights of undesirable responses: p/(1 − p) within bounds, p the density model's P(desirable | prompt).

    Args:
        desirable_probability: [B] float in [0, 1].
        low, high: bounds of the weights, low <= high.

    Raises:
        ValueError, TypeError: an argument is of the wrong type or range.

    Reference: arXiv 2404.04656, underlying distribution matching.
    """
    validate.tensor("desirable_probability", desirable_probability)
    validate.within("desirable_probability", desirable_probability, limits.SHARE)
    low, high = validate.number("low", low, limits.NOT_NEGATIVE), validate.number("high", high, limits.BOUND)
    validate.ordered("low", low, "high", high)
    p = desirable_probability.float()
    return (p / (1 - p).clamp(min=torch.finfo(torch.float32).tiny)).clamp(low, high)


def wpo_weights(logps, log_sum_sq_probs, mask=None, *, most: float = float("inf")) -> torch.Tensor:
    """WPO's weight of a response: exp(mean_t(log π_t − log Σ_v p_t²)), without gradient.

    Args:
        logps: [B, T] float, log π of the tokens.
        log_sum_sq_probs: like logps, as ``rlfast.token_logps(outputs=("log_sum_sq_probs",))`` gives it.
        mask: like logps.
        most: an upper bound; the authors' code has 1.

    Returns:
        float32 [B]. The loss of a pair is multiplied by those of both of its responses.

    Reference: arXiv 2406.11827 (2).
    """
    validate.tensor("logps", logps)
    if logps.dim() != 2:
        validate.fail("logps", "shape [B, T] of tokens", validate.shape(logps))
    validate.tensor("log_sum_sq_probs", log_sum_sq_probs)
    if log_sum_sq_probs.shape != logps.shape:
        wanted = f"shape {validate.shape(logps)} like logps"
        validate.fail("log_sum_sq_probs", wanted, validate.shape(log_sum_sq_probs))
    keep = validate.mask_like(mask, "logps", logps)
    aligned = (logps.detach().float() - log_sum_sq_probs.detach().float()).nan_to_num()
    aligned = aligned if keep is None else torch.where(keep, aligned, 0.0)
    count = torch.full(logps.shape[:1], float(logps.shape[1]), device=logps.device) if keep is None else keep.sum(-1)
    return (aligned.sum(-1) / count.clamp(min=1)).exp().clamp(max=most)
