"""`make test` and `make test-all` each run every op on every backend: what they collect is looked at, not trusted."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlfast import backends

ROOT = Path(__file__).resolve().parent.parent
PAIRS = tuple((op, name) for op, names in backends.IMPLEMENTED.items() for name in names)


def pytest_lines(target: str) -> list[str]:
    """The pytest commands of a target of the Makefile."""
    make = shutil.which("make")
    assert make, "make is not on PATH"
    done = subprocess.run([make, "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if re.search(r"-m pytest\b", line)]


def listing(arguments: list[str]) -> list[str]:
    """The arguments of a pytest command that list what it would run of the ops' own files."""
    rest = [x for x in arguments if x not in ("tests", "bench", "-q")]  # a second -q would list files only
    assert "tests" in arguments, arguments
    return [*(f"tests/test_{op}.py" for op in backends.IMPLEMENTED), *rest, "--collect-only", "-q"]


def collected(line: str) -> set[tuple[str, str]]:
    """The (op, backend) pairs that a pytest command of the Makefile would run."""
    words = shlex.split(line)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= dict(word.split("=", 1) for word in words[: words.index("-m")] if re.match(r"[A-Z_]+=", word))
    arguments = words[words.index("pytest") + 1 :]
    while "-n" in arguments:  # no workers for a listing
        del arguments[arguments.index("-n") : arguments.index("-n") + 2]
    command = [sys.executable, "-m", "pytest", *listing(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    pairs = set()
    for node in done.stdout.splitlines():
        for op, name in PAIRS:
            if re.match(rf"tests/test_{op}\.py::\w+\[{name}\b", node):
                pairs.add((op, name))
    return pairs


@pytest.mark.parametrize("target", ("test", "test-all"))
def test_every_op_on_every_backend(target):
    """All pairs, but CUDA C++ where there is no GPU and the target says that it leaves GPUs out."""
    lines = pytest_lines(target)
    assert lines, f"make {target} runs no pytest"
    pairs = set().union(*(collected(line) for line in lines))
    missing = set(PAIRS) - pairs
    if any("not gpu" in line for line in lines):
        missing = {pair for pair in missing if pair[1] != "cuda"}
    assert not missing, f"make {target} never runs {sorted(missing)}"


def test_the_gpu_target_runs_the_kernels_of_a_gpu():
    (line,) = pytest_lines("test-gpu")
    arguments = shlex.split(line.split("-m pytest", 1)[1])
    assert "gpu and (large or not large)" in arguments, line
    command = [sys.executable, "-m", "pytest", *listing(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for op, name in PAIRS:
        if name == "cuda":  # Triton's tests are of a GPU only where there is one
            full = re.search(rf"test_{op}\.py::test_full_size\w*\[{name}\b", done.stdout)
            assert full, f"{op} on {name}: no full size"
