"""What ``token_loss`` passes to its backends: the fields of the tokens, the structure of the objective, its numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch

# The unit of the log-ratio x: the token's own, its sequence's mean or sum, or the mean's value with the gradient of the
# token's own (GSPO's token form).
UNITS = ("token", "seq_mean", "seq_sum", "seq_mean_through")
TOKEN, SEQ_MEAN, SEQ_SUM, SEQ_MEAN_THROUGH = range(4)

# How the tokens' losses become one number; c_t is a token's weight in the sum, n what the sum is divided by.
REDUCTIONS = ("token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "seq_sum_over_max_len")
TOKEN_MEAN, TOKEN_SUM, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, SEQ_SUM_OVER_MAX_LEN = range(5)

# What an importance weight or a gate looks at: nothing, the token's ρ, its sequence's sum or mean.
LEVELS = (None, "token", "seq_sum", "seq_mean")
NO_LEVEL, AT_TOKEN, AT_SEQ_SUM, AT_SEQ_MEAN = range(4)

# Of the effective sample size: a larger weight counts for the largest, a smaller one for 0, so that neither the squares
# nor their sum leave the normal range of float32.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-15, 1e15
LOG_LEAST = -18.420680743952367  # log 1e-8: what a weight of 0 counts for in VESPO's log-ratio


class Fields(NamedTuple):
    """The tokens. float32, bfloat16 or float16 each; [rows, T] of any row stride, or packed [N] with cu_seqlens."""

    logp: torch.Tensor
    old_logp: torch.Tensor | None  # None: sg(logp)
    ref_logp: torch.Tensor | None
    rollout_logp: torch.Tensor | None
    adv: torch.Tensor  # the last stride is 1, or 0 where a row has one advantage
    entropy: torch.Tensor | None
    weights: torch.Tensor | None  # multiply the surrogate
    extra: torch.Tensor | None  # what the formula calls ``extra``
    mask: torch.Tensor | None  # bool: the tokens that count
    keep: torch.Tensor | None  # bool: the tokens whose surrogate counts; the others keep their KL and their place in n
    cu_seqlens: torch.Tensor | None  # int64 [rows + 1]
    num_items: torch.Tensor | None  # float32 []: in place of the batch's own count in n
    coefs: torch.Tensor | None  # float32 [2]: factors of beta and entropy_coef that live on the device


class Plan(NamedTuple):
    """The structure of an objective, as integers."""

    unit: int = TOKEN
    signed: int = 0  # GMPO's clip: x ≤ inner_high where A > 0, x ≥ inner_low where A < 0
    mean_adv: int = 0  # every token of a sequence has the mean of its advantages
    kl_through: int = 0  # the gradient of k2 under the value of the estimator
    # the estimator is multiplied by r, and differentiated through it: 1 the unit's, 2 the token's; 3 by π/sg(π), whose
    # value is 1 (its gradient is 0 where the estimate is at kl_max)
    kl_ratio: int = 0
    reduce: int = TOKEN_MEAN
    count_empty: int = 0  # sequences without a token that counts are counted too
    entropy_mean: int = 0  # the entropy bonus is a mean over the kept tokens, whatever the reduction
    weight: int = NO_LEVEL  # the level of the importance weight ρ
    weight_in_ratio: int = 0  # log ρ is added to x (VESPO); neither it nor its gate multiplies anything
    gate: int = NO_LEVEL  # the level of the gate on ρ
    gate_kind: int = 1  # of which estimator: k1 (log ρ), k2, k3
    gate_masks: int = 0  # a closed gate takes the token out of the mask, and out of n


class Settings(NamedTuple):
    """The numbers of an objective; run-time floats in every kernel."""

    beta: float = 0.0
    entropy_coef: float = 0.0
    inner_low: float = -float("inf")  # bounds of the token's log-ratio
    inner_high: float = float("inf")
    unit_low: float = -float("inf")  # bounds of the unit's
    unit_high: float = float("inf")
    weight_low: float = 0.0  # bounds of ρ
    weight_high: float = float("inf")
    gate_low: float = -float("inf")  # bounds of what the gate looks at
    gate_high: float = float("inf")
    off_policy: float = float("inf")  # δ: a sequence with mean(log π_rollout − log π) > δ counts only where A ≥ 0
    max_len: float = 1.0  # of seq_sum_over_max_len
    factor: float = 1.0  # world size ÷ gradient accumulation
    entropy_factor: float = 1.0  # of the entropy bonus where entropy_mean


class Metrics(NamedTuple):
    """Names of the float32 ``metrics`` that a launch fills. Means are over the ``tokens`` unless said otherwise."""

    loss: object
    scale: object  # factor ÷ n: true gradient = dlogp · scale
    entropy_scale: object  # the same of dentropy
    tokens: object  # Σ mask
    sequences: object  # the sequences that the reduction counts
    policy_loss: object  # the surrogate's part of the loss
    kl: object  # the estimator to the reference
    entropy: object
    approx_kl_k1: object  # −x, of the token's log-ratio to the old policy within its bounds
    approx_kl_k3: object  # e^x − 1 − x
    clip_low: object  # tokens whose surrogate, or log-ratio, is at a bound, and r < 1
    clip_high: object  # and r ≥ 1
    ratio_mean: object  # r of the unit
    ratio_max: object
    ess: object  # (Σ w)² / (tokens · Σ w²), w = r·ρ as it is applied
    # tokens whose surrogate is multiplied by 0; those that a gate masks are in no metric, ``tokens`` among them
    dropped: object
    rollout_ratio_mean: object  # e^(log π_old − log π_rollout) of the token; 1 without rollout_logp
    rollout_ratio_max: object


METRICS = Metrics._fields


class Output(NamedTuple):
    """What a backend returns."""

    loss: torch.Tensor  # []
    metrics: torch.Tensor  # [len(METRICS)]
    dlogp: torch.Tensor  # like logp, in the compute dtype: ∂loss/∂logp ÷ scale; no elements if not needed
    dentropy: torch.Tensor  # the same by entropy ÷ entropy_scale


def row_wise(plan: Plan, settings: Settings) -> bool:
    """Whether a token's part depends on its sequence: else any split of the tokens will do."""
    return plan.reduce >= SEQ_MEAN_TOKEN_MEAN or reads_sequences(plan, settings)


def reads_sequences(plan: Plan, settings: Settings) -> bool:
    """Whether it depends on other tokens of its sequence, and not on how many there are alone."""
    return (
        plan.unit != TOKEN
        or bool(plan.mean_adv)
        or max(plan.weight, plan.gate) > AT_TOKEN
        or settings.off_policy < float("inf")
    )


def allocate(fields: Fields, needs: tuple[bool, bool]) -> Output:
    """Uninitialised outputs: float32, or float64 for float64."""
    logp = fields.logp
    acc = torch.float64 if logp.dtype == torch.float64 else torch.float32
    # never one tensor twice: outputs of an op may not alias one another
    gradients = (torch.empty(logp.shape if need else 0, dtype=acc, device=logp.device) for need in needs)
    return Output(logp.new_empty((), dtype=acc), logp.new_empty(len(METRICS), dtype=acc), *gradients)
