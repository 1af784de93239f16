"""``rlfast info | verify | bench | compare | generate | recipes | train | new-loss``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

import rlfast
from rlfast import backends, validate
from rlfast import verify as verification
from rlfast.recipes import command
from rlfast.rollout import flash

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Fast, exact kernels for RL post-training.")


def _console() -> Console:
    """As wide as the terminal; a pipe gets lines that hold a whole row."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads; no GPU"


@app.command()
def info(as_json: bool = typer.Option(False, "--json", help="Print one JSON object.")) -> None:
    """Versions, device, instruction set, and each backend with the reason if it is missing."""
    found = {
        "versions": {
            "rlfast": rlfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "trl": _version("trl"),
        },
        "device": _device(),
        "isa": {"in use": backends.isa(), "available": list(backends.isas())},
        "backends": {name: backends.why_not(name) or "available" for name in backends.NAMES},
        "attention": {name: flash.why_not(name) or "available" for name in flash.NAMES},
        "active": {op: {device: _active(op, device) for device in _device_types()} for op in backends.IMPLEMENTED},
    }
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console = _console()
    table = Table("", "", show_header=False, box=None, padding=(0, 2))
    for name, version in found["versions"].items():
        table.add_row(name, version)
    table.add_row("device", found["device"])
    table.add_row("instruction set", f"{found['isa']['in use']} (of {', '.join(found['isa']['available']) or 'none'})")
    for name, state in found["backends"].items():
        table.add_row(f"backend {name}", state if state == "available" else f"missing: {state}")
    for name, state in found["attention"].items():
        table.add_row(f"attention {name}", state if state == "available" else f"missing: {state}")
    for op, by_device in found["active"].items():
        table.add_row(op, ", ".join(f"{device} tensors run on {name}" for device, name in by_device.items()))
    console.print(table)


def _device_types() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _active(op: str, device: str) -> str:
    return backends.active(op, device, torch.float32)


@app.command()
def verify(
    op: list[str] = typer.Option(None, help="Only this op (repeatable)."),
    backend: list[str] = typer.Option(None, help="Only this backend (repeatable)."),
    every_isa: bool = typer.Option(False, "--every-isa", help="The C++ kernels at each instruction set."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list of cells."),
) -> None:
    """Parity on this machine: error ÷ torch's own error per op, backend and dtype. Exit 1 on a failure."""
    for name in op or ():
        if name not in backends.IMPLEMENTED:
            raise typer.BadParameter(f"expected one of {tuple(backends.IMPLEMENTED)}, got {name!r}", param_hint="--op")
    for name in backend or ():
        if name not in backends.NAMES:
            raise typer.BadParameter(f"expected one of {backends.NAMES}, got {name!r}", param_hint="--backend")
    cells = verification.verify(op or None, backend or None, every_isa)
    if not cells:
        has = {name: backends.IMPLEMENTED[name] for name in op or backends.IMPLEMENTED}
        said = "; ".join(f"{name} has {', '.join(names)}" for name, names in has.items())
        raise typer.BadParameter(f"nothing to verify: {said}", param_hint="--backend")
    if as_json:
        print(json.dumps([c._asdict() for c in cells], indent=1))
    else:
        _print_cells(cells)
    if any(c.status == "FAILED" for c in cells):
        raise typer.Exit(1)


def _print_cells(cells) -> None:
    console = _console()
    table = Table(
        "op", "backend", "dtype", "on", "values", "gradients", "", title="error ÷ torch's own error (float32)"
    )
    for c in cells:
        ratios = ["" if r is None else f"{r:.2f}" for r in (c.value_ratio, c.gradient_ratio)]
        table.add_row(c.op, f"{c.backend} {c.isa}", c.dtype, c.device, *ratios, c.status)
    console.print(table)
    for c in cells:
        if c.status == "FAILED":
            console.print(f"{c.op} on {c.backend}, {c.dtype}: {c.detail}", soft_wrap=True)
    for name, reason in {c.backend: c.detail for c in cells if c.status == "not here"}.items():
        console.print(f"{name} is not here: {reason}", soft_wrap=True)


def _clone(command: str, what: str) -> Path:
    """The root of the clone that this rlfast runs from."""
    clone = Path(rlfast.__file__).resolve().parent.parent
    if not (clone / "bench" / "suite.py").exists():
        print(
            f"rlfast {command}: {what} of the repository, and this rlfast is installed in {clone}: "
            "run it from a clone (`pip install -e .`)",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    return clone


@app.command()
def bench(
    op: list[str] = typer.Option(None, help="Only cases of this op (repeatable)."),
    case: list[str] = typer.Option(None, help="Only cases whose name contains this (repeatable)."),
    small: bool = typer.Option(False, help="Small shapes: a minute, and no figure to quote."),
    device: str = typer.Option("cpu", help="cpu or cuda."),
    json_path: Path = typer.Option(None, "--json", help="Write the results to this file."),
) -> None:
    """Time the cases of bench/suite.py beside eager, torch.compile, plain torch and installed peers."""
    clone = _clone("bench", "the cases are in the bench/ folder")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device!r}", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("cuda: torch sees no CUDA device", param_hint="--device")
    for name in op or ():
        if name not in backends.IMPLEMENTED:
            raise typer.BadParameter(f"expected one of {tuple(backends.IMPLEMENTED)}, got {name!r}", param_hint="--op")
    sys.path.insert(0, str(clone))
    runner = importlib.import_module("bench.run")
    raise typer.Exit(runner.run(ops=op, cases=case, small=small, device=device, json_path=json_path))


@app.command()
def compare(
    context: typer.Context,
    library: str = typer.Argument(help="trl, or the functions of verl or openrlhf."),
    trainer: str = typer.Option("grpo", help="TRL's: grpo, rloo, dpo, kto or sft."),
    steps: int = typer.Option(5, help="Of each arm of TRL's trainer."),
    model: str = typer.Option("tiny", help="TRL's: tiny (random), smollm2, or the folder of a model."),
    loss_type: str = typer.Option("", help="One of TRL's trainer (DPO: several with a comma between)."),
    batch: int = typer.Option(4, help="Examples a step of TRL's trainer."),
    learning_rate: float = typer.Option(1e-4, help="Of AdamW, constant, in TRL's trainer."),
    threads: int = typer.Option(0, help="0: torch's default."),
    seed: int = typer.Option(0, help="Of the data and of sampling."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
) -> None:
    """TRL's trainer, or a library's functions, stock beside patched, in fresh processes. Exit 1 if they differ."""
    from rlfast import integrations
    from rlfast.compare import run
    from rlfast.demo.settings import DemoError, at_least

    asked = {"threads": threads, "seed": seed}
    of_trl = {"trainer": trainer, "steps": steps, "model": model, "loss_type": loss_type, "batch": batch}
    of_trl |= {"learning_rate": learning_rate}
    try:
        if library not in run.LIBRARIES:
            raise DemoError(f"expected one of {run.LIBRARIES}, got {library!r}")
        at_least(0, **asked)
        given = [name for name in of_trl if context.get_parameter_source(name).name != "DEFAULT"]
        if library != "trl" and given:
            raise DemoError(f"--{given[0].replace('_', '-')}: of TRL's trainers; of {library} functions are compared")
        integrations.installed(library)
        asked |= of_trl if library == "trl" else {}
        found = run.run(library, asked, lambda text: print(text, file=sys.stderr) if sys.stderr.isatty() else None)
    except (DemoError, ImportError) as error:
        print(f"rlfast compare: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    if as_json:
        print(json.dumps(found.json))
    else:
        console = _console()
        console.print(found.table)
        for words in (found.summary, *found.failures):
            console.print(words, soft_wrap=True, markup=False, highlight=False)
    if found.failures:
        raise typer.Exit(1)


@app.command()
def generate(
    model: str = typer.Argument(help="A folder or a name that from_pretrained takes."),
    prompt: str = typer.Argument(help="What the response follows."),
    n: int = typer.Option(1, "--n", help="Responses."),
    max_tokens: int = typer.Option(64, help="Tokens of a response at most."),
    temperature: float = typer.Option(1.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="1 is off."),
    top_k: int = typer.Option(0, help="0 is off."),
    min_p: float = typer.Option(0.0, help="0 is off."),
    seed: int = typer.Option(0, help="Of the first response."),
    stop: list[str] = typer.Option(None, help="A string that ends a response (repeatable)."),
    dtype: str = typer.Option("auto", help="auto (the checkpoint's), float32, bfloat16 or float16."),
    chat: bool = typer.Option(False, "--chat", help="The prompt is a user's message: use the chat template."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list of responses with their log-probs."),
) -> None:
    """Responses of a model to a prompt by rlfast's rollout engine; one alone is printed as it comes."""
    import transformers

    from rlfast.rollout import Engine, SamplingParams

    try:
        params = SamplingParams(
            n=n, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed,
            stop=tuple(stop or ()),
        )  # fmt: skip
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=_dtype(dtype)).eval()
        if torch.cuda.is_available():
            loaded = loaded.cuda()
        if chat:  # as ids: the template has the special tokens, which encoding a string would add again
            said = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)["input_ids"]
        engine = Engine(loaded, tokenizer)
        if n == 1 and not as_json:
            for _, text in engine.tokens(prompt, params):
                print(text, end="", flush=True)
            print()
            return
        rollouts = engine.generate([prompt], params)
    except (ValueError, TypeError, OSError) as error:
        print(f"rlfast generate: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps([{**r._asdict(), **{k: x.tolist() for k, x in _tensors(r).items()}} for r in rollouts]))
        return
    for rollout in rollouts:
        print(f"--- {rollout.index}: {len(rollout.tokens)} tokens, {rollout.finish_reason}")
        print(rollout.text)


def _dtype(name: str):
    """ "auto", or torch's dtype of a name."""
    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    return known[validate.one_of("dtype", name, tuple(known))]


def _tensors(record) -> dict:
    return {k: x for k, x in record._asdict().items() if isinstance(x, torch.Tensor)}


@app.command()
def recipes(
    name: str = typer.Argument(None, help="Only this one, with every value and its source."),
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list, every value with its source."),
) -> None:
    """How the systems of the survey were trained, as far as it is disclosed: a row each."""
    if name is not None and name not in rlfast.RECIPES:
        wanted = ", ".join(rlfast.RECIPES)
        raise typer.BadParameter(f"expected one of {wanted}, got {name!r}", param_hint="NAME")
    command.print_recipes(_console(), name, as_json)


app.command("train")(command.train)


@app.command("new-loss")
def new_loss(name: str = typer.Argument(help="Of the loss: lower-case letters, digits and _.")) -> None:
    """Outline a loss in a clone: a formula, a row and an oracle, red until they are right."""
    clone = _clone("new-loss", "it writes into the sources")
    sys.path.insert(0, str(clone))
    raise typer.Exit(importlib.import_module("tools.new_loss").main(name))


def main() -> None:
    """The ``rlfast`` command."""
    app()


if __name__ == "__main__":
    main()
