"""The rollout engine beside transformers' own generation and llama.cpp; on a GPU beside vLLM and nano-vllm.

    python -m bench.rollouts [--device cpu|cuda] [--case WORD] [--json PATH]

Whole calls, prompts included, in one interleaved loop: tokens a second and their ratios. Then where the engine's decode
steps spend their time, and the least that the hardware could take for them:

    roofline of a step   max((weights + keys and values) ÷ read bandwidth, FLOP ÷ the best GEMM's rate)
    of a call            that of its decode steps, and its prompts' FLOP at the GEMM's rate
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from bench import arms, gemms, measure, report
from bench.rollouts_cases import SETTINGS, Setting, build, engine_of, load, prompts_of
from bench.rollouts_report import OURS, PARTS
from bench.run import RESULTS, label, machine, slug, stamp
from rlfast import rollout
from rlfast import sampling as head_and_sampler
from rlfast.rollout import attention, linears, sampling

ROUNDS = {"cpu": 5, "cuda": 3}
AGREE = 16  # greedy tokens that every arm must share with ``generate``, in float32
METHOD = (
    "Every arm generates the same number of tokens at temperature 1 with no end of sequence; rlfast with log-probs and "
    "entropy, the others without. All arms run in one interleaved loop, rotated. Times are medians, ratios medians "
    "over rounds. The split is of decode steps with clocks around the parts, in calls of their own."
)


# Who is called for a part of a step. On a GPU a forward is one graph.
PLACES = {
    "cpu": {
        "linears": (linears, "linear"),
        "head": (head_and_sampler, "head_logits"),
        "attention": (attention.Paged, "attend"),
        "sampler": (sampling, "draw"),  # and the head, which it calls
    },
    "cuda": {"forward": (rollout.Engine, "forward"), "head and sampler": (sampling, "draw")},
}


def synchronize(device: str) -> None:
    """Wait for what was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def clocks(device: str):
    """{part: seconds} of what runs within it."""
    spent, places = defaultdict(float), PLACES[device]
    before = {part: getattr(*place) for part, place in places.items()}

    def timed(part, function):
        def run(*args, **kwargs):
            started = time.perf_counter()
            try:
                found = function(*args, **kwargs)
                synchronize(device)
                return found
            finally:
                spent[part] += time.perf_counter() - started

        return run

    try:
        for part, (owner, name) in places.items():
            setattr(owner, name, timed(part, before[part]))
        yield spent
    finally:
        for part, (owner, name) in places.items():
            setattr(owner, name, before[part])


def split(setting: Setting, engine, prompts, device: str) -> dict:
    """Milliseconds of a decode step by part: the medians over some calls."""
    params = rollout.SamplingParams(n=setting.samples, max_tokens=setting.new, ignore_eos=True, seed=1)
    calls = []
    for _ in range(3):
        engine.submit(rollout.calls.requested(prompts, params))
        while any(not s.tokens for samples in engine.live.values() for s in samples):
            engine.step()  # the prompts
        with clocks(device) as spent:
            started, steps = time.perf_counter(), 0
            while engine.live:
                engine.step()
                steps += 1
            whole = time.perf_counter() - started
        if "head" in spent:
            spent["sampler"] -= spent["head"]
        spent[PARTS[device][-1]] = whole - sum(spent.values())
        calls.append({"step": whole, **spent, "steps": steps})
    steps = calls[0].pop("steps")
    return {"steps": steps} | {part: statistics.median(c[part] for c in calls) / steps * 1e3 for part in calls[0]}


def floor(setting: Setting, engine, bandwidth: float, rate: float) -> dict:
    """Milliseconds: the roofline of a decode step (the mean over the steps) and of a call."""
    decoder = engine.decoder
    body = sum(m.weight.numel() for m in decoder.linears)
    head = decoder.head.module.weight.numel()
    itemsize = decoder.head.module.weight.element_size()
    arithmetic = 2.0 * setting.rows * (body + head) / rate
    times = []
    for step in range(1, setting.new):
        positions = setting.prompts * setting.length + setting.rows * step  # of shared prompts once
        data = (body + head) * itemsize + positions * decoder.bytes_of_token
        times.append(max(data / bandwidth, arithmetic))
    prefill = 2.0 * setting.prompts * (setting.length * body + head) / rate
    return {"step": 1e3 * statistics.mean(times), "call": 1e3 * (sum(times) + prefill)}


def ceilings(engine) -> dict:
    """{name: (function, amount)}: reading the head's bytes, and the best GEMM of a prompt's rows with it."""
    weight = engine.decoder.head.module.weight.detach()
    rows = 512 if weight.device.type == "cpu" else 4096
    hidden = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    _, gemm = gemms.best(hidden, weight)["forward"]
    return {
        "read": (arms.bandwidth(weight)["read"], weight.numel() * weight.element_size()),
        "gemm": (gemm, 2.0 * hidden.shape[0] * weight.numel()),
    }


def agreement(setting: Setting, todo: dict, prompts, say) -> dict[str, float]:
    """The share of the prompts whose first greedy tokens are those of ``generate``."""
    first = {}
    for name, run in todo.items():
        say(f"checking {name}")
        first[name] = run(prompts, 1, AGREE, greedy=True)
    truth = first["generate"]
    return {
        name: None if got is None else sum(map(list.__eq__, got, truth)) / len(truth) for name, got in first.items()
    }


def run_setting(setting: Setting, scratch: Path, say, device: str = "cpu") -> dict:
    """Everything about one workload."""
    model, tokenizer = load(setting, device)
    engine, prompts = engine_of(setting, model, tokenizer), prompts_of(setting, tokenizer)
    todo, failures = build(setting, model, engine, scratch, device)
    agree = agreement(setting, todo, prompts, say)
    if setting.dtype == "float32" and agree[OURS] < 1.0:
        raise RuntimeError(f"greedy tokens differ from generate's in {1 - agree[OURS]:.0%} of the prompts")
    with torch.no_grad():
        above = ceilings(engine)
        timed = {name: lambda run=run: run(prompts, setting.samples, setting.new) for name, run in todo.items()}
        samples = defaultdict(list)
        for round_ in range(ROUNDS[device]):
            names = [*timed][round_ % len(timed) :] + [*timed][: round_ % len(timed)]
            for name in names:
                say(f"round {round_ + 1}: {name}")
                started = time.perf_counter()
                timed[name]()
                synchronize(device)
                samples[name].append(time.perf_counter() - started)
                for ceiling, (function, _) in above.items():
                    samples[ceiling] += [measure._sample(function, device) for _ in range(3)]
        parts = split(setting, engine, prompts, device)
    rates = {name: amount / statistics.median(samples.pop(name)) for name, (_, amount) in above.items()}
    rows = {name: measure.summary(s) for name, s in samples.items()}
    for name, row in rows.items():
        row |= {"tokens_s": setting.rows * setting.new / row["ms"] * 1e3, "agree": agree[name]}
    least = floor(setting, engine, rates["read"], rates["gemm"])
    ratio = {
        name: statistics.median(b / a for a, b in zip(rows[OURS]["rounds"], row["rounds"], strict=True))
        for name, row in rows.items()
        if name != OURS
    }
    shares = {"roofline": least["call"] / rows[OURS]["ms"]}
    if device == "cpu":
        busy = parts["linears"] + parts["head"] + parts["sampler"]
        shares["linears and sampler"] = least["step"] / busy
    gc.collect()
    return {
        "name": setting.name, "setting": asdict(setting), "arms": rows, "failures": failures, "split_ms": parts,
        "roofline_ms": least, "gb_s": rates["read"] / 1e9, "gflop_s": rates["gemm"] / 1e9, "ratio": ratio,
        "share": shares,
    }  # fmt: skip


def main() -> int:
    """The command line."""
    import platformdirs

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=tuple(SETTINGS), default="cpu")
    parser.add_argument("--case", help="workloads whose name contains this")
    parser.add_argument("--json", type=Path, help="by default bench/results/rollouts.json, of a GPU rollouts-GPU.json")
    args = parser.parse_args()
    device = args.device
    here = f"rollouts-{slug(machine(device))}.json" if device == "cuda" else "rollouts.json"
    path = args.json or RESULTS / here
    chosen = [s for s in SETTINGS[device] if not args.case or args.case in s.name]
    command = "python -m bench.rollouts" + (" --device cuda" if device == "cuda" else "")
    result = stamp(device, command) | {"method": METHOD, "rollouts": _others(path, chosen, device)}
    started = time.perf_counter()
    for setting in chosen:
        scratch = Path(platformdirs.user_cache_dir("rlfast", appauthor=False))
        found = run_setting(setting, scratch, lambda text, s=setting: _say(started, f"{s.name}: {text}"), device)
        result["rollouts"].append(found | {"stamp": report.stamp(result)})
        print(json.dumps({k: found[k] for k in ("ratio", "share", "split_ms", "roofline_ms")}, indent=1))
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0 if chosen else 1


def _others(path: Path, chosen: list[Setting], device: str) -> list[dict]:
    """What an earlier run on such a machine has measured of other workloads; each has its own stamp."""
    if not path.exists():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    names = {setting.name for setting in chosen}
    same = before["device"] == label(machine(device))
    return [row for row in before["rollouts"] if same and row["name"] not in names]


def _say(started: float, text: str) -> None:
    print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
