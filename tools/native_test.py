"""Builds the stand-alone C++ test of the kernels (csrc/tests), with the instruction sets and flags of setup.py."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
# csrc/tests includes the CUDA source, whose unroll pragmas are nvcc's, and switches contexts.
WARNINGS = ("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered")


def load_setup():
    """setup.py as a module: it holds the flags of each instruction set."""
    spec = importlib.util.spec_from_file_location("rlfast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(compiler: list[str], machine: str, folder: Path, kernel_flags=(), test_flags=(), link_flags=()) -> Path:
    """Compiles what is older than its sources, and returns the executable.

    Args:
        compiler: the command, such as ``["g++"]``.
        machine: the processor it compiles for, a key of setup.py's ISAS.
        kernel_flags, test_flags: after setup.py's flags for the kernels, and for the tests.
    """
    setup = load_setup()
    isas = {name: flags for name, flags in setup.ISAS[machine].items() if setup.takes(compiler, *flags)}
    defined = f"-DRLFAST_ISAS(X)={' '.join(f'X({name})' for name in isas)}"
    jobs = []
    for isa, flags in isas.items():
        for source in sorted((CSRC / "cpu").glob("*.cpp")):
            if source.stem != "dispatch":
                named = f"-DRLFAST_ISA_NS={isa}"
                command = [*compiler, *setup.KERNEL, "-fopenmp", *flags, defined, named, *kernel_flags]
                jobs.append((source, folder / isa / f"{source.stem}.o", command))
    for source in (CSRC / "cpu" / "dispatch.cpp", *sorted((CSRC / "tests").glob("*.cpp"))):
        command = [*compiler, "-std=c++17", *WARNINGS, "-ffp-contract=off", defined, *test_flags]
        jobs.append((source, folder / f"{source.stem}.o", command))
    newest = max(path.stat().st_mtime for suffix in ("h", "cuh", "cu") for path in CSRC.rglob(f"*.{suffix}"))
    stale = [
        [*command, "-c", source, "-o", target]
        for source, target, command in jobs
        if not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime)
    ]
    for _, target, _ in jobs:
        target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, stale))
    program = folder / "test_kernels"
    run([*compiler, "-fopenmp", *link_flags, *(target for _, target, _ in jobs), "-o", program])
    return program


def run(command, **options) -> None:
    """Runs a command; ends this program with its exit status if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, **options)
    if done.returncode:
        sys.exit(f"failed with status {done.returncode}: {' '.join(words)}")
