"""docs/preferences.md, from the tables of preference losses, of single responses and of reward models.

python tools/preference_docs.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from loss_docs import described, source

from rlfast.kernels.formulas import PAIRS, RANKINGS, SCORES, SINGLES
from rlfast.preference import Part, PreferenceLoss
from rlfast.preference_presets import PRESETS
from rlfast.preference_table import PREFERENCES
from rlfast.ranked import RANKED
from rlfast.reward_losses import NOT_OPTIONS, REWARD_LOSSES
from rlfast.unpaired import PRESETS as SINGLE_PRESETS
from rlfast.unpaired import UNPAIRED

PAGE = Path(__file__).resolve().parent.parent / "docs" / "preferences.md"
SHOWN = ("parts", "nll", "reduce", "needs", "name", "paper", "reward", "reward_mean", "reference_free")
HEAD = """# Preference losses, reward models, and arithmetic on weights

Made by `make docs` from `rlfast.PREFERENCES`, `rlfast.UNPAIRED`, `rlfast.RANKED` and `rlfast.REWARD_LOSSES`.

    loss = factor/n · Σ_i w_i·Σ_k weight_k·link_k(s_k(chosen_i), s_k(rejected_i))

S = Σ m·log π of a response, D = S − S_ref, n its tokens; s is a score of a response, divided by n where it is a mean; w
and l are the scores of the chosen and the rejected one. One kernel makes the sums of packed or padded tokens, the
scores, the links, the gradient of every token and the metrics:

```python
dpo = rlfast.preference_loss("dpo", beta=0.1)
out = dpo(chosen_logps, rejected_logps, ref_chosen_logps=..., ref_rejected_logps=...)  # sums [B]
out = dpo(chosen, rejected, ..., chosen_mask=..., rejected_mask=...)  # tokens [B, T]
out = dpo.rows(logps, ref_logps=..., mask=..., cu_seqlens=...)  # packed, the chosen first
out = dpo.linear(chosen_hidden, rejected_hidden, weight, chosen_targets, rejected_targets, ...)  # no logits
mixture = rlfast.preference_loss({"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0})
```

What depends on other batches is an object of its own, whose value a loss takes as an argument: `rlfast.RunningDelta` is
BCO's δ, `rlfast.DynamicBeta` makes β-DPO's factors and its filter, `rlfast.kto_reference_point` KTO's z,
`rlfast.udm_weights` and `rlfast.wpo_weights` weights of responses. TR-DPO is `rlfast.ema_update` of the reference
between steps of any of these losses; iterative DPO, sDPO, DNO and GSHF are DPO with another reference or other pairs,
and step-DPO is DPO under a mask that starts at the first step that differs. RSO samples its pairs with a reward model,
and then takes `dpo` or `hinge`. Nash-MD is a policy loss, `rlfast.loss("nash_md")`. DRO-V trains its V with
`rlfast.value_loss` on what `dro_v` leaves of the reward.

A likelihood beside a loss is a mean over the response's tokens, over all chosen tokens of the batch (TRL, Liger), or a
sum: `nll_reduce`. SLiC-HF has the sum, and so has RPO (2405.16436), times βη: its authors train with β = 0.01 or 0.05.
What TRL and OpenRLHF put beside DPO is a mean, which is `irpo`.
"""

RANKED_HEAD = """    x = beta·(s − s_ref)/n^alpha
    loss = factor/P · Σ_g w_g·[form(x_g, r_g) − nll·s_best]          (nll·(K − 1)² if nll_by_size)

P groups of K candidates, whose s are rewards, or the log-probs S of responses; n are their tokens, r what they are
ranked by.

```python
listwise = rlfast.ranked_loss("dpo_list", beta=0.1)
out = listwise(sums, ref_scores=..., rewards=..., mask=...)  # sums [P, K]
out = listwise.rows(logps, groups, ref_logps=..., mask=..., cu_seqlens=..., rewards=...)  # tokens, padded or packed
```
"""


def hyper(part: Part, hidden) -> str:
    """The hyper-parameters of a part, defaults included."""
    values = PAIRS[part.link].hyper(**part.hyper)._asdict() if part.link in PAIRS else None
    values = SINGLES[part.link].hyper(**part.hyper)._asdict() if values is None else values
    values |= SCORES[part.score].hyper(**part.score_hyper)._asdict()
    return ", ".join(f"{k} {v:g}" for k, v in values.items() if k not in hidden)


def parts(row) -> str:
    """What a row adds up."""
    said = []
    for part in row.parts:
        weight = "" if part.weight == 1.0 else f"{part.weight:g}·"
        of = "" if part.score == "log_ratio" else f" of {part.score}"
        said.append(f"{weight}{part.link}{of}{', a mean' if part.mean else ''}")
    if isinstance(row, PreferenceLoss) and row.nll:
        said.append(f"{row.nll:g}·nll")
    return " + ".join(said)


def options(row, shown=SHOWN) -> str:
    """Everything else that a row says."""
    other = [f for f in fields(row) if f.name not in shown]
    return ", ".join(f"{f.name} {getattr(row, f.name)}" for f in other if f.default != getattr(row, f.name))


def table(rows, presets: dict, hidden=("unused",), called=None) -> list[str]:
    """One line a row, without some hyper-parameters; ``called`` has other names of what a row needs."""
    lines = ["| loss | what is added up | defaults | needs | like | paper |", "|---|---|---|---|---|---|"]
    for row in rows:
        defaults = "; ".join(filter(None, (*(hyper(part, hidden) for part in row.parts), options(row))))
        like = ", ".join(trainer for trainer, names in presets.items() if row.name in names)
        needs = ", ".join((called or {}).get(need, need) for need in row.needs)
        cells = (f"`{row.name}`", parts(row), defaults or "–", needs or "–", like or "–")
        lines.append(f"| {' | '.join(cells)} | {source(row.paper)} |")
    return [*lines, ""]


def ranked() -> list[str]:
    """One line a loss of ranked groups."""
    lines = ["| loss | form | defaults | needs | paper |", "|---|---|---|---|---|"]
    for row in RANKED.values():
        needs = ("ref_scores",) * row.referenced + row.needs + ("lengths",) * bool(row.alpha)
        of = options(row, ("form", "needs", "name", "paper", "referenced")) or "–"
        lines.append(f"| `{row.name}` | {row.form} | {of} | {', '.join(needs) or '–'} | {source(row.paper)} |")
    return [*lines, ""]


def formulas(named: dict) -> list[str]:
    """Equations and derivatives."""
    lines = []
    for name, formula in named.items():
        equation, *rest = described(formula)
        lines += [f"- `{name}`: {equation} {' '.join(rest)}"]
    return [*lines, ""]


def page() -> str:
    """The whole of docs/preferences.md."""
    rewards = [row.objective for row in REWARD_LOSSES.values()]
    lines = [HEAD, "## Pairs", "", *table(PREFERENCES.values(), PRESETS)]
    lines += ["## Single responses", "", *table(UNPAIRED.values(), SINGLE_PRESETS)]
    lines += ["## Ranked groups", "", RANKED_HEAD, *ranked()]
    lines += ["## Reward models", "", *table(rewards, {}, NOT_OPTIONS, {"extra": "probability"})]
    lines += ["Beside them: `rlfast.attribute_regression_loss`, `rlfast.quantile_loss`, `rlfast.gaussian_reward_loss`,"]
    lines += [
        "`rlfast.process_reward_loss`, `rlfast.generative_reward_loss`, `rlfast.gpm_scores`, `rlfast.grm_loss`.",
        "",
    ]
    lines += ["## Scores", "", *formulas(SCORES), "## Links of a pair", "", *formulas(PAIRS)]
    lines += ["## Links of a single response", "", *formulas(SINGLES)]
    return "\n".join([*lines, "## Forms of a ranked group", "", *formulas(RANKINGS)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is fresh")
    if parser.parse_args().check:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page() else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
