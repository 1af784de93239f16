"""Peak extra memory of one arm: what it needs above its inputs, its outputs and the gradients it returns.

    python -m bench.memory CASE ARM [--small]

On a CPU: the high-water mark of the resident set (VmHWM, reset through /proc/self/clear_refs) in a process of its
own, in which the allocator hands every block above 64 KiB straight back to the system. The libraries are started by a
small case first; the arm's first full-size call is the one that is measured, so that scratch it holds on to is
counted. On a GPU: torch's own peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch

from bench import arms, suite
from bench.case import Case

# mallopt parameters, by their glibc names: no block above 64 KiB stays in a free list, and no such list is trimmed late
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


def _return_memory_at_once() -> None:
    import ctypes

    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    libc.mallopt(_M_TRIM_THRESHOLD, 0)


def _status(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field + ":"))


def available() -> bool:
    """Whether this system can reset the high-water mark."""
    try:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")
    except OSError:
        return False
    return True


def extra(case: Case, name: str, device: str) -> int:
    """Bytes above inputs and results at the peak of one call."""
    tiny = case.small()
    arms.build(tiny, tiny.inputs(device), device)[name]()
    data = case.inputs(device)
    run = arms.build(case, data, device)[name]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = _status("VmRSS")
        if not available():
            raise OSError("memory: /proc/self/clear_refs cannot be written: this system does not say its peak")
        results = run()
        peak = _status("VmHWM") - before
    returned = sum(x.numel() * x.element_size() for x in results.values())
    return max(0, peak - returned)


def measure(case: Case, name: str, device: str, small: bool) -> int | None:
    """``extra`` in a process of its own; None where the system cannot say."""
    command = [
        sys.executable,
        "-m",
        "bench.memory",
        case.name,
        name,
        "--device",
        device,
        *(["--small"] if small else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        print(f"  memory of {name}: not measured ({said[-1]})")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure one arm and print its bytes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("arm")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if args.device == "cpu":
        _return_memory_at_once()
    case = next(c for c in suite.CASES if c.name == args.case)
    print(json.dumps(extra(case.small() if args.small else case, args.arm, args.device)))


if __name__ == "__main__":
    main()
