"""Run one long command of the Makefile: its output goes to a log, the terminal shows that it is alive.

    python3 tools/step.py [--limit SECONDS] LABEL LOG COMMAND...

On a failure the end of the log is printed. With --limit, a command that succeeds but takes longer counts as failed.
"""

import argparse
import os
import subprocess
import sys
import time


def last_line(path, width):
    """The last non-empty line of a log, cut to the terminal."""
    with open(path, errors="replace") as log:
        log.seek(max(0, os.path.getsize(path) - 2000))
        lines = [line.strip() for line in log.read().splitlines() if line.strip()]
    return lines[-1][: max(0, width)] if lines else ""


def watch(process, label, log, started):
    """Until the process ends: on a terminal one line a second, elsewhere one line each 20 s."""
    terminal = sys.stdout.isatty()
    said = time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = time.monotonic()
        if now - said < (1 if terminal else 20):
            continue
        said = now
        head = f"  {label} {now - started:.0f} s  "
        if terminal:
            columns = os.get_terminal_size().columns
            print("\r\033[K" + head + last_line(log, columns - len(head) - 1), end="", flush=True)
        else:
            print(head + last_line(log, 100), flush=True)
    if terminal:
        print("\r\033[K", end="")


def main():
    """Run, watch, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=float, help="seconds that the command may take")
    parser.add_argument("label")
    parser.add_argument("log")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    started = time.monotonic()
    with open(args.log, "w") as log:
        process = subprocess.Popen(args.command, stdout=log, stderr=subprocess.STDOUT)
    try:
        watch(process, args.label, args.log, started)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 130
    took = time.monotonic() - started
    if process.returncode:
        with open(args.log, errors="replace") as log:
            print("".join(log.readlines()[-40:]))
        print(f"{args.label}: failed after {took:.0f} s (exit {process.returncode}); the whole log: {args.log}")
        return 1
    print(f"  {args.label}: {took:.0f} s")
    if args.limit and took > args.limit:
        print(f"{args.label}: took {took:.0f} s, the limit is {args.limit:.0f} s")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
