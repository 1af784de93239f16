"""Compile every kernel for every GPU that we build for, with no GPU: registers, shared memory, spills.

python tools/compile_kernels.py [--arch 80 90 100] [--only bfloat16] [--every] [--json PATH]

Triton: each ``kernels/<op>.py`` has ``COMPILE``, a list of calls, and ``launch_to_compile``, which makes one. They
run on CPU tensors under a driver that compiles each launch and does not make it, so that what is compiled is what a
GPU would be given. A kernel that no call reaches is an error. CUDA C++: ``nvcc`` and ``ptxas`` on every
``csrc/cuda/*.cu``.

A kernel that does not compile, or that spills registers to memory, fails.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARCHS = (80, 90, 100)
NVCC_ARCHS = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
NVCC_OPTIONS = ("-std=c++17", "-O3", "--cubin", "-Xptxas=-v", f"-I{ROOT / 'csrc'}")


class Compiled(NamedTuple):
    """One kernel in one specialisation on one architecture."""

    kernel: str
    arch: int
    variant: str
    registers: int  # a thread
    shared: int  # bytes a program
    spill: int  # bytes of local memory a thread


class CompileOnly:
    """A Triton driver for a GPU that is not there."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return f"compile-only sm_{self.target.arch}"

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compile_only(arch: int):
    """Launches inside the ``with`` block compile for ``arch`` and do not run: a list of (function, compiled kernel)."""
    import torch
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    before = driver.active if torch.cuda.is_available() else None
    run, launched = JITFunction.run, []

    def compile_launch(self, *args, grid, warmup, **kwargs):
        launched.append((self, run(self, *args, grid=grid, warmup=True, **kwargs)))

    driver.set_active(CompileOnly(arch))
    JITFunction.run = compile_launch
    try:
        yield launched
    finally:
        JITFunction.run = run
        driver.set_active(before)


def modules() -> list:
    """Every module of ``rlfast.kernels``."""
    import rlfast.kernels as package

    found = pkgutil.walk_packages(package.__path__, "rlfast.kernels.")
    return [importlib.import_module(module.name) for module in found]


def grid_kernels() -> set[str]:
    """Names of the ``@jit`` functions that ask for their place in a grid: those that are launched."""
    from triton.runtime.jit import JITFunction

    return {
        f"{f.__module__}.{f.__name__}"
        for module in modules()
        for f in vars(module).values()
        if isinstance(f, JITFunction) and "program_id" in f.src
    }


def resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers, shared memory, local memory) that a cubin says its kernel takes."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["SHARED"]), int(found["STACK"]) + int(found["LOCAL"])


def compile_triton(arch: int, only: str, say) -> tuple[list[Compiled], set[str]]:
    """Every case of every op on one architecture; and the names of the kernels that were reached."""
    done, seen, reached = [], set(), set()
    for module in modules():
        for case in getattr(module, "COMPILE", ()):
            if only not in str(case):
                continue
            op = module.__name__.rpartition(".")[2]
            say(f"sm_{arch} {op}: {case}")
            with compile_only(arch) as launched:
                module.launch_to_compile(case)
            for function, kernel in launched:
                name = f"{function.__module__}.{function.__name__}"
                reached.add(name)
                if kernel.hash in seen:
                    continue
                seen.add(kernel.hash)
                registers, shared, spill = resources(kernel.asm["cubin"])
                shared = max(shared, kernel.metadata.shared)
                done.append(Compiled(name.removeprefix("rlfast."), arch, f"{op}: {case}", registers, shared, spill))
    return done, reached


def compile_cuda(arch: int, say) -> list[Compiled]:
    """Every ``csrc/cuda/*.cu`` on one architecture, by ptxas's own account."""
    nvcc, done = shutil.which("nvcc"), []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if nvcc is None:
            raise SystemExit("nvcc is not on PATH: the CUDA sources cannot be compiled (--no-cuda leaves them out)")
        say(f"{NVCC_ARCHS[arch]} {source.name}")
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, *NVCC_OPTIONS, f"-arch={NVCC_ARCHS[arch]}", "-o", f"{folder}/out.cubin", str(source)]
            run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"{source.name} does not compile for {NVCC_ARCHS[arch]}:\n{run.stderr}")
        done += [Compiled(f"cuda/{source.name}", arch, *account) for account in ptxas_accounts(run.stderr)]
    return done


def ptxas_accounts(text: str):
    """(entry, registers, shared memory, spill) of each entry function in ptxas's verbose output."""
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name = demangled(re.match(r"'([^']+)'", part)[1])
        spill = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        yield name, registers, int(shared[1]) if shared else 0, spill


def demangled(name: str) -> str:
    """A C++ name for people, without its arguments."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |\(anonymous namespace\)::|rlfast::|\((?!anonymous)[^()]*\)$", "", text)


def show(done: list[Compiled], every: bool) -> None:
    """One line per kernel and architecture, the worst of its variants; or each of them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="compiled, not run" + ("" if every else ": the worst variant of each kernel"))
    table.add_column("kernel", overflow="fold")
    for column in ("arch", "variants", "registers", "shared (B)", "spill (B)"):
        table.add_column(column, justify="right", no_wrap=True)
    groups = {}
    for x in done:
        groups.setdefault((x.kernel, x.variant if every else "", x.arch), []).append(x)
    for (kernel, variant, arch), group in groups.items():
        worst = [max(getattr(x, field) for x in group) for field in ("registers", "shared", "spill")]
        table.add_row(f"{kernel} {variant}".strip(), f"sm_{arch}", str(len(group)), *(str(x) for x in worst))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def record(path: Path, done: list[Compiled], command: str) -> None:
    """The table as JSON, stamped."""
    import triton

    from bench.run import stamp

    nvcc = shutil.which("nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    release = re.search(r"release ([\d.]+)", version)
    head = {**stamp("cpu", command), "triton": triton.__version__, "nvcc": release[1] if release else None}
    path.write_text(json.dumps({**head, "kernels": [x._asdict() for x in done]}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--only", default="", help="only the cases whose name holds this, such as bfloat16")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA C++ sources")
    parser.add_argument("--every", action="store_true", help="print each variant of each kernel")
    parser.add_argument("--json", type=Path, help="write the table there too")
    args = parser.parse_args()
    started, done = time.monotonic(), []

    def say(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K[{time.monotonic() - started:4.0f} s] {text}", end="", file=sys.stderr, flush=True)

    for arch in args.arch:
        found, reached = compile_triton(arch, args.only, say)
        done += found
        missed = [] if args.only else sorted(grid_kernels() - reached)
        if missed:
            print(f"sm_{arch}: no case of COMPILE launches {', '.join(missed)}", file=sys.stderr)
            return 1
        if not args.no_cuda:
            done += compile_cuda(arch, say)
    say("")
    show(done, args.every)
    if args.json:
        record(args.json, done, "make compile")
    spilling = [x for x in done if x.spill]
    for x in spilling:
        print(f"{x.kernel} sm_{x.arch} spills {x.spill} bytes: {x.variant}", file=sys.stderr)
    print(f"{len(done)} kernels compiled in {time.monotonic() - started:.0f} s, {len(spilling)} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
