"""docs/losses.md, its plots, and the README's table of losses, from the table itself.

python tools/loss_docs.py [--check]
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import sys
from dataclasses import fields
from pathlib import Path

import torch

from rlfast.kernels.formulas import ESTIMATORS, SURROGATES, Formula
from rlfast.kernels.formulas.token import Token
from rlfast.kernels.lang import torch_version
from rlfast.loss_table import LOSSES
from rlfast.losses import Loss
from rlfast.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
PAGE, PLOTS, README = ROOT / "docs" / "losses.md", ROOT / "docs" / "losses", ROOT / "README.md"
OLD_LOGP = -1.0  # of the token in the plots
SHOWN = ("surrogate", "hyper", "unit", "reduce", "kl", "beta", "name", "paper", "needs")
HEAD = """# The losses

Made by `make docs` from `rlfast.LOSSES`. To add one: [add_a_loss.md](add_a_loss.md).

    loss = factor/n · Σ_t m_t·c_t·(s_t·ρ_t·w_t + beta·KL_t − entropy_coef·H_t)

s is the surrogate, x = log π − log π_old of its unit (the token, or its sequence's mean or sum), r = e^x, sg a
stop-gradient. m is the mask, ρ the correction for the sampler, c_t = 1/L in `seq_mean_token_mean`, n the denominator of
the reduction, factor = world size ÷ gradient accumulation.

Quark (arXiv 2205.13636) is `raft` on responses that begin with a token for the quantile of their reward, with `kl=` or
`rlfast.divergence` to the reference. `clip_cov` and `kl_cov` take what `rlfast.clip_cov_keep` and
`rlfast.kl_cov_extra` choose.
"""


def policies() -> list[str]:
    """The surrogates of policies; those of critics are the business of ``rlfast.value_loss``."""
    return [
        name for name, f in SURROGATES.items() if getattr(f.function, "fn", f.function).__module__ == Token.__module__
    ]


def described(formula: Formula) -> list[str]:
    """The lines of a formula's docstring: the equation, the derivative with its source."""
    source = getattr(formula.function, "fn", formula.function)
    return [line for line in inspect.getdoc(source).splitlines() if line]


def source(paper: str) -> str:
    """A link to arXiv, or the name as it is."""
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper[:4].isdigit() else paper


def hyper(row: Loss) -> str:
    """The hyper-parameters of a row, defaults included, without those that are off."""
    values = SURROGATES[row.surrogate].hyper(**row.hyper)._asdict()
    shown = {k: v for k, v in values.items() if k != "unused" and v != float("inf")}
    return ", ".join(f"{k} {v:g}" for k, v in shown.items())


def options(row: Loss) -> str:
    """Everything else that a row says."""
    other = {
        f.name: getattr(row, f.name) for f in fields(Loss) if f.name not in SHOWN and f.default != getattr(row, f.name)
    }
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in other.items())


def kl(row: Loss) -> str:
    """The estimator and its weight."""
    return f"{row.kl}, β {row.beta:g}" if row.kl else "–"


def summary(root: str) -> list[str]:
    """One line a row."""
    lines = ["| loss | surrogate | unit | reduction | KL | defaults | paper |", "|---|---|---|---|---|---|---|"]
    for name, row in LOSSES.items():
        cells = (f"`{name}`", f"[{row.surrogate}]({root}#{row.surrogate})", row.unit, row.reduce, kl(row))
        lines.append(f"| {' | '.join(cells)} | {hyper(row) or '–'} | {source(row.paper)} |")
    return lines


def section(surrogate: str) -> list[str]:
    """A surrogate: its equation, derivative, plot, and the rows that use it."""
    equation, *rest = described(SURROGATES[surrogate])
    lines = [f"## {surrogate}", "", f"    {equation}", *(f"    {line}" for line in rest), ""]
    lines += [f"![value and gradient of {surrogate}](losses/{surrogate}.svg)", ""]
    for name, row in LOSSES.items():
        if row.surrogate == surrogate:
            like = [trainer for trainer, rows in PRESETS.items() if name in rows]
            parts = [f"`{name}`: {source(row.paper)}", f"unit {row.unit}", row.reduce]
            parts += [hyper(row)] * bool(hyper(row)) + [f"KL {kl(row)}"] * bool(row.kl)
            parts += [options(row)] * bool(options(row)) + [f"needs {', '.join(row.needs)}"] * bool(row.needs)
            parts += ["like " + ", ".join(like)] * bool(like)
            lines.append("- " + "; ".join(parts) + ".")
    return [*lines, ""]


def page() -> str:
    """The whole of docs/losses.md."""
    lines = [HEAD, *summary(""), ""]
    for surrogate in policies():
        lines += section(surrogate)
    lines += ["## KL estimators", "", "d = log π_ref − log π. A `+` keeps the value and takes the gradient of k2.", ""]
    for name, function in ESTIMATORS.items():
        lines.append(f"- `{name}`: {inspect.getdoc(getattr(function, 'fn', function))}")
    return "\n".join(lines) + "\n"


def curves(surrogate: str, adv: float) -> tuple[torch.Tensor, ...]:
    """(ratio, value, gradient by log π of one token) with the row's defaults, π_old = e^OLD_LOGP."""
    ratio = torch.linspace(0.02, 2.5, 120, dtype=torch.float64)
    x = ratio.log()
    row = next((row for row in LOSSES.values() if row.surrogate == surrogate), None)
    formula = SURROGATES[surrogate]
    logp = torch.full_like(x, OLD_LOGP) + x
    seen = Token(logp, torch.full_like(x, OLD_LOGP), x, ratio, torch.full_like(x, adv), torch.ones_like(x))
    value, d_x, d_logp, _ = torch_version(formula.function)(seen, formula.hyper(**(row.hyper if row else {})))
    return ratio, value, (torch.as_tensor(d_x) + torch.as_tensor(d_logp)).expand_as(x)


def digest(surrogate: str) -> str:
    """Of what is plotted, as far as one can see it."""
    drawn = [[round(y, 4) + 0.0 for y in part.tolist()] for adv in (1.0, -1.0) for part in curves(surrogate, adv)]
    return f"curves {hashlib.sha256(repr(drawn).encode()).hexdigest()[:16]}"


def plot(surrogate: str) -> None:
    """value and gradient against the ratio, for A = ±1."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "rlfast", "svg.fonttype": "none"}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    for adv, colour in ((1.0, "tab:blue"), (-1.0, "tab:red")):
        ratio, value, gradient = curves(surrogate, adv)
        for axis, y in zip(axes, (value, gradient), strict=True):
            axis.plot(ratio, y, color=colour, label=f"A = {adv:+g}")
    for axis, title in zip(axes, ("ℓ", "∂ℓ/∂log π"), strict=True):
        axis.set_xlabel("r")
        axis.set_title(title, fontsize=10)
        axis.axvline(1.0, color="0.8", linewidth=0.8, zorder=0)
        axis.grid(alpha=0.2)
    axes[0].legend(frameon=False, fontsize=8)
    PLOTS.mkdir(exist_ok=True)
    path = PLOTS / f"{surrogate}.svg"
    figure.savefig(path, metadata={"Date": None, "Description": digest(surrogate)})
    pyplot.close(figure)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is stale")
    check = parser.parse_args(arguments).check
    readme = README.read_text(encoding="utf-8")
    begin, end = "<!-- loss table -->\n", "<!-- /loss table -->"
    before, rest = readme.split(begin)
    fresh = before + begin + "\n".join(summary("docs/losses.md")) + "\n" + end + rest.split(end)[1]
    if check:
        stale = PAGE.read_text(encoding="utf-8") != page() or readme != fresh
        drawn = {path.stem: path.read_text(encoding="utf-8") for path in PLOTS.glob("*.svg")}
        stale = stale or set(drawn) != set(policies()) or any(digest(name) not in text for name, text in drawn.items())
        return int(stale)
    for surrogate in policies():
        plot(surrogate)
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
