"""Run the cases of ``bench/suite.py`` on this machine and write ``bench/results/<device>.json``.

python -m bench.run [--op OP] [--case WORD] [--small] [--device cuda] [--json PATH | --update] [--lower-isas]
                    [--no-memory]
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import rlfast
from bench import arms, measure, memory, overhead, report, suite
from bench.case import Case
from bench.show import print_case
from rlfast import backends
from rlfast import verify as verification

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parent.parent
LOWER = (" avx2", " baseline")
METHOD = (
    "Every arm is checked against float64 on sampled rows; then all arms run in one interleaved loop, rotated. "
    "A call below 1 ms is repeated within its sample. Times are medians, spread is the interquartile range ÷ the "
    "median, ratios are medians over rounds. "
    "Extra memory is the peak above inputs, outputs and returned gradients (bench/memory.py)."
)


def machine(device: str) -> dict:
    """What the figures depend on; no host name and no path."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        model = fields.get("model name", model)
        if "cpu family" in fields:
            model += f" (family {fields['cpu family']} model {fields['model']})"
    found = {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "isa": backends.isa(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": f"sm_{major}{minor}"}
    return found


def label(found: dict) -> str:
    """The device in words."""
    return found.get("gpu") or f"{found['cpu'].split(' (')[0]}, {found['threads']} threads, {found['isa']}"


def slug(found: dict) -> str:
    """The device as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", label(found).lower()).strip("-")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def stamp(device: str, command: str) -> dict:
    """Where, when, and of what commit a result is."""
    found = machine(device)
    return {
        "device": label(found),
        "machine": found,
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") or "unknown",
        "uncommitted": bool(_git("status", "--porcelain", "--", "rlfast", "kernels", "csrc")),
        "versions": {"rlfast": rlfast.__version__, "python": platform.python_version(), "torch": torch.__version__},
        "command": command,
        "method": METHOD,
    }


def lower_isas(case: Case, say) -> dict:
    """The arms that the targets of a lower instruction set name, of a case that leaves them out of its loop."""
    named = {name for t in case.targets if t.arm.endswith(LOWER) for name in (t.arm, t.over)}
    named |= {name.removesuffix("avx2") + "baseline" for name in named}
    case = replace(case, isas=True, budget_s=3.5 * case.budget_s)
    data = case.inputs()
    todo = {name: run for name, run in arms.build(case, data).items() if name in named}
    errors, failures = measure.checked(todo, case.truth(data), case.gate, say)
    if "compile" in errors:
        todo["compile"]()  # the first call compiled; the second settles its guards
    times = measure.interleaved({n: f for n, f in todo.items() if n not in failures}, case.budget_s, say=say)
    return {"arms": {n: measure.summary(s) | {"error": errors[n]} for n, s in times.items()}, "failures": failures}


def run_case(case: Case, device: str, small: bool, with_memory: bool, say) -> dict:
    """Everything about one case: times, errors, ceilings, extra memory."""
    torch.compiler.reset()  # else the ninth function of one source text is not compiled any more
    data = case.inputs(device)
    todo = arms.build(case, data, device)
    errors, failures = measure.checked(todo, case.truth(data), case.gate, say)
    say("ceilings")
    ceilings = case.ceilings(data, device)
    timed = {name: run for name, run in todo.items() if name not in failures} | ceilings
    if "compile" in timed:
        timed["compile"]()  # the first call compiled; the second settles its guards
    times = measure.interleaved(timed, case.budget_s, device, say)
    rows = {}
    for name, samples in times.items():
        rows[name] = measure.summary(samples) | ({"error": errors[name]} if name in errors else {})
        for rate, amount in (("gb_s", case.traffic(name)), ("gflop_s", case.flops(name))):
            if amount:
                rows[name][rate] = amount / rows[name]["ms"] / 1e6
    del data, todo, timed, ceilings
    if with_memory:
        for name in rows:
            if name in errors and _memory_matters(case, name):
                say(f"extra memory of {name}")
                rows[name]["extra_bytes"] = memory.measure(case, name, device, small)
    return {"case": asdict(case), "arms": rows, "failures": failures}


def _memory_matters(case: Case, name: str) -> bool:
    """Not the forced instruction sets, which allocate alike; of a minute-long case only ours."""
    if name.endswith((" avx2", " baseline")) or "compile" in name:
        return False
    return name.startswith("rlfast") or case.budget_s < 100


def run(ops=None, cases=None, small=False, device="cpu", json_path=None, with_memory=True, update=False) -> int:
    """Run, print, write. Returns the exit status.

    ``update`` puts the chosen cases in the place of those in this device's own file, each with its own stamp.
    """
    chosen = [case for case in suite.selected(ops, cases) if device == "cuda" or not case.gpu_only]
    if not chosen:
        print(f"bench: no case matches; there are: {', '.join(c.name for c in suite.CASES)}", file=sys.stderr)
        return 1
    command = (
        "python -m bench.run"
        + "".join(f" --op {op}" for op in ops or ())
        + "".join(f" --case {c!r}" for c in cases or ())
    )
    command += " --small" * small + (f" --device {device}" if device != "cpu" else "")
    result = stamp(device, command) | {"small": small, "cases": []}
    whole = not (ops or cases)
    own = RESULTS / f"{slug(result['machine'])}.json"
    path = Path(json_path) if json_path else own if whole and not small else None
    started = time.perf_counter()
    if device == "cpu" and (whole or update):  # first: torch.compile and large buffers leave a slower process behind
        result["overhead"] = overhead.measure()
        print("overhead:", result["overhead"])
    for number, case in enumerate(chosen, 1):
        if device == "cuda":
            case = replace(case, targets=case.gpu_targets)
        case = case.small() if small else case
        say = _progress(f"[{number}/{len(chosen)}] {case.name}", started)
        with_peak = with_memory and (device == "cuda" or memory.available())
        measured = run_case(case, device, small, with_peak, say)
        print_case(measured)
        result["cases"].append(measured)
        _write(path, result)
        if update:
            _write(own, updated(own, measured, result))
    if whole:
        result["verify"] = [cell._asdict() for cell in verification.verify(every_isa=True)]
        _write(path, result)
    print(f"{f'wrote {path.name} in ' if path else ''}{time.perf_counter() - started:.0f} s")
    return 0


def run_lower_isas(ops=None, cases=None) -> int:
    """The lower instruction sets of the cases that leave them out, into this device's own file. The exit status."""
    chosen = [c for c in suite.selected(ops, cases) if not c.isas and any(t.arm.endswith(LOWER) for t in c.targets)]
    now = stamp("cpu", "")
    own, started = RESULTS / f"{slug(now['machine'])}.json", time.perf_counter()
    for number, case in enumerate(chosen, 1):
        measured = lower_isas(case, _progress(f"[{number}/{len(chosen)}] {case.name}", started))
        print_case({"case": asdict(case)} | measured)
        result = json.loads(own.read_text(encoding="utf-8"))
        (place,) = [c for c in result["cases"] if c["case"]["name"] == case.name]
        place["lower"] = measured | {"stamp": report.stamp(now)}
        _write(own, result)
    return 0 if chosen else 1


def updated(path: Path, measured: dict, now: dict) -> dict:
    """The file's result with one case in the place of the one of its name, or after the others.

    What was measured of its lower instruction sets, in a loop of their own, stays.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    by_name = {c["case"]["name"]: c for c in result["cases"]}
    name = measured["case"]["name"]
    kept = {"lower": by_name[name]["lower"]} if "lower" in by_name.get(name, {}) else {}
    result["overhead"] = now["overhead"] | {"stamp": report.stamp(now)} if now.get("overhead") else None
    by_name[name] = measured | {"stamp": report.stamp(now)} | kept
    result["cases"] = list(by_name.values())
    return result


def _write(path: Path | None, result: dict) -> None:
    """After every case: a run that is cut off has measured what it measured."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _progress(head: str, started: float):
    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {head}: {text}", flush=True)

    return say


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append")
    parser.add_argument("--case", action="append", help="cases whose name contains this")
    parser.add_argument("--small", action="store_true", help="small shapes: a minute, and no figure to quote")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="where to write; a whole run goes to bench/results/ by itself")
    parser.add_argument(
        "--lower-isas",
        action="store_true",
        help="only the lower instruction sets of the largest cases, in a loop of their own (minutes)",
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--update", action="store_true", help="replace these cases in the file of this device")
    args = parser.parse_args()
    if args.lower_isas:
        return run_lower_isas(args.op, args.case)
    options = (args.small, args.device, args.json, not args.no_memory, args.update)
    return run(args.op, args.case, *options)


if __name__ == "__main__":
    sys.exit(main())
