"""The demo's command line."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rlfast.demo.settings import DemoError, Settings, check, missing

try:
    import typer
    from rich.console import Console
except ImportError as error:
    sys.exit(f"rlfast.demo: {error.name} is not installed: run `pip install rlfast`")

defaults = Settings()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    steps: int = typer.Option(defaults.steps, help="Timed steps of each arm, after one that warms up."),
    parity_steps: int = typer.Option(defaults.parity_steps, help="Steps that both arms take on the same rollouts."),
    batch: int = typer.Option(defaults.batch, help="Completions a step."),
    generations: int = typer.Option(defaults.generations, help="Completions a prompt: the size of a group."),
    max_completion: int = typer.Option(defaults.max_completion, help="Tokens of the longest completion."),
    temperature: float = typer.Option(defaults.temperature, help="Of sampling and of the loss."),
    beta: float = typer.Option(defaults.beta, help="KL coefficient; above 0, a reference model is scored too."),
    learning_rate: float = typer.Option(defaults.learning_rate, help="Of AdamW, constant."),
    checkpointing: bool = typer.Option(
        defaults.checkpointing, "--checkpointing/--no-checkpointing", help="Gradient checkpointing, in both arms."
    ),
    threads: int = typer.Option(defaults.threads, help="Threads of torch and of the kernels; 0: torch's default."),
    seed: int = typer.Option(defaults.seed, help="Of the problems and of sampling."),
    out: Path = typer.Option(Path("demo-out"), help="Folder for demo.png and demo.html."),
    json_path: Path | None = typer.Option(None, "--json", help="Also write the result, stamped, to this file."),
) -> None:
    """Train SmolLM2-135M-Instruct with TRL's GRPOTrainer on the CPU, stock and with rlfast's kernels swapped in.

    First both arms take the same steps on the same rollouts, and every difference is held to a tolerance; then each
    trains on its own rollouts and is timed. Exit code 1 if the steps differ, or if too few groups had an advantage.
    """
    settings = Settings(
        steps=steps, parity_steps=parity_steps, batch=batch, generations=generations, max_completion=max_completion,
        temperature=temperature, beta=beta, learning_rate=learning_rate, checkpointing=checkpointing, threads=threads,
        seed=seed,
    )  # fmt: skip
    console = Console() if sys.stdout.isatty() else Console(width=120)  # a pipe gets lines that hold a whole row
    try:
        fine = _run(settings, console, out, json_path)
    except DemoError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        fine = False
    if not fine:
        raise typer.Exit(1)


def _run(settings: Settings, console: Console, out: Path, json_path: Path | None) -> bool:
    check(settings)
    sentence = missing()
    if sentence:
        raise DemoError(sentence)
    from rlfast.demo import model, parity, report, speed, trainer

    trainer.quiet()

    start = time.perf_counter()
    if model.cached() is None:
        with console.status("Converting the weights of SmolLM2-135M-Instruct (once, about half a minute)"):
            model.prepare()
        console.print(
            f"Converted the weights in {time.perf_counter() - start:.0f} s; later runs read them from a cache."
        )
    settings = Settings(**{**vars(settings), "model": str(model.prepare())})
    start = time.perf_counter()
    progress = report.Progress(console, 2 * settings.parity_steps + 2 + 2 * settings.total_steps + 2)
    with progress:
        same = parity.compare(settings, lambda text: progress.advance(f"parity, {text}"))
        report.parity_table(console, same)
        timed = speed.measure(settings, lambda text: progress.advance(f"speed, {text}"))
    report.speed_table(console, timed)
    result = report.Result.of(settings, same, timed, time.perf_counter() - start)
    for path in result.write(out, json_path):
        console.print(f"wrote {path}", markup=False)
    for failure in result.failures:
        console.print(failure, style="red", markup=False, highlight=False)
    return not result.failures


if __name__ == "__main__":
    app(prog_name="python -m rlfast.demo")
