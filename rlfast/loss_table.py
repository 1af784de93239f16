"""The table: an objective a row. What a row does not say is the default of ``rlfast.Loss``.

To add one: a formula in ``kernels/formulas/token.py``, a row here, an oracle in ``rlfast/reference/surrogates.py``.
"""

from __future__ import annotations

import math

from rlfast import validate
from rlfast.kl import of_loss
from rlfast.losses import Loss
from rlfast.presets import preset

BOUND = 20.0  # of log-ratios, as their authors' code has it


def _rows(*rows: Loss) -> dict[str, Loss]:
    return {row.name: row for row in rows}


def _row(name: str, surrogate: str, paper: str, needs=("adv",), **options) -> Loss:
    hyper = options.pop("hyper", {})
    return Loss(surrogate, hyper, name=name, paper=paper, needs=needs, **options)


SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM = "seq_mean_token_mean", "seq_mean_token_sum"
CLIP_HIGHER = {"eps_low": 0.2, "eps_high": 0.28}

LOSSES = _rows(
    # −A·log p, and what differs in how A was made: group_advantage(method="rloo", "remax", "gpg", "opo"), and for
    # asymre group_advantage(method="asymre", delta=δ), which is r − (mean + δ)
    _row("reinforce", "reinforce", "Williams 1992"),
    _row("rloo", "reinforce", "2402.14740", reduce=SEQ_MEAN_TOKEN_SUM),
    _row("remax", "reinforce", "2310.10505", reduce=SEQ_MEAN_TOKEN_SUM),
    _row("gpg", "reinforce", "2504.02546"),
    _row("opo", "reinforce", "2505.23585", reduce=SEQ_MEAN_TOKEN_SUM),
    _row("asymre", "reinforce", "2506.20520", reduce=SEQ_MEAN_TOKEN_SUM),
    _row("c_rlft", "reinforce", "2309.11235"),
    _row("raft", "nll", "2304.06767", needs=()),
    _row("awr", "awr", "1910.00177"),
    # PPO's clip
    _row("ppo", "ppo_clip", "1707.06347"),
    _row("dual_clip_ppo", "ppo_clip", "1912.09729", hyper={"dual_clip": 3.0}),
    _row("reinforce++", "ppo_clip", "2501.03262"),
    _row("grpo", "ppo_clip", "2402.03300", kl="k3", beta=0.04, reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("dr_grpo", "ppo_clip", "2503.20783", reduce="seq_sum_over_max_len"),
    _row("bnpo", "ppo_clip", "2506.02864"),  # what trainers call so; the paper is about the advantage
    _row("dapo", "ppo_clip", "2503.14476", hyper=CLIP_HIGHER),
    _row("two_sided_grpo", "ppo_clip", "2505.07291", hyper={"delta": 4.0}, reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("clip_cov", "ppo_clip", "2505.22617", needs=("adv", "keep")),
    _row("kl_cov", "kl_cov", "2505.22617", needs=("adv", "old_logp", "extra")),
    # ratios of a whole sequence
    _row("gspo", "ppo_clip", "2507.18071", hyper={"eps_low": 3e-4, "eps_high": 4e-4}, unit="seq_mean",
         reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("gspo_token", "ppo_clip", "2507.18071", hyper={"eps_low": 3e-4, "eps_high": 4e-4}, unit="seq_mean_through",
         reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("luspo", "ppo_clip", "2602.05261", hyper={"eps_low": 2e-3, "eps_high": 2.5e-3}, unit="seq_mean",
         reduce=SEQ_MEAN_TOKEN_SUM),
    _row("gmpo", "ratio_weighted", "2507.20673", unit="seq_mean", signed=True, mean_adv=True, log_ratio_low=-0.4,
         log_ratio_high=0.4, reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("vespo", "vespo", "2602.10693", unit="seq_sum", log_ratio_low=-BOUND, log_ratio_high=BOUND,
         unit_low=math.log(1e-8), unit_high=BOUND, weight_in_ratio=True),
    # a weight that the gradient does not see
    _row("cispo", "cispo", "2506.13585"),
    _row("cispo_capped", "cispo_capped", "2506.13585", hyper={"cap": 5.0}),
    _row("topr", "topr", "2503.14286", unit="seq_sum", reduce=SEQ_MEAN_TOKEN_SUM),
    _row("a_lol", "a_lol", "2305.14718", needs=("adv", "old_logp"), hyper={"eps_low": 0.9, "eps_high": 0.9},
         unit="seq_sum", reduce=SEQ_MEAN_TOKEN_SUM),
    _row("dppo_tv", "dppo_tv", "2602.04879", hyper={"eps_low": 0.15, "eps_high": 0.15}),
    _row("dppo_kl", "dppo_kl", "2602.04879", hyper={"eps_low": 0.05, "eps_high": 0.05}),
    # other shapes of the surrogate
    _row("sapo", "sapo", "2511.20347", reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("cpgd", "cpgd", "2505.12504"),
    _row("apa", "apa", "2306.02231", needs=("adv", "old_logp")),
    # preferences as a reward: A is the probability of being preferred, less ½; old_logp that of the reference
    _row("nash_md", "nash_md", "2312.00886", needs=("adv", "old_logp"), reduce=SEQ_MEAN_TOKEN_SUM),
    # a squared residual of a whole sequence; π_old is the policy that the paper's regulariser holds on to
    _row("kimi", "squared_residual", "2501.12599", needs=("adv", "old_logp"), unit="seq_sum",
         reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("kimi_token", "quadratic_penalty", "2501.12599", needs=("adv", "old_logp")),
    _row("dro", "squared_residual", "2405.19107", needs=("adv", "old_logp"), hyper={"tau": 1.0, "scale": 0.5},
         unit="seq_sum", reduce=SEQ_MEAN_TOKEN_MEAN),
    _row("a_star_po", "squared_residual", "2505.20686", needs=("adv", "old_logp"), hyper={"tau": 1e-3},
         unit="seq_sum", reduce=SEQ_MEAN_TOKEN_MEAN),
)  # fmt: skip


def loss(name: str, *, like: str | None = None, **options) -> Loss:
    """An objective of the table, or a trainer's version of it.

    Args:
        name: a row of ``rlfast.LOSSES``.
        like: "trl", "verl", "openrlhf", "nemo-rl" or "liger": that trainer's semantics where it differs from the paper.
        options: any option of ``rlfast.Loss``, or a hyper-parameter of the row's surrogate, by name.

    Raises:
        ValueError: the name is unknown, or the trainer has no such loss; the message lists what there is.
        TypeError: the row has no such option.

    Example:
        >>> logp = torch.tensor([[-1.0, -0.5, -2.0, -0.1]])
        >>> old_logp = torch.tensor([[-1.2, -0.5, -1.2, -0.6]])
        >>> out = rlfast.loss("dapo")(logp, old_logp=old_logp, adv=torch.tensor([1.0]))
        >>> round(out.loss.item(), 6)
        -0.987683
    """
    row = LOSSES[validate.one_of("name", name, tuple(LOSSES))]
    if like is not None:
        if options.get("kl") is not None:
            options["kl"] = of_loss("kl", options["kl"])  # by whose name the trainer has its bounds
        options = preset(name, like, options.get("kl", ...)) | options
    return row.with_options(**options) if options else row
