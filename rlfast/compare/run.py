"""One comparison, from what the command line asks to what it prints."""

from __future__ import annotations

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
    """TRL's trainer step by step as ``asked`` (fields of ``trainers.Settings``), or a library's functions.

    Args:
        library: of ``LIBRARIES``.
        asked: of the functions "threads" and "seed" alone.

    Raises:
        DemoError: something asked for is not there.
    """
    return _steps(asked, progress) if library == "trl" else _functions(library, asked, progress)


def _steps(asked: dict, progress) -> Found:
    from rlfast.compare import steps, trainers

    with tempfile.TemporaryDirectory() as scratch:
        settings = trainers.prepared(trainers.Settings(**asked), Path(scratch))
        done = steps.compare(settings, Path(scratch), progress)
    title = f"TRL's {trainers.KINDS[settings.trainer].trainer}Trainer on {asked['model']}"
    allowed = report.TINY if asked["model"] == "tiny" else report.TOLERANCES
    failures = report.failures(done, allowed)
    verdict = "the same steps" if not failures else "not the same steps"
    summary = f"{verdict}; a step takes stock {report.ratio(done):.2f}× the time of rlfast, without generation"
    return Found(report.steps_table(done, title), summary, failures, report.as_json(done, allowed))


def _functions(library: str, asked: dict, progress) -> Found:
    done = functions.compare(f"rlfast.compare.{library}", progress, **asked)
    failures = [words for measured in done.measured for words in measured.failures]
    memory = " | ".join(f"{peak / 1e6:.0f}" for peak in done.peak)
    summary = "\n".join((
        f"{len(done.measured)} functions of {library}, {len(failures)} differences; "
        f"resident at most, stock | patched: {memory} MB",
        *report.ran(done.measured),
        *done.notes,
    ))  # fmt: skip
    rows = [measured._asdict() for measured in done.measured]
    table = report.functions_table(done.measured, library)
    said = {"functions": rows, "peak_bytes": done.peak, "notes": done.notes, "failures": failures}
    return Found(table, summary, failures, said)
