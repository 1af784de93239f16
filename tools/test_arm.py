"""make test-arm: the C++ core cross-compiled for aarch64, and its stand-alone test under qemu-user."""

from __future__ import annotations

import platform
import shutil
import sys
import time

from native_test import ROOT, build, run

# The command, and the Debian or Ubuntu package that has it.
NEEDED = {"aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu", "qemu-aarch64": "qemu-user"}


def main() -> None:
    native = platform.machine().lower() in ("aarch64", "arm64")
    missing = [] if native else [package for command, package in NEEDED.items() if not shutil.which(command)]
    if missing:
        sys.exit(f"test-arm needs {' and '.join(missing)}: sudo apt-get install -y {' '.join(missing)}")
    start = time.time()
    compiler = ["g++" if native else "aarch64-linux-gnu-g++"]
    # static: qemu-user then needs no aarch64 system libraries. simt.h is no test of the processor, and slow to emulate.
    program = build(compiler, "aarch64", ROOT / "build" / "arm", ("-O2",), ("-O2",), ("-static",))
    print(f"built for aarch64 in {time.time() - start:.0f} s", flush=True)
    run([*([] if native else ["qemu-aarch64"]), program, "no-simt"])


if __name__ == "__main__":
    main()
