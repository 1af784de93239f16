"""Builds the compiled extensions; everything else is in pyproject.toml.

``rlfast._cpu`` is built from csrc/cpu/*.cpp, each file once per instruction set, ``rlfast._cuda`` from csrc/cuda/*.cu
where ``nvcc`` is found. Neither needs torch. What cannot be built does not stop the install: the reason goes to
rlfast/_build_record.py, and ``rlfast info`` shows it. RLFAST_BUILD_CUDA=0 leaves the CUDA extension out.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
RECORD = "rlfast/_build_record.py"
# In the tree, where an editable install finds them again: pip gives it another temporary folder each time.
OBJECTS = ROOT / "build" / f"objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
COMMON += ("-fno-math-errno", "-fno-trapping-math")
# One text must give the same bits wherever it is inlined: a compiler may not fuse products and sums on its own.
KERNEL = (*COMMON, "-ffp-contract=off", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
ISAS = {
    "x86_64": {
        "baseline": ("-DRLFAST_GENERIC",),
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": (*AVX512, "-mavx512bf16"),
    },
    "aarch64": {"baseline": ("-DRLFAST_GENERIC",), "neon": ()},
}
ISAS["amd64"], ISAS["arm64"] = ISAS["x86_64"], ISAS["aarch64"]

# Ampere, Hopper, Blackwell, and PTX for what comes after.
GENCODE = (
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=sm_100",
    "-gencode=arch=compute_100,code=compute_100",
)


class NotBuilt(Exception):
    """Why an extension is left out."""


def run(command) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise NotBuilt(f"{Path(str(command[0])).name} failed: {first}")


def find_compiler() -> list[str]:
    named = os.environ.get("CXX", "").split()
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    raise NotBuilt(f"no C++ compiler: {' '.join(named) or 'g++'} is not on PATH")


def takes(compiler, *flags) -> bool:
    """Whether the compiler builds an empty library with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("#include <cmath>\nint empty() { return 0; }\n")
        command = [*compiler, *flags, "-shared", "-fPIC", str(source), "-o", str(Path(folder, "empty.so"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_nvcc() -> str:
    if os.environ.get("RLFAST_BUILD_CUDA", "1") == "0":
        raise NotBuilt("RLFAST_BUILD_CUDA=0 was set")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    for found in (*(shutil.which("nvcc", path=str(Path(home, "bin"))) for home in homes if home), shutil.which("nvcc")):
        if found:
            return found
    raise NotBuilt("nvcc is not on PATH and CUDA_HOME is not set")


def object_of(source: Path, folder: Path, command) -> Path:
    """Where a source's object goes: another place for another command, but for where this tree lies."""
    words = " ".join(map(str, command)).replace(str(ROOT), "")
    return folder / f"{source.stem}-{zlib.crc32(words.encode()):08x}.o"


def include_flags() -> list[str]:
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 is not installed: pip install pybind11") from None
    python = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").exists() for folder in python):
        raise NotBuilt(f"Python's headers are missing: no Python.h in {', '.join(sorted(python))}")
    return [f"-I{CSRC}", f"-isystem{pybind11.get_include()}", *(f"-isystem{folder}" for folder in sorted(python))]


class Build(build_ext):
    """Compiles on all cores, and writes down what was built or why not."""

    def run(self):
        record = {}
        for extension in self.extensions:
            name = extension.name.rpartition("._")[2]
            try:
                getattr(self, f"build_{name}")(Path(self.get_ext_fullpath(extension.name)), OBJECTS / name)
                record[name] = "built"
            except NotBuilt as reason:
                record[name] = str(reason)
            print(f"rlfast._{name}: {record[name]}", file=sys.stderr)
        path = Path(self.get_ext_fullpath("rlfast._cpu")).parent / Path(RECORD).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""What the build of this install wrote down."""\n\nRECORD = {record!r}\n')

    def get_output_mapping(self):
        return {}

    def get_outputs(self):
        return [self.get_ext_fullpath(extension.name) for extension in self.extensions]

    def compile(self, jobs) -> None:
        """Runs (source, object, command) jobs whose object is older than the source or a header."""
        newest = max(path.stat().st_mtime for path in (*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")))
        stale = []
        for source, target, command in jobs:
            target.parent.mkdir(parents=True, exist_ok=True)
            if self.force or not target.exists() or target.stat().st_mtime < max(newest, source.stat().st_mtime):
                stale.append([*command, "-c", source, "-o", target])
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(run, stale))

    def build_cpu(self, library: Path, temp: Path) -> None:
        compiler, machine = find_compiler(), platform.machine().lower()
        wanted = ISAS.get(machine, {"baseline": ("-DRLFAST_GENERIC",)})
        isas = {name: flags for name, flags in wanted.items() if takes(compiler, *flags)}
        openmp = ["-fopenmp"] if takes(compiler, "-fopenmp") else ["-Wno-unknown-pragmas"]
        defined = f"-DRLFAST_ISAS(X)={' '.join(f'X({name})' for name in isas)}"
        jobs = []
        # The baseline comes first: where a template of the C++ library is compiled for several instruction sets, the
        # linker keeps the first copy, and every processor must be able to run it.
        for isa, flags in isas.items():
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                if source.stem == "dispatch":
                    continue
                command = [*compiler, *KERNEL, *openmp, *flags, defined, f"-DRLFAST_ISA_NS={isa}", f"-I{CSRC}"]
                jobs.append((source, object_of(source, temp / isa, command), command))
        for source in (CSRC / "cpu" / "dispatch.cpp", *sorted(CSRC.glob("bindings_cpu*.cpp"))):
            command = [*compiler, *COMMON, defined, *include_flags()]
            jobs.append((source, object_of(source, temp, command), command))
        self.compile(jobs)
        self.link([*compiler, *openmp, *(target for _, target, _ in jobs)], library)

    def build_cuda(self, library: Path, temp: Path) -> None:
        nvcc, compiler = find_nvcc(), find_compiler()
        sources = sorted((CSRC / "cuda").glob("*.cu"))
        if not sources:
            raise NotBuilt("csrc/cuda has no source")
        options = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}", *GENCODE]
        jobs = [(source, object_of(source, temp, [nvcc, *options]), [nvcc, *options]) for source in sources]
        for source in sorted(CSRC.glob("bindings_cuda*.cpp")):
            command = [*compiler, *COMMON, *include_flags()]
            jobs.append((source, object_of(source, temp, command), command))
        self.compile(jobs)
        self.link([nvcc, "-cudart=static", *(target for _, target, _ in jobs)], library)

    def link(self, command, library: Path) -> None:
        library.parent.mkdir(parents=True, exist_ok=True)
        undefined = ["-Wl,-undefined,dynamic_lookup"] if sys.platform == "darwin" else []
        run([*command, "-shared", *undefined, "-o", library])


if __name__ == "__main__":  # tools/native_test.py imports the flags above
    setup(
        packages=[
            *find_packages(include=["rlfast", "rlfast.*"]),
            "rlfast.kernels",
            *(f"rlfast.kernels.{name}" for name in find_packages("kernels")),
        ],
        package_dir={"rlfast.kernels": "kernels"},
        ext_modules=[Extension("rlfast._cpu", []), Extension("rlfast._cuda", [])],
        cmdclass={"build_ext": Build},
    )
