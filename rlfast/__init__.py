"""rlfast: fast, exact kernels for RL post-training of language models."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent
if not (_root / "_build_record.py").exists():
    raise ImportError(
        f"rlfast: {_root} is a source tree that is not built (if rlfast is also installed, this folder hides it): "
        f"run `pip install -e {_root.parent}`, or leave the folder that holds it"
    )
if not (_root / "kernels").exists():  # in a source tree, the Triton kernels are the folder next to this one
    __path__.append(str(_root.parent))

from rlfast import backends, distributed, rollout  # noqa: E402
from rlfast.advantages import (  # noqa: E402
    GroupStatistics,
    affine_scan,
    discounted_returns,
    gae,
    group_advantage,
    group_statistics,
    lambda_returns,
    n_step_returns,
    optimal_token_baseline,
    per_decision_td,
    reward_to_go,
    td_residuals,
    vapo_lam,
    vtrace,
)
from rlfast.attention import packed_attention, paged_attention  # noqa: E402
from rlfast.backends import use_backend  # noqa: E402
from rlfast.controllers import AdaptiveEntropy, AdaptiveKL, RunningMeanStd  # noqa: E402
from rlfast.corrections import Correction  # noqa: E402
from rlfast.divergences import Divergence, divergence, linear_divergence  # noqa: E402
from rlfast.formulas import formula  # noqa: E402
from rlfast.integrations import patch  # noqa: E402
from rlfast.kl import kl_penalty  # noqa: E402
from rlfast.linear import linear  # noqa: E402
from rlfast.logps import TokenLogps, linear_token_logps, token_logps  # noqa: E402
from rlfast.loss_outputs import LinearLossOutput, LossMetrics, LossOutput  # noqa: E402
from rlfast.loss_table import LOSSES, loss  # noqa: E402
from rlfast.losses import Loss  # noqa: E402
from rlfast.plans import LinearPlan, plan  # noqa: E402
from rlfast.preference import Part, PreferenceLoss, PreferenceOutput  # noqa: E402
from rlfast.preference_table import PREFERENCES, preference_loss  # noqa: E402
from rlfast.ranked import RANKED, RankedLoss, RankedOutput, ranked_loss  # noqa: E402
from rlfast.reductions import Whiten, masked_mean, masked_whiten  # noqa: E402
from rlfast.reward_losses import (  # noqa: E402
    REWARD_LOSSES,
    RewardLoss,
    attribute_regression_loss,
    gaussian_reward_loss,
    generative_reward_loss,
    gpm_scores,
    grm_loss,
    process_reward_loss,
    quantile_loss,
    reward_loss,
)
from rlfast.rewards import length_reward, overlong_penalty, shape_rewards  # noqa: E402
from rlfast.sampling import Edits, Sampled, linear_sample, penalty_edits, sample  # noqa: E402
from rlfast.selections import clip_cov_keep, kl_cov_extra, rollout_keep, top_entropy_keep  # noqa: E402
from rlfast.statistics import DynamicBeta, RunningDelta, kto_reference_point, udm_weights, wpo_weights  # noqa: E402
from rlfast.unpaired import UNPAIRED, UnpairedLoss, UnpairedOutput, unpaired_loss  # noqa: E402
from rlfast.values import value_loss  # noqa: E402
from rlfast.weights import ema_update, extrapolate, merge, slerp  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "PREFERENCES",
    "RANKED",
    "REWARD_LOSSES",
    "UNPAIRED",
    "AdaptiveEntropy",
    "AdaptiveKL",
    "Correction",
    "Divergence",
    "DynamicBeta",
    "Edits",
    "GroupStatistics",
    "LinearLossOutput",
    "LinearPlan",
    "Loss",
    "LossMetrics",
    "LossOutput",
    "Part",
    "PreferenceLoss",
    "PreferenceOutput",
    "RankedLoss",
    "RankedOutput",
    "RewardLoss",
    "RunningDelta",
    "RunningMeanStd",
    "Sampled",
    "TokenLogps",
    "UnpairedLoss",
    "UnpairedOutput",
    "Whiten",
    "affine_scan",
    "attribute_regression_loss",
    "backends",
    "clip_cov_keep",
    "discounted_returns",
    "distributed",
    "divergence",
    "ema_update",
    "extrapolate",
    "formula",
    "gae",
    "gaussian_reward_loss",
    "generative_reward_loss",
    "gpm_scores",
    "grm_loss",
    "group_advantage",
    "group_statistics",
    "kl_cov_extra",
    "kl_penalty",
    "kto_reference_point",
    "lambda_returns",
    "length_reward",
    "linear",
    "linear_divergence",
    "linear_sample",
    "linear_token_logps",
    "loss",
    "masked_mean",
    "masked_whiten",
    "merge",
    "n_step_returns",
    "optimal_token_baseline",
    "overlong_penalty",
    "packed_attention",
    "paged_attention",
    "patch",
    "penalty_edits",
    "per_decision_td",
    "plan",
    "preference_loss",
    "process_reward_loss",
    "quantile_loss",
    "ranked_loss",
    "reward_loss",
    "reward_to_go",
    "rollout",
    "rollout_keep",
    "sample",
    "shape_rewards",
    "slerp",
    "td_residuals",
    "token_logps",
    "top_entropy_keep",
    "udm_weights",
    "unpaired_loss",
    "use_backend",
    "value_loss",
    "vapo_lam",
    "vtrace",
    "wpo_weights",
]
