"""The README's tables, from the files in bench/results/ and from nothing else.

    python -m bench.report [--check]

Each table lies between ``<!-- name -->`` and ``<!-- /name -->``. ``--check`` writes nothing, and exits 1 if a document
is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from bench import beside_report, outcome, rollouts_cases, rollouts_report, suite
from rlfast import backends

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "bench" / "results", ROOT / "README.md"
PLACES = ("x86-64 CPU", "ARM CPU", "NVIDIA GPU")
DEMO_RATIO = {"GRPO": 1.6, "DPO": 1.3}  # a whole step of `make demo` and of `make demo-dpo`, over stock TRL
# Where a backend's kernels have hardware to run on; elsewhere the cell is a dash.
HAS = {
    "reference": PLACES,
    "torch": PLACES,
    "cpu": PLACES[:2],
    "triton": (PLACES[0], PLACES[2]),
    "cuda": PLACES[2:],
}


def results() -> list[dict]:
    """Every result file, oldest first."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    return sorted(found, key=lambda result: result["date"])


def place(result: dict) -> str:
    """The column of the support matrix that a result belongs to."""
    machine = result["machine"]
    if "gpu" in machine:
        return PLACES[2]
    arm = re.search(r"aarch64|arm64", machine.get("system", ""))
    return PLACES[1] if arm else PLACES[0]


def stamp(result: dict) -> str:
    """Date and commit."""
    return f"{result['date'][:10]}, {result['commit']}{' + changes' if result.get('uncommitted') else ''}"


def support(found: list[dict]) -> list[str]:
    """The support matrix: op × backend, per kind of machine."""
    lines = ["| op | backend | " + " | ".join(PLACES) + " |", "|---|---|" + "---|" * len(PLACES)]
    for op, names in backends.IMPLEMENTED.items():
        for name in names:
            cells = [_cell(found, op, name, where) if where in HAS[name] else "–" for where in PLACES]
            lines.append(f"| `{op}` | {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(found: list[dict], op: str, backend: str, where: str) -> str:
    for result in reversed(found):
        cells = [c for c in result.get("verify", ()) if (c["op"], c["backend"]) == (op, backend)]
        cells = [c for c in cells if c["status"] != "not here"]
        if not cells or place(result) != where:
            continue
        failed = sorted({c["dtype"] for c in cells if c["status"] == "FAILED"})
        if failed:
            return f"**fails parity** ({', '.join(failed)}), {stamp(result)}"
        if all(c["status"] == "interpreted" for c in cells):
            return f"*interpreted*, {stamp(result)}"
        isas = list(dict.fromkeys(c.get("isa") for c in cells if c.get("isa")))
        at = f" ({', '.join(isas)})" if isas else ""
        return f"*run on {result['device'].split(',')[0]}*{at}, {stamp(result)}"
    if where == PLACES[2]:
        for result in reversed(found):
            if any(_compiles(kernel, op, backend) for kernel in result.get("kernels", ())):
                archs = sorted({k["arch"] for k in result["kernels"] if _compiles(k, op, backend)})
                return f"*compiled, never run* ({', '.join(f'sm_{a}' for a in archs)}), {stamp(result)}"
    return "*untested*" if where == PLACES[1] else "*not yet measured*"


def _compiles(kernel: dict, op: str, backend: str) -> bool:
    """Whether a row of ``make compile`` is a kernel of this op and backend."""
    name = kernel["kernel"]
    if backend == "cuda":
        return name == f"cuda/{op}.cu"
    return backend == "triton" and not name.startswith("cuda/") and kernel["variant"].startswith(f"{op}:")


def benches(found: list[dict]) -> list[dict]:
    """The latest full benchmark of each device."""
    latest = {result["device"]: result for result in found if result.get("cases") and not result.get("small")}
    return list(latest.values())


def demos(found: list[dict]) -> list[dict]:
    """The results of ``make demo`` and ``make demo-dpo``."""
    return [result for result in found if "parity" in result]


def _demo(result: dict) -> tuple[str, str]:
    """(the trainer, the command) of a result of the demo."""
    trainer = result.get("trainer", "GRPO")
    return trainer, "make demo" if trainer == "GRPO" else "make demo-dpo"


def figures(found: list[dict]) -> list[str]:
    """Per device and family of ops, case by case: ours, over the best plain torch first, then the others."""
    lines = []
    for result in benches(found):
        lines += [
            "",
            f"{result['device']}; {stamp(result)}; torch {result['versions']['torch']}; `{result['command']}`:",
        ]
        for family in suite.FAMILIES:
            cases = [case for case in result["cases"] if suite.family(case["case"]["op"]) is family]
            lines += ["", *_table(cases)] if cases else []
        overhead = result.get("overhead") or {}
        above = overhead.get("above_raw", {})
        said = ", ".join(
            f"{micros:.1f} µs {'under no_grad' if name == 'no_grad' else name + ' autograd'}"
            for name, micros in above.items()
        )
        lines += (
            ["", f"A public call on a tiny input ({overhead.get('stamp', stamp(result))}), above its kernel: {said}."]
            if above
            else []
        )
    for result in rollouts_report.measured(found):
        lines += ["", f"{result['device']}; {stamp(result)}; `{result['command']}`:", ""]
        lines += rollouts_report.figures(result)
    for result in demos(found):
        trainer, command = _demo(result)
        where = f"{result['machine']['cpu']}, {stamp(result)}"
        lines += ["", f"A whole {trainer} step of `{command}` ({where}): {result['ratio']:.2f}× stock TRL."]
    return lines[1:] or ["No benchmark has been committed yet: `make bench` writes one."]


def _table(cases: list[dict]) -> list[str]:
    others = {"plain": "best plain torch", "eager": "eager", "compile": "torch.compile"}
    for case in cases:
        others |= {name: outcome.NAMES.get(name, name) for name in outcome.peers(case["arms"])}
    head = ["case", "ms", *(f"× {name}" for name in others.values()), "of the ceiling", "extra MiB"]
    rows = [_figure(case, name, others) for case in cases for name in outcome.ours(case)]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]


def _figure(result: dict, name: str, others) -> str:
    case, arms, row = outcome.case_of(result), result["arms"], result["arms"][name]
    label = re.sub(rf"\b{case.op}\b", f"`{case.op}`", case.name, count=1)
    label += name.removeprefix("rlfast").replace(" ", ", ", 1)
    label += f" ({result['stamp']})" if "stamp" in result else ""
    cells = [f"{row['ms']:.4g}"]
    for over in others:
        other = outcome.rounds(case, arms, over, name)
        cells.append(f"{1 / outcome.ratio(row['rounds'], other):.2f}" if other else "")
    share, extra = outcome.ceiling_share(result, name), row.get("extra_bytes")
    cells += ["" if share is None else f"{share:.0%}", "" if extra is None else f"{extra / 2**20:.1f}"]
    return f"| {label} | " + " | ".join(cells) + " |"


def targets(found: list[dict]) -> list[str]:
    """What must be reached, and whether it is."""
    lines = []
    for result in benches(found):
        rows = [o for case in result["cases"] for o in outcome.outcomes(case)]
        met = sum(o.passed is True for o in rows)
        lines += [f"{result['device']}: {met} of {len(rows)} met; {sum(o.passed is None for o in rows)} not measured."]
        lines += ["", "| case | must reach | reached | |", "|---|---|---|---|"]
        for o in rows:
            state = "not measured" if o.passed is None else "met" if o.passed else "**missed**"
            lines.append(f"| {o.case} | {o.text} | {'' if o.value is None else f'{o.value:.3g}'} | {state} |")
        for name, micros in (result.get("overhead") or {}).get("above_raw", {}).items():
            bound = result["overhead"]["targets"][name]
            state = "met" if micros <= bound else "**missed**"
            case = f"public call on a tiny input, {name}"
            lines.append(f"| {case} | ≤ {bound:g} µs over the raw kernel | {micros:.1f} | {state} |")
        lines.append("")
    for result in rollouts_report.measured(found):
        lines += [f"On {result['device']}:", "", "| rollouts | must reach | reached | |", "|---|---|---|---|"]
        for name, text, value, passed in rollouts_report.outcomes(result):
            state = "not measured" if passed is None else "met" if passed else "**missed**"
            lines.append(f"| {name} | {text} | {'' if value is None else f'{value:.3g}'} | {state} |")
        lines.append("")
    for result in beside_report.measured(found):
        where = f"{result['device']}; {stamp(result)}; `{result['command']}`:"
        lines += [where, "", "| case | must reach | reached | |", "|---|---|---|---|"]
        lines += [
            f"| {x.case} | {x.text} | {x.value:.3g} | {'met' if x.passed else '**missed**'} |"
            for x in beside_report.outcomes(result)
        ]
        lines.append("")
    for result in demos(found):
        least = DEMO_RATIO[_demo(result)[0]]
        state = "met" if result["ratio"] >= least and not result["failures"] else "**missed**"
        lines += ["| case | must reach | reached | |", "|---|---|---|---|"]
        wanted = f"≥ {least}× stock TRL"
        lines += [f"| a whole {_demo(result)[0]} step, {stamp(result)} | {wanted} | {result['ratio']:.2f} | {state} |"]
    lines = lines or ["No benchmark has been committed yet: `make bench` writes one."]
    if all(place(result) != PLACES[2] for result in benches(found)):
        cases = [(case.name, outcome.text(case, t)) for case in suite.CASES for t in case.gpu_targets]
        lines += _on_gpu(cases)
    if all(place(result) != PLACES[2] for result in rollouts_report.measured(found)):
        settings = rollouts_cases.SETTINGS["cuda"]
        rows = [(s.name, rollouts_report.text(*target)) for s in settings for target in s.targets]
        lines += _on_gpu(rows)
    return lines


def _on_gpu(cases: list[tuple[str, str]]) -> list[str]:
    """The targets of a GPU, where none was there to measure them."""
    head = ["", "On a GPU, by `make bench-gpu`; no result of one has been committed:", ""]
    rows = [f"| {name} | {wanted} | not yet measured |" for name, wanted in cases]
    return [*head, "| case | must reach | reached |", "|---|---|---|", *rows]


def losses(found: list[dict]) -> list[str]:
    """Where we lose: whoever is faster than us, and every target that is missed."""
    lines = []
    for result in benches(found):
        for case in result["cases"]:
            said = [f"{ours} takes {x:.2f}× the time of {other}" for ours, other, x in outcome.faster_than_us(case)]
            said += [f"{o.text}, reached {o.value:.3g}" for o in outcome.outcomes(case) if o.passed is False]
            lines += [f"- {case['case']['name']}: {'; '.join(said)}."] if said else []
        for name, micros in (result.get("overhead") or {}).get("above_raw", {}).items():
            bound = result["overhead"]["targets"][name]
            if micros > bound:
                lines.append(f"- public call on a tiny input, {name}: wanted ≤ {bound:g} µs, reached {micros:.1f}.")
    for result in rollouts_report.measured(found):
        missed = [o for o in rollouts_report.outcomes(result) if o[3] is False]
        lines += [
            f"- rollouts, {name}, on {result['device']}: wanted {text}, reached {value:.3g}."
            for name, text, value, _ in missed
        ]
    for result in beside_report.measured(found):
        missed = [x for x in beside_report.outcomes(result) if not x.passed]
        lines += [f"- {x.case}, {result['command']}: wanted {x.text}, reached {x.value:.3g}." for x in missed]
    for result in demos(found):
        least = DEMO_RATIO[_demo(result)[0]]
        if result["ratio"] < least:
            lines.append(
                f"- a whole {_demo(result)[0]} step: wanted ≥ {least}× stock TRL, reached {result['ratio']:.2f}."
            )
    if lines:
        return lines
    return (
        ["Nothing yet: no benchmark has been committed."] if not benches(found) else ["Nowhere in the cases measured."]
    )


SECTIONS = {"support": support, "figures": figures, "targets": targets, "losses": losses}


def fill(text: str, found: list[dict]) -> str:
    """The text with every marked section written anew."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = "\n".join(section(found)).strip("\n")
        text = pattern.sub(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
    return text


def documents() -> list[Path]:
    """Files that have generated sections."""
    return [README, ROOT / "docs" / "benchmarks.md"]


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    found, stale = results(), []
    for path in documents():
        before = path.read_text(encoding="utf-8")
        after = fill(before, found)
        if after != before:
            stale.append(path.name)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    print(f"{', '.join(stale)}: {'stale, run `make docs`' if args.check else 'written'}" if stale else "up to date")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
