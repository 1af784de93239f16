"""One comparison, from what the command line asks to what it prints."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from rlfast.compare import functions, report

LIBRARIES = ("trl", "verl", "openrlhf")


class Found(NamedTuple):
    """What a comparison has come to."""

    table: Table
    summary: str
    failures: list[str]  # what is out of tolerance, in words
    json: dict


def run(library: str, asked: dict, progress=lambda _: None) -> Found:
    """TRL's trainer step by step as ``asked`` (the fields of ``trainers.Settings``), or a library's functions.

    Raises:
        DemoError: something asked for is not there.
    """
    return _steps(asked, progress) if library == "trl" else _functions(library, progress)


def _steps(asked: dict, progress) -> Found:
    from rlfast.compare import steps, trainers

    with tempfile.TemporaryDirectory() as scratch:
        settings = trainers.prepared(trainers.Settings(**asked), Path(scratch))
        done = steps.compare(settings, Path(scratch), progress)
    title = f"TRL's {trainers.KINDS[settings.trainer].trainer}Trainer on {asked['model']}"
    failures = report.failures(done)
    verdict = "the same steps" if not failures else "not the same steps"
    summary = f"{verdict}; a step takes stock {report.ratio(done):.2f}× the time of rlfast, without generation"
    return Found(report.steps_table(done, title), summary, failures, report.as_json(done))


def _functions(library: str, progress) -> Found:
    cases = importlib.import_module(f"rlfast.compare.{library}")
    done = functions.compare(cases.CASES, cases.OURS, progress)
    failures = [words for measured in done for words in measured.failures]
    summary = f"{len(done)} functions of {library}, {len(failures)} differences"
    rows = [measured._asdict() for measured in done]
    return Found(report.functions_table(done, library), summary, failures, {"functions": rows, "failures": failures})
