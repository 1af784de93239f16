"""A look around before anything is installed: what `make` needs, what is missing, and the one command that mends it.

Standard library only, on any Python 3, because it runs before there is an environment.

    python3 tools/doctor.py [--venv .venv] [--for build|demo|test|test-arm|sanitize|compile]
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import sysconfig

MIN_PYTHON = (3, 10)
GIB = 1 << 30
# Installed sizes measured on x86-64 Linux with a CPU build of torch: torch 0.9 GiB, triton 0.7, the trainer and demo
# packages 0.9.
DISK = {"build": 2, "test": 4, "demo": 4}
# Peak resident memory: the demo's stock arm holds full logits for a group; compiling one kernel file takes 1 GiB.
MEMORY = {"build": 2, "test": 6, "demo": 6}

# What each tool is called by the package managers whose command is printed.
PACKAGES = {
    "apt-get": {
        "venv": "python3-venv",
        "headers": "python3-dev",
        "compiler": "g++",
        "aarch64": "g++-aarch64-linux-gnu",
        "qemu": "qemu-user",
    },
    "dnf": {
        "venv": "python3",
        "headers": "python3-devel",
        "compiler": "gcc-c++",
        "aarch64": "gcc-c++-aarch64-linux-gnu",
        "qemu": "qemu-user",
    },
    "brew": {"venv": "python", "headers": "python", "compiler": "llvm"},
}
INSTALL = {"apt-get": "apt-get install -y", "dnf": "dnf install -y", "brew": "brew install"}


class Report:
    """Findings, printed as they come; the missing tools, for the one command at the end."""

    def __init__(self):
        self.missing, self.fatal = [], False

    def line(self, mark, name, text):
        print(f"  {mark:<5} {name:<9} {text}")

    def ok(self, name, text):
        self.line("ok", name, text)

    def warn(self, name, text, tool=None):
        self.line("note", name, text)
        self.missing += [tool] if tool else []

    def fail(self, name, text, tool=None):
        self.line("STOP", name, text)
        self.missing += [tool] if tool else []
        self.fatal = True


def manager():
    """The package manager that is here, or None."""
    for name in ("apt-get", "dnf", "brew"):
        if shutil.which(name):
            return name
    return None


def mend(tools):
    """One command that installs the missing tools, or None."""
    name = manager()
    if not tools or name is None:
        return None
    wanted = sorted({PACKAGES[name].get(tool, tool) for tool in tools})
    root = name == "brew" or not hasattr(os, "geteuid") or os.geteuid() == 0
    return "{}{} {}".format("" if root else "sudo ", INSTALL[name], " ".join(wanted))


def newer_python():
    """A Python on the path that is new enough, or None."""
    for minor in range(14, MIN_PYTHON[1] - 1, -1):
        name = f"python3.{minor}"
        # a version manager's shim is on the path for versions that are not switched on: run it to know
        if shutil.which(name) and subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return name
    return None


def check_python(report):
    """The version of this interpreter."""
    version = platform.python_version()
    if sys.version_info >= MIN_PYTHON:
        report.ok("python", f"{version} ({sys.executable})")
        return
    other = newer_python()
    hint = f"try `make PYTHON={other} ...`" if other else "install a newer Python and name it: `make PYTHON=... ...`"
    report.fail("python", "{} is older than {}.{}: {}".format(version, *MIN_PYTHON, hint))


def check_venv(report, path):
    """The environment that is there, or the modules that make one."""
    if os.path.exists(os.path.join(path, "bin", "python")):
        report.ok("venv", f"{path} is there and is used")
        return
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        report.fail("venv", f"this Python cannot make an environment ({error})", "venv")
        return
    report.ok("venv", f"{path} will be made")


def compiler():
    """The C++ compiler that a build would use, or None."""
    for name in [*os.environ.get("CXX", "").split()[:1], "g++", "clang++", "c++"]:
        if shutil.which(name):
            return shutil.which(name)
    return None


def check_build(report):
    """What compiles the kernels. Without it the install still succeeds, with the torch backend."""
    found = compiler()
    if found:
        report.ok("compiler", found)
    else:
        report.warn("compiler", "no C++ compiler: the install goes on with the torch backend alone", "compiler")
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if os.path.exists(header):
        report.ok("headers", header)
    else:
        report.warn("headers", f"{header} is missing: no C++ kernels, the torch backend alone", "headers")
    nvcc = shutil.which("nvcc")
    gpu = os.path.exists("/dev/nvidia0") or bool(shutil.which("nvidia-smi"))
    report.ok("gpu", "{}; {}".format("found" if gpu else "none in sight", "nvcc at " + nvcc if nvcc else "no nvcc"))


def check_room(report, path, goal):
    """Disk for the environment, memory for the goal."""
    folder = path
    while not os.path.isdir(folder):
        folder = os.path.dirname(os.path.abspath(folder))
    free, wanted = shutil.disk_usage(folder).free / GIB, DISK.get(goal, DISK["build"])
    if os.path.exists(os.path.join(path, "bin", "python")):
        wanted = 1  # mostly installed: room for the build and for results
    text = f"{free:.0f} GiB free, {wanted} wanted"
    (report.ok if free >= wanted else report.fail)("disk", text)
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    except (ValueError, OSError, AttributeError):
        return
    wanted = MEMORY.get(goal, MEMORY["build"])
    text = f"{memory:.0f} GiB on {os.cpu_count()} cores, {wanted} wanted"
    (report.ok if memory >= wanted else report.warn)("memory", text)


def check_tools(report, goal):
    """What single goals need beside a compiler."""
    if goal == "sanitize" and compiler() is None:
        report.fail("compiler", "the sanitizers need a C++ compiler", "compiler")
    if goal == "compile" and shutil.which("nvcc") is None:
        # no package to name: those of distributions are too old for sm_100
        report.fail("nvcc", "no nvcc on PATH: install the CUDA toolkit, 12.8 or later, from developer.nvidia.com")
    if goal != "test-arm" or platform.machine().lower() in ("aarch64", "arm64"):
        return
    for tool, names in (("aarch64", ["aarch64-linux-gnu-g++"]), ("qemu", ["qemu-aarch64"])):
        found = [shutil.which(name) for name in names if shutil.which(name)]
        if found:
            report.ok(tool, found[0])
        else:
            report.fail(tool, "no {}".format(" or ".join(names)), tool)


def main():
    """Look, say, and exit 1 when the goal cannot be reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="the environment that make uses or makes")
    parser.add_argument(
        "--for", dest="goal", default="build", help="what is to be done: build, demo, test, test-arm, ..."
    )
    args = parser.parse_args()
    report = Report()
    print(f"doctor: {platform.system()} {platform.machine()} for `make {args.goal}`")
    check_python(report)
    check_venv(report, args.venv)
    check_build(report)
    check_tools(report, args.goal)
    check_room(report, args.venv, args.goal)
    command = mend(report.missing)
    if command:
        print("  mend all of it with:  " + command)
    elif report.missing:
        print(
            "  missing: {}; install them with this system's package manager".format(
                ", ".join(sorted(set(report.missing)))
            )
        )
    return 1 if report.fatal else 0


if __name__ == "__main__":
    sys.exit(main())
