"""The demo's command line."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from rlfast.demo.settings import Common, DemoError, DpoSettings, Settings, check, missing

try:
    import typer
    from rich.console import Console
except ImportError as error:
    sys.exit(f"rlfast.demo: {error.name} is not installed: run `pip install rlfast`")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
grpo, dpo = Settings(), DpoSettings()
common = {  # options of both halves; their defaults are the same
    "steps": typer.Option(grpo.steps, help="Timed steps of each arm, after one that warms up."),
    "parity_steps": typer.Option(grpo.parity_steps, help="Steps that both arms take on the same data."),
    "max_completion": typer.Option(grpo.max_completion, help="Tokens of the longest completion."),
    "temperature": typer.Option(grpo.temperature, help="Of sampling, and of GRPO's loss."),
    "learning_rate": typer.Option(grpo.learning_rate, help="Of AdamW, constant."),
    "checkpointing": typer.Option(
        grpo.checkpointing, "--checkpointing/--no-checkpointing", help="Gradient checkpointing, in both arms."
    ),
    "threads": typer.Option(grpo.threads, help="Threads of torch and of the kernels; 0: torch's default."),
    "seed": typer.Option(grpo.seed, help="Of the problems and of sampling."),
    "out": typer.Option(Path("demo-out"), help="Folder for the chart and the page."),
    "json": typer.Option(None, "--json", help="Also write the result, stamped, to this file."),
}


@app.callback(invoke_without_command=True)
def train_grpo(
    context: typer.Context,
    steps: int = common["steps"],
    parity_steps: int = common["parity_steps"],
    batch: int = typer.Option(grpo.batch, help="Completions a step."),
    generations: int = typer.Option(grpo.generations, help="Completions a prompt: the size of a group."),
    max_completion: int = common["max_completion"],
    temperature: float = common["temperature"],
    beta: float = typer.Option(grpo.beta, help="KL coefficient; above 0, a reference model is scored too."),
    learning_rate: float = common["learning_rate"],
    checkpointing: bool = common["checkpointing"],
    threads: int = common["threads"],
    seed: int = common["seed"],
    out: Path = common["out"],
    json_path: Path | None = common["json"],
) -> None:
    """Train SmolLM2-135M-Instruct with TRL's GRPOTrainer on the CPU, stock and with rlfast's kernels swapped in.

    First both arms take the same steps on the same rollouts, and every difference is held to a tolerance; then each
    trains on its own rollouts and is timed. Exit code 1 if the steps differ, or if too few groups had an advantage.
    The same with DPOTrainer: python -m rlfast.demo dpo.
    """
    if context.invoked_subcommand is not None:
        return
    settings = Settings(
        steps=steps, parity_steps=parity_steps, batch=batch, generations=generations, max_completion=max_completion,
        temperature=temperature, beta=beta, learning_rate=learning_rate, checkpointing=checkpointing, threads=threads,
        seed=seed,
    )  # fmt: skip
    _end(settings, out, json_path)


@app.command("dpo")
def train_dpo(
    steps: int = common["steps"],
    parity_steps: int = common["parity_steps"],
    batch: int = typer.Option(dpo.batch, help="Pairs a step."),
    pairs: int = typer.Option(dpo.pairs, help="Pairs of the data set."),
    problems: int = typer.Option(dpo.problems, help="At most so many are answered to find them."),
    samples: int = typer.Option(dpo.samples, help="Answers a problem."),
    max_completion: int = common["max_completion"],
    temperature: float = common["temperature"],
    beta: float = typer.Option(dpo.beta, help="Of the loss."),
    loss_type: str = typer.Option(dpo.loss_type, help="TRL's name of it, or several with a comma between."),
    learning_rate: float = common["learning_rate"],
    checkpointing: bool = common["checkpointing"],
    threads: int = common["threads"],
    seed: int = common["seed"],
    out: Path = common["out"],
    json_path: Path | None = common["json"],
) -> None:
    """Train SmolLM2-135M-Instruct with TRL's DPOTrainer on pairs of its own answers, a right one and a wrong one.

    The pairs are sampled and graded once, and then read from a cache. Both arms take the same steps, every difference
    is held to a tolerance, and then each is timed. Exit code 1 if the steps differ, or if there are too few pairs.
    """
    settings = DpoSettings(
        steps=steps, parity_steps=parity_steps, batch=batch, pairs=pairs, problems=problems, samples=samples,
        max_completion=max_completion, temperature=temperature, beta=beta, loss_type=loss_type,
        learning_rate=learning_rate, checkpointing=checkpointing, threads=threads, seed=seed,
    )  # fmt: skip
    _end(settings, out, json_path)


def _end(settings: Common, out: Path, json_path: Path | None) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=120)  # a pipe gets lines that hold a whole row
    try:
        fine = _run(settings, console, out, json_path)
    except DemoError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        fine = False
    if not fine:
        raise typer.Exit(1)


def _run(settings: Common, console: Console, out: Path, json_path: Path | None) -> bool:
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
    settings = replace(settings, model=str(model.prepare()))
    training = trainer.training_of(settings)
    if hasattr(training, "prepared"):
        with console.status("Answering problems, to grade the answers") as status:
            say = status.update if console.is_terminal else console.print
            settings = training.prepared(settings, lambda text: say(f"answering problems: {text}, once"))
    start = time.perf_counter()
    progress = report.Progress(console, 2 * settings.parity_steps + 2 + 2 * settings.total_steps + 2)
    with progress:
        same = parity.compare(settings, lambda text: progress.advance(f"parity, {text}"))
        report.parity_table(console, settings, same)
        timed = speed.measure(settings, lambda text: progress.advance(f"speed, {text}"))
    report.speed_table(console, settings, timed)
    result = report.Result.of(settings, same, timed, time.perf_counter() - start)
    for path in result.write(out, json_path):
        console.print(f"wrote {path}", markup=False)
    for failure in result.failures:
        console.print(failure, style="red", markup=False, highlight=False)
    return not result.failures


if __name__ == "__main__":
    app(prog_name="python -m rlfast.demo")
