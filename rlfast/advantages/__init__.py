"""Advantages: every estimator over the tokens of a row, and over the answers to a prompt."""

from rlfast.advantages.group import GroupStatistics, group_advantage, group_statistics
from rlfast.advantages.n_step import n_step_returns
from rlfast.advantages.otb import optimal_token_baseline
from rlfast.advantages.scan import (
    affine_scan,
    discounted_returns,
    gae,
    lambda_returns,
    per_decision_td,
    reward_to_go,
    td_residuals,
    vapo_lam,
    vtrace,
)

__all__ = [
    "GroupStatistics",
    "affine_scan",
    "discounted_returns",
    "gae",
    "group_advantage",
    "group_statistics",
    "lambda_returns",
    "n_step_returns",
    "optimal_token_baseline",
    "per_decision_td",
    "reward_to_go",
    "td_residuals",
    "vapo_lam",
    "vtrace",
]
