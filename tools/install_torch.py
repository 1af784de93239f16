"""Put torch into the environment of the Python that runs this, unless it has one.

    .venv/bin/python tools/install_torch.py SPEC [--index-url URL] [--constraints constraints.txt OUT]

On Linux the default wheel of torch depends on gigabytes of CUDA packages. With no GPU in sight a CPU wheel is taken:
from the wheels at hand (pip's find-links), else from PyTorch's own CPU index, else from pip's index if that one's
torch brings no CUDA package. `--index-url` names another index and is obeyed as it is. `--constraints` writes a copy
of the constraints in which what is installed already stays as it is, so that no later step replaces it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
MINIMUM = (2, 11)


def pip(*arguments, quiet=False):
    """Exit status of ``pip install ...``."""
    where = subprocess.DEVNULL if quiet else None
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.call(command, stdout=where, stderr=where)


def installed():
    """The version of the torch that is here, or None."""
    if importlib.util.find_spec("torch") is None:
        return None
    code = "import torch; print(torch.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode:
        sys.exit("torch: the installed one cannot be imported: " + found.stderr.strip().splitlines()[-1])
    return found.stdout.strip()


def cuda_packages(spec):
    """CUDA packages that pip's own index would bring along."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--dry-run",
        "-q",
        "--report",
        "-",
        spec,
    ]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"torch: pip cannot find {spec}: {found.stderr.strip().splitlines()[-1]}")
    names = [item["metadata"]["name"] for item in json.loads(found.stdout)["install"]]
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def write_constraints(source, target):
    """``source`` with torch at the version that is here, and with Triton and NumPy if they came with it."""
    here = {}
    for name in ("torch", "triton", "numpy"):
        try:
            here[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    lines = []
    for line in pathlib.Path(source).read_text().splitlines():
        name = re.split(r"[=<>~! ]", line)[0]
        lines.append(f"{name}=={here[name]}" if name in here else line)
    pathlib.Path(target).write_text("\n".join(lines) + "\n")


def main():
    """Reuse, or install by the rule above; then the constraints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec")
    parser.add_argument("--index-url")
    parser.add_argument("--constraints", nargs=2, metavar=("IN", "OUT"))
    args = parser.parse_args()
    status = install(args)
    if status == 0 and args.constraints:
        write_constraints(*args.constraints)
    return status


def install(args):
    """Reuse, or install by the rule at the top; the exit status of pip."""
    version = installed()
    if version is not None:
        if tuple(int(x) for x in version.split(".")[:2]) < MINIMUM:
            sys.exit(f"torch: {version} is installed here, 2.11 or newer is needed: name another VENV or PYTHON")
        print(f"torch {version} is installed and is reused")
        return 0
    gpu = os.path.exists("/dev/nvidia0") or shutil.which("nvidia-smi")
    if args.index_url:
        return pip(args.spec, "--index-url", args.index_url)
    if gpu or platform.system() != "Linux":
        return pip(args.spec)
    if pip("--no-index", "--no-deps", args.spec, quiet=True) == 0:
        return pip(args.spec)  # the wheel is in; now what it depends on
    if pip(args.spec, "--index-url", CPU_INDEX, "--retries", "1", "--timeout", "15") == 0:
        return 0
    extra = cuda_packages(args.spec)
    if extra:
        sys.exit(
            f"torch: no CPU wheel can be reached, and pip's index would bring {len(extra)} CUDA packages; "
            "name an index with `make TORCH_INDEX=...`, a wheel with `make TORCH_SPEC=...`, "
            "or put torch into the environment"
        )
    return pip(args.spec)


if __name__ == "__main__":
    sys.exit(main())
