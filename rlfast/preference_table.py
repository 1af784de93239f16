"""The tables: a preference loss a row. What a row does not say is the default of ``rlfast.PreferenceLoss``.

To add one: a formula in ``kernels/formulas/pair.py``, a row here, an oracle in ``rlfast/reference/preferences.py``.
"""

from __future__ import annotations

from dataclasses import replace

from rlfast import validate
from rlfast.preference import Part, PreferenceLoss
from rlfast.preference_presets import BY_BATCH, preset


def _rows(*rows: PreferenceLoss) -> dict[str, PreferenceLoss]:
    return {row.name: row for row in rows}


def _row(name: str, link: str, paper: str, needs=(), hyper=None, score="log_ratio", mean=False, weight=1.0, **rest):
    part = Part(link, hyper or {}, score, mean=mean, weight=weight)
    return PreferenceLoss((part, *rest.pop("more", ())), name=name, paper=paper, needs=needs, **rest)


def _free(name: str, link: str, paper: str, mean=False, **rest):
    """Without a reference: the score is the policy's own log-prob."""
    options = {"score": "total", "mean": mean, "reward": "total", "reward_mean": mean} | rest
    return _row(name, link, paper, reference_free=True, **options)


PREFERENCES = _rows(
    # −log σ of the difference of log-ratios, and other shapes of it
    _row("dpo", "logistic", "2305.18290"),
    _row("cdpo", "logistic", "2305.18290", hyper={"label_smoothing": 0.1}),  # Mitchell's note on noisy labels
    _row("robust", "robust", "2403.00409"),
    _row("hinge", "hinge", "2309.06657"),
    _row("ipo", "ipo", "2310.12036"),
    _row("dpo_norm", "logistic", "2411.15124", hyper={"beta": 5.0}, mean=True),
    _row("margin_dpo", "logistic", "2305.18290", needs=("margin",)),
    _row("step_dpo", "logistic", "2406.18629"),  # under a mask that starts at the first divergent step
    _row("r_dpo", "logistic", "2403.19159", hyper={"length_price": 0.01}),
    _row("ld_dpo", "logistic", "2409.06411", tail=0.5),
    _row("wpo", "logistic", "2406.11827", needs=("weights",)),
    _row("beta_dpo", "scaled_logistic", "2407.08639", needs=("extra",)),
    _row("exo_pair", "exo_pair", "2402.00856"),
    _row("nca_pair", "nca_pair", "2402.05369"),
    _row("bco_pair", "bco", "2404.04656"),
    _row("bco", "bco", "2404.04656", needs=("shared",)),
    _row("sppo_hard", "sppo_hard", "2405.00675", hyper={"scale": 0.5}),
    _row("sppo", "sppo", "2405.00675", needs=("extra",), hyper={"scale": 0.5}),
    _row("aot", "logistic", "2406.05882", sort="pairs"),
    _row("aot_unpaired", "logistic", "2406.05882", sort="responses"),
    _row("apo_zero", "apo_zero", "2408.06266"),
    _row("apo_down", "apo_down", "2408.06266"),
    _row("discopop", "discopop", "2406.08414"),
    _row("f_dpo_reverse_kl", "logistic", "2309.16240"),
    _row("f_dpo_forward_kl", "logistic", "2309.16240", score="forward_kl"),
    _row("f_dpo_js", "logistic", "2309.16240", score="jensen_shannon"),
    _row("f_dpo_alpha", "logistic", "2309.16240", score="alpha_divergence"),
    _row("dpop", "dpop", "2402.13228"),
    _row("dpop_outside", "dpop_outside", "2402.13228"),
    _row("tdpo1", "logistic", "2404.11999", kl=1.0),
    _row("tdpo2", "logistic", "2404.11999", kl=0.5, kl_detached=True),
    _row("cal_dpo", "cal_dpo", "2412.14516"),
    _row("d2o", "unequal", "2403.03419"),
    _row("gpo_logistic", "logistic", "2402.05749"),
    _row("gpo_hinge", "hinge", "2402.05749"),
    _row("gpo_squared", "squared", "2402.05749"),
    _row("gpo_exponential", "exponential", "2402.05749"),
    _row("gpo_truncated_quadratic", "truncated_quadratic", "2402.05749"),
    _row("gpo_savage", "savage", "2402.05749"),
    _row("rpo_squared", "rpo_squared", "2406.11704", needs=("margin",), hyper={"beta": 0.2}),
    _row("rpo_backward_kl", "rpo_backward_kl", "2406.11704", needs=("margin",), hyper={"beta": 0.2}),
    _row("rpo_forward_kl", "rpo_forward_kl", "2406.11704", needs=("margin",), hyper={"beta": 0.2}),
    # beside a likelihood
    _row("mpo", "logistic", "2411.10442", weight=0.8, more=(Part("bco", weight=0.2),), nll=1.0),
    _row("irpo", "logistic", "2404.19733", nll=1.0),
    _row("rpo", "logistic", "2405.16436", more=(Part("weighted_nll", score="total"),)),
    _row("xpo", "logistic", "2405.21046", needs=("extra",), more=(Part("exploration", score="total"),)),
    # without a reference
    _free("cpo", "logistic", "2401.08417", nll=1.0),
    _free("cpo_hinge", "hinge", "2401.08417", nll=1.0),
    _free("cpo_ipo", "ipo", "2401.08417", nll=1.0),
    _free("orpo", "odds_ratio", "2403.07691", mean=True, nll=1.0),
    _free("simpo", "logistic", "2405.14734", mean=True, hyper={"beta": 2.0, "gamma": 1.0}),
    _free("cpo_simpo", "logistic", "2405.14734", mean=True, hyper={"beta": 2.0, "gamma": 1.0}, nll=1.0),
    _free("alpha_po", "logistic", "2501.03884", score="power", reward="power", hyper={"beta": 2.5, "gamma": 0.5}),
    _free("slic_hf", "hinge", "2305.10425", hyper={"beta": 1.0}, nll=0.1, nll_reduce="sum"),
)  # fmt: skip


def preference_loss(name: str | dict[str, float], *, like: str | None = None, **options) -> PreferenceLoss:
    """A preference loss of the table, a trainer's version of it, or a mixture.

    Args:
        name: a row of ``rlfast.PREFERENCES``; or {row: weight}, whose losses are added up, "nll" among them.
        like: "trl", "liger", "openrlhf" or "halos": that trainer's semantics where it differs from the paper.
        options: any option of ``rlfast.PreferenceLoss``, or a hyper-parameter of the row's link or score, by name.

    Raises:
        ValueError: the name is unknown, or the trainer has no such loss; the message lists what there is.
        TypeError: the row has no such option.

    Example:
        >>> chosen, rejected = torch.tensor([-40.0]), torch.tensor([-55.0])
        >>> ref = {"ref_chosen_logps": torch.tensor([-42.0]), "ref_rejected_logps": torch.tensor([-50.0])}
        >>> round(rlfast.preference_loss("dpo", beta=0.1)(chosen, rejected, **ref).loss.item(), 6)
        0.403186
    """
    if isinstance(name, dict):
        return _mixture(name, like, options)
    if name not in PREFERENCES:
        validate.fail("name", f"one of {', '.join(PREFERENCES)}", repr(name))
    row = PREFERENCES[name]
    if like is not None:
        row = row.with_options(**preset(name, like))
    return row.with_options(**options) if options else row


def _mixture(weights: dict[str, float], like: str | None, options: dict) -> PreferenceLoss:
    """One loss of several rows; what is not a matter of a part is the first row's."""
    rows = [preference_loss(name, like=like) for name in weights if name != "nll"]
    if not rows:
        validate.fail("name", "at least one row beside nll", repr(weights))
    for row in rows[1:]:
        for what in ("sort", "tail", "kl", "reduce"):
            if getattr(row, what) != getattr(rows[0], what):
                validate.fail("name", f"rows of one {what}: {rows[0].name} has {getattr(rows[0], what)!r}", row.name)
    of = [validate.finite(name, weights[name]) for name in weights if name != "nll"]
    parts = [replace(p, weight=w * p.weight) for row, w in zip(rows, of, strict=True) for p in row.parts]
    kinds = {row.nll_reduce for row in rows if row.nll}
    if weights.get("nll"):
        kinds.add("batch" if like in BY_BATCH else "mean")
    if len(kinds) > 1:
        validate.fail("name", "likelihoods of one nll_reduce", " and ".join(sorted(kinds)))
    nll = weights.get("nll", 0.0) + sum(w * row.nll for row, w in zip(rows, of, strict=True))
    needs = tuple(dict.fromkeys(need for row in rows for need in row.needs))
    free = all(row.reference_free for row in rows)
    mixed = replace(
        rows[0], parts=tuple(parts), nll=nll, nll_reduce=kinds.pop() if kinds else "mean", needs=needs,
        reference_free=free, name=" + ".join(weights), paper="",
    )  # fmt: skip
    return mixed.with_options(**options) if options else mixed
